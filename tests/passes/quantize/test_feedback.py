"""GPTQ's arithmetic against a naive column loop with explicit updates of the inverse, in NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from tightship.formats.layouts import parse_layout
from tightship.layout import Context, Grid, Layout, TableGrid, nearest
from tightship.passes.hessian import NotPositive, inverse_factor, loss
from tightship.passes.quantize.feedback import Feedback, round_with_feedback

pytest.importorskip("torch")

LAYOUTS = (
    "int2-asym",
    "int3-g16",
    "int4",
    "int4-g128-asym",
    "int4-channel",
    "int8-g64",
    "iq4_nl",
    "iq4_xs",
    "mxfp4",
    "q4_1",
    "q2_k",
    "q4_k",
    "q6_k",
)


def problem(cols: int = 256, rows: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and moments of strongly correlated inputs."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(cols, cols)) * np.arange(1, cols + 1) ** -0.7
    x = rng.normal(size=(4 * cols, cols)) @ mix.T
    return rng.standard_t(5, (rows, cols)).astype(np.float32), x.T @ x / len(x)


def best_code(grid: Grid, w: np.ndarray, column: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Code and value nearest to `w` (rows,) of one column, by trying all codes."""
    scale = np.broadcast_to(grid.scale, (len(w), width))[:, column, None].astype(np.float64)
    if isinstance(grid, TableGrid):
        said = scale * grid.table.astype(np.float64)
        low = 0
    else:
        offset = np.broadcast_to(grid.offset, (len(w), width))[:, column, None].astype(np.float64)
        low, said = grid.lo, scale * np.arange(grid.lo, grid.hi + 1) + offset
    best = np.abs(said - w[:, None]).argmin(axis=1)
    return best + low, said[np.arange(len(w)), best]


