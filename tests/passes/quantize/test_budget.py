"""A budget of bytes: the choice against trying everything, the bytes against the file."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported, UsageError
from tightship.exporters.to_gguf import GgufExporter
from tightship.opening import open_checkpoint
from tightship.passes.allocation import Choice, allocate
from tightship.passes.base import Run
from tightship.passes.quantize import Quantize
from tightship.recipe import Recipe
from tightship.stages import for_container, scheme_stage
from tightship.target import Target
from tightship.weights import Quantized

EMBER = Path(__file__).parents[3] / "examples" / "ember"
TEXT = "The old ship lay at anchor in the bay, and nobody on the shore could say whence she had come. " * 10


@pytest.fixture(scope="module")
def ember() -> Checkpoint:
    return open_checkpoint(EMBER)


def run_with(figures: dict[str, Any], **changes: Any) -> Run:
    return Run(threads=1, texts=(TEXT,), tokens=128, sequence=64, report=figures.__setitem__, **changes)


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    choices = {
        f"w{i}": [
            Choice(str(k), int(size), float(harm))
            for k, (size, harm) in enumerate(
                zip(np.cumsum(rng.integers(1, 9, 4)), -np.sort(-rng.random(4)), strict=True)
            )
        ]
        for i in range(5)
    }
    budget = 55
    fitting = [c for c in itertools.product(*choices.values()) if sum(x.size for x in c) <= budget]
    best = min(sum(x.harm for x in c) for c in fitting)
    found = allocate(choices, budget)
    assert sum(c.size for c in found.values()) <= budget
    assert sum(c.harm for c in found.values()) == pytest.approx(best)


def test_too_small_a_budget_says_what_it_takes() -> None:
    with pytest.raises(UsageError, match="smallest candidates take, 7 bytes"):
        allocate({"w": [Choice("a", 7, 1.0)]}, 6)


def test_the_same_bytes_are_spent_better(ember: Checkpoint, tmp_path: Path) -> None:
    target = Target("gguf", "q4_k_s", {"bytes": "same", "sensitivity": "fisher"})
    exporter = GgufExporter()
    stage = scheme_stage(ember, target, exporter, Recipe())
    assert stage is not None
    assert stage.work.needs == "calibration"
    figures: dict[str, Any] = {}
    mixed = stage.work.apply(ember, run_with(figures, scratch=tmp_path))
    again = stage.work.apply(ember, run_with({}, scratch=tmp_path))  # from what was kept
    plain = scheme_stage(ember, Target("gguf", "q4_k_s"), exporter, Recipe())
    assert plain is not None
    uniform = plain.work.apply(ember, run_with({}))
    targets = (for_container(target, Recipe()), Target("gguf", "q4_k_s"))
    sizes = [exporter.plan(c, t).file_bytes for c, t in zip((mixed, uniform), targets, strict=True)]
    assert 0.99 * sizes[1] < sizes[0] <= sizes[1]
    chosen = {name: w.layout.name for name, w in mixed.weights.items() if isinstance(w, Quantized)}
    assert {n: w.layout.name for n, w in again.weights.items() if isinstance(w, Quantized)} == chosen
    assert len({chosen[info.name] for info in ember.linears()}) > 1
    for info in ember.linears():
        found = figures[f"{info.name} (bytes)"]
        assert found["layout"] == chosen[info.name]
        assert found.get("harm_if_larger", 0) <= found["harm"] <= found.get("harm_if_smaller", np.inf)


def test_what_is_loaded_as_one_gets_one_type(ember: Checkpoint) -> None:
    spec = Quantize(layout="int4", bytes="same", container="safetensors", sensitivity="fisher")
    result = spec.apply(ember, run_with({}))
    for block in range(2):
        layouts = {i.rule.role: result.weights[i.name].layout for i in ember.linears() if i.block == block}  # type: ignore[union-attr]
        assert layouts["attn_q"] == layouts["attn_k"] == layouts["attn_v"]
        assert layouts["ffn_gate"] == layouts["ffn_up"]


def test_ablation_and_fisher_agree_on_the_order_of_sizes(ember: Checkpoint) -> None:
    figures: dict[str, Any] = {}
    Quantize(bytes=800_000, candidates=("q2_k", "q6_k")).apply(ember, run_with(figures))
    told = [found for name, found in figures.items() if name.endswith("(bytes)")]
    assert len(told) == len(ember.linears())
    assert all(found["harm"] > 0 for found in told)


def test_a_container_without_the_types_is_refused(ember: Checkpoint) -> None:
    with pytest.raises(Unsupported, match="in safetensors"):
        Quantize(bytes=10_000_000, container="safetensors", candidates=("q4_k",)).requires(ember)
    with pytest.raises(UsageError, match="no candidate fits"):
        Quantize(bytes=1000).requires(ember)
