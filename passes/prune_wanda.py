"""Wanda: zero what carries least. Sun et al., arXiv:2306.11695.

The score of a weight is |w_ij| * root mean square of input channel j; by default it is compared within a row, so
the zeros are spread evenly over rows. Nothing is updated.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from tightship.passes.calibration import Moments
from tightship.passes.masks import even_rows, lowest, lowest_in_groups
from tightship.passes.prune import Prune
from tightship.passes.prune_calibrated import CalibratedPrune


class Wanda(CalibratedPrune):
    """See the module."""

    options: ClassVar[frozenset[str]] = frozenset({"schedule", "score", "spread", "trials"})
    scopes: ClassVar[tuple[str, ...]] = ("row", "tensor", "global")

    def pruned(self, spec: Prune, w: np.ndarray, moments: Moments, zeros: int, device: str) -> np.ndarray:  # noqa: ARG002
        scores = np.abs(w) * np.sqrt(moments.importance)
        scores[w == 0] = -1.0  # what is zero already counts, also where a channel carries nothing
        if spec.groups:
            mask = lowest_in_groups(scores, *spec.groups)
        else:
            mask = even_rows(scores, zeros) if spec.compared == "row" else lowest(scores, zeros)
        return np.where(mask, np.float32(0), w)

    def costs(self, spec: Prune, w: np.ndarray, moments: Moments) -> np.ndarray:  # noqa: ARG002
        return np.square(w, dtype=np.float64) * np.diagonal(moments.second)


METHOD = Wanda()
