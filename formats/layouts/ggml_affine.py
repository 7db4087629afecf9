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

from tightship.formats.layouts.ggml_base import GgmlLayout
from tightship.layout import AffineGrid, Arrays, Context


class _Minimum(GgmlLayout):
    """Base of the two types; `bits` of a code."""

    bits: ClassVar[int]
    width: ClassVar[int] = 32
    code_dtype: ClassVar[type[np.integer]] = np.uint8
    parameters: ClassVar[dict[str, tuple[type[np.generic], int]]] = {"d": (np.float16, 1), "m": (np.float16, 1)}
    zero: ClassVar[bool] = False

    def fit(self, w: np.ndarray, importance: np.ndarray | None = None, context: Context | None = None) -> Arrays:
        """`quantize_row_q4_1_ref` / `q5_1_ref` of ggml-quants.c."""
        blocks = np.ascontiguousarray(w, np.float32).reshape(w.shape[0], self.blocks_per_row(w.shape[1]), self.width)
        m = blocks.min(axis=2)
        d = (blocks.max(axis=2) - m) / np.float32((1 << self.bits) - 1)
        inverse = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)[..., None]
        codes = np.trunc((blocks - m[..., None]) * inverse + np.float32(0.5)).clip(0, (1 << self.bits) - 1)
        return {"codes": codes.astype(np.uint8).reshape(w.shape), "d": d.astype(np.float16), "m": m.astype(np.float16)}

    def grid(self, params: Mapping[str, np.ndarray]) -> AffineGrid:
        d, m = (np.repeat(params[key].astype(np.float32), self.width, axis=1) for key in ("d", "m"))
        return AffineGrid(d, m, 0, (1 << self.bits) - 1)

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
