"""Calibrated passes: one block after the other, each solved on inputs that passed through the solved blocks before it.

For every matrix, what reached it is summed up as *moments*:

    second = sum over tokens of x x^T / tokens     (in, in) float64, or its diagonal (in,): the mean square of a channel

Products are float32 in runs of at most 4096 tokens, sums are float64. Twice `second` is the Hessian of the squared
output error with respect to a row of the matrix; its diagonal is what llama.cpp calls the importance matrix.

Where errors are to be propagated (QEP, arXiv:2504.09629), the blocks are walked a second time on untouched weights, and

    drift = mean over tokens of (x - x') x'^T        (in, in) float64, x' what the solved blocks before really hand on

says how inputs have moved: the matrix whose outputs on x' are nearest to W x is W + W drift second^-1.

With a scratch directory every solved block is kept, so a killed run goes on with the next block and ends in the same
bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tightship.blocks import BlockStep, BlockWalk
from tightship.checkpoint import Checkpoint
from tightship.durable import flush_tree
from tightship.errors import GateFailed
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
    """What reached a matrix: `second` as above, and from how many tokens (an expert sees only those routed to it).

    `drift` as above where it was asked for and can be told: an expert's tokens are not the same in both walks.
    """

    second: np.ndarray
    tokens: int
    drift: np.ndarray | None = None

    @property
    def importance(self) -> np.ndarray:
        """(in,) float32: mean square of each input channel."""
        diagonal = self.second if self.second.ndim == 1 else np.diagonal(self.second)
        return diagonal.astype(np.float32)


Solve = Callable[[str, Moments], tuple[Stored, Figures]]
"""solve(on-disk name, moments) -> the weight to go on with, and figures for the report."""


class Unreached(GateFailed):
    """A matrix that calibration knows nothing about."""

    code = "unreached"


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


class DriftSums:
    """Collects drift from two steps of the same block, one on untouched weights."""

    def __init__(self, untouched: BlockStep, step: BlockStep, experts: Set[str]) -> None:
        self._sums: dict[str, Any] = {}
        self._tokens = 0
        for before, now in zip(untouched.inputs(), step.inputs(), strict=True):
            added: dict[int, Any] = {}
            for names, x in now.items():
                if not experts & set(names):
                    self._add(names, before[names], x, added)
            self._tokens += max((len(x) for x in now.values()), default=0)

    def of(self, name: str) -> np.ndarray | None:
        """The drift of a matrix; None where its tokens cannot be paired."""
        found = self._sums.get(name)
        return None if found is None else found.cpu().numpy() / max(self._tokens, 1)

    def _add(self, names: tuple[str, ...], before: Any, now: Any, added: dict[int, Any]) -> None:
        """Matrices that are fed the same tensor share one product; `added` holds those of this batch by address."""
        product = added.setdefault(now.data_ptr(), ((before - now).T @ now).double())
        for name in names:
            known = self._sums.get(name)
            self._sums[name] = product if known is None else known + product


def _same(a: Any, b: Any) -> bool:
    """Whether two tensors are the same memory, unchanged; both are alive, so an address is not a coincidence."""
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a._version == b._version)


def calibration_windows(checkpoint: Checkpoint, run: Run) -> Sequence[np.ndarray]:
    """Token windows of the run's texts or of what the source wrote; without either `checkpoint` writes some itself."""
    if run.written:
        return run.written
    if run.texts:
        return token_windows(checkpoint, run.texts, tokens=run.tokens, sequence=run.sequence)
    view = ModelView(checkpoint, threads=run.threads, device=run.device)
    return generated_windows(view, tokens=run.tokens, sequence=run.sequence, seed=run.seed)


def solve_blocks(
    checkpoint: Checkpoint,
    run: Run,
    wanted: Collection[str],
    solve: Solve,
    *,
    full: bool,
    drift: bool = False,
) -> _Weights:
    """Solve the `wanted` matrices block by block; the new weights by on-disk name.

    `full` asks for whole moments, otherwise their diagonal; `drift` for what errors before a matrix did to its inputs.

    Raises:
        Unreached: no token reached a matrix, and `run.allow` does not let it pass.
        Unsupported, Malformed: see `tightship.blocks` and `tightship.texts`; and what `solve` raises.
    """
    view = ModelView(checkpoint, threads=run.threads, device=run.device)
    windows = calibration_windows(checkpoint, run)
    walk = BlockWalk(view, windows)
    untouched = BlockWalk(view, windows).steps() if drift else None
    blocks = len(walk.blocks)
    changed: _Weights = {}
    tokens: dict[str, int] = {}
    singular = 0
    for step in walk.steps(outside=wanted):
        run.progress("calibrated blocks", step.index, blocks)
        pair = (step, next(untouched) if untouched is not None and step.index < blocks else None)
        names = [name for name in step.linears if name in wanted]
        kept = _Kept(run.scratch, step.index)
        solved, figures = kept.load(checkpoint) or kept.save(
            checkpoint, *_solve_block(checkpoint, pair, names, _if_reached(solve, run.allow), full)
        )
        for name, weight in solved.items():
            step.write(name, weight)
            run.report(name, figures[name])
            tokens[name] = int(figures[name]["tokens"])
            singular += figures[name].get("fallback") == "singular"
        changed.update(solved)
    run.progress("calibrated blocks", blocks, blocks)
    _tell_thin(checkpoint, tokens, run)
    if singular:
        run.report("matrices whose moments have no inverse", {"count": singular})
    return changed


def _if_reached(solve: Solve, allow: Collection[str]) -> Solve:
    """`solve`, refusing matrices that no token reached unless they are let through."""

    def one(name: str, moments: Moments) -> tuple[Stored, Figures]:
        if not moments.tokens and "unreached" not in allow:
            raise Unreached(
                "no token of the calibration text reached this matrix, so that nothing is known about it",
                tensor=name,
                hint="more calibration text, or `allow: [unreached]` under the recipe's `calibration`",
            )
        return solve(name, moments)

    return one


def _tell_thin(checkpoint: Checkpoint, tokens: Mapping[str, int], run: Run) -> None:
    """Report matrices, experts above all, that fewer tokens reached than they have input channels."""
    thin = {name: count for name, count in tokens.items() if count < checkpoint.resolve(name).shape[1]}
    if thin:
        fewest = min(thin, key=lambda name: (thin[name], name))
        unreached = sum(count == 0 for count in thin.values())
        found: Figures = {"count": len(thin), "unreached": unreached, "tokens": thin[fewest], "fewest": fewest}
        run.report("thinly calibrated matrices", found)


def _solve_block(
    checkpoint: Checkpoint, pair: tuple[BlockStep, BlockStep | None], names: Sequence[str], solve: Solve, full: bool
) -> tuple[_Weights, _AllFigures]:
    step, untouched = pair
    sums = MomentSums(full=full)
    if names:
        step.observe(sums)
    experts = {info.name for info in checkpoint.linears() if info.expert is not None}
    drifts = DriftSums(untouched, step, experts) if untouched is not None and names else None
    solved: _Weights = {}
    figures: _AllFigures = {}
    for name in names:
        moments = sums.of(name, checkpoint.resolve(name).shape[1])
        if drifts is not None:
            moments = replace(moments, drift=drifts.of(name))
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
