"""Block influence: how much a block turns the hidden states that pass through it.

    BI_i = 1 - mean over tokens of cosine(what enters block i, what leaves it)

A block of little influence is one whose input could go straight on. Cosines are float64. Source: ShortGPT,
arXiv:2403.03853, equation 1.
"""

from __future__ import annotations

from tightship.checkpoint import Checkpoint
from tightship.passes.base import Run
from tightship.passes.observed import passed_blocks


def block_influences(checkpoint: Checkpoint, run: Run) -> list[float]:
    """One number a block, in block order.

    Raises:
        Unsupported, Malformed: see `tightship.blocks` and `tightship.texts`.
    """
    import torch

    found = []
    for step in passed_blocks(checkpoint, run, "block influence"):
        total, tokens = 0.0, 0
        for entering, leaving in step.passages():
            cosines = torch.nn.functional.cosine_similarity(entering.double(), leaving.double(), dim=-1)
            total += float(cosines.sum())
            tokens += cosines.numel()
        found.append(1 - total / tokens)
        run.report(f"block {step.index}", {"influence": found[-1]})
    return found


def least_influential(checkpoint: Checkpoint, count: int, run: Run) -> tuple[int, ...]:
    """Numbers of the `count` blocks of least influence, ascending; of equal ones the earlier goes."""
    influences = block_influences(checkpoint, run)
    return tuple(sorted(sorted(range(len(influences)), key=lambda i: (influences[i], i))[:count]))
