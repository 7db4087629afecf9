"""Calibrated solvers on whole models; losses are measured again by hooks in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tightship.addresses import skeleton
from tightship.checkpoint import Checkpoint
from tightship.errors import UsageError
from tightship.formats.layouts import parse_layout
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.passes.base import Run
from tightship.passes.calibration import Unreached, calibration_windows
from tightship.passes.hessian import NotPositive, corrected
from tightship.passes.quantize import Quantize
from tightship.weights import Dense, Factored, Quantized, Sum

torch = pytest.importorskip("torch")

EMBER = Path(__file__).parents[3] / "examples" / "ember"
TEXT = "The old ship lay at anchor in the bay, and nobody on the shore could say whence she had come. " * 40
Figures = dict[str, Mapping[str, Any]]


@pytest.fixture(scope="module")
def ember() -> Checkpoint:
    return open_checkpoint(EMBER)


def run_with(figures: Figures, **changes: Any) -> Run:
    settings = {"threads": 1, "texts": (TEXT,), "tokens": 1024, "sequence": 128}
    return Run(**{**settings, "report": figures.__setitem__, **changes})


def inputs(checkpoint: Checkpoint, windows: np.ndarray, **more: Any) -> dict[str, np.ndarray]:
    """(tokens, in) float64 of every linear, from hooks on the whole model, which is given `more` beside ids."""
    module = ModelView(checkpoint, threads=1).module()
    seen: dict[str, np.ndarray] = {}
    for name, place in skeleton(checkpoint)[1].items():
        owner = module.get_submodule(place.parameter.rpartition(".")[0])
        owner.register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].reshape(-1, args[0].shape[-1]).double().numpy())
        )
    with torch.no_grad():
        module(torch.from_numpy(windows), **more)
    return seen


@pytest.mark.parametrize("solver", ["importance", "gptq"])
def test_reported_losses_are_those_of_the_outputs(ember: Checkpoint, solver: str) -> None:
    figures: Figures = {}
    run = run_with(figures)
    windows = np.stack(calibration_windows(ember, run))
    options = {"actorder": False} if solver == "gptq" else {}
    result = Quantize(solver=solver, layout="int3-asym", **options).apply(ember, run)
    for block in (0, 1):
        before = {i.name: result.weights[i.name] for i in ember.linears() if i.block < block}
        seen = inputs(ember.with_weights(before), windows)
        for info in ember.linears():
            if info.block != block:
                continue
            w, q = (c.weights[info.name].value().astype(np.float64) for c in (ember, result))
            x = seen[info.name]
            assert figures[info.name]["tokens"] == len(x)
            if solver == "gptq":
                expected = ((x @ (q - w).T) ** 2).sum() / ((x @ w.T) ** 2).sum()
            else:
                expected = ((q - w) ** 2 @ (x**2).mean(axis=0)).sum() / (w**2 @ (x**2).mean(axis=0)).sum()
            assert figures[info.name]["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("layout", ["int2-asym", "q4_k"])
def test_error_feedback_beats_rounding_on_every_matrix(ember: Checkpoint, layout: str) -> None:
    figures: Figures = {}
    Quantize(solver="gptq", layout=layout).apply(ember, run_with(figures))
    assert set(figures) == {info.name for info in ember.linears()}
    for name, found in figures.items():
        assert str(found["solver"]).startswith("gptq"), name
        assert found["loss"] < found["loss_importance"], name
        assert found["loss"] < found["loss_rtn"], name


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "bert", "phi3", "falcon"])
def test_families_with_experts_turned_or_fused_matrices_can_be_solved(
    family: str, tiny: Callable[[str], Checkpoint]
) -> None:
    checkpoint = tiny(family)
    figures: Figures = {}
    windows = np.random.default_rng(0).integers(0, 96, (8, 32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tightship.passes.calibration.calibration_windows", lambda *_: list(windows))
        result = Quantize(solver="gptq", layout="int4").apply(checkpoint, run_with(figures))
    for info in checkpoint.linears():
        weight = result.weights[info.name]
        assert isinstance(weight, Quantized)
        assert weight.layout == parse_layout("int4")
        assert figures[info.name]["loss"] <= figures[info.name]["loss_rtn"]
        experts = int(checkpoint.hyper.get("experts", 0))
        assert experts or figures[info.name]["tokens"] == windows.size
    assert ModelView(result).outputs(windows)


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(ember: Checkpoint, tmp_path: Path) -> None:
    spec = Quantize(solver="gptq", layout="int4", actorder=True, sweeps=0)
    straight = spec.apply(ember, run_with({}))

    def die(_what: str, done: int, _total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        spec.apply(ember, run_with({}, scratch=tmp_path, progress=die))
    assert [p.name for p in tmp_path.iterdir()] == ["block-00000"]
    with pytest.MonkeyPatch.context() as patch:
        solved: list[str] = []
        gptq = type(spec.method)
        original = gptq.matrix
        patch.setattr(
            gptq, "matrix", lambda self, s, name, *a, **k: [solved.append(name), original(self, s, name, *a, **k)][1]
        )
        figures: Figures = {}
        resumed = spec.apply(ember, run_with(figures, scratch=tmp_path))
    assert len(figures) == len(ember.linears())
    assert set(solved) == {info.name for info in ember.linears() if info.block == 1}
    for info in ember.linears():
        a, b = (c.weights[info.name].read() for c in (straight, resumed))
        assert a.keys() == b.keys()
        for key, array in a.items():
            np.testing.assert_array_equal(array, b[key])


def test_factors_are_solved_one_after_the_other(ember: Checkpoint) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    left, s, right = np.linalg.svd(ember.weights[name].value(), full_matrices=False)
    rank = 64
    factored = Factored(
        Dense.of((left[:, :rank] * s[:rank]).astype(np.float32)), Dense.of(right[:rank].astype(np.float32))
    )
    figures: Figures = {}
    result = Quantize(solver="gptq", layouts={name: "int4"}).apply(
        ember.with_weights({name: factored}), run_with(figures)
    )
    found = result.weights[name]
    assert isinstance(found, Factored)
    assert isinstance(found.left, Quantized)
    assert isinstance(found.right, Quantized)
    for side in ("left", "right"):
        assert figures[name][f"{side}_loss"] < figures[name][f"{side}_loss_rtn"]


def test_what_lies_outside_the_blocks_is_rounded_and_reported(ember: Checkpoint) -> None:
    figures: Figures = {}
    spec = Quantize(solver="importance", layout="int4", include=("embeddings",))
    result = spec.apply(ember, run_with(figures))
    name = "model.embed_tokens.weight"
    assert figures[name]["solver"] == "rtn"
    expected = parse_layout("int4").quantize(ember.weights[name].value())
    for key, array in result.weights[name].read().items():
        np.testing.assert_array_equal(array, expected[key])


def test_an_untied_head_is_solved_with_what_reaches_it(tiny: Callable[[str], Checkpoint]) -> None:
    checkpoint = tiny("llama")
    windows = list(np.random.default_rng(0).integers(0, 96, (24, 32)))
    figures: Figures = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tightship.passes.calibration.calibration_windows", lambda *_: windows)
        result = Quantize(solver="gptq", layout="int3", include=("head",)).apply(checkpoint, run_with(figures))
    name = "lm_head.weight"
    x = inputs(result.with_weights({name: checkpoint.weights[name]}), np.stack(windows))[name]
    w, q = (c.weights[name].value().astype(np.float64) for c in (checkpoint, result))
    assert figures[name]["tokens"] == len(x)
    assert figures[name]["loss"] == pytest.approx(((x @ (q - w).T) ** 2).sum() / ((x @ w.T) ** 2).sum(), rel=1e-4)
    assert figures[name]["loss"] < figures[name]["loss_importance"] < 1


def test_pruned_weights_stay_pruned(ember: Checkpoint) -> None:
    zeros = {}
    for info in ember.linears():
        w = ember.weights[info.name].value().copy()
        w[np.abs(w) < np.quantile(np.abs(w), 0.6)] = 0
        zeros[info.name] = Dense.of(w)
    pruned = ember.with_weights(zeros).replace(history=({"use": "prune", "makes": ["mask"]},))
    result = Quantize(solver="gptq", layout="int4-asym", actorder=False, sweeps=1).apply(pruned, run_with({}))
    for info in ember.linears():
        assert not result.weights[info.name].value()[zeros[info.name].value() == 0].any(), info.name


def test_options_belong_to_their_solver() -> None:
    for options in ({"actorder": True}, {"damp": 0.1}):
        with pytest.raises(UsageError, match=next(iter(options))):
            Quantize(solver="importance", layout="int4", **options)
    with pytest.raises(UsageError, match="at most 1"):
        Quantize(solver="gptq", layout="int4", damp=2.0)


def test_propagation_is_least_squares_against_the_untouched_model(ember: Checkpoint) -> None:
    """The drift of block 1 after a coarse block 0, from hooks on whole models, and what becomes of the outputs."""
    windows = np.stack(calibration_windows(ember, run_with({})))
    lost = {}
    for strength in (0.0, 1.0):
        result = Quantize(solver="gptq", layout="int2-asym", sweeps=0, propagate=strength).apply(ember, run_with({}))
        before = {i.name: result.weights[i.name] for i in ember.linears() if i.block == 0}
        untouched, drifted = inputs(ember, windows), inputs(ember.with_weights(before), windows)
        for info in ember.linears():
            if info.block == 1:
                w, q = (c.weights[info.name].value().astype(np.float64) for c in (ember, result))
                error = untouched[info.name] @ w.T - drifted[info.name] @ q.T
                lost[strength, info.name] = float((error**2).sum())
    better = [lost[1.0, name] < lost[0.0, name] for strength, name in lost if strength]
    assert all(better)


def test_a_corrected_matrix_is_what_least_squares_finds() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((200, 12)), rng.standard_normal((5, 12)).astype(np.float32)
    moved = x + 0.3 * rng.standard_normal((200, 12))
    expected = np.linalg.lstsq(moved, x @ w.T, rcond=None)[0].T
    second, drift = moved.T @ moved / 200, (x - moved).T @ moved / 200
    np.testing.assert_allclose(corrected(w, second, drift, 1.0, 1e-12), expected, atol=1e-6)
    np.testing.assert_array_equal(corrected(w, second, drift, 0.0, 0.01), w)


def test_experts_are_left_out_of_propagation(tiny: Callable[[str], Checkpoint]) -> None:
    checkpoint = tiny("mixtral")
    windows = list(np.random.default_rng(0).integers(0, 96, (8, 32)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tightship.passes.calibration.calibration_windows", lambda *_: windows)
        result = Quantize(solver="gptq", layout="int4", propagate=0.5).apply(checkpoint, run_with({}))
    assert ModelView(result).outputs(np.stack(windows))


def test_a_correction_is_the_best_of_its_rank(ember: Checkpoint) -> None:
    """Its loss, seen by hooks, is what Eckart and Young leave: the singular values beyond the rank, whitened."""
    figures: Figures = {}
    spec = Quantize(solver="gptq", layout="int2-asym", sweeps=0, compensate=8)
    outline = spec.outline(ember)
    result = spec.apply(ember, run_with(figures))
    windows = np.stack(calibration_windows(ember, run_with({})))
    x = inputs(ember, windows)
    for info in (i for i in ember.linears() if i.block == 0):
        weight = result.weights[info.name]
        assert isinstance(weight, Sum)
        assert weight.residual.rank == outline.weights[info.name].residual.rank == 8  # type: ignore[union-attr]
        w = ember.weights[info.name].value().astype(np.float64)
        left = x[info.name] @ (weight.value() - w).T
        singular = np.linalg.svd(x[info.name] @ (weight.base.value() - w).T, compute_uv=False)
        assert (left**2).sum() == pytest.approx((singular[8:] ** 2).sum(), rel=0.05)
        assert figures[info.name]["loss_compensated"] < figures[info.name]["loss"]


def test_experts_that_few_tokens_reached_are_told(tiny: Callable[[str], Checkpoint]) -> None:
    checkpoint = tiny("mixtral")
    figures: Figures = {}
    windows = list(np.random.default_rng(0).integers(0, 96, (2, 16)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tightship.passes.calibration.calibration_windows", lambda *_: windows)
        Quantize(solver="importance", layout="int4").apply(checkpoint, run_with(figures, allow={"unreached"}))
    told = figures["thinly calibrated matrices"]
    linears = {info.name: info.shape[1] for info in checkpoint.linears()}
    thin = {name: figures[name]["tokens"] for name, width in linears.items() if figures[name]["tokens"] < width}
    assert told["count"] == len(thin) > 0
    assert told["tokens"] == min(thin.values()) == thin[told["fewest"]]


@pytest.mark.parametrize("solver", ["importance", "gptq"])
def test_a_matrix_that_no_token_reached_fails_unless_allowed(tiny: Callable[[str], Checkpoint], solver: str) -> None:
    checkpoint = tiny("mixtral")
    figures: Figures = {}
    ids = (np.zeros(8, np.int64),)  # one token over and over: at most two of the experts are ever chosen
    spec = Quantize(solver=solver, layout="int4")
    with pytest.raises(Unreached, match="no token") as failed:
        spec.apply(checkpoint, run_with(figures, written=ids))
    assert failed.value.tensor in checkpoint.weights
    assert failed.value.exit_code == 1
    after = spec.apply(checkpoint, run_with(figures, written=ids, allow={"unreached"}))
    unreached = [info.name for info in checkpoint.linears() if figures[info.name]["tokens"] == 0]
    assert figures["thinly calibrated matrices"]["unreached"] == len(unreached) > 0
    assert all(isinstance(after.weights[name], Quantized) for name in unreached)


def test_moments_without_an_inverse_fail_unless_allowed(ember: Checkpoint) -> None:
    figures: Figures = {}
    spec = Quantize(solver="gptq", layout="int4", damp=1e-300)  # 64 tokens span no space of 256 channels
    short = {"tokens": 64, "sequence": 64}
    with pytest.raises(NotPositive, match="not positive definite") as failed:
        spec.apply(ember, run_with(figures, **short))
    assert "allow: [singular]" in str(failed.value.hint)
    spec.apply(ember, run_with(figures, **short, allow={"singular"}))
    fallen = [name for name, found in figures.items() if found.get("fallback") == "singular"]
    assert figures["matrices whose moments have no inverse"]["count"] == len(fallen) > 0
    assert {figures[name]["solver"] for name in fallen} <= {"importance", "rtn"}


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_both_stacks_are_solved_on_moments_of_the_whole_model(family: str, tiny: Callable[[str], Checkpoint]) -> None:
    """Moments, and losses below rounding's, of every matrix; the encoder was solved before the decoder read it."""
    checkpoint = tiny(family)
    ids = np.random.default_rng(0).integers(7, 96, (24, 32))
    figures: Figures = {}
    shown: dict[str, np.ndarray] = {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tightship.passes.calibration.calibration_windows", lambda *_: list(ids))
        gptq = type(Quantize(solver="gptq", layout="int3-asym").method)
        original = gptq.matrix

        def matrix(self: Any, spec: Any, name: str, matrix: Any, moments: Any, **more: Any) -> Any:
            shown[name] = moments.second
            return original(self, spec, name, matrix, moments, **more)

        patch.setattr(gptq, "matrix", matrix)
        result = Quantize(solver="gptq", layout="int3-asym").apply(checkpoint, run_with(figures))
    start = {"t5": 5, "bart": 6}[family]
    behind = np.concatenate([np.full((len(ids), 1), start), ids[:, :-1]], axis=1)
    before: dict[str, Any] = {}
    for prefix in (checkpoint.architecture.block_prefix, checkpoint.architecture.decoder_prefix):
        for block in (0, 1):
            names = [i.name for i in checkpoint.linears() if i.name.startswith(str(prefix).format(i=block))]
            seen = inputs(checkpoint.with_weights(before), ids, decoder_input_ids=torch.from_numpy(behind))
            for name in names:
                np.testing.assert_allclose(
                    shown[name], seen[name].T @ seen[name] / len(seen[name]), rtol=1e-4, atol=1e-6
                )
            before |= {name: result.weights[name] for name in names}
    assert set(before) == set(figures) == {info.name for info in checkpoint.linears()}
    for name, found in figures.items():
        assert found["loss"] < found["loss_rtn"], name
