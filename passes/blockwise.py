"""Block by block, each trained to put out what the same block of the dense model does (EBFT, arXiv:2402.12419).

A block's inputs have passed through the recovered blocks before it; its target is the dense block's output on the
dense model's own stream, so that a block also makes good for what the earlier ones left. The loss is the squared
difference over the mean square of the target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tightship.blocks import BlockStep, BlockWalk
from tightship.checkpoint import Checkpoint
from tightship.errors import UsageError
from tightship.modelview import ModelView
from tightship.passes.base import Run
from tightship.passes.leaves import Leaf
from tightship.passes.lessons import Lessons
from tightship.passes.trainee import Assembly, every_leaf
from tightship.passes.training import Training, fit
from tightship.weights import Stored

if TYPE_CHECKING:
    import torch


Leaves = Callable[[Checkpoint, Run, Callable[[str], bool]], dict[str, Leaf]]
"""leaves(checkpoint, run, wanted) -> what is trained of the tensors whose names are wanted."""


def reconstruct(
    checkpoint: Checkpoint, dense: Checkpoint, text: Lessons, how: Training, run: Run, *, leaves: Leaves = every_leaf
) -> dict[str, Stored]:
    """The recovered tensors of every block, by on-disk name; each block sees all of the lessons' tokens.

    Raises:
        UsageError: the two models do not have the same number of blocks and channels.
    """
    for key in ("layers", "hidden"):
        if checkpoint.hyper[key] != dense.hyper[key]:
            raise UsageError(
                f"blockwise recovery compares block with block: {key} is {checkpoint.hyper[key]}, "
                f"the teacher's {dense.hyper[key]}",
                hint="method: full, or distill",
            )
    found: dict[str, Stored] = {}
    walk, model = (_walk(c, text, how, run) for c in (checkpoint, dense))
    walk.module.requires_grad_(False)
    for step, original in zip(walk.steps(), model.steps(), strict=True):
        targets = [output for _, output in original.passages()]
        recovered = _recover(_Block(walk, step, targets, leaves), text.steps, how, run)
        for name, weight in recovered.items():
            step.write(name, weight)
        found.update(recovered)
    return found


def _walk(checkpoint: Checkpoint, text: Lessons, how: Training, run: Run) -> BlockWalk:
    view = ModelView(checkpoint, threads=run.threads, device=run.device)
    return BlockWalk(view, text.windows, at_once=how.batch * how.sequence)


@dataclass(frozen=True)
class _Block:
    """The block in hand, and what the dense one puts out for each batch: (windows, length, hidden) float32."""

    walk: BlockWalk
    step: BlockStep
    targets: Sequence[torch.Tensor]
    leaves: Leaves

    def loss(self, place: int, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        output: torch.Tensor = self.walk.run(self.step.index, self.walk.batches[place], parameters)
        target = self.targets[place].to(output.device)
        return (output - target).square().mean() / target.square().mean()


def _recover(block: _Block, steps: int, how: Training, run: Run) -> dict[str, Stored]:
    """Train the block in hand; its tensors."""
    import torch

    walk, index = block.walk, block.step.index
    leaves = block.leaves(walk.checkpoint, run, lambda name: name.startswith(walk.prefixes[index]))
    assembly = Assembly(walk.checkpoint, walk.module, walk.addresses, leaves)
    last = len(block.targets) - 1  # is held out

    def exam() -> float:
        with torch.no_grad():
            return float(block.loss(last, assembly.parameters()))

    def loss(number: int) -> torch.Tensor:
        return block.loss(number % max(last, 1), assembly.parameters())

    key = f"block-{index:05d}"
    run.report(key, fit(assembly.tensors, loss, how, steps, run, held_out=exam, key=key))
    return assembly.weights()
