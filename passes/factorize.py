"""The best rank-r product of a matrix, in a metric. W is (out, in); all arithmetic is float64.

A metric is a pair (A, B), A diagonal (out,), B invertible (in, in); the product minimises ||A (W - L R) B||_F by
Eckart and Young (1936): with the singular value decomposition A W B = U S V^T,

    L = A^-1 U_r S_r^(1/2)        R = S_r^(1/2) V_r^T B^-1        error^2 = sum of the S_k^2 left out

| method  | A                                   | B                                              | source              |
|---------|-------------------------------------|------------------------------------------------|---------------------|
| svd     | I                                   | I                                              | Eckart and Young    |
| asvd    | I                                   | diag(mean square of the channel)^(alpha / 2)   | arXiv:2312.05821    |
| svd-llm | I                                   | Cholesky factor of E[x x^T], damped            | arXiv:2403.07378    |
| fisher  | sqrt(mean squared gradient of a row)| I                                              | arXiv:2207.00112    |

With svd-llm the metric *is* the output error over the calibration tokens, so no other rank-r product has a smaller one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tightship.passes.hessian import NotPositive


@dataclass(frozen=True)
class Metric:
    """`rows`: diagonal of A. `columns`: B as a diagonal (in,) or a lower triangle (in, in). None stands for I."""

    rows: np.ndarray | None = None
    columns: np.ndarray | None = None


def by_channel(mean_square: np.ndarray, alpha: float) -> Metric:
    """ASVD's diagonal; a channel that was never fed counts as the weakest that was."""
    seen = mean_square[mean_square > 0]
    floor = seen.min() if len(seen) else 1.0
    return Metric(columns=np.maximum(mean_square, floor).astype(np.float64) ** (alpha / 2))


def whitening(second: np.ndarray, damp: float) -> Metric:
    """Lower Cholesky factor of E[x x^T] + damp * mean(diagonal) * I.

    Raises:
        NotPositive: the factorisation broke down.
    """
    mean = float(np.diagonal(second).mean()) or 1.0
    try:
        return Metric(columns=np.linalg.cholesky(second + damp * mean * np.eye(len(second))))
    except np.linalg.LinAlgError as error:
        hint = "more calibration text, or a larger `damp`"
        raise NotPositive("the calibration moments are not positive definite", hint=hint) from error


def by_row(mean_square_gradient: np.ndarray) -> Metric:
    """Fisher weights of the rows from (out, in) mean squared gradients; a row without any counts as the weakest."""
    weights = np.sqrt(mean_square_gradient.sum(axis=1, dtype=np.float64))
    seen = weights[weights > 0]
    return Metric(rows=np.maximum(weights, seen.min() if len(seen) else 1.0))


@dataclass(frozen=True)
class Spectrum:
    """A decomposition in a metric, ready to be cut at any rank. `singular` is descending."""

    metric: Metric
    left: np.ndarray
    singular: np.ndarray
    right: np.ndarray

    def rank_for(self, energy: float) -> int:
        """Smallest rank whose squared singular values reach the share `energy` of all."""
        share = np.cumsum(self.singular**2) / max(float((self.singular**2).sum()), np.finfo(np.float64).tiny)
        return min(int(np.searchsorted(share, energy - 1e-12)) + 1, len(self.singular))

    def lost(self, rank: int) -> float:
        """Squared error in the metric, as a share of the matrix's own square."""
        total = float((self.singular**2).sum())
        return float((self.singular[rank:] ** 2).sum()) / total if total else 0.0

    def cut(self, rank: int) -> np.ndarray:
        """The matrix of this rank, (out, in) float32."""
        left, right = self.factors(rank)
        return (left @ right).astype(np.float32)

    def factors(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """L (out, rank) and R (rank, in) float64."""
        root = np.sqrt(self.singular[:rank])
        left = self.left[:, :rank] * root
        if self.metric.rows is not None:
            left = left / self.metric.rows[:, None]
        right = root[:, None] * self.right[:rank]
        columns = self.metric.columns
        if columns is None:
            return left, right
        if columns.ndim == 1:
            return left, right / columns
        import scipy.linalg

        # R B = S V^T with B lower triangular: solve B^T R^T = (S V^T)^T from the last column up
        return left, scipy.linalg.solve_triangular(columns, right.T, lower=True, trans="T").T


def spectrum(w: np.ndarray, metric: Metric, device: str = "cpu") -> Spectrum:
    """Decompose `w` (out, in) in `metric`."""
    import torch

    weighted: Any = w.astype(np.float64)
    if metric.rows is not None:
        weighted = weighted * metric.rows[:, None]
    if metric.columns is not None:
        weighted = weighted * metric.columns if metric.columns.ndim == 1 else weighted @ metric.columns
    u, s, vt = torch.linalg.svd(torch.from_numpy(weighted).to(device), full_matrices=False)
    return Spectrum(metric, u.cpu().numpy(), s.cpu().numpy(), vt.cpu().numpy())


def most_useful(out: int, width: int) -> int:
    """Largest rank whose factors are smaller than the matrix: r * (out + in) < out * in."""
    return max((out * width - 1) // (out + width), 0)
