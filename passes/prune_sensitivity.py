"""Prune what the loss feels least, to second order: w^2 * mean gradient^2.

Optimal Brain Damage (LeCun et al., 1989) with the empirical Fisher information for the diagonal of the Hessian.

Over all tensors together (`scope: global`) such a diagonal misjudges whole matrices, so each is ablated: pruned alone,
by the same scores and to the same share, while the divergence of the model's output is measured. Its scores are then
scaled so that what was pruned costs just that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.passes.base import Run
from tightship.passes.calibration import calibration_windows
from tightship.passes.masks import lowest
from tightship.passes.prune import Prune
from tightship.passes.prune_gradient import Gradient
from tightship.passes.stand_ins import StandIns


class Sensitivity(Gradient):
    """See the module."""

    revision: ClassVar[int] = 2

    @staticmethod
    def of(gradient: Any) -> Any:
        return gradient.square()

    @staticmethod
    def score(w: np.ndarray, mean: np.ndarray) -> np.ndarray:
        return np.square(w) * mean

    def comparable(
        self, spec: Prune, checkpoint: Checkpoint, run: Run, scores: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        model = StandIns(checkpoint, calibration_windows(checkpoint, run), run)
        found = {}
        for done, (name, score) in enumerate(scores.items()):
            run.progress("ablation of matrices", done, len(scores))
            mask = lowest(score, round((spec.sparsity or 0.0) * score.size))
            hurt = model.hurt(name, np.where(mask, np.float32(0), checkpoint.resolve(name).value()))
            run.report(f"{name} alone", {"divergence": hurt})
            found[name] = score * (hurt / (float(score[mask].sum(dtype=np.float64)) or 1.0))
        return found


METHOD = Sensitivity()
