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
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from tightship.formats.layouts import ggml_k_kernels as kernels
from tightship.formats.layouts.ggml_base import HALF, GgmlLayout, to_half
from tightship.formats.layouts.ggml_search import affine_steps, positive_steps, signed_steps
from tightship.formats.threads import over_blocks
from tightship.layout import AffineGrid, Arrays, Context

NOTHING = np.empty(0, np.float32)


@dataclass(frozen=True)
class _Found:
    """What a search fills, for B blocks of S sub-blocks.

    Attributes:
        d: (B,) float32, not yet rounded.
        dmin: (B,) float32, or empty.
        scales: (B, S).
        mins: (B, S), or empty.
        kept: (B, S, 2) float32, see `ggml_search`; empty if the search wrote its codes itself.
        codes: (B, 256).
    """

    d: np.ndarray
    dmin: np.ndarray
    scales: np.ndarray
    mins: np.ndarray
    kept: np.ndarray
    codes: np.ndarray


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

    def fit(self, w: np.ndarray, importance: np.ndarray | None = None, context: Context | None = None) -> Arrays:  # noqa: ARG002
        w = np.ascontiguousarray(w, np.float32)
        weights = NOTHING if importance is None else np.ascontiguousarray(importance, np.float32)
        found = self._search(w, weights, self.blocks_per_row(w.shape[1]))
        rows = len(w)
        arrays: Arrays = {"codes": found.codes.reshape(w.shape), "scales": found.scales.reshape(rows, -1)}
        arrays["d"] = to_half(found.d, self.name).reshape(rows, -1)
        if len(found.dmin):
            arrays["dmin"] = to_half(found.dmin, self.name).reshape(rows, -1)
            arrays["mins"] = found.mins.reshape(rows, -1)
        stored = (arrays[key].astype(np.float32).reshape(-1) if key in arrays else NOTHING for key in ("d", "dmin"))
        over_blocks(
            kernels.encode, len(found.d), w.reshape(-1), *stored, found.scales, found.mins, found.kept,
            self.low, self.high, found.codes,
        )  # fmt: skip
        return arrays

    def _search(self, w: np.ndarray, importance: np.ndarray, per_row: int) -> _Found:
        """Scales of `w`; `importance` is empty or (cols,)."""
        raise NotImplementedError

    def _room(self, blocks: int) -> _Found:
        """Unfilled arrays for so many blocks."""
        parts = self.width // self.sub
        small = self.parameters["scales"][0]
        minima = blocks if "dmin" in self.parameters else 0
        return _Found(
            d=np.empty(blocks, np.float32),
            dmin=np.empty(minima, np.float32),
            scales=np.empty((blocks, parts), small),
            mins=np.empty((minima, parts), small),
            kept=np.empty((blocks, parts, 2), np.float32),
            codes=np.empty((blocks, self.width), self.code_dtype),
        )


class _Affine(_KQuant):
    """Q2_K, Q4_K, Q5_K: unsigned codes and a minimum."""

    low: ClassVar[int] = 0
    code_dtype: ClassVar[type[np.integer]] = np.uint8
    zero: ClassVar[bool] = False
    scale_top: ClassVar[int]
    plain: ClassVar[np.ndarray]
    weighted: ClassVar[np.ndarray]
    variance: ClassVar[float]

    def _search(self, w: np.ndarray, importance: np.ndarray, per_row: int) -> _Found:
        found = self._room(len(w) * per_row)
        how = kernels.AffineSearch(
            self.sub, float(self.high), self.weighted if len(importance) else self.plain,
            float(self.scale_top), positive_steps(self.scale_top), self.variance,
        )  # fmt: skip
        over_blocks(
            kernels.affine_blocks, len(found.d), w.reshape(-1), importance, per_row, how,
            (found.d, found.dmin), (found.scales, found.mins), found.kept,
        )  # fmt: skip
        return found


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
    linear: ClassVar[dict[str, tuple[float, float]]] = {"scales": (0, 15), "mins": (0, 15), "d": HALF, "dmin": HALF}


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
    linear: ClassVar[dict[str, tuple[float, float]]] = {"scales": (0, 63), "mins": (0, 63), "d": HALF, "dmin": HALF}


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


@dataclass(frozen=True)
class Q3K(_Symmetric):
    """3.4375 bits a weight."""

    kind: ClassVar[str] = "q3_k"
    low: ClassVar[int] = -4
    high: ClassVar[int] = 3
    linear: ClassVar[dict[str, tuple[float, float]]] = {"scales": (-32, 31), "d": HALF}

    def _search(self, w: np.ndarray, importance: np.ndarray, per_row: int) -> _Found:
        found = self._room(len(w) * per_row)
        if not len(importance):
            over_blocks(kernels.q3_blocks_plain, len(found.d), w.reshape(-1), found.d, found.scales, found.codes)
            return replace(found, kept=found.kept[:0])
        over_blocks(
            kernels.q3_blocks, len(found.d), w.reshape(-1), importance, per_row, signed_steps(4), signed_steps(32),
            found.d, found.scales, found.kept,
        )  # fmt: skip
        return found


@dataclass(frozen=True)
class Q6K(_Symmetric):
    """6.5625 bits a weight."""

    kind: ClassVar[str] = "q6_k"
    low: ClassVar[int] = -32
    high: ClassVar[int] = 31
    linear: ClassVar[dict[str, tuple[float, float]]] = {"scales": (-128, 127), "d": HALF}

    def _search(self, w: np.ndarray, importance: np.ndarray, per_row: int) -> _Found:
        found = self._room(len(w) * per_row)
        over_blocks(
            kernels.symmetric_blocks, len(found.d), w.reshape(-1), importance, per_row, 32.0, signed_steps(32), 128.0,
            found.d, found.scales, found.kept,
        )  # fmt: skip
        return found
