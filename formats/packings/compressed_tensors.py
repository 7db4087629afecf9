"""Affine integers as compressed-tensors stores them. X is the module's path, b the bits, W is (out, in).

pack-quantized

| tensor               | dtype | shape                  | meaning                                                    |
|----------------------|-------|------------------------|------------------------------------------------------------|
| X.weight_packed      | int32 | [out, ceil(in·b / 32)] | each row a bit stream of codes + 2^(b-1)                   |
| X.weight_scale       | float | [out, groups]          | one a group; one group a row for the channel strategy      |
| X.weight_shape       | int64 | [2]                    | out, in                                                    |
| X.weight_zero_point  | int32 | [ceil(out·b / 32), groups] | asymmetric only; each column a bit stream              |

The stream is dense: value i takes bits i·b to i·b + b - 1, lowest bit first, across the borders of the little-endian
words; the last word is filled with zeros. 32 values take b words.

int-quantized, naive-quantized

| tensor               | dtype | shape                  | meaning                                                    |
|----------------------|-------|------------------------|------------------------------------------------------------|
| X.weight             | int8  | [out, in]              | codes                                                      |
| X.weight_scale       | float | [out, groups]          | as above                                                   |
| X.weight_zero_point  | int8  | [out, groups]          | asymmetric only                                            |

W = (code - zero_point) · scale. Scales are written as float32, which holds every float16 and bfloat16 scale exactly.
Read from compressed_tensors/compressors/pack_quantized/helpers.py and naive_quantized/base.py, version 0.20.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from tightship.dtypes import dtype
from tightship.errors import Malformed
from tightship.formats.layouts.affine import Affine
from tightship.layout import Arrays, ArraySpec

_CHUNK = 1 << 20  # codes worked on at a time; odd widths unfold each into single bits


def packed_words(count: int, bits: int) -> int:
    """int32 words that `count` codes take."""
    return math.ceil(count * bits / 32)


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """(rows, cols) signed codes to (rows, words) int32."""
    rows, cols = codes.shape
    words = np.zeros((rows, packed_words(cols, bits) * 4), np.uint8)
    for part in _parts(rows, cols):
        stream = _to_bytes(codes[part].view(np.uint8) + np.uint8(1 << (bits - 1)), bits)
        words[part, : stream.shape[1]] = stream
    return words.view("<i4")


def unpack_codes(words: np.ndarray, bits: int, cols: int) -> np.ndarray:
    """(rows, words) int32 to (rows, cols) int8 codes.

    Raises:
        Malformed: the number of words is not that of `cols` codes.
    """
    if words.shape[1] != packed_words(cols, bits):
        raise Malformed(f"{cols} codes of {bits} bits take {packed_words(cols, bits)} words, found {words.shape[1]}")
    codes = np.empty((words.shape[0], cols), np.int8)
    raw = np.ascontiguousarray(words, "<i4").view(np.uint8)
    for part in _parts(len(codes), cols):
        codes[part] = (_from_bytes(raw[part], bits, cols) - np.uint8(1 << (bits - 1))).view(np.int8)
    return codes


def _parts(rows: int, cols: int) -> Iterator[slice]:
    """Runs of rows that keep the intermediate arrays small."""
    step = max(1, _CHUNK // max(cols, 1))
    return (slice(start, start + step) for start in range(0, rows, step))


def _to_bytes(unsigned: np.ndarray, bits: int) -> np.ndarray:
    """(rows, cols) values below 2^bits to (rows, bytes): the dense stream, lowest bit first."""
    if 8 % bits:
        single = np.unpackbits(unsigned[..., None], axis=-1, count=bits, bitorder="little")
        return np.packbits(single.reshape(len(unsigned), -1), axis=1, bitorder="little")
    each = 8 // bits
    padded = np.pad(unsigned, ((0, 0), (0, -unsigned.shape[1] % each))) if unsigned.shape[1] % each else unsigned
    stream = padded[:, ::each].copy()
    for place in range(1, each):
        stream |= padded[:, place::each] << np.uint8(place * bits)
    return stream


def _from_bytes(stream: np.ndarray, bits: int, cols: int) -> np.ndarray:
    """The inverse of `_to_bytes`; bytes behind the last value are not looked at."""
    if 8 % bits:
        single = np.unpackbits(stream, axis=1, count=cols * bits, bitorder="little")
        return np.packbits(single.reshape(-1, cols, bits), axis=2, bitorder="little")[..., 0]
    each = 8 // bits
    unsigned = np.empty((len(stream), stream.shape[1] * each), np.uint8)
    for place in range(each):
        unsigned[:, place::each] = (stream >> np.uint8(place * bits)) & np.uint8((1 << bits) - 1)
    return unsigned[:, :cols]


def packed_specs(layout: Affine, shape: tuple[int, int]) -> dict[str, ArraySpec]:
    """The tensors of a pack-quantized matrix, by suffix, without data."""
    rows, cols = shape
    groups = layout.blocks_per_row(cols)
    specs = {
        "weight_packed": ArraySpec(np.dtype(np.int32), (rows, packed_words(cols, layout.bits))),
        "weight_scale": ArraySpec(np.dtype(np.float32), (rows, groups)),
        "weight_shape": ArraySpec(np.dtype(np.int64), (2,)),
    }
    if not layout.symmetric:
        specs["weight_zero_point"] = ArraySpec(np.dtype(np.int32), (packed_words(rows, layout.bits), groups))
    return specs


def pack_quantized(layout: Affine, arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Logical arrays to the tensors of `packed_specs`."""
    codes = arrays["codes"]
    packed = {
        "weight_packed": pack_codes(codes, layout.bits),
        "weight_scale": arrays["scale"].astype(np.float32),
        "weight_shape": np.array(codes.shape, np.int64),
    }
    if not layout.symmetric:
        columns = np.ascontiguousarray(arrays["zero_point"].T)
        packed["weight_zero_point"] = np.ascontiguousarray(pack_codes(columns, layout.bits).T)
    return packed


