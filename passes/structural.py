"""How `prune-structured` makes a model smaller: experts first, then heads and MLP channels in one walk, width last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.dtypes import dtype
from tightship.passes.base import Run
from tightship.passes.calibration import Figures, Moments, solve_blocks
from tightship.passes.experts import fewer_experts, with_fewer_experts
from tightship.passes.hessian import loss
from tightship.passes.masks import finite
from tightship.passes.silence import loud_units, silenced
from tightship.passes.slicing import principal_directions, sliced
from tightship.passes.spaces import Space, space_of
from tightship.passes.structure import cut
from tightship.weights import Dense, Stored

if TYPE_CHECKING:
    from tightship.passes.prune_structured import PruneStructured

_INNER = ("heads", "ffn")


def smaller(spec: PruneStructured, checkpoint: Checkpoint, counts: Mapping[str, int], run: Run) -> Checkpoint:
    """Everything that `counts` asks for: space -> units that stay in each block."""
    if "experts" in counts:
        checkpoint = with_fewer_experts(checkpoint, counts["experts"], run, merge=spec.merge)
    spaces = [space_of(checkpoint, name) for name in _INNER if name in counts]
    if spaces:
        quiet = silence(checkpoint, spaces, counts, run, spec.damp)
        checkpoint = cut_silent(quiet, spaces, counts)
    if "width" in counts:
        directions, energy = principal_directions(checkpoint, run)
        run.report("principal directions", {"energy": float(energy[: counts["width"]].sum())})
        checkpoint = sliced(checkpoint, directions[:, : counts["width"]])
    return checkpoint


def silence(
    checkpoint: Checkpoint, spaces: list[Space], counts: Mapping[str, int], run: Run, damp: float
) -> Checkpoint:
    """The same shapes, with all but `counts` units of every space silent in every block."""
    of = {info.name: (info, space) for space in spaces for info in space.readers(checkpoint)}

    def one(name: str, moments: Moments) -> tuple[Stored, Figures]:
        info, space = of[name]
        weight = checkpoint.resolve(name)
        w = finite(name, weight.value())
        columns = space.columns(info, checkpoint.hyper)
        quiet = silenced(w, moments.second, columns, counts[space.name], damp)
        energy = loss(w, moments.second) or 1.0
        return Dense.of(quiet.astype(dtype(weight.dtype).numpy)), {"loss": loss(quiet - w, moments.second) / energy}

    return checkpoint.with_weights(solve_blocks(checkpoint, run, set(of), one, full=True))


def cut_silent(checkpoint: Checkpoint, spaces: list[Space], counts: Mapping[str, int]) -> Checkpoint:
    """The checkpoint without silent units, `counts` of them left: its outputs stay what they are."""
    kept: dict[tuple[int, int | None], dict[str, np.ndarray]] = {}
    for space in spaces:
        for info in space.readers(checkpoint):
            w = checkpoint.resolve(info.name).value()
            loud = loud_units(w, space.columns(info, checkpoint.hyper), counts[space.name])
            kept.setdefault((int(info.block or 0), info.expert), {}).update(space.kept(loud))
    sizes = {width: size for space in spaces for width, size in space.sizes(counts[space.name]).items()}
    return cut(checkpoint, kept, sizes)


def narrowed(checkpoint: Checkpoint, counts: Mapping[str, int]) -> Checkpoint:
    """Config, names and shapes of what `smaller` makes; which units stay is not known without data."""
    layers = range(int(checkpoint.hyper["layers"]))
    if "experts" in counts:
        checkpoint = fewer_experts(checkpoint, {block: np.arange(counts["experts"]) for block in layers})
    for space in (space_of(checkpoint, name) for name in _INNER if name in counts):
        first = space.kept(np.arange(counts[space.name]))
        kept = {(int(info.block or 0), info.expert): first for info in space.readers(checkpoint)}
        checkpoint = cut(checkpoint, kept, space.sizes(counts[space.name]))
    if "width" in counts:
        checkpoint = sliced(checkpoint, np.eye(int(checkpoint.hyper["hidden"]))[:, : counts["width"]])
    return checkpoint
