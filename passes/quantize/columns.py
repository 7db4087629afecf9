"""A layout's grid, one column at a time, for solvers that round in torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

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
