"""Pruning in steps, with recovery between them.

After step t of n the sparsity is S (1 - (1 - t / n)^3): much is taken while the model can still make good for it, and
little at the end (Zhu and Gupta, arXiv:1710.01878, equation 1). Every step prunes what the step before left, zeros
first, so masks only grow; `recover` trains under the mask after each step, with its own options and tokens.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tightship.checkpoint import Checkpoint
from tightship.passes.base import Run
from tightship.passes.options import build
from tightship.passes.recover import Recover

if TYPE_CHECKING:
    from tightship.passes.prune import Prune


def sparsities(final: float, steps: int) -> list[float]:
    """The sparsity after each step; the last is `final`."""
    return [final * (1 - (1 - step / steps) ** 3) for step in range(1, steps)] + [final]


def pruned_in_steps(spec: Prune, checkpoint: Checkpoint, run: Run) -> Checkpoint:
    """The checkpoint after all steps of `spec`."""
    targets = sparsities(spec.sparsity or 0.0, spec.steps) if spec.groups is None else [None]
    for number, sparsity in enumerate(targets, start=1):
        run.progress("pruning in steps", number - 1, len(targets))
        step = replace(spec, sparsity=sparsity, steps=1, recover=None)
        checkpoint = checkpoint.with_weights(step.solver.prune(step, checkpoint, _inside(run, f"prune-{number}")))
        if spec.recover is not None:
            recovery = build(Recover, spec.recover, "prune: recover")
            recovery.requires(checkpoint)
            after = recovery.apply(checkpoint, _inside(run, f"recover-{number}"))
            recovery.ensures(checkpoint, after)
            checkpoint = after
    return checkpoint


def _inside(run: Run, name: str) -> Run:
    """The run with a scratch directory of its own, and its name before what it reports."""
    scratch = None if run.scratch is None else Path(run.scratch) / name
    if scratch is not None:
        scratch.mkdir(exist_ok=True)
    return replace(run, scratch=scratch, report=lambda tensor, figures: run.report(f"{name}: {tensor}", figures))
