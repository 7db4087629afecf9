"""Lane arithmetic against NumPy's float32, bit for bit."""

from collections.abc import Callable

import numpy as np
import pytest
from numba import njit

from tightship.formats.lanes import (
    absolute,
    larger,
    load,
    nearest,
    root,
    smaller,
    some,
    splat,
    store,
    where,
)


def tiles() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    a = (rng.normal(0, 1, (8, 16)) * 10.0 ** rng.integers(-30, 30, (8, 16))).astype(np.float32)
    b = rng.normal(0, 3, (8, 16)).astype(np.float32)
    a[0, :4] = [0.0, -0.0, 0.5, -2.5]
    return a, b


@njit
def _add(x, y):
    return x + y


@njit
def _subtract(x, y):
    return x - y


@njit
def _multiply(x, y):
    return x * y


@njit
def _divide(x, y):
    return x / y


@njit
def _no_fusing(x, y):
    return x * y + y


@njit
def _scalars(x, y):
    return 2.5 * x + y * 0.1


@njit
def _smaller(x, y):
    return smaller(x, y)


@njit
def _larger(x, y):
    return larger(x, y)


@njit
def _root(x, y):
    return root(absolute(x)) + splat(0.0) * y


@njit
def _select(x, y):
    return where((x > y) | (x < splat(-1.0)) & (y != 0.0), x, y)


@njit
def _nearest(x, y):
    return nearest(y + splat(0.0) * x)


f32 = np.float32
CASES: list[tuple[Callable, Callable]] = [
    (_add, lambda a, b: a + b),
    (_subtract, lambda a, b: a - b),
    (_multiply, lambda a, b: a * b),
    (_divide, lambda a, b: a / b),
    (_no_fusing, lambda a, b: a * b + b),
    (_scalars, lambda a, b: f32(2.5) * a + b * f32(0.1)),
    (_smaller, np.minimum),
    (_larger, np.maximum),
    (_root, lambda a, b: np.sqrt(np.abs(a)) + f32(0) * b),
    (_select, lambda a, b: np.where((a > b) | (a < -1) & (b != 0), a, b)),
    (_nearest, lambda a, b: np.rint(b + f32(0) * a)),
]


@pytest.mark.parametrize(("ours", "numpy"), CASES, ids=[ours.__name__ for ours, _ in CASES])
def test_operation(ours: Callable, numpy: Callable) -> None:
    @njit
    def run(a, b, out):
        for row in range(a.shape[0]):
            store(out, row, ours(load(a, row), load(b, row)))

    a, b = tiles()
    out = np.empty_like(a)
    run(a, b, out)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(out, numpy(a, b))


def test_some() -> None:
    @njit
    def any_above(a, limit):
        return some(load(a, 0) > limit)

    a = np.zeros((1, 16), np.float32)
    a[0, 13] = 2
    assert any_above(a, 1.0)
    assert not any_above(a, 2.0)
