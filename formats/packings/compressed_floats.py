"""FP8 and FP4 matrices as compressed-tensors stores them. X is the module's path, W is (out, in).

float-quantized, naive-quantized (FP8)

| tensor         | dtype   | shape                                               | meaning                     |
|----------------|---------|-----------------------------------------------------|-----------------------------|
| X.weight       | F8_E4M3 | [out, in]                                           | codes                       |
| X.weight_scale | F32     | [1], [out, 1], [out, in / g], [⌈out / r⌉, ⌈in / g⌉] | of tensor, row, group, tile |

mxfp8-quantized: the same with X.weight_scale uint8 [out, in / 32], E8M0.

mxfp4-pack-quantized, nvfp4-pack-quantized

| tensor                | dtype          | shape         | meaning                                           |
|-----------------------|----------------|---------------|---------------------------------------------------|
| X.weight_packed       | uint8          | [out, in / 2] | two codes a byte, the first in the low nibble     |
| X.weight_scale        | uint8, F8_E4M3 | [out, in / g] | E8M0, g = 32; E4M3, g = 16                        |
| X.weight_global_scale | F32            | [1]           | NVFP4 only: what the scales are divided by        |

Fine-grained FP8 (DeepSeek's and transformers' `fp8` method) is float-quantized in tiles with the scale under the name
X.weight_scale_inv. Read from compressed_tensors/compressors/{naive_quantized,nvfp4,mxfp4,mxfp8}/base.py, version 0.20.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tightship.errors import Malformed, Unsupported
from tightship.formats.layouts.float8 import E4M3, MXFP8, Float8
from tightship.formats.layouts.mx import MXFP4, NVFP4, ScaledNVFP4
from tightship.layout import Arrays, ArraySpec

_NOT_A_NUMBER = 0x7F


def scale_shape(layout: Float8, shape: tuple[int, int]) -> tuple[int, ...]:
    """Shape of X.weight_scale."""
    rows, groups = shape[0], layout.blocks_per_row(shape[1])
    if layout.tile_rows == 0 and layout.group_size == 0:
        return (1,)
    return (-(-rows // (layout.tile_rows or rows)), groups)


def float8_specs(layout: Float8 | MXFP8, shape: tuple[int, int]) -> dict[str, ArraySpec]:
    """The tensors of an FP8 matrix, by suffix, without data."""
    scale = (
        layout.array_specs(shape)["scale"]
        if isinstance(layout, MXFP8)
        else ArraySpec(np.dtype(np.float32), scale_shape(layout, shape))
    )
    return {"weight": ArraySpec(E4M3, shape), "weight_scale": scale}


def pack_float8(layout: Float8 | MXFP8, arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Logical arrays to the tensors of `float8_specs`.

    Raises:
        Unsupported: rows of one tile have different scales (a permutation tore it apart).
    """
    codes, scale = arrays["codes"], arrays["scale"]
    if isinstance(layout, Float8):
        step = layout.tile_rows or len(codes)
        tiles = scale[::step]
        if not np.array_equal(np.repeat(tiles, step, axis=0)[: len(codes)], scale):
            raise Unsupported(f"rows that share a scale in {layout.name} have different ones")
        scale = tiles.reshape(scale_shape(layout, codes.shape))
    return {"weight": codes.view(E4M3), "weight_scale": scale}


def unpack_float8(layout: Float8 | MXFP8, tensors: Mapping[str, np.ndarray]) -> Arrays:
    """The inverse of `pack_float8`; scales of any float type widen exactly.

    Raises:
        Malformed: shapes that do not belong together.
    """
    codes = np.ascontiguousarray(tensors["weight"]).view(np.uint8)
    scale = tensors["weight_scale"]
    if isinstance(layout, Float8):
        rows = len(codes)
        tiles = scale.astype(np.float32).reshape(-(-rows // (layout.tile_rows or rows)), -1)
        scale = np.repeat(tiles, layout.tile_rows or rows, axis=0)[:rows]
    arrays = {"codes": codes, "scale": np.ascontiguousarray(scale)}
    layout.check(arrays, codes.shape)
    if ((codes & 0x7F) == _NOT_A_NUMBER).any():
        raise Malformed("FP8 weights hold NaN")
    return arrays


def fp4_specs(layout: MXFP4 | NVFP4, shape: tuple[int, int]) -> dict[str, ArraySpec]:
    """The tensors of an FP4 matrix, by suffix, without data."""
    rows, cols = shape
    if cols % layout.group:
        raise Unsupported(f"{layout.name} needs rows in groups of {layout.group}, found {cols} columns")
    nvidia = isinstance(layout, NVFP4)
    specs = {
        "weight_packed": ArraySpec(np.dtype(np.uint8), (rows, cols // 2)),
        "weight_scale": ArraySpec(E4M3 if nvidia else np.dtype(np.uint8), (rows, cols // layout.group)),
    }
    return {**specs, "weight_global_scale": ArraySpec(np.dtype(np.float32), (1,))} if nvidia else specs


def pack_fp4(layout: MXFP4 | NVFP4, arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Logical arrays to the tensors of `fp4_specs`.

    Raises:
        Unsupported: rows with different divisors.
    """
    codes = arrays["codes"]
    packed = {"weight_packed": codes[:, ::2] | codes[:, 1::2] << np.uint8(4), "weight_scale": arrays["scale"]}
    if isinstance(layout, NVFP4):
        divisor = arrays["divisor"] if isinstance(layout, ScaledNVFP4) else np.ones((1, 1), np.float32)
        if (divisor != divisor[0]).any():
            raise Unsupported("the rows of an NVFP4 matrix have different divisors")
        packed |= {"weight_scale": arrays["scale"].view(E4M3), "weight_global_scale": divisor[0]}
    return packed


def unpack_fp4(layout: MXFP4 | ScaledNVFP4, tensors: Mapping[str, np.ndarray]) -> Arrays:
    """The inverse of `pack_fp4`; NVFP4 comes with its divisor.

    Raises:
        Malformed: shapes that do not belong together, or scales that are negative, NaN or zero divisors.
    """
    packed = tensors["weight_packed"]
    codes = np.empty((packed.shape[0], 2 * packed.shape[1]), np.uint8)
    codes[:, ::2], codes[:, 1::2] = packed & 15, packed >> 4
    arrays = {"codes": codes, "scale": np.ascontiguousarray(tensors["weight_scale"]).view(np.uint8)}
    if isinstance(layout, ScaledNVFP4):
        divisor = tensors["weight_global_scale"].astype(np.float32).reshape(-1)
        if divisor.size != 1 or not (np.isfinite(divisor[0]) and divisor[0] > 0):
            raise Malformed(f"an NVFP4 matrix has one positive global scale, found {divisor[:4]}")
        if (arrays["scale"] >= _NOT_A_NUMBER).any():
            raise Malformed("NVFP4 group scales are negative or NaN")
        arrays["divisor"] = np.full((len(codes), 1), divisor[0], np.float32)
    layout.check(arrays, codes.shape)
    return arrays
