"""GPTQ on every grid: parameters searched with importance, codes rounded with error feedback.

Both orders of `feedback` are tried, unless `actorder` says which; the better one is improved by `sweeps` rounds of
`refit` (parameters given codes) and `descent` (codes given parameters).
Feedback can lose to plain rounding on a matrix that few tokens reached; of all candidates the one with the least
calibration loss is kept, and the report says which. A matrix whose moments have no inverse is an error; if the
recipe allows it, importance search takes over and the report counts it.

With `propagate` the loss is against what the matrix should be on inputs that carry the errors of the blocks before.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from tightship.errors import Unsupported
from tightship.layout import Arrays
from tightship.passes.calibration import Figures, Moments
from tightship.passes.hessian import DAMP, corrected
from tightship.passes.quantize import Matrix, Quantize
from tightship.passes.quantize.calibrated import Calibrated, error, output_energy, rounded, values
from tightship.passes.quantize.descent import descend
from tightship.passes.quantize.feedback import Feedback, round_with_feedback
from tightship.passes.quantize.refit import refit

SWEEPS = 4


class Gptq(Calibrated):
    """See the module."""

    full: ClassVar[bool] = True
    revision: ClassVar[int] = 2
    options: ClassVar[frozenset[str]] = frozenset({"actorder", "damp", "sweeps", "propagate", "compensate"})

    def check_matrix(self, name: str, matrix: Matrix) -> None:
        if matrix.layout.code_width > 1:
            raise Unsupported(
                f"codes of {matrix.layout.name} span {matrix.layout.code_width} columns; GPTQ rounds one at a time",
                tensor=name,
                hint="use the rtn or importance solver for this layout",
            )

    def matrix(
        self, spec: Quantize, name: str, matrix: Matrix, moments: Moments, *, pruned: bool, device: str
    ) -> tuple[Arrays, Figures]:
        w = _wanted(spec, values(name, matrix), moments, pruned=pruned)
        (plain, loss_rtn), (searched, loss_searched) = rounded(name, matrix, w, moments)
        fed_back, word = self._fed_back(spec, matrix, moments, w, pruned=pruned, device=device)
        candidates = {
            word: (fed_back, error(matrix, w, fed_back, moments)),
            "importance": (searched, loss_searched),
            "rtn": (plain, loss_rtn),
        }
        chosen = min(candidates, key=lambda solver: candidates[solver][1])
        energy = output_energy(w, moments) or 1.0
        best, lowest = candidates[chosen]
        return best, {
            "solver": chosen,
            "loss": lowest / energy,
            "loss_importance": loss_searched / energy,
            "loss_rtn": loss_rtn / energy,
        }

    def _fed_back(
        self, spec: Quantize, matrix: Matrix, moments: Moments, w: np.ndarray, *, pruned: bool, device: str
    ) -> tuple[Arrays, str]:
        """The better order's codes and parameters, improved in turn, and its name."""
        damp = DAMP if spec.damp is None else spec.damp
        found: dict[str, Arrays] = {}
        for actorder in (True, False) if spec.actorder is None else (spec.actorder,):
            how = Feedback(actorder=actorder, damp=damp, device=device)
            arrays = round_with_feedback(w, moments.second, matrix.layout, how, keep_zeros=pruned)
            found["gptq-actorder" if actorder else "gptq"] = arrays
        word = min(found, key=lambda order: error(matrix, w, found[order], moments))
        best = found[word]
        for _ in range(SWEEPS if spec.sweeps is None else spec.sweeps):
            for improve in (refit, descend):
                best = improve(best, w, moments.second, matrix.layout, damp=damp, keep_zeros=pruned, device=device)
        return best, word


def _wanted(spec: Quantize, w: np.ndarray, moments: Moments, *, pruned: bool) -> np.ndarray:
    """The matrix to come near to: itself, or with `propagate` what makes good for errors before it; zeros stay."""
    if not spec.propagate or moments.drift is None:
        return w
    damp = DAMP if spec.damp is None else spec.damp
    target = corrected(w, moments.second, moments.drift, spec.propagate, damp)
    return np.where(w == 0, np.float32(0), target) if pruned else target


SOLVER = Gptq()
