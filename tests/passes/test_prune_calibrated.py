"""Calibrated and gradient pruning on whole models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
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
from tightship.passes.calibration import calibration_windows
from tightship.passes.divergence import Yardstick
from tightship.passes.gradients import mean_over_windows
from tightship.passes.prune import Prune
from tightship.passes.prune_search import all_moments, search
from tightship.passes.stand_ins import StandIns

torch = pytest.importorskip("torch")

EMBER = Path(__file__).parents[2] / "examples" / "ember"
TEXT = "The old ship lay at anchor in the bay, and nobody on the shore could say whence she had come. " * 40
CALIBRATED = ("wanda", "sparsegpt")


@pytest.fixture(scope="module")
def ember() -> Checkpoint:
    return open_checkpoint(EMBER)


def run_with(figures: dict[str, Mapping[str, Any]] | None = None, **changes: Any) -> Run:
    settings = {"threads": 1, "texts": (TEXT,), "tokens": 768, "sequence": 128}
    return Run(**{**settings, "report": ({} if figures is None else figures).__setitem__, **changes})


def matrices(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {info.name: checkpoint.weights[info.name].value() for info in checkpoint.linears()}


@pytest.mark.parametrize("method", [*CALIBRATED, "gradient", "sensitivity"])
def test_every_tensor_has_its_share_of_zeros_in_the_sources_type(ember: Checkpoint, method: str) -> None:
    figures: dict[str, Mapping[str, Any]] = {}
    result = Prune(method=method, sparsity=0.6).apply(ember, run_with(figures))
    for name, w in matrices(result).items():
        assert (w == 0).sum() == round(0.6 * w.size), name
        assert result.weights[name].dtype == ember.weights[name].dtype == "bf16"
        assert figures[name]["sparsity"] == pytest.approx(0.6, abs=1e-4)
    untouched = set(ember.weights) - set(matrices(ember))
    assert all(result.weights[name] is ember.weights[name] for name in untouched)


@pytest.mark.parametrize("method", [*CALIBRATED, "gradient"])
def test_two_of_four(ember: Checkpoint, method: str) -> None:
    result = Prune(method=method, pattern="2:4").apply(ember, run_with())
    for name, w in matrices(result).items():
        assert ((w.reshape(-1, 4) != 0).sum(axis=1) == 2).all(), name


def test_wanda_zeroes_what_carries_least_in_each_row(ember: Checkpoint) -> None:
    """Against the definition, with inputs seen by hooks on the whole model (the first block's are the original's)."""
    result = Prune(method="wanda", sparsity=0.5).apply(ember, run_with())
    module = ModelView(ember).module()
    seen: list[Any] = []
    module.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        module(torch.from_numpy(np.stack(calibration_windows(ember, run_with()))))
    x = seen[0].double().reshape(-1, 256)
    w = torch.from_numpy(ember.weights["model.layers.0.self_attn.q_proj.weight"].value()).double()
    score = w.abs() * x.square().mean(dim=0).sqrt()
    gone = torch.zeros_like(w, dtype=torch.bool).scatter_(1, score.argsort(dim=1)[:, :128], True)
    found = result.weights["model.layers.0.self_attn.q_proj.weight"].value()
    np.testing.assert_array_equal(found, np.where(gone.numpy(), 0, w.numpy()).astype(np.float32))


def test_wanda_over_whole_tensors_and_all_of_them(ember: Checkpoint) -> None:
    """One threshold for every weight of a tensor, and one for all tensors, on what the unpruned model multiplies."""
    moments = all_moments(ember, run_with(), set(matrices(ember)), calibration_windows(ember, run_with()))
    scores = {n: np.abs(w) * np.sqrt(np.diagonal(moments[n].second)) for n, w in matrices(ember).items()}
    found = matrices(Prune(method="wanda", sparsity=0.5, scope="tensor").apply(ember, run_with()))
    first = "model.layers.0.self_attn.q_proj.weight"
    wanted = scores[first] <= np.median(scores[first])
    assert ((found[first] == 0) != wanted).sum() <= 2  # ties in float32
    assert all((w == 0).sum() == w.size // 2 for w in found.values())
    found = matrices(Prune(method="wanda", sparsity=0.5, scope="global").apply(ember, run_with()))
    zeros = {name: int((w == 0).sum()) for name, w in found.items()}
    assert sum(zeros.values()) == sum(w.size for w in found.values()) // 2
    level = np.median(np.concatenate([score.reshape(-1) for score in scores.values()]))
    assert all(abs(zeros[name] - (score <= level).sum()) <= 2 for name, score in scores.items())


@pytest.mark.parametrize("scope", ["row", "tensor", "global"])
def test_sparsegpt_in_other_scopes_is_exact_on_a_model(ember: Checkpoint, scope: str) -> None:
    found = matrices(Prune(method="sparsegpt", sparsity=0.6, scope=scope).apply(ember, run_with()))
    zeros = {name: int((w == 0).sum()) for name, w in found.items()}
    assert sum(zeros.values()) == pytest.approx(0.6 * sum(w.size for w in found.values()), abs=len(zeros))
    alike = {name: zeros[name] == round(0.6 * w.size) for name, w in found.items()}
    assert all(alike.values()) is (scope != "global")
    if scope == "row":
        assert all(np.ptp((w == 0).sum(axis=1)) <= 1 for w in found.values())


def test_sensitivity_over_all_tensors_weighs_them_by_their_ablation(ember: Checkpoint) -> None:
    """The divergence of the report against one computed here, from the logits of the model with that matrix pruned."""
    figures: dict[str, Mapping[str, Any]] = {}
    everywhere = Prune(method="sensitivity", sparsity=0.5, scope="global").apply(ember, run_with(figures))
    zeros = {name: int((w == 0).sum()) for name, w in matrices(everywhere).items()}
    assert sum(zeros.values()) == sum(w.size for w in matrices(ember).values()) // 2
    apart = Prune(method="sensitivity", sparsity=0.5).apply(ember, run_with())
    name = "model.layers.0.mlp.down_proj.weight"
    ids = np.stack(calibration_windows(ember, run_with()))
    before, after = (
        torch.log_softmax(torch.from_numpy(ModelView(c, threads=1).outputs(ids)["logits"]).double(), dim=-1)
        for c in (ember, ember.with_weights({name: apart.weights[name]}))
    )
    divergence = float((before.exp() * (before - after)).sum(dim=-1).mean())
    assert figures[f"{name} alone"]["divergence"] == pytest.approx(divergence, rel=1e-2)  # weights there are bfloat16
    hurts = {name: figures[f"{name} alone"]["divergence"] / matrices(ember)[name].size for name in zeros}
    shares = {name: zeros[name] / matrices(ember)[name].size for name in zeros}
    assert shares[min(hurts, key=hurts.__getitem__)] > 0.5 > shares[max(hurts, key=hurts.__getitem__)]


def test_the_more_a_method_knows_the_less_it_loses(ember: Checkpoint) -> None:
    yardsticks = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        figures: dict[str, Mapping[str, Any]] = {}
        result = Prune(method=method, sparsity=0.6).apply(ember, run_with(figures))
        view = ModelView(ember, threads=1)
        ruler = Yardstick(view, calibration_windows(ember, run_with()))
        assert ruler.divergence() == 0.0
        with torch.no_grad():
            for name, w in matrices(result).items():
                view.module().get_parameter(name).copy_(torch.from_numpy(w))
        yardsticks[method] = ruler.divergence()
    assert 0 < yardsticks["sparsegpt"] < yardsticks["wanda"] < yardsticks["magnitude"]


@pytest.mark.parametrize(
    ("schedule", "score"),
    [("log-kmeans", "kl"), ("log-kmeans", "absolute"), ("owl", None), ("water-fill", "relative"), ("search", None)],
)
def test_schedules_come_to_the_global_sparsity_exactly(ember: Checkpoint, schedule: str, score: str | None) -> None:
    trials = 6 if schedule == "search" else None
    spec = Prune(method="wanda", sparsity=0.7, schedule=schedule, score=score, trials=trials)
    found = matrices(spec.apply(ember, run_with()))
    zeros = {name: int((w == 0).sum()) for name, w in found.items()}
    assert sum(zeros.values()) == round(0.7 * sum(w.size for w in found.values()))
    assert len({round(zeros[name] / w.size, 3) for name, w in found.items()}) > 1


def test_a_search_ends_nearer_to_the_original_than_it_began(ember: Checkpoint) -> None:
    spec = Prune(method="wanda", sparsity=0.7, schedule="search", trials=24)
    begin = {name: round(0.7 * w.size) for name, w in matrices(ember).items()}
    found = search(spec.solver, spec, ember, run_with(), begin)  # type: ignore[arg-type]
    assert sum(found.values()) == sum(begin.values())
    windows = calibration_windows(ember, run_with())
    moments = all_moments(ember, run_with(), set(begin), windows)
    ends = []
    for shares in (begin, found):
        model = StandIns(ember, windows, run_with())
        for name, zeros in shares.items():
            w = ember.weights[name].value()  # type: ignore[union-attr]
            model.put(name, spec.solver.pruned(spec, w, moments[name], zeros, "cpu"))  # type: ignore[attr-defined]
        ends.append(model.divergence())
    assert ends[1] < ends[0]


def test_pruned_and_rounded_in_one_pass(ember: Checkpoint) -> None:
    step = pass_for("prune-quantize", {"sparsity": 0.6, "layout": "int4"})
    step.requires(ember)
    outline, result = step.outline(ember), step.apply(ember, run_with())
    for name, w in matrices(result).items():
        assert result.weights[name].layout == outline.weights[name].layout  # type: ignore[union-attr]
        assert (w == 0).sum() >= round(0.6 * w.size), name


@pytest.mark.parametrize(("options", "word"), [({"layout": "q4_k"}, "zero"), ({"layout": "int4-g48"}, "blocks")])
def test_grids_that_cannot_be_swept(ember: Checkpoint, options: dict[str, Any], word: str) -> None:
    with pytest.raises(Unsupported, match=word):
        pass_for("prune-quantize", {"sparsity": 0.6, **options}).requires(ember)


def test_a_killed_run_keeps_its_survey(ember: Checkpoint, tmp_path: Path) -> None:
    spec = Prune(method="sparsegpt", sparsity=0.7, schedule="log-kmeans", score="absolute")
    straight = matrices(spec.apply(ember, run_with()))

    def die(what: str, done: int, _total: int) -> None:
        if what == "calibrated blocks" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        spec.apply(ember, run_with(scratch=tmp_path, progress=die))
    assert set(json.loads((tmp_path / "survey.json").read_text())) == set(straight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tightship.passes.prune_calibrated.survey", None)
        resumed = matrices(spec.apply(ember, run_with(scratch=tmp_path)))
    for name, w in straight.items():
        np.testing.assert_array_equal(w, resumed[name])


def test_gradients_against_finite_differences(ember: Checkpoint) -> None:
    windows = calibration_windows(ember, run_with())[:2]
    found = mean_over_windows(ember, run_with(), windows, lambda g: g.abs())
    name = "model.layers.1.mlp.down_proj.weight"
    module = ModelView(ember).module().double()
    parameter = module.get_parameter(name)

    def loss_of(window: np.ndarray) -> float:
        ids = torch.from_numpy(window[None])
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(module(ids).logits[0, :-1], ids[0, 1:]))

    # transformers computes norms in float32, so the steps have to be large and the slopes the steepest there are.
    for place in np.argsort(found[name].reshape(-1))[[-1, -50, -1000]]:
        row, col = np.unravel_index(place, found[name].shape)
        slopes = []
        for window in windows:
            sides = []
            for step in (2e-3, -2e-3):
                with torch.no_grad():
                    parameter[row, col] += step
                sides.append(loss_of(window))
                with torch.no_grad():
                    parameter[row, col] -= step
            slopes.append(abs(sides[0] - sides[1]) / 4e-3)
        assert found[name][row, col] == pytest.approx(np.mean(slopes), rel=1e-3)


def test_gradients_through_both_stacks(tiny: Callable[[str], Checkpoint]) -> None:
    """Those of transformers' own loss with the text as labels, which it gives to the decoder behind its start token."""
    checkpoint = tiny("t5")
    ids = np.random.default_rng(0).integers(7, 96, (2, 16))
    found = mean_over_windows(checkpoint, run_with(), list(ids), lambda g: g)
    module = ModelView(checkpoint).module()
    for row in torch.from_numpy(ids):
        (module(row[None], labels=row[None]).loss / len(ids)).backward()
    for name, gradient in found.items():
        np.testing.assert_allclose(gradient, module.get_parameter(name).grad.numpy(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("method", "scope"),
    [("gradient", "tensor"), ("gradient", "row"), ("gradient", "global"), ("sensitivity", "tensor"),
     ("sensitivity", "row")],
)  # fmt: skip
def test_gradient_scores_by_definition(ember: Checkpoint, method: str, scope: str) -> None:
    """Masks against scores from transformers' own loss, window by window."""
    score = {"gradient": lambda w, g: w.abs() * g.abs(), "sensitivity": lambda w, g: (w * g) ** 2}[method]
    module = ModelView(ember).module()
    names = list(matrices(ember))
    total = dict.fromkeys(names, 0.0)
    for window in calibration_windows(ember, run_with()):
        module.zero_grad()
        ids = torch.from_numpy(window[None])
        module(ids, labels=ids).loss.backward()
        for name in names:
            w = module.get_parameter(name)
            total[name] += score(w.detach().double(), w.grad.double())
    found = matrices(Prune(method=method, sparsity=0.5, scope=scope).apply(ember, run_with()))
    level = torch.cat([s.reshape(-1) for s in total.values()]).median()
    for name, s in total.items():
        threshold = {"tensor": s.median(), "row": s.median(dim=1, keepdim=True).values, "global": level}[scope]
        differing = (found[name] == 0) != (s <= threshold).numpy()
        assert differing.mean() <= 1e-3, name  # float32 gradients; ties


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "phi3", "bart"])
@pytest.mark.parametrize("method", [*CALIBRATED, "sensitivity"])
def test_experts_turned_and_fused_matrices_and_two_stacks(
    family: str, method: str, tiny: Callable[[str], Checkpoint]
) -> None:
    checkpoint = tiny(family)
    windows = tuple(np.random.default_rng(0).integers(0, 96, (6, 32)))
    schedule = {} if method == "sensitivity" else {"schedule": "log-kmeans"}
    result = Prune(method=method, sparsity=0.5, **schedule).apply(checkpoint, replace(run_with(), written=windows))
    found = matrices(result)
    total = sum(w.size for w in found.values())
    assert sum(int((w == 0).sum()) for w in found.values()) == total // 2
    before, after = (ModelView(c).outputs(np.stack(windows))["logits"] for c in (checkpoint, result))
    assert not np.array_equal(before, after)


