"""Runs of columns: what is compiled for the CPU does what torch does a column at a time."""

from __future__ import annotations

import numpy as np
import pytest

from tightship.formats.threads import threads
from tightship.passes.quantize.columns import Columns

torch = pytest.importorskip("torch")

COLUMNS, ROWS = 40, 70  # rows of two tiles and a part


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def grid_of(kind: str) -> Columns:
    """A grid of 8 numbers; one scale of it is zero."""
    scale = numbers(COLUMNS, ROWS, seed=1).abs() / 5
    scale[3, 5] = 0.0
    if kind == "table":
        return Columns(scale, torch.zeros_like(scale), 0, 7, numbers(8, seed=2))
    return Columns(scale, numbers(COLUMNS, ROWS, seed=3) / 20, -4, 3, None)


def moments() -> torch.Tensor:
    mix = numbers(COLUMNS, COLUMNS, seed=4)
    return mix @ mix.T + torch.eye(COLUMNS, dtype=torch.float64)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("some_fixed", [False, True])
@pytest.mark.parametrize("kind", ["affine", "table"])
def test_the_kernels_do_what_torch_does(kind: str, some_fixed: bool, count: int) -> None:
    grid, second = grid_of(kind), moments()
    fixed = numbers(COLUMNS, ROWS, seed=5) > 0.5 if some_fixed else None
    factor = torch.linalg.cholesky(torch.linalg.inv(second), upper=True)
    first, w = 8, numbers(COLUMNS - 8, ROWS, seed=6)
    with threads(count):
        part = slice(first, None)
        ours, theirs = w.clone(), w.clone()
        kept = None if fixed is None else fixed[part]
        codes, errors = grid.feed_back(first, ours, factor[part, part], kept)
        expected, others = grid.feed_back_in_torch(first, theirs, factor[part, part], kept)
        torch.testing.assert_close(codes, expected, rtol=0, atol=0)
        torch.testing.assert_close(errors, others, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        assert codes.unique().numel() > 4

        slope = second[part, part] @ (w - numbers(COLUMNS - 8, ROWS, seed=7))
        mine, yours = [(w.clone(), codes.clone()) for _ in range(2)]
        change = grid.descend(first, *mine, slope=slope, moments=second[part, part], fixed=kept)
        other = grid.descend_in_torch(first, *yours, slope=slope, moments=second[part, part], fixed=kept)
        torch.testing.assert_close(mine[1], yours[1], rtol=0, atol=0)
        torch.testing.assert_close(mine[0], yours[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(change, other, rtol=1e-12, atol=1e-12)
        assert change.count_nonzero() > COLUMNS
        if kept is not None:
            assert not change[kept].any()
