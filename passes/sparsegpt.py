"""SparseGPT: zero weights and let those that follow in their row make good for them.

Frantar & Alistarh, arXiv:2301.00774. Columns are taken in runs of about 128. For a run, the weights that cost least
when zeroed, w_ij^2 / U_jj^2, are chosen, U being the factor of the inverse moments (`tightship.passes.hessian`); then
column by column the error e_j = (w_j - v_j) / U_jj is taken off later columns, w_k - e_j U_jk. The sum of e^2 is the
loss. Arithmetic is float64.

A weight is compared with its run (scope `columns`, the paper's), with its row of the run (`row`), or, before anything
is updated, with the whole matrix (`tensor`).

In the joint sweep what stays is rounded to a grid as its column is reached, so later columns make good for both errors
at once (section 3.5 of the paper). A block's parameters are fitted when the sweep reaches it, on weights that carry all
errors so far and hold the zeros already. Zero must be a value of the grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tightship.layout import Arrays, Context, Layout
from tightship.passes.hessian import DAMP, inverse_factor
from tightship.passes.masks import even_counts, lowest, lowest_in_groups, lowest_of_rows
from tightship.passes.quantize.columns import Columns

if TYPE_CHECKING:
    import torch

_COLUMNS = 128


@dataclass(frozen=True)
class Sweep:
    """How to go about it: (N, M) of a pattern, damping as a share of the mean diagonal, where to compute, the scope."""

    groups: tuple[int, int] | None = None
    damp: float = DAMP
    device: str = "cpu"
    scope: str = "columns"


def prune_with_feedback(
    w: np.ndarray, second: np.ndarray, zeros: int, how: Sweep = Sweep()
) -> tuple[np.ndarray, float]:
    """The pruned matrix (rows, cols) float32, and its loss on the damped moments.

    Exactly `zeros` weights are 0.0 afterwards, spread as the scope says, or with groups (N, M) all but N of each M
    consecutive ones. Weights that are 0.0 already are the first to go.

    Raises:
        NotPositive: the moments have no inverse.
    """
    weights, _, total = _swept(w, second, zeros, how, None)
    return weights, total


def prune_and_round(
    w: np.ndarray, second: np.ndarray, zeros: int, layout: Layout, how: Sweep = Sweep()
) -> tuple[Arrays, float]:
    """Codes and parameters of `w` (rows, cols) float32 on the grid of `layout`, and the loss on the damped moments.

    As `prune_with_feedback`, except that rounding may make further weights zero.

    Raises:
        NotPositive: the moments have no inverse.
    """
    _, found, total = _swept(w, second, zeros, how, layout)
    whole = {key: np.concatenate([part[key] for part in found], axis=1) for key in found[0]}
    whole["codes"] = whole["codes"].astype(layout.array_specs((w.shape[0], w.shape[1]))["codes"].dtype)
    return whole, total


def _swept(
    w: np.ndarray, second: np.ndarray, zeros: int, how: Sweep, layout: Layout | None
) -> tuple[np.ndarray, list[Arrays], float]:
    """Weights (rows, cols) float32; with a layout also the arrays of its blocks; the sum of squared errors."""
    import torch

    cols, groups = w.shape[1], how.groups
    factor = inverse_factor(second, how.damp, how.device)
    weights = torch.from_numpy(w.astype(np.float64)).to(how.device)
    gone = torch.from_numpy(w == 0).to(how.device)
    width = _width(cols, groups, layout)
    total = 0.0
    chosen = None if groups else _Chosen(weights, factor, gone, zeros, how.scope)
    found: list[Arrays] = []
    for first in range(0, cols, width):
        last = min(first + width, cols)
        run = _Run(weights[:, first:last], factor[first:last, first:last], gone[:, first:last])
        if chosen:
            run.mask = chosen.of(run, first, last)
        if layout is None:
            run.zero(groups)
        else:
            found += run.round(layout, groups, np.diagonal(second)[first:last].astype(np.float32))
        total += float(run.errors.square().sum())
        weights[:, last:].addmm_(run.errors, factor[first:last, last:], alpha=-1)
    return weights.float().cpu().numpy(), found, total


class _Chosen:
    """Which weights go, run by run: as many by the end of each as its share of the columns, `zeros` in all."""

    def __init__(self, weights: torch.Tensor, factor: torch.Tensor, gone: torch.Tensor, zeros: int, scope: str) -> None:
        rows, self._cols = weights.shape
        self._by_row = scope == "row"
        # What rows have to reach; a single entry stands for the whole run.
        self._wanted = even_counts(rows, zeros) if self._by_row else np.array([zeros])
        self._done = np.zeros_like(self._wanted)
        self._whole = _Run(weights, factor, gone).lowest(np.array([zeros])) if scope == "tensor" else None

    def of(self, run: _Run, first: int, last: int) -> torch.Tensor:
        """The mask of a run that holds the columns from `first` to `last`."""
        if self._whole is not None:
            return self._whole[:, first:last]
        counts = np.maximum(np.rint(self._wanted * last / self._cols).astype(np.int64) - self._done, 0)
        mask = run.lowest(counts)
        self._done += (mask.sum(dim=1) if self._by_row else mask.sum()).cpu().numpy()
        return mask


def _width(cols: int, groups: tuple[int, int] | None, layout: Layout | None) -> int:
    """Columns of a run: about 128, and whole groups and blocks."""
    block = 1 if layout is None else layout.block or cols
    step = math.lcm(block, groups[1] if groups else 1)
    return step * max(1, _COLUMNS // step)


class _Run:
    """A run of columns: `weights` (rows, columns) is a view that is changed in place.

    `mask` says which weights are to be zero, `errors` (rows, columns) what later columns have to bear.
    """

    def __init__(self, weights: torch.Tensor, factor: torch.Tensor, gone: torch.Tensor) -> None:
        import torch

        self.weights, self.factor, self.gone = weights, factor, gone
        self.mask = torch.zeros_like(gone)
        self.errors = torch.empty_like(weights)

    def lowest(self, counts: np.ndarray) -> torch.Tensor:
        """Where the cheapest weights lie: `counts` (rows,) of each row, or (1,) of the whole run."""
        scores = self._scores(0, self.weights.shape[1])
        if len(counts) == len(scores) > 1:
            mask = lowest_of_rows(scores, np.minimum(counts, scores.shape[1]))
        else:
            mask = lowest(scores, min(int(counts[0]), scores.size))
        return self._with_known(mask, 0)

    def choose(self, first: int, group: tuple[int, int]) -> None:
        """Mark the cheapest weights of the group (N, M) of columns that begins at `first`."""
        last = first + group[1]
        self.mask[:, first:last] = self._with_known(lowest_in_groups(self._scores(first, last), *group), first)

    def _scores(self, first: int, last: int) -> np.ndarray:
        costs = (self.weights[:, first:last] / self.factor.diagonal()[first:last]).square()
        return costs.masked_fill(self.gone[:, first:last], -1.0).cpu().numpy()

    def _with_known(self, mask: np.ndarray, first: int) -> torch.Tensor:
        """The mask, and what was zero before."""
        import torch

        found: torch.Tensor = torch.from_numpy(mask).to(self.gone.device) | self.gone[:, first : first + mask.shape[1]]
        return found

    def zero(self, groups: tuple[int, int] | None) -> None:
        """Zero the marked weights column by column."""
        for j in range(self.weights.shape[1]):
            if groups is not None and j % groups[1] == 0:
                self.choose(j, groups)
            self._settle(j, self.weights[:, j].masked_fill(self.mask[:, j], 0.0))

    def round(self, layout: Layout, groups: tuple[int, int] | None, importance: np.ndarray) -> list[Arrays]:
        """Zero the marked weights and round the others, block by block of the layout; each block's arrays."""
        columns = self.weights.shape[1]
        width = layout.block or columns
        found = []
        for start in range(0, columns, width):
            if groups:
                for first in range(start, start + width, groups[1]):
                    self.choose(first, groups)
            found.append(self._block(layout, start, start + width, importance[start : start + width]))
        return found

    def _block(self, layout: Layout, start: int, stop: int, importance: np.ndarray) -> Arrays:
        import torch

        block = self.weights[:, start:stop].masked_fill(self.mask[:, start:stop], 0.0).float().cpu().numpy()
        arrays = layout.fit(block, importance, Context(np.mean(np.square(block), axis=1)))
        arrays.pop("codes", None)
        grid = Columns.of(layout.grid(arrays), block.shape, str(self.weights.device))
        codes = torch.empty(block.shape, dtype=torch.int32, device=self.weights.device)
        for j in range(start, stop):
            code, value = grid.round(self.weights[:, j].masked_fill(self.mask[:, j], 0.0), j - start)
            codes[:, j - start] = code.int()
            self._settle(j, value)
        return {"codes": codes.cpu().numpy(), **arrays}

    def _settle(self, j: int, value: torch.Tensor) -> None:
        """Column j becomes `value`; the columns after it in the run make good for the difference."""
        self.errors[:, j] = (self.weights[:, j] - value) / self.factor[j, j]
        self.weights[:, j] = value
        self.weights[:, j + 1 :].addr_(self.errors[:, j], self.factor[j, j + 1 :], alpha=-1)


def column_costs(second: np.ndarray, damp: float = 0.01) -> np.ndarray:
    """(cols,) float64: what a unit weight costs when zeroed, 1 / U_jj^2; times w^2 this is SparseGPT's score.

    Raises:
        NotPositive: the moments have no inverse.
    """
    return 1.0 / inverse_factor(second, damp).diagonal().square().cpu().numpy()
