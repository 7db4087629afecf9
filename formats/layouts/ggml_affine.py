"""Q4_1 and Q5_1: unsigned integers in groups of 32 with a free minimum, value = d * code + m.

| array | dtype   | shape             | meaning                                        |
|-------|---------|-------------------|------------------------------------------------|
| codes | uint8   | (rows, cols)      | 0..15 (q4_1) or 0..31 (q5_1)                   |
| d     | float16 | (rows, cols / 32) | step                                           |
| m     | float16 | (rows, cols / 32) | value of code 0; no code need fall on 0.0      |

Their symmetric siblings Q8_0, Q5_0 and Q4_0 are the affine layouts int8-g32, int5-g32 and int4-g32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tightship.formats.layouts import ggml_kernels as kernels
from tightship.formats.layouts.ggml_base import HALF, GgmlLayout, row_mean_square, to_half
from tightship.formats.layouts.ggml_search import affine_steps
from tightship.formats.threads import over_blocks
from tightship.layout import AffineGrid, Arrays, Context


class _Minimum(GgmlLayout):
    """Base of the two types; `bits` of a code."""

    bits: ClassVar[int]
    width: ClassVar[int] = 32
    code_dtype: ClassVar[type[np.integer]] = np.uint8
    parameters: ClassVar[dict[str, tuple[type[np.generic], int]]] = {"d": (np.float16, 1), "m": (np.float16, 1)}
    linear: ClassVar[dict[str, tuple[float, float]]] = {"d": HALF, "m": HALF}
    zero: ClassVar[bool] = False

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def fit(self, w: np.ndarray, importance: np.ndarray | None = None, context: Context | None = None) -> Arrays:
        """`quantize_row_q4_1_ref` without importance, `quantize_row_q4_1_impl` with it (or q5_1) of ggml-quants.c."""
        w = np.ascontiguousarray(w, np.float32)
        blocks = w.reshape(len(w) * self.blocks_per_row(w.shape[1]), self.width)
        d, m = np.empty(len(blocks), np.float32), np.empty(len(blocks), np.float32)
        codes = np.empty(blocks.shape, np.uint8)
        if importance is None:
            over_blocks(kernels.round_affine, len(blocks), blocks, blocks.view(np.int32), self.top, d, m, codes)
        else:
            kept = np.empty((len(blocks), 2), np.float32)
            over_blocks(
                kernels.search_affine, len(blocks), w.reshape(-1), np.ascontiguousarray(importance, np.float32),
                w.shape[1] // self.width, row_mean_square(w, context or Context()), float(self.top),
                affine_steps(-0.9, 0.05, 36, self.top), d, m, kept,
            )  # fmt: skip
            over_blocks(kernels.kept_codes, len(blocks), w.reshape(-1), kept, 0, self.top, codes)
        steps = {"d": to_half(d, self.name).reshape(len(w), -1), "m": to_half(m, self.name).reshape(len(w), -1)}
        return {"codes": codes.reshape(w.shape), **steps}

    def grid(self, params: Mapping[str, np.ndarray]) -> AffineGrid:
        d, m = (np.repeat(params[key].astype(np.float32), self.width, axis=1) for key in ("d", "m"))
        return AffineGrid(d, m, 0, self.top)

    def values(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        d, m = (np.repeat(arrays[key].astype(np.float64), self.width, axis=1) for key in ("d", "m"))
        return arrays["codes"] * d + m


@dataclass(frozen=True)
class Q4_1(_Minimum):
    """4.0 bits a code, 5.0 bits a weight in GGUF."""

    kind: ClassVar[str] = "q4_1"
    bits: ClassVar[int] = 4


@dataclass(frozen=True)
class Q5_1(_Minimum):
    """5.0 bits a code, 6.0 bits a weight in GGUF."""

    kind: ClassVar[str] = "q5_1"
    bits: ClassVar[int] = 5
