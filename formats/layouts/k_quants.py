"""K-quants: super-blocks of 256 weights, sub-blocks of 16 or 32 with integer scales of a float16 step.

| array  | dtype   | shape              | q2_k  | q3_k    | q4_k   | q5_k   | q6_k      |
|--------|---------|--------------------|-------|---------|--------|--------|-----------|
| codes  | (below) | (rows, cols)       | 0..3  | -4..3   | 0..15  | 0..31  | -32..31   |
| d      | float16 | (rows, cols / 256) | yes   | yes     | yes    | yes    | yes       |
| dmin   | float16 | (rows, cols / 256) | yes   |         | yes    | yes    |           |
| scales | (below) | (rows, cols / sub) | 0..15 | -32..31 | 0..63  | 0..63  | -128..127 |
| mins   | uint8   | (rows, cols / sub) | 0..15 |         | 0..63  | 0..63  |           |
| sub    |         |                    | 16    | 16      | 32     | 32     | 16        |

value = d * scale * code - dmin * min. Integers that can be negative are int8, others uint8.

The search is ggml-quants.c's, bit for bit: `quantize_row_*_ref` without importance, `quantize_row_*_impl` with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tightship.formats.layouts import ggml_k_kernels as kernels
from tightship.formats.layouts.ggml_base import GgmlLayout, to_half
from tightship.formats.layouts.ggml_search import affine_steps, positive_steps, signed_steps
from tightship.formats.threads import over_blocks
from tightship.layout import AffineGrid, Arrays, Context

NOTHING = np.empty(0, np.float32)
NO_MINS = np.empty((0, 0), np.uint8)
NO_CODES = np.empty((0, 0, 2), np.float32)


class _KQuant(GgmlLayout):
    """Base of the family: codes in [low, high], sub-blocks of `sub` weights."""

    width: ClassVar[int] = 256
    sub: ClassVar[int]
    low: ClassVar[int]
    high: ClassVar[int]

    def _steps(self, params: Mapping[str, np.ndarray], kind: type[np.floating]) -> tuple[np.ndarray, np.ndarray | None]:
        """(rows, cols / sub) step and minimum of every sub-block; exact in float32 as in float64."""
        parts = self.width // self.sub
        step = np.repeat(params["d"].astype(kind), parts, axis=1) * params["scales"].astype(kind)
        if "dmin" not in self.parameters:
            return step, None
        return step, np.repeat(params["dmin"].astype(kind), parts, axis=1) * params["mins"].astype(kind)

    def grid(self, params: Mapping[str, np.ndarray]) -> AffineGrid:
        step, minimum = self._steps(params, np.float32)
        offset = np.zeros_like(step) if minimum is None else -minimum
        return AffineGrid(np.repeat(step, self.sub, axis=1), np.repeat(offset, self.sub, axis=1), self.low, self.high)

    def values(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        step, minimum = self._steps(arrays, np.float64)
        rows, cols = arrays["codes"].shape
        result = arrays["codes"].reshape(rows, -1, self.sub) * step[..., None]
        if minimum is not None:
            result -= minimum[..., None]
        return result.reshape(rows, cols)

    def _finish(self, w: np.ndarray, d: np.ndarray, dmin: np.ndarray, scales: np.ndarray, mins: np.ndarray,
                kept: np.ndarray, codes: np.ndarray) -> Arrays:  # fmt: skip
        """Round the steps to float16 and encode with what is stored."""
        rows = len(w)
        arrays: Arrays = {"codes": codes.reshape(w.shape), "scales": scales.reshape(rows, -1)}
        for key, value in (("d", d), ("dmin", dmin)):
            if len(value):
                arrays[key] = to_half(value, self.name).reshape(rows, -1)
        if len(mins):
            arrays["mins"] = mins.reshape(rows, -1)
        stored = (arrays[key].astype(np.float32).reshape(-1) if key in arrays else NOTHING for key in ("d", "dmin"))
        over_blocks(kernels.encode, len(d), w.reshape(-1), *stored, scales, mins, kept, self.low, self.high, codes)
        return arrays


class _Affine(_KQuant):
    """Q2_K, Q4_K, Q5_K: unsigned codes and a minimum."""

    low: ClassVar[int] = 0
    code_dtype: ClassVar[type[np.integer]] = np.uint8
    zero: ClassVar[bool] = False
    scale_top: ClassVar[int]
    plain: ClassVar[np.ndarray]
    weighted: ClassVar[np.ndarray]
    variance: ClassVar[float]

    def fit(self, w: np.ndarray, importance: np.ndarray | None = None, context: Context | None = None) -> Arrays:  # noqa: ARG002
        w = np.ascontiguousarray(w, np.float32)
        per_row = self.blocks_per_row(w.shape[1])
        blocks, parts = len(w) * per_row, self.width // self.sub
        d, dmin = np.empty(blocks, np.float32), np.empty(blocks, np.float32)
        scales, mins = np.empty((blocks, parts), np.uint8), np.empty((blocks, parts), np.uint8)
        kept = np.empty((blocks, parts, 2), np.float32)
        weights = NOTHING if importance is None else np.ascontiguousarray(importance, np.float32)
        steps = self.plain if importance is None else self.weighted
        over_blocks(
            kernels.affine_blocks, blocks, w.reshape(-1), weights, per_row, self.sub, float(self.high), steps,
            float(self.scale_top), positive_steps(self.scale_top), self.variance, d, dmin, scales, mins, kept,
        )  # fmt: skip
        codes = np.empty((blocks, self.width), np.uint8)
        return self._finish(w, d, dmin, scales, mins, kept, codes)


@dataclass(frozen=True)
class Q2K(_Affine):
    """2.625 bits a weight."""

    kind: ClassVar[str] = "q2_k"
    sub: ClassVar[int] = 16
    high: ClassVar[int] = 3
    scale_top: ClassVar[int] = 15
    plain: ClassVar[np.ndarray] = affine_steps(-0.5, 0.1, 15, 3)
    weighted: ClassVar[np.ndarray] = affine_steps(-0.9, 0.05, 36, 3)
    variance: ClassVar[float] = 1.0
    parameters: ClassVar[dict[str, tuple[type[np.generic], int]]] = {
        "d": (np.float16, 1), "dmin": (np.float16, 1), "scales": (np.uint8, 16), "mins": (np.uint8, 16),
    }  # fmt: skip


@dataclass(frozen=True)
class Q4K(_Affine):
    """4.5 bits a weight."""

    kind: ClassVar[str] = "q4_k"
    sub: ClassVar[int] = 32
    high: ClassVar[int] = 15
    scale_top: ClassVar[int] = 63
    plain: ClassVar[np.ndarray] = affine_steps(-1.0, 0.1, 20, 15)
    weighted: ClassVar[np.ndarray] = affine_steps(-0.9, 0.05, 36, 15)
    variance: ClassVar[float] = 2.0
    parameters: ClassVar[dict[str, tuple[type[np.generic], int]]] = {
        "d": (np.float16, 1), "dmin": (np.float16, 1), "scales": (np.uint8, 8), "mins": (np.uint8, 8),
    }  # fmt: skip


@dataclass(frozen=True)
class Q5K(Q4K):
    """5.5 bits a weight."""

    kind: ClassVar[str] = "q5_k"
    high: ClassVar[int] = 31
    plain: ClassVar[np.ndarray] = affine_steps(-0.5, 0.1, 15, 31)
    weighted: ClassVar[np.ndarray] = affine_steps(-0.9, 0.05, 36, 31)


class _Symmetric(_KQuant):
    """Q3_K, Q6_K: signed codes and scales, no minimum."""

    sub: ClassVar[int] = 16
    code_dtype: ClassVar[type[np.integer]] = np.int8
    zero: ClassVar[bool] = True
    parameters: ClassVar[dict[str, tuple[type[np.generic], int]]] = {"d": (np.float16, 1), "scales": (np.int8, 16)}

    def fit(self, w: np.ndarray, importance: np.ndarray | None = None, context: Context | None = None) -> Arrays:  # noqa: ARG002
        w = np.ascontiguousarray(w, np.float32)
        per_row = self.blocks_per_row(w.shape[1])
        blocks = len(w) * per_row
        d, scales = np.empty(blocks, np.float32), np.empty((blocks, 16), np.int8)
        kept, codes = np.empty((blocks, 16, 2), np.float32), np.empty((blocks, self.width), np.int8)
        weights = NOTHING if importance is None else np.ascontiguousarray(importance, np.float32)
        kept = self._search(blocks, w.reshape(-1), weights, per_row, d, scales, kept, codes)
        return self._finish(w, d, NOTHING, scales, NO_MINS, kept, codes)

    def _search(self, blocks: int, w: np.ndarray, importance: np.ndarray, per_row: int, d: np.ndarray,
                scales: np.ndarray, kept: np.ndarray, codes: np.ndarray) -> np.ndarray:  # fmt: skip
        """Fill `d` and `scales`, and either `kept` (returned) or `codes`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Q3K(_Symmetric):
    """3.4375 bits a weight."""

    kind: ClassVar[str] = "q3_k"
    low: ClassVar[int] = -4
    high: ClassVar[int] = 3

    def _search(self, blocks: int, w: np.ndarray, importance: np.ndarray, per_row: int, d: np.ndarray,
                scales: np.ndarray, kept: np.ndarray, codes: np.ndarray) -> np.ndarray:  # fmt: skip
        if not len(importance):
            over_blocks(kernels.q3_blocks_plain, blocks, w, d, scales, codes)
            return NO_CODES
        over_blocks(
            kernels.q3_blocks, blocks, w, importance, per_row, signed_steps(4), signed_steps(32), d, scales, kept
        )
        return kept


@dataclass(frozen=True)
class Q6K(_Symmetric):
    """6.5625 bits a weight."""

    kind: ClassVar[str] = "q6_k"
    low: ClassVar[int] = -32
    high: ClassVar[int] = 31

    def _search(self, blocks: int, w: np.ndarray, importance: np.ndarray, per_row: int, d: np.ndarray,
                scales: np.ndarray, kept: np.ndarray, codes: np.ndarray) -> np.ndarray:  # fmt: skip
        over_blocks(
            kernels.symmetric_blocks, blocks, w, importance, per_row, 32.0, signed_steps(32), 128.0, d, scales, kept
        )
        return kept
