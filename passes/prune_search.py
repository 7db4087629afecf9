"""Search for shares: move zeros from one matrix to another as long as the model's output comes nearer to what it was.

A trial takes two matrices and moves as many zeros from one to the other as `stride` of the smaller one holds; the
stride falls from trial to trial. It stays if the divergence (`tightship.passes.divergence`) falls. Both matrices are
pruned anew for it, on the moments that the unpruned model gives, and all others stand in the model as pruned so far,
so what they do to each other is measured, not predicted. The total never changes. The idea of exchanging levels under
a fixed budget is EvoPress's (Sieberling et al., arXiv:2410.14649); a database of levels and generations are left out.

The moments of all matrices are in memory, and the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.passes.base import Run
from tightship.passes.calibration import Moments, calibration_windows
from tightship.passes.masks import finite
from tightship.passes.observed import observed_blocks
from tightship.passes.schedules import CEILING
from tightship.passes.stand_ins import StandIns

if TYPE_CHECKING:
    from tightship.passes.prune import Prune
    from tightship.passes.prune_calibrated import CalibratedPrune

TRIALS = 100
_STRIDES = (0.1, 0.01)  # of the smaller matrix, first and last


def search(
    method: CalibratedPrune, spec: Prune, checkpoint: Checkpoint, run: Run, seed: Mapping[str, int]
) -> dict[str, int]:
    """Zeros of each matrix, from `seed` on; their sum stays."""
    windows = calibration_windows(checkpoint, run)
    moments = all_moments(checkpoint, run, set(seed), windows)
    weights = {name: finite(name, checkpoint.resolve(name).value()) for name in seed}

    def pruned(name: str, zeros: int) -> np.ndarray:
        return method.pruned(spec, weights[name], moments[name], zeros, run.device)

    model = StandIns(checkpoint, windows, run)
    for name, zeros in seed.items():
        model.put(name, pruned(name, zeros))
    found, best = dict(seed), model.divergence()
    rng = np.random.default_rng(run.seed)
    trials = TRIALS if spec.trials is None else spec.trials
    for trial in range(trials):
        run.progress("search of shares", trial, trials)
        more, less = (str(name) for name in rng.choice(sorted(found), 2, replace=False))
        stride = np.interp(trial / max(trials - 1, 1), (0, 1), _STRIDES)
        amount = round(float(stride) * min(weights[more].size, weights[less].size))
        amount = min(amount, found[less], int(CEILING * weights[more].size) - found[more])
        if amount <= 0:
            continue
        tried = {more: found[more] + amount, less: found[less] - amount}
        before = {name: model.put(name, pruned(name, zeros)) for name, zeros in tried.items()}
        now = model.divergence()
        if now < best:
            found, best = found | tried, now
        else:
            for name, values in before.items():
                model.put(name, values)
    return found


def all_moments(checkpoint: Checkpoint, run: Run, names: set[str], windows: Sequence[np.ndarray]) -> dict[str, Moments]:
    """What reaches each matrix in the model as it is."""
    found: dict[str, Moments] = {}
    for _, known in observed_blocks(checkpoint, run, "moments of blocks", names, windows=windows):
        found |= known
    return found
