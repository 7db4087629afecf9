"""Recovery: what is held stays held, what is trained gets better, and torch alone comes to the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tightship.checkpoint import Checkpoint
from tightship.errors import GateFailed, UsageError
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.passes import pass_for
from tightship.passes.base import Run
from tightship.passes.lessons import lessons
from tightship.passes.objectives import Grading, mean_over, own_loss
from tightship.passes.recover import Recover
from tightship.passes.trainee import Trainee, every_leaf
from tightship.weights import Alias, Dense, Factored, Quantized

torch = pytest.importorskip("torch")

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT = "The old ship lay at anchor in the bay, and nobody on the shore could say whence she had come. " * 60
SMALL = {"tokens": 768, "sequence": 64, "batch": 4, "rate": 2e-3, "snapshot": 2}
Tiny = Callable[[str], Checkpoint]


def run_with(**more: Any) -> Run:
    return Run(threads=1, texts=(TEXT,), **more)


@pytest.fixture(scope="module")
def ember() -> Checkpoint:
    return open_checkpoint(EXAMPLES / "ember")


@pytest.fixture(scope="module")
def pruned(ember: Checkpoint) -> Checkpoint:
    return pass_for("prune", {"sparsity": 0.7}).apply(ember, run_with())


@pytest.fixture(scope="module")
def quantized(pruned: Checkpoint) -> Checkpoint:
    step = pass_for("quantize", {"layout": "int4"})
    return step.apply(pruned, run_with())


def loss_of(checkpoint: Checkpoint, how: Recover) -> float:
    run = run_with()
    trainee, grading = Trainee(checkpoint, {}, run), Grading(checkpoint, 0, "cpu")
    return mean_over(lessons(checkpoint, run, how).exam(), lambda batch: own_loss(trainee, grading, batch))


@pytest.mark.parametrize("method", ["full", "norms", "lora", "blockwise"])
def test_the_mask_is_intact_and_the_loss_lower(ember: Checkpoint, pruned: Checkpoint, method: str) -> None:
    how = Recover(method=method, **SMALL)
    after = how.apply(pruned, run_with(inputs={"teacher": ember}))
    how.ensures(pruned, after)
    for info in pruned.linears():
        old, new = pruned.weights[info.name].value(), after.weights[info.name].value()
        assert not new[old == 0].any()
        assert np.count_nonzero(new) > 0.29 * new.size
    assert loss_of(after, how) < loss_of(pruned, how)
    changed = {n for n in after.weights if after.weights[n] is not pruned.weights[n]}
    kinds = {pruned.infos()[n].rule.kind for n in changed}
    inside = {"linear", "norm"}
    assert kinds == {"full": {*inside, "embedding"}, "norms": {"norm"}, "lora": {"linear"}, "blockwise": inside}[method]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_grid_is_intact(quantized: Checkpoint, method: str) -> None:
    how = Recover(method=method, **SMALL)
    after = how.apply(quantized, run_with())
    how.ensures(quantized, after)
    moved = 0
    for info in quantized.linears():
        old, new = quantized.weights[info.name], after.weights[info.name]
        assert isinstance(old, Quantized)
        assert isinstance(new, Quantized)
        before, now = old.read(), new.read()
        np.testing.assert_array_equal(before["scale"], now["scale"])
        assert not now["codes"][before["codes"] == 0].any()  # pruned zeros, on the grid too
        moved += int((before["codes"] != now["codes"]).sum())
    assert moved > 0
    assert loss_of(after, how) < loss_of(quantized, how)


def test_ties_and_factors_are_kept(ember: Checkpoint) -> None:
    low = pass_for("low-rank", {"rank": 32}).apply(ember, run_with())
    first, second = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
    low = low.with_weights({second: Alias(first)})
    after = Recover(**SMALL).apply(low, run_with())
    assert after.weights[second] == Alias(first)
    for info in low.linears():
        weight = after.resolve(info.name)
        assert isinstance(weight, Factored)
        assert weight.rank == 32
        assert weight.nbytes == low.resolve(info.name).nbytes


@pytest.mark.parametrize("family", ["llama-tied", "mixtral", "gpt2", "bert", "phi3"])
def test_gradients_are_those_of_plain_transformers(family: str, tiny: Tiny) -> None:
    """Stacked experts, turned matrices, fused and tied tensors: leaves get what the module's own parameters get."""
    checkpoint = tiny(family)
    run = Run(threads=1)
    leaves = every_leaf(checkpoint, run)
    trainee = Trainee(checkpoint, leaves, run)
    ids = torch.from_numpy(np.random.default_rng(0).integers(1, 96, (2, 12)))
    trainee(input_ids=ids).logits.square().mean().backward()
    module = ModelView(checkpoint, threads=1).module()
    module.requires_grad_(True)
    module(input_ids=ids).logits.square().mean().backward()
    total = sum(float(p.grad.square().sum()) for p in module.parameters() if p.grad is not None)
    ours = sum(float(t.grad.square().sum()) for t in trainee.tensors.values() if t.grad is not None)
    assert ours == pytest.approx(total, rel=1e-4)
    assert total > 0


def test_unchanged_leaves_give_the_model_bit_for_bit(tiny: Tiny, family: str) -> None:
    checkpoint = tiny(family)
    ids = torch.from_numpy(np.random.default_rng(0).integers(1, 96, (2, 12)))
    run = Run(threads=1)
    with torch.no_grad():
        found = Trainee(checkpoint, every_leaf(checkpoint, run), run)(input_ids=ids)[0]
        expected = ModelView(checkpoint, threads=1).module()(input_ids=ids)[0]
    np.testing.assert_array_equal(found.numpy(), expected.numpy())


def test_a_revived_weight_is_caught(pruned: Checkpoint) -> None:
    name = pruned.linears()[0].name
    revived = pruned.with_weights({name: Dense.of(np.ones(pruned.weights[name].shape, np.float32))})
    with pytest.raises(GateFailed, match="revived"):
        Recover().ensures(pruned, revived)


def test_what_cannot_be_done_is_refused(ember: Checkpoint) -> None:
    from tightship.recipe import Recipe
    from tightship.stages import make_stages

    def stages(step: dict[str, Any]) -> None:
        make_stages(Recipe.from_json({"passes": [{"use": "recover", **step}], "targets": [{"to": "gguf"}]}))

    with pytest.raises(UsageError, match="needs an input `teacher`"):
        stages({"with": {"method": "blockwise"}})
    with pytest.raises(UsageError, match=r"takes no input 'datta'.*data"):
        stages({"inputs": {"datta": "x"}})
    fewer = pass_for("drop-layers", {"layers": [0]}).apply(ember, run_with())
    with pytest.raises(UsageError, match="layers is 1"):
        Recover(method="blockwise", **SMALL).apply(fewer, run_with(inputs={"teacher": ember}))
