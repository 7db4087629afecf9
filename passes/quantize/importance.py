"""Round to nearest, with parameters searched where errors hurt: each input channel weighs as much as it carries.

The weight of a channel is the mean square of what flows through it (llama.cpp's importance matrix; the diagonal of
GPTQ's Hessian). The search itself is the layout's.
"""

from __future__ import annotations

from typing import ClassVar

from tightship.layout import Arrays
from tightship.passes.calibration import Figures, Moments
from tightship.passes.quantize import Matrix, Quantize
from tightship.passes.quantize.calibrated import Calibrated, better_search


class Importance(Calibrated):
    """Data-free search where the weighted one turns out worse on its own measure; that is counted."""

    full: ClassVar[bool] = False

    def matrix(
        self,
        spec: Quantize,  # noqa: ARG002
        name: str,
        matrix: Matrix,
        moments: Moments,
        *,
        pruned: bool,  # noqa: ARG002 - a layout that keeps zeros rounds 0.0 to 0.0
        device: str,  # noqa: ARG002
    ) -> tuple[Arrays, Figures]:
        return better_search(name, matrix, moments)


SOLVER = Importance()