def unpack_quantized(layout: Affine, tensors: Mapping[str, np.ndarray]) -> Arrays:
    """The tensors of a pack-quantized matrix to logical arrays.

    Raises:
        Malformed: shapes that do not belong together, or a scale that the layout's scale type cannot hold exactly.
    """
    rows, cols = (int(n) for n in tensors["weight_shape"])
    arrays = {
        "codes": unpack_codes(tensors["weight_packed"], layout.bits, cols),
        "scale": _exact_scale(tensors["weight_scale"], layout.scale_dtype),
    }
    if not layout.symmetric:
        columns = np.ascontiguousarray(tensors["weight_zero_point"].T)
        arrays["zero_point"] = np.ascontiguousarray(unpack_codes(columns, layout.bits, rows).T)
    layout.check(arrays, (rows, cols))
    return arrays


def plain_specs(layout: Affine, shape: tuple[int, int]) -> dict[str, ArraySpec]:
    """The tensors of int-quantized and naive-quantized, by suffix, without data."""
    groups = (shape[0], layout.blocks_per_row(shape[1]))
    specs = {"weight": ArraySpec(np.dtype(np.int8), shape), "weight_scale": ArraySpec(np.dtype(np.float32), groups)}
    return specs if layout.symmetric else {**specs, "weight_zero_point": ArraySpec(np.dtype(np.int8), groups)}


def plain_quantized(layout: Affine, arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Logical arrays to the tensors of int-quantized and naive-quantized."""
    plain = {"weight": arrays["codes"], "weight_scale": arrays["scale"].astype(np.float32)}
    return plain if layout.symmetric else {**plain, "weight_zero_point": arrays["zero_point"]}


def unplain_quantized(layout: Affine, tensors: Mapping[str, np.ndarray]) -> Arrays:
    """The inverse of `plain_quantized`.

    Raises:
        Malformed: as `unpack_quantized`.
    """
    arrays = {"codes": tensors["weight"], "scale": _exact_scale(tensors["weight_scale"], layout.scale_dtype)}
    if not layout.symmetric:
        arrays["zero_point"] = tensors["weight_zero_point"]
    layout.check(arrays, arrays["codes"].shape)
    return arrays


def _exact_scale(scale: np.ndarray, name: str) -> np.ndarray:
    stored = scale.astype(dtype(name).numpy)
    if not np.array_equal(stored.astype(np.float64), scale.astype(np.float64)):
        raise Malformed(f"the scales are not exact in {name}")
    return stored
