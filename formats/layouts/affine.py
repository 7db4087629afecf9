"""Affine integers in groups along a row: value = (code - zero_point) * scale.

| array      | dtype       | shape          | meaning                                                    |
|------------|-------------|----------------|------------------------------------------------------------|
| codes      | int8        | (rows, cols)   | in [-2^(b-1), 2^(b-1) - 1], signed also when asymmetric     |
| scale      | scale_dtype | (rows, groups) | signed (symmetric rounding may choose a negative scale)     |
| zero_point | int8        | (rows, groups) | only when asymmetric; same range as codes; 0.0 maps to it   |

Round-to-nearest follows the GGML reference where a twin exists, so that the twins' bytes are the same:
symmetric 8 bit is Q8_0 (scale = absmax / 127), fewer bits are Q4_0 and Q5_0 (scale = signed absmax / -2^(b-1)).

Asymmetric: S = (Rmax - Rmin) / (2^b - 1), Z = Qmin - Rmin / S with Rmin <= 0 <= Rmax, so that 0.0 maps to Z exactly.
The scale is rounded up to `11 - b` significant bits, which makes the offset -Z * S exact in float16 (the twin of
Q4_1 and Q5_1, whose minimum is stored as float16); 8 bits have no such twin and keep the whole mantissa.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tightship.dtypes import dtype
from tightship.errors import Malformed, Unsupported
from tightship.formats.layouts import ggml_kernels as kernels
from tightship.formats.layouts.affine_search import search
from tightship.formats.layouts.ggml_base import row_mean_square
from tightship.formats.layouts.ggml_search import signed_steps
from tightship.formats.threads import over_blocks
from tightship.layout import AffineGrid, Arrays, ArraySpec, Context, Layout

F16_MAX = 65504.0


@dataclass(frozen=True, kw_only=True)
class Affine(Layout):
    """`int{bits}-g{group_size}[-asym]`; group_size 0 is one group a row (`-channel`).

    `wide_offset` marks matrices of other tools, whose offsets -Z * S are not all float16.
    """

    kind: ClassVar[str] = "affine"
    bits: int
    group_size: int = 32
    symmetric: bool = True
    scale_dtype: str = "f16"
    wide_offset: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise Malformed(f"affine layouts have 2 to 8 bits, found {self.bits}")
        if self.group_size < 0:
            raise Malformed(f"group size must be positive, or 0 for one group a row; found {self.group_size}")
        dtype(self.scale_dtype)

    @property
    def name(self) -> str:
        group = f"g{self.group_size}" if self.group_size else "channel"
        return f"int{self.bits}-{group}" + ("" if self.symmetric else "-asym")

    @property
    def block(self) -> int:
        return self.group_size

    @property
    def keeps_zero(self) -> bool:
        return True

    @property
    def refittable(self) -> dict[str, tuple[float, float]]:
        reach = F16_MAX if self.scale_dtype == "f16" else float(np.finfo(np.float32).max)
        whole = {} if self.symmetric else {"zero_point": (float(self.lo), float(self.hi))}
        return {**whole, "scale": (-reach, reach)}

    def stored(self, key: str, x: np.ndarray) -> np.ndarray:
        narrow = key == "scale" and not self.symmetric and self.bits < 8
        return super().stored(key, to_significant(x, 11 - self.bits) if narrow else x)

    @property
    def lo(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def hi(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def array_specs(self, shape: tuple[int, int]) -> dict[str, ArraySpec]:
        rows, cols = shape
        groups = self.blocks_per_row(cols)
        specs = {
            "codes": ArraySpec(np.dtype(np.int8), (rows, cols)),
            "scale": ArraySpec(dtype(self.scale_dtype).numpy, (rows, groups)),
        }
        if not self.symmetric:
            specs["zero_point"] = ArraySpec(np.dtype(np.int8), (rows, groups))
        return specs

    def fit(self, w: np.ndarray, importance: np.ndarray | None = None, context: Context | None = None) -> Arrays:
        """Round-to-nearest, or with importance the search of Q4_0 and Q5_0 (symmetric layouts below 8 bits).

        Eight symmetric bits ignore the importance, as Q8_0 does. Asymmetric layouts fit the range, and with importance
        search from there (`affine_search`).
        """
        w = np.ascontiguousarray(w, np.float32)
        if not self.symmetric:
            plain = self._fit_asymmetric(self._blocks(w))
            return plain if importance is None else self._search_asymmetric(w, importance, plain)
        if importance is None or self.bits == 8:
            return self._fit_symmetric(w)
        return self._search_symmetric(w, importance, context or Context())

    def grid(self, params: Mapping[str, np.ndarray]) -> AffineGrid:
        scale = params["scale"].astype(np.float32)
        offset = np.zeros_like(scale) if self.symmetric else -(params["zero_point"].astype(np.float32) * scale)
        width = self._width(params)
        return AffineGrid(np.repeat(scale, width, axis=1), np.repeat(offset, width, axis=1), self.lo, self.hi)

    def values(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        codes = self._blocks(arrays["codes"]).astype(np.float64)  # (rows, groups, group)
        if not self.symmetric:
            codes = codes - arrays["zero_point"].astype(np.float64)[..., None]
        return (codes * arrays["scale"].astype(np.float64)[..., None]).reshape(arrays["codes"].shape)

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "scale_dtype": self.scale_dtype,
            **({"wide_offset": True} if self.wide_offset else {}),
        }

    def _blocks(self, w: np.ndarray) -> np.ndarray:
        rows, cols = w.shape
        return w.reshape(rows, self.blocks_per_row(cols), self.group_size or cols)

    def _width(self, params: Mapping[str, np.ndarray]) -> int:
        if self.group_size:
            return self.group_size
        if "codes" in params:
            return params["codes"].shape[1]
        return 1  # one column per row group; broadcasts over the row

    def _fit_symmetric(self, w: np.ndarray) -> Arrays:
        rows, cols = w.shape
        blocks = w.reshape(rows * self.blocks_per_row(cols), -1)
        scale, codes = np.empty(len(blocks), np.float32), np.empty(blocks.shape, np.int8)
        if self.bits == 8:
            over_blocks(kernels.round_bytes, len(blocks), blocks, blocks.view(np.int32), scale, codes)
        else:
            over_blocks(kernels.round_symmetric, len(blocks), blocks, blocks.view(np.int32), self.lo, scale, codes)
        return {"codes": codes.reshape(w.shape), "scale": self._store(scale.reshape(rows, -1))}

    def _search_symmetric(self, w: np.ndarray, importance: np.ndarray, context: Context) -> Arrays:
        """Scales of least weighted squared error, weights importance * sqrt(mean square of the row + x^2)."""
        rows, cols = w.shape
        per_row = self.blocks_per_row(cols)
        blocks = rows * per_row
        scale, kept = np.empty(blocks, np.float32), np.empty((blocks, 2), np.float32)
        codes = np.empty((blocks, cols // per_row), np.int8)
        over_blocks(
            kernels.search_symmetric, blocks, w.reshape(-1), np.ascontiguousarray(importance, np.float32), per_row,
            row_mean_square(w, context), codes.shape[1], float(-self.lo), signed_steps(-self.lo), scale, kept,
        )  # fmt: skip
        over_blocks(kernels.kept_codes, blocks, w.reshape(-1), kept, self.lo, self.hi, codes)
        return {"codes": codes.reshape(w.shape), "scale": self._store(scale.reshape(rows, per_row))}

    def _fit_asymmetric(self, blocks: np.ndarray) -> Arrays:
        low = np.minimum(blocks.min(axis=2), np.float32(0))
        high = np.maximum(blocks.max(axis=2), np.float32(0))
        scale = (high - low) / np.float32(self.hi - self.lo)
        if self.bits < 8:
            scale = round_up_significant(scale, 11 - self.bits)
        stored = self._store(scale)
        scale = stored.astype(np.float32)
        ratio = np.divide(low, scale, out=np.zeros_like(low), where=scale != 0)
        zero = np.clip(np.rint(np.float32(self.lo) - ratio), self.lo, self.hi)
        return {"scale": stored, "zero_point": zero.astype(np.int8)}

    def _search_asymmetric(self, w: np.ndarray, importance: np.ndarray, plain: Arrays) -> Arrays:
        per_row = self.blocks_per_row(w.shape[1])
        weights = np.asarray(importance, np.float64) if np.any(importance) else np.ones(w.shape[1])
        scale = plain["scale"].astype(np.float64).reshape(-1)
        zero = plain["zero_point"].astype(np.int32).reshape(-1) - self.lo
        over_blocks(
            search, len(scale), w.reshape(len(scale), -1), weights.reshape(per_row, -1), self.hi - self.lo,
            11 - self.bits if self.bits < 8 else 11, scale, zero,
        )  # fmt: skip
        shape = plain["scale"].shape
        zero_point = (zero + self.lo).astype(np.int8)
        return {"scale": self._store(scale.reshape(shape)), "zero_point": zero_point.reshape(shape)}

    def _store(self, scale: np.ndarray) -> np.ndarray:
        target = dtype(self.scale_dtype)
        if target.name == "f16" and np.abs(scale).max(initial=0) > F16_MAX:
            raise Unsupported(
                f"a {self.name} scale of {np.abs(scale).max():.3g} overflows float16 (limit {F16_MAX:.0f})",
                hint="these weights are far out of the usual range; use an f32 or bf16 target for this tensor",
            )
        return scale.astype(target.numpy)


def round_up_significant(x: np.ndarray, bits: int) -> np.ndarray:
    """Smallest float32 >= x (x >= 0) with at most `bits` significant bits that float16 can hold."""
    return to_significant(x, bits, np.ceil).astype(np.float32)


def to_significant(x: np.ndarray, bits: int, whole: Callable[[np.ndarray], np.ndarray] = np.rint) -> np.ndarray:
    """float64 with at most `bits` significant bits that float16 can hold; `whole` says which way to round."""
    mantissa, exponent = np.frexp(x.astype(np.float64))
    # Below 2^-14 float16 is subnormal: its spacing is fixed at 2^-24, so the grid cannot be finer than that.
    step_exponent = np.maximum(exponent - bits, -24)
    return np.ldexp(whole(np.ldexp(mantissa, exponent - step_exponent)), step_exponent)
