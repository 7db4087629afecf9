"""The quadratic picture of one matrix: what a change of its weights does to its outputs.

With moments S = mean of x x^T, changing W by D changes the outputs by a mean square of tr(D S D^T): the *loss*. The
solvers that push an error on to later columns (GPTQ, arXiv:2210.17323; SparseGPT, arXiv:2301.00774; both after
Optimal Brain Surgeon) need the upper factor U of the inverse, S^-1 = U^T U. Its diagonal says what a column costs
once the columns before it are fixed: U_jj^2 is element jj of the inverse of S without its first j rows and columns.

Everything is float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tightship.errors import TightshipError

if TYPE_CHECKING:
    import torch

DAMP = 0.01


class NotPositive(TightshipError):
    """The damped moments of a matrix have no inverse."""

    exit_code = 4
    code = "numeric"


def inverse_factor(second: np.ndarray, damp: float, device: str = "cpu") -> torch.Tensor:
    """Upper triangular U (n, n) float64 with U^T U = (S + damp * mean(diag S) * I)^-1.

    One Cholesky factor, of the matrix turned end for end: with J the exchange matrix and J S J = L L^T, U = J L^-1 J.
    Where nothing was seen at all (S = 0), S counts as the identity.

    Raises:
        NotPositive: the factorisation broke down.
    """
    import torch

    matrix = torch.from_numpy(np.ascontiguousarray(second[::-1, ::-1], np.float64)).to(device)
    mean = float(matrix.diagonal().mean())
    if mean == 0:
        return torch.eye(len(matrix), dtype=torch.float64, device=device)
    matrix.diagonal().add_(damp * mean)
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed) or not bool(torch.isfinite(lower).all()):
        raise NotPositive(
            f"the calibration moments are not positive definite (at column {len(matrix) - int(failed)})",
            hint="more calibration text, or a larger `damp`",
        )
    eye = torch.eye(len(matrix), dtype=torch.float64, device=device)
    return torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1).contiguous()


def damped_tensor(second: np.ndarray, damp: float, device: str = "cpu") -> torch.Tensor:
    """S + damp * mean(diag S) * I, (n, n) float64, where no inverse is asked for; a mean of 0 counts as 1."""
    import torch

    found = torch.from_numpy(second.astype(np.float64)).to(device)
    found.diagonal().add_(damp * (float(found.diagonal().mean()) or 1.0))
    return found


def damped(second: np.ndarray, damp: float) -> np.ndarray:
    """S + damp * mean(diag S) * I, (n, n) float64; the identity where nothing was seen at all.

    Raises:
        NotPositive: some direction is still without weight.
    """
    mean = float(np.diagonal(second).mean())
    if mean == 0:
        return np.eye(len(second))
    found = second.astype(np.float64) + damp * mean * np.eye(len(second))
    try:
        np.linalg.cholesky(found)
    except np.linalg.LinAlgError as error:
        raise NotPositive(
            "the calibration moments are not positive definite", hint="more calibration text, or a larger `damp`"
        ) from error
    return found


def corrected(w: np.ndarray, second: np.ndarray, drift: np.ndarray, strength: float, damp: float) -> np.ndarray:
    """W + strength * W drift (S + damp * mean(diag S) * I)^-1, float32: the W that suits drifted inputs.

    `strength` 1 is least squares on the calibration tokens; less keeps some distance from them (QEP's alpha,
    arXiv:2504.09629, equation 9). W (out, in) float32, S and drift (in, in) float64.
    """
    return (w + strength * np.linalg.solve(damped(second, damp), (w.astype(np.float64) @ drift).T).T).astype(np.float32)


def loss(difference: np.ndarray, second: np.ndarray) -> float:
    """tr(D S D^T): mean square of the change of the outputs, summed over outputs. D (out, in), S (in, in)."""
    wide = difference.astype(np.float64)
    return float(np.einsum("ij,ij->", wide @ second, wide))
