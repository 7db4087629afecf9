"""Pruning by magnitude against torch's own pruning, and by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tightship.checkpoint import Checkpoint
from tightship.dtypes import dtype
from tightship.errors import Malformed, Unsupported
from tightship.passes import pass_for
from tightship.passes.base import Run
from tightship.passes.masks import lowest, lowest_in_groups, lowest_in_rows
from tightship.weights import Dense


def pruned(checkpoint: Checkpoint, **options: object) -> Checkpoint:
    step = pass_for("prune", options)
    step.requires(checkpoint)
    return step.apply(checkpoint, Run())


def linears(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {info.name: checkpoint.weights[info.name].value() for info in checkpoint.linears()}


def test_ties_fall_to_the_lower_index() -> None:
    scores = np.array([[1, 1, 0, 1], [2, 1, 1, 1]], np.float32)
    assert lowest_in_rows(scores, 2).tolist() == [[True, False, True, False], [False, True, True, False]]
    assert lowest(scores, 3).tolist() == [[True, True, True, False], [False, False, False, False]]
    assert lowest_in_groups(scores, 1, 2).tolist() == [[True, False, True, False], [False, True, True, False]]
    assert not lowest_in_rows(scores, 0).any()
    assert lowest_in_rows(scores, 4).all()


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.73])
def test_the_same_zeros_as_torch(tiny: Callable[[str], Checkpoint], sparsity: float) -> None:
    torch = pytest.importorskip("torch")
    from torch.nn.utils import prune

    before = tiny("llama")
    after = linears(pruned(before, sparsity=sparsity))
    for name, w in linears(before).items():
        layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
        layer.weight.data = torch.from_numpy(w.copy())
        prune.l1_unstructured(layer, "weight", amount=sparsity)
        np.testing.assert_array_equal(after[name], layer.weight.detach().numpy())


def test_the_same_zeros_as_torch_over_all_tensors(tiny: Callable[[str], Checkpoint]) -> None:
    torch = pytest.importorskip("torch")
    from torch.nn.utils import prune

    before = tiny("llama")
    layers = {}
    for name, w in linears(before).items():
        layers[name] = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
        layers[name].weight.data = torch.from_numpy(w.copy())
    prune.global_unstructured(
        [(layer, "weight") for layer in layers.values()], pruning_method=prune.L1Unstructured, amount=0.6
    )
    after = linears(pruned(before, sparsity=0.6, scope="global"))
    for name, layer in layers.items():
        np.testing.assert_array_equal(after[name], layer.weight.detach().numpy())


def with_value(checkpoint: Checkpoint, array: np.ndarray) -> tuple[Checkpoint, str]:
    name = checkpoint.linears()[0].name
    return checkpoint.with_weights({name: Dense.of(array)}), name


@pytest.mark.parametrize("scope", ["tensor", "row", "global"])
def test_counts_are_exact_where_all_weights_are_equal(tiny: Callable[[str], Checkpoint], scope: str) -> None:
    checkpoint = tiny("llama")
    equal = {i.name: Dense.of(np.full(i.shape, -0.25, np.float32)) for i in checkpoint.linears()}
    after = linears(pruned(checkpoint.with_weights(equal), sparsity=0.3, scope=scope))
    total = sum(w.size for w in after.values())
    zeros = sum(int((w == 0).sum()) for w in after.values())
    if scope == "global":
        assert zeros == round(0.3 * total)
        first, last = min(after), max(after)  # ties go in name order
        assert (after[first] == 0).all()
        assert (after[last] != 0).all()
    elif scope == "row":
        assert all(((w == 0).sum(axis=1) == round(0.3 * w.shape[1])).all() for w in after.values())
    else:
        assert all((w == 0).sum() == round(0.3 * w.size) for w in after.values())


def test_two_of_four(tiny: Callable[[str], Checkpoint]) -> None:
    before = tiny("llama")
    after = linears(pruned(before, pattern="2:4"))
    for name, w in linears(before).items():
        groups, kept = np.abs(w).reshape(-1, 4), after[name].reshape(-1, 4)
        assert ((kept != 0).sum(axis=1) == 2).all()
        assert np.array_equal(np.sort(np.abs(kept), axis=1)[:, 2:], np.sort(groups, axis=1)[:, 2:])


def test_other_weights_keep_their_bits_and_dtype(tiny: Callable[[str], Checkpoint]) -> None:
    values = np.random.default_rng(0).normal(size=(64, 64)).astype(dtype("bf16").numpy)
    checkpoint, name = with_value(tiny("llama"), values)
    after = pruned(checkpoint, sparsity=0.5)
    result = after.weights[name].read()  # type: ignore[union-attr]
    kept = result != 0
    assert result.dtype == values.dtype
    assert np.array_equal(result[kept].view(np.uint16), values[kept].view(np.uint16))
    assert not np.signbit(result[~kept].astype(np.float32)).any()
    assert after.weights["model.norm.weight"] is checkpoint.weights["model.norm.weight"]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_name_the_tensor(tiny: Callable[[str], Checkpoint], bad: float) -> None:
    values = np.ones((64, 64), np.float32)
    values[3, 5] = bad
    checkpoint, name = with_value(tiny("llama"), values)
    with pytest.raises(Malformed, match=r"\(3, 5\)") as caught:
        linears(pruned(checkpoint, sparsity=0.5))
    assert caught.value.tensor == name
    assert caught.value.exit_code == 5


def test_groups_must_divide_the_columns(tiny: Callable[[str], Checkpoint]) -> None:
    with pytest.raises(Unsupported) as caught:
        pruned(tiny("llama"), pattern="2:7")
    assert caught.value.tensor == tiny("llama").linears()[0].name
