"""How many units each block keeps where blocks may differ: many where losing them hurts the model, few elsewhere.

Every block loses units alone, in several numbers around those that all would lose if they were alike, and the model's
output is compared with what it was. What each further step of units costs follows from that, and one cost is found, the
same for all blocks, below which units go (water-filling, as in `schedules`). Every block keeps one step of units at
least, since neither a block without heads nor one without MLP runs everywhere; all blocks together keep what uniform
ones would.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.passes.base import Run
from tightship.passes.calibration import calibration_windows
from tightship.passes.masks import finite
from tightship.passes.observed import observed_blocks
from tightship.passes.schedules import SPREAD, Layer, zeros_per_layer
from tightship.passes.silence import silenced
from tightship.passes.spaces import Space
from tightship.passes.stand_ins import StandIns

if TYPE_CHECKING:
    from tightship.passes.prune_structured import PruneStructured


def allotted(
    spec: PruneStructured, checkpoint: Checkpoint, spaces: list[Space], counts: Mapping[str, int], run: Run
) -> dict[str, list[int]]:
    """Space -> units of each block; their sum is that of `counts` in every block."""
    windows = calibration_windows(checkpoint, run)
    alone = StandIns(checkpoint, windows, run)
    readers = {info.name: (info, space) for space in spaces for info in space.readers(checkpoint)}
    curves: dict[str, list[np.ndarray]] = {space.name: [] for space in spaces}
    for step, known in observed_blocks(checkpoint, run, "cost of units", readers, windows=windows):
        for name, moments in known.items():
            info, space = readers[name]
            w, second = finite(name, step.read(name)), moments.second
            quiet = functools.partial(silenced, w, second, space.columns(info, checkpoint.hyper), damp=spec.damp)
            hurt = functools.partial(_hurt, alone, name, quiet)
            costs = step_costs(hurt, space.units, counts[space.name], space.step(spec.multiple))
            run.report(f"{space.name} of block {step.index}", {"divergence": float(costs.sum())})
            curves[space.name].append(costs)
    return {s.name: shares_of(curves[s.name], counts[s.name], s.step(spec.multiple)) for s in spaces}


def _hurt(model: StandIns, name: str, quiet: Callable[[int], np.ndarray], keep: int) -> float:
    """What the model's output loses when the matrix `name` reads `keep` units."""
    return model.hurt(name, quiet(keep))


def step_costs(hurt: Callable[[int], float], units: int, keep: int, step: int) -> np.ndarray:
    """(units / step,) float64, ascending: what each further step of units that goes costs.

    `hurt(n)`, what it costs to keep n, is measured at the share that is asked for and at two on either side, as far as
    shares may lie apart; straight lines lie in between, and no step is cheaper than the one before it.
    """
    packs = units // step
    shares = 1 - keep / units + np.linspace(-2, 2, 5) * SPREAD["water-fill"]
    places = np.unique(np.clip(np.rint(shares * packs).astype(int), 1, packs - 1))
    known = np.maximum.accumulate([hurt(units - int(place) * step) for place in places])
    ends = [0.0, *known, known[-1] * packs / places[-1]]
    return np.maximum.accumulate(np.diff(np.interp(np.arange(packs + 1), [0, *places, packs], ends)))


def shares_of(curves: list[np.ndarray], keep: int, step: int) -> list[int]:
    """Units that each block keeps, multiples of `step` and at least one, `keep` on average.

    `curves`: of each block what each further step of units costs, ascending.
    """
    packs = len(curves[0]) - 1  # the last one stays in every case
    layers = {str(n): Layer(packs, costs=curve[:-1]) for n, curve in enumerate(curves)}
    gone = packs + 1 - keep // step
    removed = zeros_per_layer("water-fill", layers, gone / packs)
    return [(packs + 1 - removed[name]) * step for name in layers]
