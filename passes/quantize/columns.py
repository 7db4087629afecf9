"""A layout's grid column by column, and the two loops over a run of columns that solvers are made of.

Both are compiled for the CPU (`column_kernels`); on other devices torch does the same, a column at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tightship.formats.threads import over_blocks
from tightship.layout import AffineGrid, Grid

if TYPE_CHECKING:
    import torch

TOGETHER = 128  # changes within so many columns are spread at once, those beyond them in one product


@dataclass(frozen=True)
class Columns:
    """A grid column by column, (cols, rows) float64 each, a column in one piece; affine ones without `table`."""

    scale: torch.Tensor
    offset: torch.Tensor
    low: int
    high: int
    table: torch.Tensor | None

    @classmethod
    def of(cls, grid: Grid, shape: tuple[int, ...], device: str) -> Columns:
        import torch

        def wide(values: Any) -> torch.Tensor:
            array = np.asarray(values)
            within = array[:, : shape[1]] if array.ndim == 2 else array  # a grid's last tile may reach further
            return torch.from_numpy(np.broadcast_to(within, shape).T.astype(np.float64, order="C")).to(device)

        if isinstance(grid, AffineGrid):
            return cls(wide(grid.scale), wide(grid.offset), grid.lo, grid.hi, None)
        table = torch.from_numpy(np.asarray(grid.table, np.float64)).to(device)
        return cls(wide(grid.scale), wide(0.0), 0, len(table) - 1, table)

    def take(self, order: np.ndarray) -> Columns:
        """The columns in another order."""
        return Columns(self.scale[order], self.offset[order], self.low, self.high, self.table)

    def round(self, w: torch.Tensor, j: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and values of column j nearest to `w` (rows,). A zero scale says code 0, clamped, like `nearest`."""
        scale = self.scale[j]
        safe = scale.masked_fill(scale == 0, float("inf"))
        if self.table is not None:
            codes = (w[:, None] / safe[:, None] - self.table).abs().argmin(dim=1)
            return codes, scale * self.table[codes]
        offset = self.offset[j]
        codes = ((w - offset) / safe).round_().clamp_(self.low, self.high)
        return codes, scale * codes + offset

    def feed_back(
        self, first: int, weights: torch.Tensor, factor: torch.Tensor, zeros: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """GPTQ on a run of columns, the grid's from `first` on.

        Args:
            weights: (columns, rows) float64, changed in place: each column bears the errors of those before it.
            factor: (columns, columns) float64, upper.
            zeros: (columns, rows) bool, weights that stay 0.

        Returns: codes and errors, (columns, rows) float64 both.
        """
        import torch

        if weights.device.type != "cpu":
            return self.feed_back_in_torch(first, weights, factor, zeros)
        from tightship.passes.quantize.column_kernels import ROWS, feed_back

        codes, errors = torch.empty_like(weights), torch.empty_like(weights)
        places = (factor.contiguous(), _mask(zeros), *self._run(first, len(weights)), codes, errors)
        over_blocks(feed_back, weights.shape[1], weights.numpy(), *map(_array, places), together=ROWS)
        return codes, errors

    def feed_back_in_torch(
        self, first: int, weights: torch.Tensor, factor: torch.Tensor, zeros: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`feed_back` on any device."""
        import torch

        codes, errors = torch.empty_like(weights), torch.empty_like(weights)
        for j, w in enumerate(weights):
            wanted = w if zeros is None else w.masked_fill(zeros[j], 0.0)
            codes[j], value = self.round(wanted, first + j)
            torch.div(w - value, factor[j, j], out=errors[j])
            weights[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
        return codes, errors

    def descend(
        self,
        first: int,
        values: torch.Tensor,
        codes: torch.Tensor,
        *,
        slope: torch.Tensor,
        moments: torch.Tensor,
        fixed: torch.Tensor | None,
    ) -> torch.Tensor:
        """Move each column of a run, the grid's from `first` on, to where the loss is least.

        Args:
            values, codes: (columns, rows) float64, changed in place.
            slope: (columns, rows) float64, this run's part of moments times error; it is read.
            moments: (columns, columns) float64.
            fixed: (columns, rows) bool, weights that stay.

        Returns: by how much each value changed.
        """
        import torch

        if values.device.type != "cpu":
            return self.descend_in_torch(first, values, codes, slope=slope, moments=moments, fixed=fixed)
        from tightship.passes.quantize.column_kernels import ROWS, descend

        change = torch.empty_like(values)
        places = (slope, moments.contiguous(), _mask(fixed), *self._run(first, len(values)), codes, change)
        over_blocks(descend, values.shape[1], values.numpy(), *map(_array, places), together=ROWS)
        return change

    def descend_in_torch(
        self,
        first: int,
        values: torch.Tensor,
        codes: torch.Tensor,
        *,
        slope: torch.Tensor,
        moments: torch.Tensor,
        fixed: torch.Tensor | None,
    ) -> torch.Tensor:
        """`descend` on any device."""
        import torch

        change, slope = torch.empty_like(values), slope.clone()
        for j, value in enumerate(values):
            code, found = self.round(value - slope[j] / moments[j, j], first + j)
            if fixed is not None:
                code, found = torch.where(fixed[j], codes[j], code), torch.where(fixed[j], value, found)
            torch.sub(found, value, out=change[j])
            codes[j], values[j] = code, found
            slope[j + 1 :].addr_(moments[j, j + 1 :], change[j])
        return change

    def _run(self, first: int, count: int) -> tuple[Any, ...]:
        """What kernels are told of a grid."""
        run = slice(first, first + count)
        table = np.empty(0) if self.table is None else self.table
        return self.scale[run], self.offset[run], float(self.low), float(self.high), table


def _mask(mask: torch.Tensor | None) -> Any:
    return np.empty((0, 0), np.bool_) if mask is None else mask


def _array(value: Any) -> Any:
    return value if isinstance(value, float | np.ndarray) else value.numpy()
