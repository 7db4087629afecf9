"""Make units of a width silent: zero the columns that read them, and let the other columns make good for it.

For a matrix W (out, in) that reads the units, with moments S of its inputs, removing the columns of a set R and
choosing the others anew by least squares,

    W_K <- W_K + W_R S_RK (S_KK)^-1,

costs tr(W_R (S^-1_RR)^-1 W_R^T) of its outputs' mean square (Optimal Brain Surgeon for groups of weights; Kurtic et
al., arXiv:2302.04089, equation 2). Units go in a few rounds, each chosen on what the rounds before left. Arithmetic is
float64.
"""

from __future__ import annotations

import numpy as np

from tightship.passes.hessian import damped

_ROUNDS = 8


def silenced(w: np.ndarray, second: np.ndarray, columns: np.ndarray, keep: int, damp: float) -> np.ndarray:
    """`w` (out, in) float32 with the columns of all but `keep` units zero.

    Args:
        second: moments of the inputs, (in, in) float64.
        columns: (units, columns of each) int64, which columns read which unit.
        keep: units that stay.
        damp: share of the mean diagonal added to it.

    Raises:
        NotPositive: the moments have no inverse.
    """
    moments = damped(second, damp)
    stay = np.arange(len(columns))
    now = w.astype(np.float64)
    for size in np.linspace(len(columns), keep, _ROUNDS + 1).round().astype(int)[1:]:
        scores = unit_costs(now, moments, columns[stay])
        stay = np.sort(stay[np.argsort(-scores, kind="stable")[:size]])
        now = _refitted(w, moments, columns, stay)
    return now.astype(np.float32)


def unit_costs(w: np.ndarray, moments: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(units,) float64: what silencing each unit alone costs, among the units of `columns` (all others are silent)."""
    alive = np.sort(columns.reshape(-1))
    inverse = np.linalg.inv(moments[np.ix_(alive, alive)])
    at = np.searchsorted(alive, columns)
    blocks = inverse[at[:, :, None], at[:, None, :]]
    mine = w[:, columns].swapaxes(0, 1)
    return np.asarray(np.einsum("uoi,uij,uoj->u", mine, np.linalg.inv(blocks), mine))


def _refitted(w: np.ndarray, moments: np.ndarray, columns: np.ndarray, stay: np.ndarray) -> np.ndarray:
    """The least-squares columns of the units that stay, zero elsewhere. Units that were silent leave the rest as is."""
    keep = np.sort(columns[stay].reshape(-1))
    gone = np.setdiff1d(columns.reshape(-1), keep)
    found = np.zeros(w.shape)
    found[:, keep] = w[:, keep]
    if w[:, gone].any():
        found[:, keep] += w[:, gone] @ np.linalg.solve(moments[np.ix_(keep, keep)], moments[np.ix_(keep, gone)]).T
    return found


def loud_units(w: np.ndarray, columns: np.ndarray, keep: int) -> np.ndarray:
    """Numbers of `keep` units, ascending: all that are read, filled up with silent ones of lowest number."""
    silent = ~w[:, columns].any(axis=(0, 2))
    return np.sort(np.argsort(silent, kind="stable")[:keep])
