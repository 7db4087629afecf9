"""SparseGPT as a pruning method; the arithmetic is in `sparsegpt`."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from tightship.passes.calibration import Moments
from tightship.passes.hessian import DAMP
from tightship.passes.prune import Prune
from tightship.passes.prune_calibrated import CalibratedPrune
from tightship.passes.sparsegpt import Sweep, column_costs, prune_with_feedback


class SparseGpt(CalibratedPrune):
    """Zeros where w^2 / U_jj^2 is least, and the other weights of the row make good for them."""

    options: ClassVar[frozenset[str]] = frozenset({"schedule", "score", "spread", "trials", "damp"})
    scopes: ClassVar[tuple[str, ...]] = ("columns", "row", "tensor", "global")

    def pruned(self, spec: Prune, w: np.ndarray, moments: Moments, zeros: int, device: str) -> np.ndarray:
        return prune_with_feedback(w, moments.second, zeros, self.sweep(spec, device))[0]

    def sweep(self, spec: Prune, device: str) -> Sweep:
        """How the spec wants it."""
        damp = DAMP if spec.damp is None else spec.damp
        return Sweep(spec.groups, damp, device, "tensor" if spec.compared == "global" else spec.compared)

    def costs(self, spec: Prune, w: np.ndarray, moments: Moments) -> np.ndarray:
        return np.square(w, dtype=np.float64) * column_costs(moments.second, DAMP if spec.damp is None else spec.damp)


METHOD = SparseGpt()
