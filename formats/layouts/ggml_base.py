"""What all GGML block layouts share: no options, a fixed block, and arrays counted in blocks."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from tightship.errors import Unsupported
from tightship.formats.layouts import ggml_kernels as kernels
from tightship.formats.threads import over_blocks
from tightship.layout import ArraySpec, Context, Layout

F16_MAX = 65504.0
HALF = (-F16_MAX, F16_MAX)


class GgmlLayout(Layout):
    """A GGML type as a layout: `kind` and `name` are the lower-case GGML name.

    Class attributes:
        width: columns of one block.
        code_dtype: dtype of `codes`, one a column.
        parameters: array name -> (dtype, entries in one block); its shape is (rows, blocks * entries).
        zero: whether 0.0 is sayable in every block.
        linear: see `Layout.refittable`.
    """

    width: ClassVar[int]
    code_dtype: ClassVar[type[np.integer]]
    parameters: ClassVar[dict[str, tuple[type[np.generic], int]]]
    zero: ClassVar[bool]
    linear: ClassVar[dict[str, tuple[float, float]]] = {}

    @property
    def refittable(self) -> dict[str, tuple[float, float]]:
        return self.linear

    @property
    def name(self) -> str:
        return self.kind

    @property
    def block(self) -> int:
        return self.width

    @property
    def keeps_zero(self) -> bool:
        return self.zero

    def array_specs(self, shape: tuple[int, int]) -> dict[str, ArraySpec]:
        rows, cols = shape
        blocks = self.blocks_per_row(cols)
        specs = {"codes": ArraySpec(np.dtype(self.code_dtype), (rows, cols))}
        for key, (dtype, entries) in self.parameters.items():
            specs[key] = ArraySpec(np.dtype(dtype), (rows, blocks * entries))
        return specs

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind}


def to_half(x: np.ndarray, name: str) -> np.ndarray:
    """float16 of a layout's steps, rounded to nearest even.

    Raises:
        Unsupported: a step overflows.
    """
    with np.errstate(over="ignore"):
        stored = x.astype(np.float16)
    if not np.isfinite(stored).all():
        raise Unsupported(
            f"a {name} step of {np.abs(x).max():.3g} overflows float16 (limit {F16_MAX:.0f})",
            hint="these weights are far out of the usual range; use an f32 or bf16 target for this tensor",
        )
    return stored


def row_mean_square(w: np.ndarray, context: Context) -> np.ndarray:
    """(rows,) float32: of the context, which knows the whole row, or of `w` itself."""
    if context.row_mean_square is not None:
        return context.row_mean_square
    result = np.empty(len(w), np.float32)
    over_blocks(kernels.row_mean_squares, len(w), w.reshape(-1), w.shape[1], result)
    return result