def test_an_encoder_without_a_vocabulary_has_no_gradients(tiny: Callable[[str], Checkpoint]) -> None:
    windows = list(np.random.default_rng(0).integers(0, 96, (2, 16)))
    with pytest.raises(Unsupported, match="no loss"):
        mean_over_windows(tiny("bert-encoder"), run_with(), windows, lambda g: g)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"method": "magnitude", "sparsity": 0.5, "schedule": "owl"}, "schedule"),
        ({"method": "wanda", "sparsity": 0.5, "scope": "columns"}, "scope"),
        ({"method": "wanda", "sparsity": 0.5, "scope": "global", "schedule": "owl"}, "scope"),
        ({"method": "sparsegpt", "pattern": "2:4", "scope": "row"}, "scope"),
        ({"method": "wanda", "sparsity": 0.5, "damp": 0.1}, "damp"),
        ({"method": "sparsegpt", "sparsity": 0.5, "score": "kl"}, "score"),
        ({"method": "sparsegpt", "sparsity": 0.5, "schedule": "owl", "spread": 0.7}, "spread"),
        ({"method": "sparsegpt", "pattern": "2:4", "schedule": "owl"}, "schedule"),
        ({"method": "sparsegpt", "sparsity": 0.5, "damp": 0.0}, "damp"),
        ({"method": "sparsegpt", "sparsity": 0.5, "schedule": "owl", "trials": 5}, "trials"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        Prune(**options)
