"""Bytes of the GGML grid types, super-blocks of 256 weights (little endian; ggml-common.h).

| type    | bytes | fields in order                                                                            |
|---------|-------|--------------------------------------------------------------------------------------------|
| IQ1_S   | 50    | f16 d; u8 qs[32]; u16 qh[8]                                                                |
| IQ1_M   | 56    | u8 qs[32]; u8 qh[16]; u16 scales[4]                                                        |
| IQ2_XXS | 66    | f16 d; 8 x (u8 index[4]; u32 rest)                                                         |
| IQ2_XS  | 74    | f16 d; u16 qs[32]; u8 scales[8]                                                            |
| IQ2_S   | 82    | f16 d; u8 qs[32]; u8 signs[32]; u8 qh[8]; u8 scales[8]                                     |
| IQ3_XXS | 98    | f16 d; u8 qs[64]; 8 x u32 rest                                                             |
| IQ3_S   | 110   | f16 d; u8 qs[64]; u8 qh[8]; u8 signs[32]; u8 scales[4]                                     |

A point's index is that into the grid of ggml-common.h (taken from `gguf.quants`). Upper bits of an index: IQ1_S qh[i],
bits 3 k.. for point 4 i + k; IQ1_M qh[i], bits 0..2 and 4..6 for points 2 i and 2 i + 1; IQ2_S qh[i], bits 2 k.. for
4 i + k; IQ3_S qh[i], bit k for 8 i + k; IQ2_XS: the index is bits 0..8 of qs.

Signs: bit j of a byte is the j-th of eight weights. Signs of seven bits leave out the last, which makes the number of
negative weights even: bits 7 k.. of `rest` for the k-th eight, bits 9.. of IQ2_XS qs.

Scales: bits 28.. of `rest`; nibbles, low first; IQ1_S bits 12..14 of qh[i]; IQ1_M bits 3 k.. of scales[i] for scale
4 i + k. IQ1 shifts (set: -1): bit 15 of IQ1_S qh, bits 3 and 7 of IQ1_M qh. The top four bits of IQ1_M scales[i] are
bits 4 i.. of d.
"""

from __future__ import annotations

from functools import cache

import gguf.quants
import numpy as np

from tightship.errors import Unsupported
from tightship.formats.layouts.iq_grid import IQ1M, IQ1S, IQ2S, IQ2XS, IQ2XXS, IQ3S, IQ3XXS
from tightship.formats.packings.ggml_block import BlockType, as_bytes, cut, halves, join
from tightship.layout import Arrays

BITS8 = np.arange(8, dtype=np.uint8)


@cache
def _grid(name: str) -> np.ndarray:
    """int8 (points, 4 or 8)."""
    kind = getattr(gguf.quants, name)
    kind.init_grid()
    return kind.grid.reshape(kind.grid_shape).astype(np.int8)


@cache
def _order(name: str) -> tuple[np.ndarray, np.ndarray]:
    """(sorted points as integers, their indices)."""
    keys = _keys(_grid(name))
    order = np.argsort(keys)
    return keys[order], order


def _keys(points: np.ndarray) -> np.ndarray:
    """int8 (n, 4 or 8) -> one integer for each point."""
    return np.ascontiguousarray(points).view(np.dtype(f"u{points.shape[1]}"))[:, 0]


def _indices(name: str, points: np.ndarray, blocks: int) -> np.ndarray:
    """uint16 (blocks, points of a block): where int8 (n, 4 or 8) stands in the grid."""
    keys, order = _order(name)
    wanted = _keys(points)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    strange = int(np.count_nonzero(keys[at] != wanted))
    if strange:
        raise Unsupported(f"{strange} groups of codes are no points of the {name} grid")
    return order[at].astype(np.uint16).reshape(blocks, -1)


def _split_signs(codes: np.ndarray) -> np.ndarray:
    """int8 codes -> uint8 (n, 1), bit j set where the j-th of eight is negative."""
    return np.packbits(codes.reshape(-1, 8) < 0, axis=1, bitorder="little")


