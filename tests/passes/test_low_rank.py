"""The low-rank pass on a whole model, and through to ONNX."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported, UsageError
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.passes import pass_for
from tightship.passes.base import Run
from tightship.passes.low_rank import LowRank
from tightship.weights import Dense, Factored

EMBER = Path(__file__).parents[2] / "examples" / "ember"
TEXT = "The old ship lay at anchor in the bay, and nobody on the shore could say whence she had come. " * 40


@pytest.fixture(scope="module")
def ember() -> Checkpoint:
    return open_checkpoint(EMBER)


def run_with(figures: dict[str, Mapping[str, Any]] | None = None) -> Run:
    report = ({} if figures is None else figures).__setitem__
    return Run(threads=1, texts=(TEXT,), tokens=768, sequence=128, report=report)


@pytest.mark.parametrize("method", ["svd", "asvd", "svd-llm", "fisher"])
def test_every_linear_becomes_factors_of_the_rank(ember: Checkpoint, method: str) -> None:
    figures: dict[str, Mapping[str, Any]] = {}
    result = LowRank(method=method, rank=48, dtype="f32").apply(ember, run_with(figures))
    for info in ember.linears():
        weight = result.weights[info.name]
        assert isinstance(weight, Factored)
        assert weight.rank == 48
        assert figures[info.name]["parameters"] == 48 * sum(info.shape)
        assert weight.nbytes == 4 * 48 * sum(info.shape)
    assert np.isfinite(ModelView(result, threads=1).outputs(np.arange(16)[None])["logits"]).all()


def test_plain_factors_are_the_best_of_their_rank(ember: Checkpoint) -> None:
    result = LowRank(rank=40, dtype="f32").apply(ember, run_with())
    name = ember.linears()[0].name
    w = ember.weights[name].value().astype(np.float64)
    tail = np.linalg.svd(w, compute_uv=False)[40:]
    assert np.square(w - result.weights[name].value()).sum() == pytest.approx(np.square(tail).sum(), rel=1e-5)


def test_energy_keeps_what_it_says_and_large_ranks_stay_dense(ember: Checkpoint) -> None:
    figures: dict[str, Mapping[str, Any]] = {}
    result = LowRank(energy=0.5).apply(ember, run_with(figures))
    assert all(figure["loss"] <= 0.5 for figure in figures.values())
    whole = LowRank(energy=1.0).apply(ember, run_with(figures))
    assert all(whole.weights[info.name] is ember.weights[info.name] for info in ember.linears())
    assert all(figure["kept_dense"] == 1 for figure in figures.values())
    assert any(isinstance(result.weights[info.name], Factored) for info in ember.linears())


def test_a_share_of_each_matrix_is_kept(ember: Checkpoint) -> None:
    step = LowRank(keep=0.6)
    outline, result = step.outline(ember), step.apply(ember, run_with())
    for info in ember.linears():
        elements = result.weights[info.name].nbytes // 2
        assert 0.6 * np.prod(info.shape) - sum(info.shape) < elements <= 0.6 * np.prod(info.shape)
        assert outline.weights[info.name].nbytes == result.weights[info.name].nbytes


@pytest.mark.parametrize("options", [{"keep": 0.6}, {"energy": 0.3}, {"rank": 40}])
def test_ranks_are_whole_multiples(ember: Checkpoint, options: dict[str, float]) -> None:
    step = LowRank(multiple=32, **options)  # type: ignore[arg-type]
    outline, result = step.outline(ember), step.apply(ember, run_with())
    ranks = {w.rank for w in result.weights.values() if isinstance(w, Factored)}
    assert ranks
    assert all(rank % 32 == 0 for rank in ranks)
    if "energy" not in options:
        assert all(outline.weights[i.name].nbytes == result.weights[i.name].nbytes for i in ember.linears())
    if "rank" in options:
        assert ranks == {32}


@pytest.mark.parametrize("method", ["svd", "svd-llm"])
def test_byte_budget_is_kept(ember: Checkpoint, method: str) -> None:
    budget = sum(ember.weights[info.name].nbytes for info in ember.linears()) // 3
    result = LowRank(method=method, bytes=budget).apply(ember, run_with())
    spent = sum(result.weights[info.name].nbytes for info in ember.linears())
    dearest = max(2 * sum(info.shape) for info in ember.linears())
    assert budget - dearest < spent <= budget


@pytest.mark.parametrize("method", ["svd", "svd-llm"])
def test_ranks_by_loss_keep_the_share_of_all(ember: Checkpoint, tmp_path: Path, method: str) -> None:
    figures: dict[str, Mapping[str, Any]] = {}
    step = LowRank(method=method, keep=0.6, by="loss", multiple=8, dtype="f32")
    run = dataclasses.replace(run_with(figures), scratch=tmp_path)
    result = step.apply(ember, run)
    kept = sum(int(figures[info.name]["parameters"]) for info in ember.linears())
    whole = sum(int(np.prod(info.shape)) for info in ember.linears())
    assert 0.6 * whole - 8 * 1024 < kept <= 0.6 * whole
    for info in ember.linears():
        assert figures[info.name]["rank"] == figures[f"{info.name} (rank)"]["rank"]
        assert figures[f"{info.name} (rank)"]["divergence"] > 0
    assert len({figures[info.name]["rank"] for info in ember.linears()}) > 3
    again = step.apply(ember, run_with())  # nothing kept
    for info in ember.linears():
        assert np.array_equal(again.weights[info.name].value(), result.weights[info.name].value())


def test_merged_factors_are_a_matrix_of_the_rank(ember: Checkpoint) -> None:
    result = LowRank(rank=16, merge=True, dtype="f32").apply(ember, run_with())
    weight = result.weights[ember.linears()[0].name]
    assert isinstance(weight, Dense)
    assert np.linalg.matrix_rank(weight.value(), tol=1e-4) == 16


def test_outline_has_the_shapes_of_the_result(ember: Checkpoint) -> None:
    step = LowRank(rank=48)
    outline, result = step.outline(ember), step.apply(ember, run_with())
    for info in ember.linears():
        assert outline.weights[info.name].nbytes == result.weights[info.name].nbytes


def test_options_are_checked(ember: Checkpoint) -> None:
    for options in (
        {},
        {"rank": 4, "energy": 0.5},
        {"rank": 0},
        {"energy": 1.5},
        {"rank": 4, "dtype": "i8"},
        {"rank": 4, "by": "loss"},
    ):
        with pytest.raises(UsageError):
            pass_for("low-rank", options)
    with pytest.raises(Unsupported, match="rank 1 everywhere"):
        LowRank(bytes=10).requires(ember)
    with pytest.raises(Unsupported, match="rank 64 everywhere"):
        LowRank(keep=0.1, by="loss", multiple=64).requires(ember)
