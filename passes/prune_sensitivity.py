"""Prune what the loss feels least, to second order: w^2 * mean gradient^2.

Optimal Brain Damage (LeCun et al., 1989) with the empirical Fisher information for the diagonal of the Hessian.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tightship.passes.prune_gradient import Gradient


class Sensitivity(Gradient):
    """See the module."""

    @staticmethod
    def of(gradient: Any) -> Any:
        return gradient.square()

    @staticmethod
    def score(w: np.ndarray, mean: np.ndarray) -> np.ndarray:
        return np.square(w) * mean


METHOD = Sensitivity()
