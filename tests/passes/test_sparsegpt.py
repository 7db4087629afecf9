"""SparseGPT's arithmetic against the definition of its loss and a naive loop."""

from __future__ import annotations

import numpy as np
import pytest

from tightship.formats.layouts import parse_layout
from tightship.passes.hessian import loss
from tightship.passes.masks import lowest_in_rows
from tightship.passes.quantize.feedback import Feedback, round_with_feedback
from tightship.passes.sparsegpt import Sweep, column_costs, prune_and_round, prune_with_feedback

pytest.importorskip("torch")


def problem(cols: int = 256, rows: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and moments of strongly correlated inputs."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(cols, cols)) * np.arange(1, cols + 1) ** -0.7
    x = rng.normal(size=(4 * cols, cols)) @ mix.T
    return rng.normal(size=(rows, cols)).astype(np.float32), x.T @ x / len(x)


@pytest.mark.parametrize("groups", [None, (2, 4), (4, 8)])
def test_the_sum_of_errors_is_the_loss(groups: tuple[int, int] | None) -> None:
    w, second = problem()
    pruned, errors = prune_with_feedback(w, second, w.size // 2, Sweep(groups))
    damped = second + 0.01 * np.mean(np.diagonal(second)) * np.eye(len(second))
    assert errors == pytest.approx(loss(pruned - w, damped), rel=1e-4)
    pruned, errors = prune_with_feedback(w, second, w.size // 2, Sweep(groups, damp=1e-4))
    assert errors == pytest.approx(loss(pruned - w, second), rel=0.05)


@pytest.mark.parametrize("zeros", [0, 1, 1234, 3072, 6000, 24 * 256])
def test_exactly_as_many_zeros_as_asked_for(zeros: int) -> None:
    w, second = problem()
    pruned, _ = prune_with_feedback(w, second, zeros)
    assert (pruned == 0).sum() == zeros


@pytest.mark.parametrize("zeros", [1, 1234, 3072, 6000])
@pytest.mark.parametrize("scope", ["row", "tensor"])
def test_other_scopes_hit_the_count_too(scope: str, zeros: int) -> None:
    w, second = problem(cols=300)
    w[:, 7] = 0
    pruned, errors = prune_with_feedback(w, second, max(zeros, 24), Sweep(scope=scope))
    assert (pruned == 0).sum() == max(zeros, 24)
    damped = second + 0.01 * np.mean(np.diagonal(second)) * np.eye(len(second))
    assert errors == pytest.approx(loss(pruned - w, damped), rel=1e-4)
    rows = (pruned == 0).sum(axis=1)
    if scope == "row":
        assert rows.max() - rows.min() <= 1
    elif zeros > 1000:
        costs = w.astype(np.float64) ** 2 * column_costs(second)  # chosen before anything is updated
        np.testing.assert_array_equal(pruned == 0, costs <= np.partition(costs.reshape(-1), zeros - 1)[zeros - 1])


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 4), (4, 8), (3, 32)])
def test_patterns_hold_in_every_group(keep: int, group: int) -> None:
    w, second = problem()
    pruned, _ = prune_with_feedback(w, second, 0, Sweep((keep, group)))
    assert ((pruned.reshape(-1, group) != 0).sum(axis=1) == keep).all()


def test_weights_that_are_zero_stay_zero_and_count() -> None:
    w, second = problem()
    w[:, ::3] = 0
    before = int((w == 0).sum())
    pruned, _ = prune_with_feedback(w, second, before + 500)
    assert not pruned[w == 0].any()
    assert (pruned == 0).sum() == before + 500


def test_one_run_is_the_naive_loop() -> None:
    """All columns in one run: choose once by w^2 / [H^-1]_jj of the running inverse, then update explicitly."""
    w, second = problem(cols=128)
    damped = second + 0.01 * np.mean(np.diagonal(second)) * np.eye(128)
    costs = np.array([1 / np.linalg.inv(damped[j:, j:])[0, 0] for j in range(128)])
    np.testing.assert_allclose(column_costs(second), costs, rtol=1e-8)
    scores = w.astype(np.float64) ** 2 * costs
    mask = scores.reshape(-1).argsort().argsort().reshape(w.shape) < 1500
    now, inverse = w.astype(np.float64), np.linalg.inv(damped)
    for j in range(128):
        wrong = np.where(mask[:, j], now[:, j], 0.0)
        now -= np.outer(wrong / inverse[j, j], inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    pruned, _ = prune_with_feedback(w, second, 1500)
    np.testing.assert_array_equal(pruned == 0, mask)
    np.testing.assert_allclose(pruned, np.where(mask, 0, now), atol=1e-6)


def test_better_than_wanda_and_magnitude_unless_the_moments_are_another_layers() -> None:
    w, second = problem()
    count = w.shape[1] // 2
    scores = {"magnitude": np.abs(w), "wanda": np.abs(w) * np.sqrt(np.diagonal(second))}
    losses = {m: loss(w * lowest_in_rows(s.astype(np.float32), count), second) for m, s in scores.items()}
    losses["sparsegpt"] = loss(w - prune_with_feedback(w, second, w.size // 2)[0], second)
    shuffle = np.random.default_rng(1).permutation(len(second))
    other = second[np.ix_(shuffle, shuffle)]
    losses["control"] = loss(w - prune_with_feedback(w, other, w.size // 2)[0], second)
    assert losses["sparsegpt"] < 0.5 * losses["wanda"]
    assert losses["wanda"] < losses["magnitude"] < losses["control"]


@pytest.mark.parametrize(
    ("word", "groups"), [("int4", None), ("int4-g64-asym", (2, 4)), ("int8-channel", None), ("q6_k", (2, 4))]
)
def test_the_joint_sweep_keeps_its_zeros_and_its_accounts(word: str, groups: tuple[int, int] | None) -> None:
    w, second = problem()
    layout = parse_layout(word)
    arrays, errors = prune_and_round(w, second, w.size // 2, layout, Sweep(groups))
    values = layout.values(arrays)
    damped = second + 0.01 * np.mean(np.diagonal(second)) * np.eye(len(second))
    assert errors == pytest.approx(loss(values - w, damped), rel=1e-4)
    if groups:
        assert ((values.reshape(-1, groups[1]) != 0).sum(axis=1) <= groups[0]).all()
    assert (values == 0).sum() >= w.size // 2


def test_one_sweep_beats_two() -> None:
    """Pruned, then rounded with feedback that keeps the zeros, against both at once; same grid, same order."""
    w, second = problem()
    layout = parse_layout("int4")
    joint = layout.values(prune_and_round(w, second, w.size // 2, layout)[0])
    pruned, _ = prune_with_feedback(w, second, w.size // 2)
    rounded = round_with_feedback(pruned, second, layout, Feedback(actorder=False), keep_zeros=True)
    assert loss(joint - w, second) < loss(layout.values(rounded) - w, second)
