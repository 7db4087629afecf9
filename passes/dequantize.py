"""Decode quantized weights, outright: for sources that are quantized already and whose grid a target does not have.

What comes out are the exact values, widened to `dtype`. Nothing else in tightship leaves a grid without being told to.
Rounding them to another grid afterwards (`quantize`) adds that grid's error to the first one's; the report shows both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from tightship.checkpoint import Checkpoint
from tightship.errors import UsageError
from tightship.passes.base import Needs, Pass, Run
from tightship.passes.quantize.cast import cast
from tightship.weights import Dense, Quantized, Stored


@dataclass(frozen=True, kw_only=True)
class Dequantize(Pass):
    """Every `Quantized` weight as a dense one; activations are float again."""

    name: ClassVar[str] = "dequantize"
    needs: ClassVar[Needs] = "nothing"
    per_tensor: ClassVar[bool] = True
    destroys: ClassVar[frozenset[str]] = frozenset({"grid"})

    dtype: Literal["f32", "bf16", "f16"] = "f32"

    def requires(self, checkpoint: Checkpoint) -> None:
        if not any(isinstance(weight, Quantized) for weight in checkpoint.weights.values()):
            raise UsageError("dequantize: no weight is quantized", hint="leave the pass out")

    def outline(self, checkpoint: Checkpoint) -> Checkpoint:
        return self.apply(checkpoint, Run())

    def apply(self, checkpoint: Checkpoint, run: Run) -> Checkpoint:  # noqa: ARG002 - data-free
        changed: dict[str, Stored] = {
            name: cast(name, Dense(weight.shape, "f32", weight.value), self.dtype)
            for name, weight in checkpoint.weights.items()
            if isinstance(weight, Quantized)
        }
        return checkpoint.with_weights(changed).replace(activations={})
