"""What schedules want to know of each matrix, on the unpruned model.

The survey walks the model once. Of each matrix it notes what zeroing a weight is predicted to cost, how many outliers
it has, and, for the score `kl`, what the model's output loses when this matrix alone is pruned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.passes.base import Run
from tightship.passes.calibration import Moments, calibration_windows
from tightship.passes.hessian import loss
from tightship.passes.masks import finite, lowest_of_all
from tightship.passes.observed import observed_blocks
from tightship.passes.schedules import Layer
from tightship.passes.stand_ins import StandIns

if TYPE_CHECKING:
    from tightship.passes.prune import Prune
    from tightship.passes.prune_calibrated import CalibratedPrune

_OUTLIER = 5.0  # times the layer's mean score; M of arXiv:2310.05175
_QUANTILES = 257


def ablates(spec: Prune) -> bool:
    """Whether each matrix is pruned alone to see what the model's output loses."""
    return spec.score in (None, "kl") and spec.schedule != "owl"


def survey(method: CalibratedPrune, spec: Prune, checkpoint: Checkpoint, run: Run) -> dict[str, Layer]:
    """Facts by on-disk name, in the order of the blocks."""
    windows = calibration_windows(checkpoint, run)
    tensors = spec.tensors(checkpoint)
    alone = StandIns(checkpoint, windows, run) if ablates(spec) else None
    layers: dict[str, Layer] = {}
    for step, known in observed_blocks(checkpoint, run, "survey of blocks", tensors, windows=windows):
        found = {}
        for name, moments in known.items():
            w = finite(name, step.read(name))
            hurt = None
            if alone is not None:
                zeros = round((spec.sparsity or 0.0) * w.size)
                hurt = alone.hurt(name, method.pruned(spec, w, moments, zeros, run.device))
            found[name] = _measure(method, spec, w, moments, hurt)
        # Outliers are counted over whole blocks, as in OWL.
        share = sum(f.outliers * f.size for f in found.values()) / max(1, sum(f.size for f in found.values()))
        layers |= {n: Layer(f.size, f.score, share, f.costs) for n, f in found.items()}
    return layers


def global_counts(method: CalibratedPrune, spec: Prune, checkpoint: Checkpoint, run: Run) -> dict[str, int]:
    """How many of the lowest costs of all matrices together each one has. All costs are in memory, float32."""
    tensors, costs = spec.tensors(checkpoint), dict[str, np.ndarray]()
    for step, known in observed_blocks(checkpoint, run, "costs of weights", tensors):
        for name, moments in known.items():
            costs[name] = method.costs(spec, finite(name, step.read(name)), moments).astype(np.float32)
    return {name: int(mask.sum()) for name, mask in lowest_of_all(costs, spec.sparsity or 0.0).items()}


def _measure(method: CalibratedPrune, spec: Prune, w: np.ndarray, moments: Moments, hurt: float | None) -> Layer:
    """`hurt`: divergence of the model when this matrix alone is pruned, for the score `kl`."""
    costs = method.costs(spec, w, moments)
    curve = np.quantile(costs, np.linspace(0, 1, _QUANTILES))
    predicted = float(costs[costs <= np.quantile(costs, spec.sparsity or 0.0)].sum())
    scale = 1.0
    if spec.score == "relative":
        scale = 1.0 / (loss(w, moments.second) or 1.0)
    elif hurt is not None:
        scale = hurt / (predicted or 1.0)
    flows = np.abs(w) * np.sqrt(np.diagonal(moments.second))
    outliers = float((flows > _OUTLIER * flows.mean()).mean())
    value = hurt / w.size if hurt is not None else float(costs.mean()) * scale
    return Layer(w.size, value, outliers, curve * scale)
