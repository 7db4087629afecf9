"""GPTQ on any grid: round column by column, and let the columns that follow make good for the error.

Frantar et al., arXiv:2210.17323. For column j with rounded value v_j and error e_j = (w_j - v_j) / U_jj, every later
column k becomes w_k - e_j U_jk. The sum of all e^2 is then exactly the (damped) loss of `tightship.passes.hessian`.

Two orders:
- *as they lie*: a block's parameters are fitted on weights that already carry the errors of all columns before it;
- *static activation order*: all parameters are fitted first, then columns are rounded in falling order of their
  mean square. Codes stay where they lie, so no container needs to know.

Arithmetic is float64; parameters are fitted in float32, as the layout does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tightship.layout import AffineGrid, Arrays, Context, Grid, Layout
from tightship.passes.hessian import inverse_factor

if TYPE_CHECKING:
    import torch

_COLUMNS = 128  # errors within so many columns are spread at once, those beyond them in one product


@dataclass(frozen=True)
class Feedback:
    """How to go about it: columns in static activation order or as they lie; damping; where to compute."""

    actorder: bool = True
    damp: float = 0.01
    device: str = "cpu"


def round_with_feedback(
    w: np.ndarray, second: np.ndarray, layout: Layout, how: Feedback, *, keep_zeros: bool = False
) -> Arrays:
    """Codes and parameters of `w` (rows, cols) float32, given its moments (cols, cols) float64.

    `keep_zeros`: weights that are 0.0 stay 0.0, and what the feedback would have put there goes on to later columns.

    Raises:
        NotPositive: the moments have no inverse.
        Unsupported: codes of the layout span several columns, or its scales cannot reach these weights.
    """
    import torch

    diagonal = np.diagonal(second).astype(np.float32)
    order = np.argsort(-diagonal, kind="stable") if how.actorder else np.arange(len(diagonal))
    job = _Job(
        layout=layout,
        weights=torch.from_numpy(w[:, order].astype(np.float64)).to(how.device),
        factor=inverse_factor(second[np.ix_(order, order)], how.damp, how.device),
        zeros=torch.from_numpy(w[:, order] == 0).to(how.device) if keep_zeros else None,
        importance=diagonal,
        context=Context(np.mean(np.square(w), axis=1)),
    )
    if not how.actorder:
        return job.as_they_lie()
    params = layout.fit(w, diagonal, job.context)
    params.pop("codes", None)
    grid = _Columns.of(layout.grid(params), w.shape, how.device)
    codes = np.empty(w.shape, layout.array_specs(w.shape)["codes"].dtype)
    codes[:, order] = job.run(grid.take(order))
    return {"codes": codes, **params}


@dataclass(frozen=True)
class _Columns:
    """A grid column by column, (rows, cols) float64 each; `table` is None for affine grids."""

    scale: torch.Tensor
    offset: torch.Tensor | None
    low: int
    high: int
    table: torch.Tensor | None

    @classmethod
    def of(cls, grid: Grid, shape: tuple[int, ...], device: str) -> _Columns:
        import torch

        def wide(values: Any) -> torch.Tensor:
            return torch.from_numpy(np.broadcast_to(np.asarray(values), shape).astype(np.float64)).to(device)

        if isinstance(grid, AffineGrid):
            return cls(wide(grid.scale), wide(grid.offset), grid.lo, grid.hi, None)
        table = torch.from_numpy(np.asarray(grid.table, np.float64)).to(device)
        return cls(wide(grid.scale), None, 0, len(table) - 1, table)

    def take(self, order: np.ndarray) -> _Columns:
        """The columns in another order."""
        offset = None if self.offset is None else self.offset[:, order]
        return _Columns(self.scale[:, order], offset, self.low, self.high, self.table)

    def round(self, w: torch.Tensor, j: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and values of column j nearest to `w` (rows,). A zero scale says code 0, clamped, like `nearest`."""
        import torch

        scale = self.scale[:, j]
        safe = torch.where(scale == 0, 1.0, scale)
        if self.table is not None:
            codes = (w[:, None] / safe[:, None] - self.table).abs().argmin(dim=1)
            return codes, scale * self.table[codes]
        offset = self.offset[:, j]  # type: ignore[index] - affine grids have one
        exact = torch.where(scale == 0, 0.0, (w - offset) / safe)
        codes = exact.round().clamp(self.low, self.high)
        return codes, scale * codes + offset


@dataclass
class _Job:
    """One matrix on its way; `weights` change as errors are passed on."""

    layout: Layout
    weights: torch.Tensor
    factor: torch.Tensor
    zeros: torch.Tensor | None
    importance: np.ndarray
    context: Context

    def as_they_lie(self) -> Arrays:
        """Fit each block of the layout when its turn comes."""
        cols = self.weights.shape[1]
        width = self.layout.block or cols
        found: list[Mapping[str, np.ndarray]] = []
        for start in range(0, cols, width):
            now = self.weights[:, start : start + width]
            if self.zeros is not None:
                now = now.masked_fill(self.zeros[:, start : start + width], 0.0)
            block = now.float().cpu().numpy()
            params = self.layout.fit(block, self.importance[start : start + width], self.context)
            params.pop("codes", None)
            grid = _Columns.of(self.layout.grid(params), block.shape, str(self.weights.device))
            found.append({"codes": self.run(grid, start, start + width), **params})
        whole = {key: np.concatenate([part[key] for part in found], axis=1) for key in found[0]}
        whole["codes"] = whole["codes"].astype(self.layout.array_specs(tuple(self.weights.shape))["codes"].dtype)
        return whole

    def run(self, grid: _Columns, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Round columns [start, stop), of which `grid` speaks, and bring all later columns up to date."""
        import torch

        stop = self.weights.shape[1] if stop is None else stop
        codes = torch.empty((len(self.weights), stop - start), dtype=torch.int32, device=self.weights.device)
        for first in range(start, stop, _COLUMNS):
            last = min(first + _COLUMNS, stop)
            block = self.weights[:, first:last]
            factor = self.factor[first:last, first:last]
            errors = torch.empty_like(block)
            for j in range(last - first):
                w = block[:, j]
                wanted = w if self.zeros is None else w.masked_fill(self.zeros[:, first + j], 0.0)
                code, value = grid.round(wanted, first + j - start)
                codes[:, first + j - start] = code.int()
                errors[:, j] = (w - value) / factor[j, j]
                block[:, j + 1 :].addr_(errors[:, j], factor[j, j + 1 :], alpha=-1)
            self.weights[:, last:].addmm_(errors, self.factor[first:last, last:], alpha=-1)
        return codes.cpu().numpy()
