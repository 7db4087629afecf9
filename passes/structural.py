"""How `prune-structured` makes a model smaller: experts first, then heads and MLP channels in one walk, width last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.dtypes import dtype
from tightship.passes.allotment import allotted
from tightship.passes.base import Run
from tightship.passes.calibration import Figures, Moments, solve_blocks
from tightship.passes.experts import fewer_experts, with_fewer_experts
from tightship.passes.hessian import loss
from tightship.passes.masks import finite
from tightship.passes.silence import loud_units, silenced
from tightship.passes.slicing import principal_directions, sliced
from tightship.passes.spaces import Space, space_of
from tightship.passes.structure import Kept, cut, resized, resized_layers
from tightship.weights import Dense, Stored

if TYPE_CHECKING:
    from tightship.passes.prune_structured import PruneStructured

_INNER = ("heads", "ffn")

Keep = Mapping[str, Sequence[int]]
"""Space -> units that stay in each block."""


def smaller(spec: PruneStructured, checkpoint: Checkpoint, counts: Mapping[str, int], run: Run) -> Checkpoint:
    """Everything that `counts` asks for: space -> units that stay in each block, on average where blocks may differ."""
    if "experts" in counts:
        checkpoint = with_fewer_experts(checkpoint, counts["experts"], run, merge=spec.merge)
    spaces = [space_of(checkpoint, name) for name in _INNER if name in counts]
    if spaces:
        keep = _alike(checkpoint, counts)
        if not spec.uniform:
            keep = allotted(spec, checkpoint, spaces, counts, run)
            for name, units in keep.items():
                run.report(f"{name} that stay", {f"block {block}": count for block, count in enumerate(units)})
        quiet = silence(checkpoint, spaces, keep, run, spec.damp)
        checkpoint = cut_silent(quiet, spaces, keep, uniform=spec.uniform)
    if "width" in counts:
        directions, energy = principal_directions(checkpoint, run)
        run.report("principal directions", {"energy": float(energy[: counts["width"]].sum())})
        checkpoint = sliced(checkpoint, directions[:, : counts["width"]])
    return checkpoint


def _alike(checkpoint: Checkpoint, counts: Mapping[str, int]) -> dict[str, list[int]]:
    return {name: [count] * int(checkpoint.hyper["layers"]) for name, count in counts.items()}


def silence(checkpoint: Checkpoint, spaces: list[Space], keep: Keep, run: Run, damp: float) -> Checkpoint:
    """The same shapes, with all but `keep` units of every space silent."""
    of = {info.name: (info, space) for space in spaces for info in space.readers(checkpoint)}

    def one(name: str, moments: Moments) -> tuple[Stored, Figures]:
        info, space = of[name]
        weight = checkpoint.resolve(name)
        w = finite(name, weight.value())
        columns = space.columns(info, checkpoint.hyper)
        quiet = silenced(w, moments.second, columns, keep[space.name][int(info.block or 0)], damp)
        energy = loss(w, moments.second) or 1.0
        return Dense.of(quiet.astype(dtype(weight.dtype).numpy)), {"loss": loss(quiet - w, moments.second) / energy}

    return checkpoint.with_weights(solve_blocks(checkpoint, run, set(of), one, full=True))


def cut_silent(checkpoint: Checkpoint, spaces: list[Space], keep: Keep, *, uniform: bool = True) -> Checkpoint:
    """The checkpoint without silent units, `keep` of them left: its outputs stay what they are."""
    kept: dict[tuple[int, int | None], dict[str, np.ndarray]] = {}
    for space in spaces:
        for info in space.readers(checkpoint):
            block = int(info.block or 0)
            w = checkpoint.resolve(info.name).value()
            loud = loud_units(w, space.columns(info, checkpoint.hyper), keep[space.name][block])
            kept.setdefault((block, info.expert), {}).update(space.kept(loud))
    return _cut_to(checkpoint, spaces, kept, keep, uniform=uniform)


def _cut_to(
    checkpoint: Checkpoint,
    spaces: list[Space],
    kept: Mapping[tuple[int, int | None], Kept],
    keep: Keep,
    *,
    uniform: bool,
) -> Checkpoint:
    """The checkpoint with only the units `kept`; sizes for the whole model, or for each block where they may differ."""
    layers = range(int(checkpoint.hyper["layers"]))
    sizes = {n: {w: size for s in spaces for w, size in s.sizes(keep[s.name][n]).items()} for n in layers}
    return cut(checkpoint, kept, resized(checkpoint, sizes[0]) if uniform else resized_layers(checkpoint, sizes))


def narrowed(checkpoint: Checkpoint, counts: Mapping[str, int], *, uniform: bool) -> Checkpoint:
    """Config, names and shapes of what `smaller` makes; which units stay is not known without data.

    Nor is, where blocks may differ, how many stay in each: all get the mean, written out block by block.
    """
    layers = range(int(checkpoint.hyper["layers"]))
    if "experts" in counts:
        checkpoint = fewer_experts(checkpoint, {block: np.arange(counts["experts"]) for block in layers})
    spaces = [space_of(checkpoint, name) for name in _INNER if name in counts]
    kept: dict[tuple[int, int | None], dict[str, np.ndarray]] = {}
    for space in spaces:
        for info in space.readers(checkpoint):
            first = space.kept(np.arange(counts[space.name]))
            kept.setdefault((int(info.block or 0), info.expert), {}).update(first)
    if spaces:
        checkpoint = _cut_to(checkpoint, spaces, kept, _alike(checkpoint, counts), uniform=uniform)
    if "width" in counts:
        checkpoint = sliced(checkpoint, np.eye(int(checkpoint.hyper["hidden"]))[:, : counts["width"]])
    return checkpoint