def _apply_signs(magnitudes: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """int8 (n, 8) with the signs of uint8 (n,)."""
    return np.where(signs.reshape(-1, 1) >> BITS8 & 1, -magnitudes, magnitudes)


def _seven(signs: np.ndarray, name: str) -> np.ndarray:
    """Signs without the last, which must make their number even."""
    odd = int(np.count_nonzero(np.bitwise_count(signs) & 1))
    if odd:
        raise Unsupported(f"{name} needs an even number of negative codes in every eight; {odd} groups have an odd one")
    return signs & 127


def _eight(seven: np.ndarray) -> np.ndarray:
    """Inverse of `_seven`."""
    seven = seven.astype(np.uint8)
    return seven | (np.bitwise_count(seven) & 1) << 7


def _nibbles(scales: np.ndarray, blocks: int) -> np.ndarray:
    scales = scales.reshape(blocks, -1, 2)
    return scales[..., 0] | scales[..., 1] << 4


def _from_nibbles(packed: np.ndarray) -> np.ndarray:
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)


def _arrays(codes: np.ndarray, d: np.ndarray, scales: np.ndarray, shape: tuple[int, int]) -> Arrays:
    return {
        "codes": codes.astype(np.int8).reshape(shape),
        "d": d,
        "scales": scales.astype(np.uint8).reshape(shape[0], -1),
    }


