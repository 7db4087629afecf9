"""Coordinate descent on codes, and on parameters: nothing left to improve alone, checked by trying what is near."""

from __future__ import annotations

import numpy as np
import pytest

from tightship.formats.layouts import parse_layout
from tightship.formats.layouts.affine import Affine
from tightship.layout import Arrays, Layout
from tightship.passes.hessian import loss
from tightship.passes.quantize.descent import descend
from tightship.passes.quantize.feedback import Feedback, round_with_feedback
from tightship.passes.quantize.refit import refit

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


WORDS = ["int2-asym", "int4", "q4_1", "q2_k", "q3_k", "q4_k", "q6_k", "iq4_nl", "iq4_xs"]


def neighbours(entries: np.ndarray, significant: int) -> list[np.ndarray]:
    """Storable values close by: numbers with so many significant bits, integers within the range in use."""
    if entries.dtype.kind == "f":
        spacing = np.ldexp(1.0, np.frexp(entries.astype(np.float64))[1] - significant)
        return [(entries + side * spacing).astype(entries.dtype) for side in (-1, 1)]
    return [entries - (entries > entries.min()), entries + (entries < entries.max())]


@pytest.mark.parametrize("word", WORDS)
def test_the_last_parameter_refitted_has_no_better_neighbour(word: str) -> None:
    w, second = problem(256)
    layout = parse_layout(word)
    found = refit(round_with_feedback(w, second, layout, Feedback()), w, second, layout, damp=0.01, keep_zeros=False)
    layout.check(found, w.shape)
    key = list(layout.refittable)[-1]
    entries = found[key]
    best = row_losses(layout, found, w, second)
    for other in neighbours(entries, significant=9 if word == "int2-asym" else 11):
        changed = {**found, key: entries.copy()}
        changed[key][:, -1] = other[:, -1]  # the last block, after which nothing moved any more
        assert (row_losses(layout, changed, w, second) >= best * (1 - 1e-9)).all()


@pytest.mark.parametrize("word", WORDS)
def test_refitting_lowers_the_loss_that_descent_left_and_moves_no_code(word: str) -> None:
    w, second = problem(256)
    layout = parse_layout(word)
    start = round_with_feedback(w, second, layout, Feedback())
    start = descend(start, w, second, layout, sweeps=3, damp=0.01, keep_zeros=False)
    found = refit(start, w, second, layout, damp=0.01, keep_zeros=False)
    np.testing.assert_array_equal(found["codes"], start["codes"])
    before, after = (loss(layout.values(arrays) - w, damped(second)) for arrays in (start, found))
    assert after < 0.999 * before


def test_refitting_keeps_pruned_weights_zero() -> None:
    w, second = problem(256)
    w[np.random.default_rng(2).random(w.shape) < 0.6] = 0
    layout = parse_layout("int4-asym")
    arrays = round_with_feedback(w, second, layout, Feedback(), keep_zeros=True)
    found = refit(arrays, w, second, layout, damp=0.01, keep_zeros=True)
    assert not layout.values(found)[w == 0].any()
    assert loss(layout.values(found) - w, second) < loss(layout.values(arrays) - w, second)


def test_offsets_of_an_asymmetric_grid_stay_exact_in_float16() -> None:
    """Q4_1 stores -zero * scale as its float16 minimum; a scale with more than 7 significant bits would not fit."""
    w, second = problem(256)
    layout = parse_layout("int4-asym")
    assert isinstance(layout, Affine)
    found: Arrays = round_with_feedback(w, second, layout, Feedback())
    found = refit(found, w, second, layout, damp=0.01, keep_zeros=False)
    offset = (layout.lo - found["zero_point"].astype(np.float64)) * found["scale"].astype(np.float64)
    np.testing.assert_array_equal(offset.astype(np.float16).astype(np.float64), offset)


def test_what_no_token_reached_stays_finite() -> None:
    w, _ = problem(256)
    layout = parse_layout("q4_k")
    arrays = layout.quantize(w)
    found = refit(arrays, w, np.zeros((256, 256)), layout, damp=0.01, keep_zeros=False)
    assert np.isfinite(layout.values(found)).all()
