"""GPTQ and AWQ words. X is the module's path, b the bits, g the group, W is (out, in); the tensors are turned.

GPTQ

| tensor    | dtype | shape                | meaning                                                       |
|-----------|-------|----------------------|---------------------------------------------------------------|
| X.qweight | int32 | [in·b / 32, out]     | each column a bit stream of codes 0..2^b - 1, lowest bit first |
| X.qzeros  | int32 | [in / g, out·b / 32] | each row a bit stream of zero points; version 1 less one      |
| X.scales  | F16   | [in / g, out]        |                                                               |
| X.g_idx   | int32 | [in]                 | the group of each input channel: i // g here                  |

`checkpoint_format` tells version 1 (`gptq`) from 2 (`gptq_v2`).

AWQ (GEMM), four bits

| tensor    | dtype | shape           | meaning                                                                   |
|-----------|-------|-----------------|---------------------------------------------------------------------------|
| X.qweight | int32 | [in, out / 8]   | nibble i of a word holds the column `_ORDER[i]` of its eight              |
| X.qzeros  | int32 | [in / g, out / 8] | likewise                                                                |
| X.scales  | F16   | [in / g, out]   |                                                                           |

W[o, i] = (code - zero point) · scale. Streams cross the borders of words with 3 bits. Read from AutoGPTQ's
qlinear_cuda_old.py (`pack`) and AutoAWQ's modules/linear/gemm.py (`from_linear`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tightship.errors import Malformed, Unsupported
from tightship.formats.layouts.affine import Affine
from tightship.formats.packings.compressed_tensors import pack_codes, packed_words, unpack_codes
from tightship.layout import Arrays, ArraySpec

GPTQ_BITS = (2, 3, 4, 8)
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_INT32, _F16 = np.dtype(np.int32), np.dtype(np.float16)


def gptq_specs(layout: Affine, shape: tuple[int, int]) -> dict[str, ArraySpec]:
    """The tensors of a GPTQ matrix, by suffix, without data.

    Raises:
        Unsupported: bits, sizes or scales that the format does not have.
    """
    rows, cols = shape
    _check(layout, GPTQ_BITS, "GPTQ")
    if cols * layout.bits % 32 or rows * layout.bits % 32:
        raise Unsupported(f"GPTQ packs whole words of 32 bits both ways, found {rows} x {cols} of {layout.bits} bits")
    groups = layout.blocks_per_row(cols)
    return {
        "qweight": ArraySpec(_INT32, (packed_words(cols, layout.bits), rows)),
        "qzeros": ArraySpec(_INT32, (groups, packed_words(rows, layout.bits))),
        "scales": ArraySpec(_F16, (groups, rows)),
        "g_idx": ArraySpec(_INT32, (cols,)),
    }


def pack_gptq(layout: Affine, arrays: Mapping[str, np.ndarray], *, v2: bool) -> Arrays:
    """Logical arrays to the tensors of `gptq_specs`.

    Raises:
        Unsupported: as `gptq_specs`, and a zero point that version 1 cannot say (the lowest code).
    """
    rows, cols = arrays["codes"].shape
    groups = layout.blocks_per_row(cols)
    zero = np.ascontiguousarray(_zeros(layout, arrays, (groups, rows)))
    if not v2:
        if (zero == layout.lo).any():
            raise Unsupported("GPTQ version 1 stores zero points less one, and cannot say 0", hint="use version 2")
        zero -= np.int8(1)
    return {
        "qweight": np.ascontiguousarray(pack_codes(arrays["codes"], layout.bits).T),
        "qzeros": pack_codes(zero, layout.bits),
        "scales": np.ascontiguousarray(arrays["scale"].T),
        "g_idx": (np.arange(cols) // (layout.group_size or cols)).astype(np.int32),
    }


def unpack_gptq(layout: Affine, tensors: Mapping[str, np.ndarray], *, v2: bool) -> Arrays:
    """The inverse of `pack_gptq`, `layout` telling bits and groups.

    Raises:
        Malformed: shapes that do not belong together, or a symmetric layout whose zero points are not the middle.
    """
    rows = tensors["scales"].shape[1]
    cols = tensors["qweight"].shape[0] * 32 // layout.bits
    codes = unpack_codes(np.ascontiguousarray(tensors["qweight"].T), layout.bits, cols)
    zero = unpack_gptq_zeros(tensors["qzeros"], layout.bits, rows, v2=v2)
    return _logical(layout, codes, zero, tensors["scales"])


def unpack_gptq_zeros(qzeros: np.ndarray, bits: int, rows: int, *, v2: bool) -> np.ndarray:
    """(groups, rows) int8 zero points, signed about the middle code."""
    zero = unpack_codes(qzeros, bits, rows)
    if v2:
        return zero
    low = 1 << (bits - 1)
    # Version 1 wraps: a stored 2^b - 1 is the zero point 0 (signed -2^(b-1)).
    return ((zero.astype(np.int16) + 1 + low) % (2 * low) - low).astype(np.int8)


def awq_specs(layout: Affine, shape: tuple[int, int]) -> dict[str, ArraySpec]:
    """The tensors of an AWQ matrix, by suffix, without data. Raises as `gptq_specs`."""
    rows, cols = shape
    _check(layout, (4,), "AWQ")
    if rows % 8:
        raise Unsupported(f"AWQ packs eight output channels in a word, found {rows}")
    groups = layout.blocks_per_row(cols)
    return {
        "qweight": ArraySpec(_INT32, (cols, rows // 8)),
        "qzeros": ArraySpec(_INT32, (groups, rows // 8)),
        "scales": ArraySpec(_F16, (groups, rows)),
    }


def pack_awq(layout: Affine, arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Logical arrays to the tensors of `awq_specs`."""
    rows, cols = arrays["codes"].shape
    zero = _zeros(layout, arrays, (layout.blocks_per_row(cols), rows))
    return {
        "qweight": pack_codes(_shuffled(arrays["codes"].T), 4),
        "qzeros": pack_codes(_shuffled(zero), 4),
        "scales": np.ascontiguousarray(arrays["scale"].T),
    }


