"""IQ4_NL and IQ4_XS: four-bit indices into a fixed table of sixteen uneven levels.

| array  | dtype   | iq4_nl            | iq4_xs             | meaning                            |
|--------|---------|-------------------|--------------------|------------------------------------|
| codes  | uint8   | (rows, cols)      | (rows, cols)       | 0..15, index into `LEVELS`         |
| d      | float16 | (rows, cols / 32) | (rows, cols / 256) | step of the table, or of `scales`  |
| scales | int8    |                   | (rows, cols / 32)  | -32..31                            |

value = d * LEVELS[code], or d * scale * LEVELS[code]. No level is 0: pruned weights do not stay zero.
The search is ggml-quants.c's `quantize_row_iq4_nl_impl`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tightship.formats.layouts import iq4_kernels as kernels
from tightship.formats.layouts.ggml_base import HALF, GgmlLayout, to_half
from tightship.formats.threads import over_blocks
from tightship.layout import Arrays, Context, TableGrid

LEVELS = kernels.LEVELS
GROUP = 32
NOTHING = np.empty(0, np.float32)


class _Iq4(GgmlLayout):
    """Base of the two types."""

    code_dtype: ClassVar[type[np.integer]] = np.uint8
    zero: ClassVar[bool] = False

    def fit(self, w: np.ndarray, importance: np.ndarray | None = None, context: Context | None = None) -> Arrays:  # noqa: ARG002
        w = np.ascontiguousarray(w, np.float32)
        per_row = self.blocks_per_row(w.shape[1])
        blocks, parts = len(w) * per_row, self.width // GROUP
        d, scales = np.empty(blocks, np.float32), np.empty((blocks, parts), np.int8)
        factor = np.empty(blocks * parts, np.float32)
        weights = NOTHING if importance is None else np.ascontiguousarray(importance, np.float32)
        over_blocks(
            kernels.search, blocks, w.reshape(-1), weights, per_row, parts, d, scales, factor.reshape(blocks, parts)
        )
        codes = np.empty((len(factor), GROUP), np.uint8)
        over_blocks(kernels.nearest_levels, len(factor), w.reshape(-1, GROUP), factor, codes)
        arrays = {"codes": codes.reshape(w.shape), "d": to_half(d, self.name).reshape(len(w), -1)}
        if parts > 1:
            arrays["scales"] = scales.reshape(len(w), -1)
        return arrays

    def _steps(self, params: Mapping[str, np.ndarray], kind: type[np.floating]) -> np.ndarray:
        """(rows, cols / 32) step of every group; exact in float32 as in float64."""
        step = np.repeat(params["d"].astype(kind), self.width // GROUP, axis=1)
        return step * params["scales"].astype(kind) if "scales" in self.parameters else step

    def grid(self, params: Mapping[str, np.ndarray]) -> TableGrid:
        return TableGrid(np.repeat(self._steps(params, np.float32), GROUP, axis=1), LEVELS)

    def values(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        levels = LEVELS.astype(np.float64)[arrays["codes"]]
        return levels * np.repeat(self._steps(arrays, np.float64), GROUP, axis=1)


@dataclass(frozen=True)
class IQ4NL(_Iq4):
    """4.5 bits a weight."""

    kind: ClassVar[str] = "iq4_nl"
    width: ClassVar[int] = 32
    parameters: ClassVar[dict[str, tuple[type[np.generic], int]]] = {"d": (np.float16, 1)}
    linear: ClassVar[dict[str, tuple[float, float]]] = {"d": HALF}


@dataclass(frozen=True)
class IQ4XS(_Iq4):
    """4.25 bits a weight."""

    kind: ClassVar[str] = "iq4_xs"
    width: ClassVar[int] = 256
    parameters: ClassVar[dict[str, tuple[type[np.generic], int]]] = {"d": (np.float16, 1), "scales": (np.int8, 8)}
    linear: ClassVar[dict[str, tuple[float, float]]] = {"scales": (-32, 31), "d": HALF}
