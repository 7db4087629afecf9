"""GPTQ on every grid: parameters searched with importance, codes rounded with error feedback.

Both orders of `feedback` are tried, unless `actorder` says which. The feedback can lose to plain rounding on a matrix
that few tokens reached; of all candidates the one with the least calibration loss is kept, and the report says which.
A matrix whose moments have no inverse is an error, never a silent rounding.
"""

from __future__ import annotations

from typing import ClassVar

from tightship.errors import Unsupported
from tightship.layout import Arrays
from tightship.passes.calibration import Figures, Moments
from tightship.passes.hessian import DAMP, NotPositive
from tightship.passes.quantize import Matrix, Quantize
from tightship.passes.quantize.calibrated import Calibrated, error, output_energy, rounded, values
from tightship.passes.quantize.feedback import Feedback, round_with_feedback


class Gptq(Calibrated):
    """See the module."""

    full: ClassVar[bool] = True
    options: ClassVar[frozenset[str]] = frozenset({"actorder", "damp"})

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
        w = values(name, matrix)
        (plain, loss_rtn), (searched, loss_searched) = rounded(name, matrix, w, moments)
        candidates = {"importance": (searched, loss_searched), "rtn": (plain, loss_rtn)}
        for actorder in (True, False) if spec.actorder is None else (spec.actorder,):
            how = Feedback(actorder=actorder, damp=DAMP if spec.damp is None else spec.damp, device=device)
            try:
                arrays = round_with_feedback(w, moments.second, matrix.layout, how, keep_zeros=pruned)
            except NotPositive as failure:
                raise NotPositive(failure.message, tensor=name, hint=failure.hint) from failure
            word = "gptq-actorder" if actorder else "gptq"
            candidates[word] = (arrays, error(matrix, w, arrays, moments))
        chosen = min(candidates, key=lambda solver: candidates[solver][1])
        energy = output_energy(w, moments) or 1.0
        best, lowest = candidates[chosen]
        return best, {
            "solver": chosen,
            "loss": lowest / energy,
            "loss_importance": loss_searched / energy,
            "loss_rtn": loss_rtn / energy,
        }


SOLVER = Gptq()
