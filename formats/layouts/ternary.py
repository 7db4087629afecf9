"""TQ1_0 and TQ2_0: -1, 0, 1 times the largest magnitude of 256 weights.

| array | dtype   | shape              | meaning                                              |
|-------|---------|--------------------|------------------------------------------------------|
| codes | int8    | (rows, cols)       | -1..1; bytes of TQ2_0 can also say 2, and decode so  |
| d     | float16 | (rows, cols / 256) | step                                                 |

They suit weights that are ternary already (BitNet, TriLM); there is no search, and importance changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tightship.formats.layouts import ggml_kernels as kernels
from tightship.formats.layouts.ggml_base import GgmlLayout, to_half
from tightship.formats.threads import over_blocks
from tightship.layout import AffineGrid, Arrays, Context


class _Ternary(GgmlLayout):
    """Base of the two types, which differ in their bytes only."""

    width: ClassVar[int] = 256
    code_dtype: ClassVar[type[np.integer]] = np.int8
    parameters: ClassVar[dict[str, tuple[type[np.generic], int]]] = {"d": (np.float16, 1)}
    zero: ClassVar[bool] = True

    def fit(self, w: np.ndarray, importance: np.ndarray | None = None, context: Context | None = None) -> Arrays:  # noqa: ARG002
        """`quantize_row_tq1_0_ref` of ggml-quants.c."""
        w = np.ascontiguousarray(w, np.float32)
        blocks = w.reshape(len(w) * self.blocks_per_row(w.shape[1]), self.width)
        d, codes = np.empty(len(blocks), np.float32), np.empty(blocks.shape, np.int8)
        over_blocks(kernels.round_ternary, len(blocks), blocks, blocks.view(np.int32), d, codes)
        return {"codes": codes.reshape(w.shape), "d": to_half(d, self.name).reshape(len(w), -1)}

    def grid(self, params: Mapping[str, np.ndarray]) -> AffineGrid:
        step = np.repeat(params["d"].astype(np.float32), self.width, axis=1)
        return AffineGrid(step, np.zeros_like(step), -1, 1)

    def values(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        return arrays["codes"] * np.repeat(arrays["d"].astype(np.float64), self.width, axis=1)


@dataclass(frozen=True)
class TQ1(_Ternary):
    """1.6875 bits a weight."""

    kind: ClassVar[str] = "tq1_0"


@dataclass(frozen=True)
class TQ2(_Ternary):
    """2.0625 bits a weight."""

    kind: ClassVar[str] = "tq2_0"
