"""Multiply factors out: for targets that hold none, and for sources that were stored as factors.

The product of left and right, in float64, takes the element type of the left factor (float32 where that is quantized).
The values of the low-rank model stay, up to that one rounding; the saving goes. Corrections beside quantized matrices
stay what they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tightship.checkpoint import Checkpoint
from tightship.errors import UsageError
from tightship.passes.base import Needs, Pass, Run
from tightship.passes.quantize.cast import cast
from tightship.weights import Dense, Factored, Stored


@dataclass(frozen=True, kw_only=True)
class Merge(Pass):
    """Every `Factored` weight as a dense one. A target does the same with its option `merge: true`."""

    name: ClassVar[str] = "merge"
    needs: ClassVar[Needs] = "nothing"
    per_tensor: ClassVar[bool] = True
    destroys: ClassVar[frozenset[str]] = frozenset({"factors"})

    def requires(self, checkpoint: Checkpoint) -> None:
        if not any(isinstance(weight, Factored) for weight in checkpoint.weights.values()):
            raise UsageError("merge: no weight is made of factors", hint="leave it out")

    def outline(self, checkpoint: Checkpoint) -> Checkpoint:
        return self.apply(checkpoint, Run())

    def apply(self, checkpoint: Checkpoint, run: Run) -> Checkpoint:  # noqa: ARG002 - data-free
        merged: dict[str, Stored] = {
            name: cast(name, Dense(weight.shape, "f32", weight.value), weight.dtype)
            for name, weight in checkpoint.weights.items()
            if isinstance(weight, Factored)
        }
        return checkpoint.with_weights(merged)
