"""Calibrated passes: one block after the other, each solved on inputs that passed through the solved blocks before it.

For every matrix, what reached it is summed up as *moments*:

    second = sum over tokens of x x^T / tokens     (in, in) float64, or its diagonal (in,): the mean square of a channel

Products are float32 in runs of at most 4096 tokens, sums are float64. Twice `second` is the Hessian of the squared
output error with respect to a row of the matrix; its diagonal is what llama.cpp calls the importance matrix.

With a scratch directory every solved block is kept, so a killed run goes on with the next block and ends in the same
bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tightship.blocks import BlockStep, BlockWalk
from tightship.checkpoint import Checkpoint
from tightship.durable import flush_tree
from tightship.modelview import ModelView
from tightship.passes.base import Run
from tightship.stage_codec import load_stage, save_stage
from tightship.texts import generated_windows, token_windows
from tightship.weights import Stored

Figures = dict[str, float | int | str]
_Weights = dict[str, Stored]
_AllFigures = dict[str, Figures]


@dataclass(frozen=True)
class Moments:
    """What reached a matrix: `second` as above, and from how many tokens (an expert sees only those routed to it)."""

    second: np.ndarray
    tokens: int

    @property
    def importance(self) -> np.ndarray:
        """(in,) float32: mean square of each input channel."""
        diagonal = self.second if self.second.ndim == 1 else np.diagonal(self.second)
        return diagonal.astype(np.float32)


Solve = Callable[[str, Moments], tuple[Stored, Figures]]
"""solve(on-disk name, moments) -> the weight to go on with, and figures for the report."""


class MomentSums:
    """Collects moments; an observer of `tightship.blocks`. Matrices that are fed the same tensor share one sum."""

    def __init__(self, *, full: bool) -> None:
        self._full = full
        self._sums: dict[str, Any] = {}
        self._tokens: dict[str, int] = {}
        self._leader: dict[str, str] = {}
        self._last: Any = None

    def __call__(self, names: tuple[str, ...], x: Any) -> None:
        leader = names[0]
        if self._last is not None and _same(self._last[1], x):
            leader = self._last[0]
        else:
            self._last = (leader, x)
            self._add(leader, x)
        for name in names:
            if self._leader.setdefault(name, leader) != leader:
                raise RuntimeError(f"{name} shared its inputs with {self._leader[name]} before, now with {leader}")

    def of(self, name: str, width: int) -> Moments:
        """The moments of a matrix with `width` input channels; zeros where no token reached it."""
        leader = self._leader.get(name)
        if leader is None:
            return Moments(np.zeros((width, width) if self._full else width), 0)
        count = self._tokens[leader]
        return Moments(self._sums[leader].cpu().numpy() / max(count, 1), count)

    def _add(self, leader: str, x: Any) -> None:
        import torch

        rows = x.reshape(-1, x.shape[-1])
        added = (rows.T @ rows).double() if self._full else rows.square().sum(dim=0, dtype=torch.float64)
        known = self._sums.get(leader)
        self._sums[leader] = added if known is None else known.add_(added)
        self._tokens[leader] = self._tokens.get(leader, 0) + len(rows)


def _same(a: Any, b: Any) -> bool:
    """Whether two tensors are the same memory, unchanged; both are alive, so an address is not a coincidence."""
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a._version == b._version)


def calibration_windows(checkpoint: Checkpoint, run: Run) -> Sequence[np.ndarray]:
    """Token windows of the run's texts, or, without any, of text that `checkpoint` writes itself."""
    if run.texts:
        return token_windows(checkpoint, run.texts, tokens=run.tokens, sequence=run.sequence)
    view = ModelView(checkpoint, threads=run.threads, device=run.device)
    return generated_windows(view, tokens=run.tokens, sequence=run.sequence, seed=run.seed)


def solve_blocks(checkpoint: Checkpoint, run: Run, wanted: Collection[str], solve: Solve, *, full: bool) -> _Weights:
    """Solve the `wanted` matrices block by block; the new weights by on-disk name.

    `full` asks for whole moments, otherwise their diagonal.

    Raises:
        Unsupported, Malformed: see `tightship.blocks` and `tightship.texts`; and what `solve` raises.
    """
    view = ModelView(checkpoint, threads=run.threads, device=run.device)
    walk = BlockWalk(view, calibration_windows(checkpoint, run))
    blocks = len(walk.blocks)
    changed: _Weights = {}
    for step in walk.steps(outside=wanted):
        run.progress("calibrated blocks", step.index, blocks)
        names = [name for name in step.linears if name in wanted]
        kept = _Kept(run.scratch, step.index)
        solved, figures = kept.load(checkpoint) or kept.save(
            checkpoint, *_solve_block(checkpoint, step, names, solve, full)
        )
        for name, weight in solved.items():
            step.write(name, weight)
            run.report(name, figures[name])
        changed.update(solved)
    run.progress("calibrated blocks", blocks, blocks)
    return changed


def _solve_block(
    checkpoint: Checkpoint, step: BlockStep, names: Sequence[str], solve: Solve, full: bool
) -> tuple[_Weights, _AllFigures]:
    sums = MomentSums(full=full)
    if names:
        step.observe(sums)
    solved: _Weights = {}
    figures: _AllFigures = {}
    for name in names:
        moments = sums.of(name, checkpoint.resolve(name).shape[1])
        solved[name], found = solve(name, moments)
        figures[name] = {"tokens": moments.tokens, **found}
    return solved, figures


class _Kept:
    """A solved block in the scratch directory, whole or not at all."""

    def __init__(self, scratch: str | Path | None, index: int) -> None:
        self._folder = None if scratch is None else Path(scratch) / f"block-{index:05d}"

    def load(self, checkpoint: Checkpoint) -> tuple[_Weights, _AllFigures] | None:
        if self._folder is None or not self._folder.exists():
            return None
        found = json.loads((self._folder / "stage.json").read_text())
        figures, stage = found["figures"], load_stage(self._folder, found["body"], checkpoint)
        return {name: stage.resolve(name) for name in figures}, figures

    def save(self, checkpoint: Checkpoint, solved: _Weights, figures: _AllFigures) -> tuple[_Weights, _AllFigures]:
        """What is to be gone on with: where there is a scratch directory, weights that are read from it."""
        if self._folder is None:
            return solved, figures
        partial = self._folder.with_suffix(".partial")
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        body = save_stage(partial, checkpoint, checkpoint.with_weights(solved))
        (partial / "stage.json").write_text(json.dumps({"body": body, "figures": figures}))
        flush_tree(partial)
        partial.rename(self._folder)
        flush_tree(self._folder.parent, deep=False)
        return self.load(checkpoint) or (solved, figures)