def unpack_awq(layout: Affine, tensors: Mapping[str, np.ndarray]) -> Arrays:
    """The inverse of `pack_awq`. Raises as `unpack_gptq`."""
    rows = tensors["scales"].shape[1]
    codes = np.ascontiguousarray(_unshuffled(unpack_codes(tensors["qweight"], 4, rows)).T)
    return _logical(layout, codes, unpack_awq_zeros(tensors["qzeros"], rows), tensors["scales"])


def unpack_awq_zeros(qzeros: np.ndarray, rows: int) -> np.ndarray:
    """(groups, rows) int8 zero points, signed about the middle code."""
    return _unshuffled(unpack_codes(qzeros, 4, rows))


def _check(layout: Affine, bits: tuple[int, ...], name: str) -> None:
    if layout.bits not in bits:
        raise Unsupported(f"{name} has {', '.join(map(str, bits))} bits, found {layout.bits}")
    if layout.scale_dtype != "f16":
        raise Unsupported(f"{name} scales are float16, those of this {layout.name} matrix are {layout.scale_dtype}")


def _zeros(layout: Affine, arrays: Mapping[str, np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """(groups, rows) int8; the middle code where the layout is symmetric."""
    return np.zeros(shape, np.int8) if layout.symmetric else arrays["zero_point"].T.copy()


def _logical(layout: Affine, codes: np.ndarray, zero: np.ndarray, scales: np.ndarray) -> Arrays:
    arrays = {"codes": codes, "scale": np.ascontiguousarray(scales.T)}
    if not layout.symmetric:
        arrays["zero_point"] = np.ascontiguousarray(zero.T)
    elif zero.any():
        raise Malformed(
            "the file says symmetric, and its zero points are not the middle code",
            hint="runtimes disagree about such files; check `sym` and `checkpoint_format`",
        )
    layout.check(arrays, codes.shape)
    return arrays


def _shuffled(codes: np.ndarray) -> np.ndarray:
    """Columns in the order of the nibbles."""
    return np.ascontiguousarray(codes.reshape(len(codes), -1, 8)[..., _ORDER].reshape(codes.shape))


def _unshuffled(codes: np.ndarray) -> np.ndarray:
    back = np.argsort(_ORDER)
    return np.ascontiguousarray(codes.reshape(len(codes), -1, 8)[..., back].reshape(codes.shape))