def naive(w: np.ndarray, second: np.ndarray, layout: Layout, *, actorder: bool) -> np.ndarray:
    """Codes by the definition: after column j is fixed, it leaves the inverse of the damped moments."""
    cols = w.shape[1]
    damped = second + 0.01 * np.mean(np.diagonal(second)) * np.eye(cols)
    importance = np.diagonal(second).astype(np.float32)
    context = Context(np.mean(np.square(w), axis=1))
    inverse, now = np.linalg.inv(damped), w.astype(np.float64)
    order = np.argsort(-importance, kind="stable") if actorder else np.arange(cols)
    width = layout.block or cols
    codes = np.zeros(w.shape, np.int64)
    grid = layout.grid(layout.fit(w, importance, context)) if actorder else None
    for j in order:
        if not actorder and j % width == 0:
            part = slice(j, j + width)
            grid = layout.grid(layout.fit(now[:, part].astype(np.float32), importance[part], context))
        at = j if actorder else j % width
        codes[:, j], value = best_code(grid, now[:, j], at, cols if actorder else width)
        wrong = now[:, j] - value
        now -= np.outer(wrong / inverse[j, j], inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@pytest.mark.parametrize("actorder", [False, True])
@pytest.mark.parametrize("word", LAYOUTS)
def test_codes_are_those_of_the_naive_loop(word: str, actorder: bool) -> None:
    w, second = problem()
    layout = parse_layout(word)
    found = round_with_feedback(w, second, layout, Feedback(actorder=actorder))
    layout.check(found, w.shape)
    np.testing.assert_array_equal(found["codes"], naive(w, second, layout, actorder=actorder))


@pytest.mark.parametrize("actorder", [False, True])
@pytest.mark.parametrize("word", LAYOUTS)
def test_the_gain_is_the_correlations(word: str, actorder: bool) -> None:
    """Half the loss of importance search or less; with moments of other channels the gain is gone."""
    w, second = problem()
    layout = parse_layout(word)
    diagonal = np.diagonal(second).astype(np.float32)
    shuffle = np.random.default_rng(1).permutation(len(second))

    def cost(arrays: dict[str, np.ndarray]) -> float:
        return loss(w - layout.values(arrays), second)

    searched = cost(layout.quantize(w, diagonal, Context(np.mean(np.square(w), axis=1))))
    solved = cost(round_with_feedback(w, second, layout, Feedback(actorder=actorder)))
    control = cost(round_with_feedback(w, second[np.ix_(shuffle, shuffle)], layout, Feedback(actorder=actorder)))
    assert solved < 0.5 * searched
    assert control > searched


@pytest.mark.parametrize("actorder", [False, True])
@pytest.mark.parametrize("word", ["int2", "int4", "int8", "int2-asym", "int4-asym", "int8-asym"])
def test_weights_on_the_grid_stay_where_they_are(word: str, actorder: bool) -> None:
    _, second = problem()
    layout = parse_layout(word)
    rng = np.random.default_rng(3)
    low, high = -(1 << (layout.bits - 1)), (1 << (layout.bits - 1)) - 1
    low = -127 if word == "int8" else low  # Q8_0 uses 255 of its codes
    codes = rng.integers(low, high + 1, (12, 8, 32))
    codes[..., 5], codes[..., 9] = low, high  # every group spans its whole range
    zero = np.zeros((12, 8, 1)) if layout.symmetric else rng.integers(low, high + 1, (12, 8, 1))
    scale = 2.0 ** -rng.integers(3, 9, (12, 8, 1))
    w = ((codes - zero) * scale).reshape(12, 256).astype(np.float32)
    found = layout.values(round_with_feedback(w, second, layout, Feedback(actorder=actorder)))
    np.testing.assert_array_equal(found, w)


@pytest.mark.parametrize("actorder", [False, True])
@pytest.mark.parametrize("word", ["int3-g16", "int4-asym", "int4-channel", "q6_k"])
def test_pruned_weights_stay_zero(word: str, actorder: bool) -> None:
    w, second = problem()
    w[np.random.default_rng(2).random(w.shape) < 0.6] = 0
    layout = parse_layout(word)
    kept = layout.values(round_with_feedback(w, second, layout, Feedback(actorder=actorder), keep_zeros=True))
    assert not kept[w == 0].any()
    plain = layout.quantize(w, np.diagonal(second).astype(np.float32))
    assert loss(w - kept, second) < loss(w - layout.values(plain), second)


def test_the_factor_is_that_of_the_inverse() -> None:
    _, second = problem()
    factor = inverse_factor(second, 0.01).numpy()
    damped = second + 0.01 * np.mean(np.diagonal(second)) * np.eye(len(second))
    assert not np.tril(factor, -1).any()
    np.testing.assert_allclose(factor.T @ factor @ damped, np.eye(len(second)), atol=1e-8)
    tail = np.linalg.inv(damped[100:, 100:])[0, 0]
    np.testing.assert_allclose(factor[100, 100] ** 2, tail, rtol=1e-8)


def test_channels_that_nothing_reached() -> None:
    w, second = problem()
    second[:, 7] = second[7, :] = 0
    layout = parse_layout("int4")
    found = round_with_feedback(w, second, layout, Feedback(actorder=False))
    rest = np.delete(np.arange(256), 7)
    alone = nearest(layout.grid({k: v for k, v in found.items() if k != "codes"}), w)[:, 7]
    np.testing.assert_array_equal(found["codes"][:, 7], alone)
    assert np.isfinite(layout.values(found)[:, rest]).all()
    nothing = round_with_feedback(w, np.zeros_like(second), layout, Feedback())
    np.testing.assert_array_equal(layout.values(nothing), layout.values(layout.quantize(w, np.zeros(256, np.float32))))


def test_moments_that_are_no_moments() -> None:
    _, second = problem()
    with pytest.raises(NotPositive, match="not positive definite"):
        inverse_factor(second - 10 * np.eye(len(second)), 0.01)
