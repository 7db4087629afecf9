"""SparseGPT: zero weights and let those that follow in their row make good for them.

Frantar & Alistarh, arXiv:2301.00774. Columns are taken in runs of about 128. For a run, the weights that cost least
when zeroed, w_ij^2 / U_jj^2, are chosen, U being the factor of the inverse moments (`tightship.passes.hessian`); then
column by column the error e_j = (w_j - v_j) / U_jj is taken off later columns, w_k - e_j U_jk. The sum of e^2 is the
loss. Arithmetic is float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tightship.passes.hessian import inverse_factor
from tightship.passes.masks import lowest, lowest_in_groups

if TYPE_CHECKING:
    import torch

_COLUMNS = 128


def prune_with_feedback(
    w: np.ndarray,
    second: np.ndarray,
    zeros: int,
    *,
    groups: tuple[int, int] | None = None,
    damp: float = 0.01,
    device: str = "cpu",
) -> tuple[np.ndarray, float]:
    """The pruned matrix (rows, cols) float32, and its loss on the damped moments.

    Exactly `zeros` weights are 0.0 afterwards, spread evenly over runs of columns, or with `groups` (N, M) all but N
    of each M consecutive ones. Weights that are 0.0 already are the first to go.

    Raises:
        NotPositive: the moments have no inverse.
    """
    import torch

    cols = w.shape[1]
    factor = inverse_factor(second, damp, device)
    weights = torch.from_numpy(w.astype(np.float64)).to(device)
    gone = torch.from_numpy(w == 0).to(device)
    width = _COLUMNS if groups is None else groups[1] * max(1, _COLUMNS // groups[1])
    total, done = 0.0, 0
    for first in range(0, cols, width):
        last = min(first + width, cols)
        run = _Run(weights[:, first:last], factor[first:last, first:last], gone[:, first:last])
        if groups is None:
            run.choose(max(0, round(zeros * last / cols) - done))
            done += int(run.mask.sum())
        errors = run.zero(groups)
        total += float(errors.square().sum())
        weights[:, last:].addmm_(errors, factor[first:last, last:], alpha=-1)
    return weights.float().cpu().numpy(), total


class _Run:
    """A run of columns: `weights` (rows, columns) is a view that is changed in place."""

    def __init__(self, weights: torch.Tensor, factor: torch.Tensor, gone: torch.Tensor) -> None:
        import torch

        self.weights, self.factor, self.gone = weights, factor, gone
        self.mask = torch.zeros_like(gone)

    def choose(self, count: int, *, first: int = 0, group: tuple[int, int] | None = None) -> None:
        """Mark the `count` cheapest weights of the run, or with `group` (N, M) those of M columns from `first` on."""
        import torch

        last = self.weights.shape[1] if group is None else first + group[1]
        costs = (self.weights[:, first:last] / self.factor.diagonal()[first:last]).square()
        known = self.gone[:, first:last].cpu().numpy()
        scores = np.where(known, -1.0, costs.cpu().numpy())
        chosen = lowest_in_groups(scores, *group) if group else lowest(scores, min(count, scores.size))
        self.mask[:, first:last] = torch.from_numpy(chosen | known).to(self.mask.device)

    def zero(self, groups: tuple[int, int] | None) -> torch.Tensor:
        """Zero the marked weights column by column; the errors (rows, columns) that later runs have to bear."""
        import torch

        errors = torch.empty_like(self.weights)
        for j in range(self.weights.shape[1]):
            if groups is not None and j % groups[1] == 0:
                self.choose(0, first=j, group=groups)
            w = self.weights[:, j]
            errors[:, j] = torch.where(self.mask[:, j], w, 0.0) / self.factor[j, j]
            self.weights[:, j] = w.masked_fill(self.mask[:, j], 0.0)
            self.weights[:, j + 1 :].addr_(errors[:, j], self.factor[j, j + 1 :], alpha=-1)
        return errors


def column_costs(second: np.ndarray, damp: float = 0.01) -> np.ndarray:
    """(cols,) float64: what a unit weight costs when zeroed, 1 / U_jj^2; times w^2 this is SparseGPT's score.

    Raises:
        NotPositive: the moments have no inverse.
    """
    return 1.0 / inverse_factor(second, damp).diagonal().square().cpu().numpy()
