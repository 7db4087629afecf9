"""Wanda: zero what carries least. Sun et al., arXiv:2306.11695.

The score of a weight is |w_ij| * root mean square of input channel j; it is compared within a row, so the zeros are
spread evenly over rows. Nothing is updated.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from tightship.passes.calibration import Moments
from tightship.passes.masks import lowest_in_groups, lowest_in_rows
from tightship.passes.prune import Prune
from tightship.passes.prune_calibrated import CalibratedPrune


class Wanda(CalibratedPrune):
    """See the module."""

    options: ClassVar[frozenset[str]] = frozenset({"schedule", "score", "spread", "trials"})

    def pruned(self, spec: Prune, w: np.ndarray, moments: Moments, zeros: int, device: str) -> np.ndarray:  # noqa: ARG002
        scores = np.abs(w) * np.sqrt(moments.importance)
        scores[w == 0] = -1.0  # what is zero already counts, also where a channel carries nothing
        mask = lowest_in_groups(scores, *spec.groups) if spec.groups else even_rows(scores, zeros)
        return np.where(mask, np.float32(0), w)

    def costs(self, spec: Prune, w: np.ndarray, moments: Moments) -> np.ndarray:  # noqa: ARG002
        return np.square(w, dtype=np.float64) * np.diagonal(moments.second)


METHOD = Wanda()


def even_rows(scores: np.ndarray, count: int) -> np.ndarray:
    """Boolean (rows, cols): `count` in all, the lowest of each row, rows differing by one at most."""
    share, extra = divmod(count, len(scores))
    ends = np.arange(1, len(scores) + 1) * extra // len(scores)
    longer = np.diff(ends, prepend=0) > 0
    mask = np.empty(scores.shape, bool)
    for rows, number in ((longer, share + 1), (~longer, share)):
        if rows.any():
            mask[rows] = lowest_in_rows(scores[rows], number)
    return mask
