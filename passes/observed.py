"""Walks through the blocks of a model that stays as it is, for passes that look at all of it before they change any."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from tightship.blocks import BlockStep, walk_blocks
from tightship.checkpoint import Checkpoint
from tightship.modelview import ModelView
from tightship.passes.base import Run
from tightship.passes.calibration import Moments, MomentSums, calibration_windows

Windows = Sequence[np.ndarray]


class BlockMoments(Mapping[str, Moments]):
    """Moments by on-disk name, made when they are asked for: those of all experts at once may be much."""

    def __init__(self, sums: MomentSums, widths: Mapping[str, int]) -> None:
        self._sums, self._widths = sums, widths

    def __getitem__(self, name: str) -> Moments:
        return self._sums.of(name, self._widths[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._widths)

    def __len__(self) -> int:
        return len(self._widths)


def passed_blocks(checkpoint: Checkpoint, run: Run, title: str, windows: Windows | None = None) -> Iterator[BlockStep]:
    """Every block in order, with progress under `title`; `windows` pass through, by default the calibration's.

    Raises:
        Unsupported, Malformed: see `tightship.blocks` and `tightship.texts`.
    """
    blocks = 0
    windows = calibration_windows(checkpoint, run) if windows is None else windows
    for step in walk_blocks(ModelView(checkpoint, threads=run.threads, device=run.device), windows):
        blocks = step.total
        run.progress(title, step.index, blocks)
        yield step
    run.progress(title, blocks, blocks)


def observed_blocks(
    checkpoint: Checkpoint,
    run: Run,
    title: str,
    wanted: Collection[str],
    *,
    windows: Windows | None = None,
    full: bool = True,
) -> Iterator[tuple[BlockStep, BlockMoments]]:
    """As `passed_blocks`, each block with the moments of its `wanted` matrices; `full` as in `MomentSums`."""
    for step in passed_blocks(checkpoint, run, title, windows):
        sums = MomentSums(full=full)
        step.observe(sums)
        names = [name for name in step.linears if name in wanted]
        yield step, BlockMoments(sums, {name: checkpoint.resolve(name).shape[1] for name in names})
