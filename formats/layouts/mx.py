"""MXFP4 and NVFP4: the floats of four bits (E2M1) with a one-byte scale for each group.

| array   | dtype   | mxfp4             | nvfp4             | meaning                                              |
|---------|---------|-------------------|-------------------|------------------------------------------------------|
| codes   | uint8   | (rows, cols)      | (rows, cols)      | 0..15: bit 3 sign, magnitude `LEVELS[code & 7]`      |
| scale   | uint8   | (rows, cols / 32) | (rows, cols / 16) | E8M0: 2^(scale - 127); UE4M3: bits of `ue4m3_values` |
| divisor | float32 |                   | (rows, 1)         | nvfp4-scaled only: the same on every row             |

value = level * scale (/ divisor). GGML's NVFP4 has one level of scales. `nvfp4-scaled` has NVIDIA's second, one for
the whole tensor, by which compressed-tensors divides (`weight_global_scale`). It is fitted to a power of two: the group
scales are floats themselves, so a finer factor gains nothing, and every decoder's product is exact, those included that
multiply in bfloat16.

Scales are GGML's (`quantize_row_mxfp4_ref`, `quantize_row_nvfp4_ref`); there is no search, importance changes nothing.
OCP Microscaling Formats 1.0, sections 5.3 and 6.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tightship.formats.layouts import ggml_kernels as kernels
from tightship.formats.layouts.ggml_base import GgmlLayout
from tightship.formats.threads import over_blocks
from tightship.layout import Arrays, ArraySpec, Context, TableGrid

LEVELS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
TABLE = np.concatenate([LEVELS, -LEVELS])
LARGEST_UE4M3 = np.float32(448)
LARGEST_GAPLESS = np.float32(240)  # GGML stores no scale between this one and 448


class _Fp4(GgmlLayout):
    """Base of the two types; groups of `group` weights."""

    group: ClassVar[int]
    code_dtype: ClassVar[type[np.integer]] = np.uint8
    zero: ClassVar[bool] = True

    def unit(self, scale: np.ndarray) -> np.ndarray:
        """float64 value of level 1.0 for stored scales."""
        raise NotImplementedError

    def store(self, magnitude: np.ndarray) -> np.ndarray:
        """uint8 scales for groups of these largest magnitudes, float32."""
        raise NotImplementedError

    def fit(self, w: np.ndarray, importance: np.ndarray | None = None, context: Context | None = None) -> Arrays:  # noqa: ARG002
        w = np.ascontiguousarray(w, np.float32)
        self.blocks_per_row(w.shape[1])
        groups = w.reshape(-1, self.group)
        magnitude, codes = np.empty(len(groups), np.float32), np.empty(groups.shape, np.uint8)
        over_blocks(kernels.magnitudes, len(groups), groups.view(np.int32), magnitude)
        scale = self.store(magnitude)
        over_blocks(kernels.round_fp4, len(groups), groups, self.unit(scale).astype(np.float32), codes)
        return {"codes": codes.reshape(w.shape), "scale": scale.reshape(len(w), -1)}

    def grid(self, params: Mapping[str, np.ndarray]) -> TableGrid:
        return TableGrid(np.repeat(self.unit(params["scale"]).astype(np.float32), self.group, axis=1), TABLE)

    def values(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        unit = np.repeat(self.unit(arrays["scale"]), self.group, axis=1)
        return TABLE.astype(np.float64)[arrays["codes"]] * unit


@dataclass(frozen=True)
class MXFP4(_Fp4):
    """4.25 bits a weight."""

    kind: ClassVar[str] = "mxfp4"
    width: ClassVar[int] = 32
    group: ClassVar[int] = 32
    parameters: ClassVar[dict[str, tuple[type[np.generic], int]]] = {"scale": (np.uint8, 1)}

    def unit(self, scale: np.ndarray) -> np.ndarray:
        return np.ldexp(1.0, scale.astype(np.int32) - 127)

    def store(self, magnitude: np.ndarray) -> np.ndarray:
        """floor(log2 magnitude) - 2, biased; 0 for zero groups and below 2^-125."""
        mantissa, exponent = np.frexp(magnitude.astype(np.float64))
        # The reference takes log2 in float32, which rounds up just below a power of two; the slope of log2 there is
        # 1 / ln 2, and further down only the floor matters.
        log2 = (exponent - (1 - mantissa) / np.log(2)).astype(np.float32)
        stored = np.clip(np.floor(log2) + np.float32(125), 0, 254)
        return np.where(magnitude > 0, stored, 0).astype(np.uint8)


@dataclass(frozen=True)
class NVFP4(_Fp4):
    """4.5 bits a weight."""

    kind: ClassVar[str] = "nvfp4"
    width: ClassVar[int] = 64
    group: ClassVar[int] = 16
    parameters: ClassVar[dict[str, tuple[type[np.generic], int]]] = {"scale": (np.uint8, 4)}

    def unit(self, scale: np.ndarray) -> np.ndarray:
        return ue4m3_values(scale)

    def store(self, magnitude: np.ndarray) -> np.ndarray:
        return to_ue4m3(magnitude / LEVELS[-1])


@dataclass(frozen=True)
class ScaledNVFP4(NVFP4):
    """The same with a scale for the whole tensor; rows of whole groups suffice."""

    kind: ClassVar[str] = "nvfp4-scaled"
    width: ClassVar[int] = 16
    parameters: ClassVar[dict[str, tuple[type[np.generic], int]]] = {"scale": (np.uint8, 1)}

    @property
    def rows_together(self) -> int:
        return 0

    @property
    def fitted_whole(self) -> bool:
        return True

    def array_specs(self, shape: tuple[int, int]) -> dict[str, ArraySpec]:
        return {**super().array_specs(shape), "divisor": ArraySpec(np.dtype(np.float32), (shape[0], 1))}

    def fit(self, w: np.ndarray, importance: np.ndarray | None = None, context: Context | None = None) -> Arrays:
        """The tensor's largest group gets a scale between 120 and 240; above, GGML's floats differ from NVIDIA's."""
        magnitude = np.abs(w).max(initial=0) / (LARGEST_GAPLESS * LEVELS[-1])
        exponent = int(np.ceil(np.log2(magnitude))) if magnitude > 0 else 0
        step = np.float32(np.ldexp(1.0, exponent))
        arrays = super().fit(np.asarray(w, np.float32) / step, importance, context)
        return {**arrays, "divisor": np.full((len(w), 1), 1 / step, np.float32)}

    def grid(self, params: Mapping[str, np.ndarray]) -> TableGrid:
        plain = super().grid(params)
        return TableGrid(plain.scale / params["divisor"], plain.table)

    def values(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        return super().values(arrays) / arrays["divisor"].astype(np.float64)


def ue4m3_values(scale: np.ndarray) -> np.ndarray:
    """float64 of unsigned E4M3 bytes: four exponent bits of bias 7, three of mantissa; 0x7F is 0, as in GGML."""
    exponent, mantissa = (scale >> 3 & 15).astype(np.int32), (scale & 7).astype(np.float64)
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    return np.where(scale == 0x7F, 0.0, np.where(exponent == 0, np.ldexp(mantissa, -9), normal))


def to_ue4m3(x: np.ndarray) -> np.ndarray:
    """UE4M3 bytes of non-negative float32, halves up, at most 448 (0x7E); GGML skips codes between 240 and 448."""
    x = np.minimum(x, LARGEST_UE4M3)
    bits = x.view(np.uint32)
    # Dropping 20 of 23 mantissa bits with a carry into the exponent; the bias changes from 127 to 7.
    normal = ((bits + np.uint32(1 << 19)) >> 20).astype(np.int64) - (120 << 3)
    normal = np.where(normal >= 15 << 3, 0x7E, normal)
    small = np.minimum((x * np.float32(512) + np.float32(0.5)).astype(np.int64), 7)
    return np.where(x < np.float32(2.0**-6), small, normal).astype(np.uint8)
