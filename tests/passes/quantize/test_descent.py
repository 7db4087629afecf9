"""Coordinate descent: no code left to improve alone, checked by trying every other one."""

from __future__ import annotations

import numpy as np
import pytest

from tightship.formats.layouts import parse_layout
from tightship.layout import Arrays, Layout
from tightship.passes.hessian import loss
from tightship.passes.quantize.descent import descend
from tightship.passes.quantize.feedback import Feedback, round_with_feedback

pytest.importorskip("torch")


def problem(cols: int, rows: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(cols, cols)) * np.arange(1, cols + 1) ** -0.7
    x = rng.normal(size=(4 * cols, cols)) @ mix.T
    return rng.standard_t(5, (rows, cols)).astype(np.float32), x.T @ x / len(x)


def damped(second: np.ndarray) -> np.ndarray:
    return second + 0.01 * np.mean(np.diagonal(second)) * np.eye(len(second))


def row_losses(layout: Layout, arrays: Arrays, w: np.ndarray, second: np.ndarray) -> np.ndarray:
    difference = layout.values(arrays) - w
    return np.einsum("ri,ij,rj->r", difference, damped(second), difference)


@pytest.mark.parametrize("word", ["int2-asym", "int3", "q4_1"])
def test_in_the_end_no_single_code_can_be_bettered(word: str) -> None:
    w, second = problem(64)
    layout = parse_layout(word)
    found = descend(layout.quantize(w), w, second, layout, sweeps=50, damp=0.01, keep_zeros=False)
    layout.check(found, w.shape)
    best = row_losses(layout, found, w, second)
    grid = layout.grid({key: value for key, value in found.items() if key != "codes"})
    for column in range(64):
        for code in range(grid.lo, grid.hi + 1):
            other = {**found, "codes": found["codes"].copy()}
            other["codes"][:, column] = code
            assert (row_losses(layout, other, w, second) >= best * (1 - 1e-9)).all()


@pytest.mark.parametrize("actorder", [False, True])
@pytest.mark.parametrize("word", ["int2-asym", "int4", "q4_k"])
def test_every_sweep_lowers_the_loss_that_gptq_left(word: str, actorder: bool) -> None:
    w, second = problem(256)
    layout = parse_layout(word)
    start = round_with_feedback(w, second, layout, Feedback(actorder=actorder))
    losses = []
    for sweeps in (0, 1, 2):
        found = descend(start, w, second, layout, sweeps=sweeps, damp=0.01, keep_zeros=False)
        losses.append(loss(layout.values(found) - w, damped(second)))
        for key in start.keys() - {"codes"}:
            np.testing.assert_array_equal(found[key], start[key])
    assert losses[2] < losses[1] < losses[0]


def test_pruned_weights_stay_zero() -> None:
    w, second = problem(256)
    w[np.random.default_rng(2).random(w.shape) < 0.6] = 0
    layout = parse_layout("int4-asym")
    start = round_with_feedback(w, second, layout, Feedback(), keep_zeros=True)
    found = layout.values(descend(start, w, second, layout, sweeps=3, damp=0.01, keep_zeros=True))
    assert not found[w == 0].any()
    assert loss(found - w, second) < loss(layout.values(start) - w, second)
