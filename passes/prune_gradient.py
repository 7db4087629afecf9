"""Prune what the loss feels least, to first order: |w| * mean |gradient|.

The mean is over windows; of a converged model the plain mean gradient is near zero and says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.dtypes import dtype
from tightship.passes.base import Needs, Run
from tightship.passes.calibration import calibration_windows
from tightship.passes.gradients import mean_over_windows
from tightship.passes.masks import finite, lowest, lowest_in_groups, lowest_in_rows, lowest_of_all
from tightship.passes.prune import Prune, PruneMethod
from tightship.weights import Dense, Stored


class Gradient(PruneMethod):
    """Base of the methods that score with gradients."""

    needs: ClassVar[Needs] = "calibration"

    @staticmethod
    def of(gradient: Any) -> Any:
        """What is averaged over windows."""
        return gradient.abs()

    @staticmethod
    def score(w: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """(rows, cols) float32, larger stays."""
        return np.abs(w) * mean

    def comparable(
        self,
        spec: Prune,  # noqa: ARG002
        checkpoint: Checkpoint,  # noqa: ARG002
        run: Run,  # noqa: ARG002
        scores: Mapping[str, np.ndarray],
    ) -> dict[str, np.ndarray]:
        """Scores that one threshold can be put on, whatever their matrix."""
        return dict(scores)

    def prune(self, spec: Prune, checkpoint: Checkpoint, run: Run) -> Mapping[str, Stored]:
        tensors = spec.tensors(checkpoint)
        means = mean_over_windows(checkpoint, run, calibration_windows(checkpoint, run), self.of)
        values = {name: finite(name, weight.value()) for name, weight in tensors.items()}
        scores = {name: self.score(w, means[name]) for name, w in values.items()}
        if spec.compared == "global":
            scores = self.comparable(spec, checkpoint, run, scores)
        found: dict[str, Stored] = {}
        for name, mask in _masks(spec, scores).items():
            weight = tensors[name]
            word = weight.dtype if isinstance(weight, Dense) else "f32"
            found[name] = Dense.of(np.where(mask, np.float32(0), values[name]).astype(dtype(word).numpy))
            run.report(name, {"sparsity": float((found[name].value() == 0).mean())})
        return found


METHOD = Gradient()


def _masks(spec: Prune, scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    if spec.groups is not None:
        return {name: lowest_in_groups(score, *spec.groups) for name, score in scores.items()}
    share = spec.sparsity or 0.0
    if spec.compared == "row":
        return {name: lowest_in_rows(score, round(share * score.shape[1])) for name, score in scores.items()}
    if spec.compared == "tensor":
        return {name: lowest(score, round(share * score.size)) for name, score in scores.items()}
    return lowest_of_all(scores, share)