def _magnitudes(arrays: Arrays, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(uint16 indices (blocks, points), uint8 signs (blocks, 32)) of IQ2 and IQ3 codes."""
    codes, blocks = arrays["codes"], arrays["d"].size
    points = np.abs(codes).reshape(-1, _grid(name).shape[1])
    return _indices(name, points, blocks), _split_signs(codes).reshape(blocks, 32)


def _rest(signs: np.ndarray, scales: np.ndarray, name: str) -> np.ndarray:
    """uint32 (blocks, 8) of four times seven signs and a four-bit scale."""
    seven = _seven(signs, name).astype(np.uint32).reshape(-1, 8, 4)
    shifted = seven << np.array([0, 7, 14, 21], np.uint32)
    return np.bitwise_or.reduce(shifted, axis=2) | scales.reshape(-1, 8).astype(np.uint32) << 28


def _from_rest(rest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inverse of `_rest`: (signs (blocks * 32,), scales (blocks, 8))."""
    seven = rest[..., None] >> np.array([0, 7, 14, 21], np.uint32) & 127
    return _eight(seven).reshape(-1), rest >> 28


def _pack_iq2_xxs(arrays: Arrays) -> np.ndarray:
    d = arrays["d"]
    index, signs = _magnitudes(arrays, "IQ2_XXS")
    rest = as_bytes(_rest(signs, arrays["scales"], "IQ2_XXS"), d.size).reshape(d.size, 8, 4)
    words = np.concatenate([index.astype(np.uint8).reshape(d.size, 8, 4), rest], axis=2)
    return join(len(d), as_bytes(d, d.size), words.reshape(d.size, 64))


def _unpack_iq2_xxs(data: np.ndarray, cols: int) -> Arrays:
    d, words = cut(data, 2, 64)
    words = words.reshape(-1, 8, 2, 4)
    signs, scales = _from_rest(np.ascontiguousarray(words[:, :, 1]).view("<u4")[..., 0])
    codes = _apply_signs(_grid("IQ2_XXS")[words[:, :, 0].reshape(-1)], signs)
    return _arrays(codes, halves(d, len(data)), scales, (len(data), cols))


def _pack_iq2_xs(arrays: Arrays) -> np.ndarray:
    d = arrays["d"]
    index, signs = _magnitudes(arrays, "IQ2_XS")
    qs = index | _seven(signs, "IQ2_XS").astype(np.uint16) << 9
    return join(len(d), as_bytes(d, d.size), as_bytes(qs, d.size), _nibbles(arrays["scales"], d.size))


def _unpack_iq2_xs(data: np.ndarray, cols: int) -> Arrays:
    d, qs, scales = cut(data, 2, 64, 8)
    words = qs.view("<u2").reshape(-1)
    codes = _apply_signs(_grid("IQ2_XS")[words & 511], _eight(words >> 9))
    return _arrays(codes, halves(d, len(data)), _from_nibbles(scales), (len(data), cols))


def _pack_iq2_s(arrays: Arrays) -> np.ndarray:
    d = arrays["d"]
    index, signs = _magnitudes(arrays, "IQ2_S")
    high = np.bitwise_or.reduce((index >> 8).reshape(-1, 8, 4) << np.array([0, 2, 4, 6], np.uint16), axis=2)
    scales = _nibbles(arrays["scales"], d.size)
    return join(len(d), as_bytes(d, d.size), index.astype(np.uint8), signs, high.astype(np.uint8), scales)


def _unpack_iq2_s(data: np.ndarray, cols: int) -> Arrays:
    d, qs, signs, qh, scales = cut(data, 2, 32, 32, 8, 8)
    high = (qh[..., None] >> np.array([0, 2, 4, 6], np.uint8) & 3).reshape(-1).astype(np.uint16)
    codes = _apply_signs(_grid("IQ2_S")[qs.reshape(-1) | high << 8], signs.reshape(-1))
    return _arrays(codes, halves(d, len(data)), _from_nibbles(scales), (len(data), cols))


def _pack_iq3_xxs(arrays: Arrays) -> np.ndarray:
    d = arrays["d"]
    index, signs = _magnitudes(arrays, "IQ3_XXS")
    rest = _rest(signs, arrays["scales"], "IQ3_XXS")
    return join(len(d), as_bytes(d, d.size), index.astype(np.uint8), as_bytes(rest, d.size))


def _unpack_iq3_xxs(data: np.ndarray, cols: int) -> Arrays:
    d, qs, rest = cut(data, 2, 64, 32)
    signs, scales = _from_rest(rest.view("<u4"))
    codes = _apply_signs(_grid("IQ3_XXS")[qs.reshape(-1)].reshape(-1, 8), signs)
    return _arrays(codes, halves(d, len(data)), scales, (len(data), cols))


def _pack_iq3_s(arrays: Arrays) -> np.ndarray:
    d = arrays["d"]
    index, signs = _magnitudes(arrays, "IQ3_S")
    high = np.packbits((index >> 8).astype(np.uint8), axis=1, bitorder="little")
    scales = _nibbles(arrays["scales"], d.size)
    return join(len(d), as_bytes(d, d.size), index.astype(np.uint8), high, signs, scales)


def _unpack_iq3_s(data: np.ndarray, cols: int) -> Arrays:
    d, qs, qh, signs, scales = cut(data, 2, 64, 8, 32, 4)
    high = np.unpackbits(qh, axis=1, bitorder="little").astype(np.uint16)
    codes = _apply_signs(_grid("IQ3_S")[qs | high << 8].reshape(-1, 8), signs.reshape(-1))
    return _arrays(codes, halves(d, len(data)), _from_nibbles(scales), (len(data), cols))


def _ternary_points(arrays: Arrays, run: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(uint16 indices (blocks, 32), shift bits (blocks, 256 / run)) of IQ1 codes 8 g + s."""
    codes, blocks = arrays["codes"].astype(np.int16), arrays["d"].size
    grid = (codes + 4) >> 3
    shift = (codes - 8 * grid).reshape(-1, run)
    mixed = int(np.count_nonzero((np.abs(shift[:, :1]) != 1) | (shift != shift[:, :1]).any(axis=1, keepdims=True)))
    if mixed:
        raise Unsupported(f"{name} shifts {run} codes together, all by 1 or all by -1; {mixed} groups do not")
    return _indices("IQ1_S", grid.astype(np.int8).reshape(-1, 8), blocks), (shift[:, 0] < 0).reshape(blocks, -1)


def _ternary_codes(index: np.ndarray, minus: np.ndarray, run: int) -> np.ndarray:
    shift = np.where(minus.reshape(-1, 1), -1, 1).repeat(run // 8, axis=0)
    return 8 * _grid("IQ1_S")[index.reshape(-1)].astype(np.int16) + shift


def _pack_iq1_s(arrays: Arrays) -> np.ndarray:
    d = arrays["d"]
    index, minus = _ternary_points(arrays, 32, "IQ1_S")
    qh = np.bitwise_or.reduce((index >> 8).reshape(-1, 8, 4) << np.array([0, 3, 6, 9], np.uint16), axis=2)
    qh |= arrays["scales"].reshape(-1, 8).astype(np.uint16) << 12 | minus.astype(np.uint16) << 15
    return join(len(d), as_bytes(d, d.size), index.astype(np.uint8), as_bytes(qh, d.size))


def _unpack_iq1_s(data: np.ndarray, cols: int) -> Arrays:
    d, qs, qh = cut(data, 2, 32, 16)
    words = qh.view("<u2")
    high = (words[..., None] >> np.array([0, 3, 6, 9], np.uint16) & 7).reshape(-1, 32)
    codes = _ternary_codes(qs | high << 8, words >> 15, 32)
    return _arrays(codes, halves(d, len(data)), words >> 12 & 7, (len(data), cols))


def _pack_iq1_m(arrays: Arrays) -> np.ndarray:
    d = arrays["d"]
    index, minus = _ternary_points(arrays, 8, "IQ1_M")
    half = (index >> 8).astype(np.uint8) | minus.astype(np.uint8) << 3
    shifted = arrays["scales"].reshape(-1, 4, 4).astype(np.uint16) << np.array([0, 3, 6, 9], np.uint16)
    words = np.bitwise_or.reduce(shifted, axis=2)
    bits = np.ascontiguousarray(d).view(np.uint16).reshape(-1, 1)
    words |= (bits >> np.array([0, 4, 8, 12], np.uint16) & 15) << 12
    return join(len(d), index.astype(np.uint8), _nibbles(half, d.size), as_bytes(words, d.size))


def _unpack_iq1_m(data: np.ndarray, cols: int) -> Arrays:
    qs, qh, scales = cut(data, 32, 16, 8)
    half, words = _from_nibbles(qh), scales.view("<u2")
    bits = np.bitwise_or.reduce(words >> 12 << np.array([0, 4, 8, 12], np.uint16), axis=1)
    three = (words[..., None] >> np.array([0, 3, 6, 9], np.uint16) & 7).reshape(-1, 16)
    codes = _ternary_codes(qs | (half & 7).astype(np.uint16) << 8, half >> 3, 8)
    return _arrays(codes, bits.view(np.float16).reshape(len(data), -1), three, (len(data), cols))


TYPES = (
    BlockType("IQ1_S", 256, 50, IQ1S(), _pack_iq1_s, _unpack_iq1_s),
    BlockType("IQ1_M", 256, 56, IQ1M(), _pack_iq1_m, _unpack_iq1_m),
    BlockType("IQ2_XXS", 256, 66, IQ2XXS(), _pack_iq2_xxs, _unpack_iq2_xxs),
    BlockType("IQ2_XS", 256, 74, IQ2XS(), _pack_iq2_xs, _unpack_iq2_xs),
    BlockType("IQ2_S", 256, 82, IQ2S(), _pack_iq2_s, _unpack_iq2_s),
    BlockType("IQ3_XXS", 256, 98, IQ3XXS(), _pack_iq3_xxs, _unpack_iq3_xxs),
    BlockType("IQ3_S", 256, 110, IQ3S(), _pack_iq3_s, _unpack_iq3_s),
)
