"""How many units each block keeps where blocks may differ: many where losing them hurts the model, few elsewhere.

Every block loses its units alone, as many as all would lose if they were alike, and the model's output is compared
with what it was; the cost of each unit (`silence.unit_costs`) is scaled by that. Then one cost is found, the same for
all blocks, below which units go (water-filling, as in `schedules`). Every block keeps one step of units at least, since
neither a block without heads nor one without MLP runs everywhere; all blocks together keep what uniform ones would.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from tightship.blocks import walk_blocks
from tightship.checkpoint import Checkpoint
from tightship.modelview import ModelView
from tightship.passes.base import Run
from tightship.passes.calibration import MomentSums, calibration_windows
from tightship.passes.hessian import damped
from tightship.passes.masks import finite
from tightship.passes.schedules import Layer, zeros_per_layer
from tightship.passes.silence import silenced, unit_costs
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
    for step in walk_blocks(ModelView(checkpoint, threads=run.threads, device=run.device), windows):
        run.progress("cost of units", step.index, int(checkpoint.hyper["layers"]))
        sums = MomentSums(full=True)
        step.observe(sums)
        for name in [name for name in step.linears if name in readers]:
            info, space = readers[name]
            w, keep = finite(name, step.read(name)), counts[space.name]
            columns, second = space.columns(info, checkpoint.hyper), sums.of(name, w.shape[1]).second
            before = alone.put(name, silenced(w, second, columns, keep, spec.damp))
            hurt = alone.divergence()
            alone.put(name, before)
            run.report(f"{space.name} of block {step.index}", {"divergence": hurt})
            costs = np.sort(unit_costs(w.astype(np.float64), damped(second, spec.damp), columns))
            curves[space.name].append(costs * hurt / (float(costs[: len(costs) - keep].sum()) or 1.0))
    return {s.name: shares_of(curves[s.name], counts[s.name], s.step(spec.multiple)) for s in spaces}


def shares_of(curves: list[np.ndarray], keep: int, step: int) -> list[int]:
    """Units that each block keeps, multiples of `step` and at least one, `keep` on average.

    `curves`: of each block the ascending costs of its units, their number a multiple of `step`.
    """
    packs = len(curves[0]) // step - 1  # the last one stays in every case
    layers = {str(n): Layer(packs, costs=curve.reshape(-1, step).sum(axis=1)[:-1]) for n, curve in enumerate(curves)}
    gone = packs + 1 - keep // step
    removed = zeros_per_layer("water-fill", layers, gone / packs)
    return [(packs + 1 - removed[name]) * step for name in layers]
