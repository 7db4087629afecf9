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
from typing import TYPE_CHECKING

import numpy as np

from tightship.layout import Arrays, Context, Layout
from tightship.passes.hessian import inverse_factor
from tightship.passes.quantize.columns import TOGETHER, Columns

if TYPE_CHECKING:
    import torch


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
        weights=torch.from_numpy(w.T[order].astype(np.float64)).to(how.device),
        factor=inverse_factor(second[np.ix_(order, order)], how.damp, how.device),
        zeros=torch.from_numpy(w.T[order] == 0).to(how.device) if keep_zeros else None,
        importance=diagonal,
        context=Context(np.mean(np.square(w), axis=1)),
    )
    if not (how.actorder or layout.fitted_whole):
        return job.as_they_lie()
    params = layout.fit(w, diagonal, job.context)
    params.pop("codes", None)
    grid = Columns.of(layout.grid(params), w.shape, how.device)
    codes = np.empty(w.shape, layout.array_specs(w.shape)["codes"].dtype)
    codes[:, order] = job.run(grid.take(order))
    return {"codes": codes, **params}


@dataclass
class _Job:
    """One matrix on its way; `weights`, (cols, rows) so that a column lies in one piece, change as errors go on."""

    layout: Layout
    weights: torch.Tensor
    factor: torch.Tensor
    zeros: torch.Tensor | None
    importance: np.ndarray
    context: Context

    def as_they_lie(self) -> Arrays:
        """Fit each block of the layout when its turn comes."""
        cols, rows = self.weights.shape
        width = self.layout.block or cols
        found: list[Mapping[str, np.ndarray]] = []
        for start in range(0, cols, width):
            now = self.weights[start : start + width]
            if self.zeros is not None:
                now = now.masked_fill(self.zeros[start : start + width], 0.0)
            block = np.ascontiguousarray(now.T.float().cpu().numpy())
            params = self.layout.fit(block, self.importance[start : start + width], self.context)
            params.pop("codes", None)
            grid = Columns.of(self.layout.grid(params), block.shape, str(self.weights.device))
            found.append({"codes": self.run(grid, start, start + block.shape[1]), **params})
        whole = {key: np.concatenate([part[key] for part in found], axis=1) for key in found[0]}
        dtype = self.layout.array_specs((rows, cols))["codes"].dtype
        whole["codes"] = whole["codes"].astype(dtype)
        return whole

    def run(self, grid: Columns, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Round columns [start, stop), of which `grid` speaks, and bring all later columns up to date."""
        import torch

        stop = len(self.weights) if stop is None else stop
        codes = torch.empty((stop - start, self.weights.shape[1]), dtype=torch.int32, device=self.weights.device)
        for first in range(start, stop, TOGETHER):
            last = min(first + TOGETHER, stop)
            zeros = None if self.zeros is None else self.zeros[first:last]
            factor = self.factor[first:last, first:last]
            codes[first - start : last - start], errors = grid.feed_back(
                first - start, self.weights[first:last], factor, zeros
            )
            self.weights[last:].addmm_(self.factor[first:last, last:].T, errors, alpha=-1)
        return np.ascontiguousarray(codes.cpu().numpy().T)
