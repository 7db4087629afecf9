"""Bytes of the K-quants, super-blocks of 256 weights (little endian; ggml-common.h).

| type | bytes | fields in order                                               |
|------|-------|---------------------------------------------------------------|
| Q2_K | 84    | u8 scales[16]; u8 qs[64]; f16 d; f16 dmin                     |
| Q3_K | 110   | u8 hmask[32]; u8 qs[64]; u8 scales[12]; f16 d                 |
| Q4_K | 144   | f16 d; f16 dmin; u8 scales[12]; u8 qs[128]                    |
| Q5_K | 176   | f16 d; f16 dmin; u8 scales[12]; u8 qh[32]; u8 qs[128]         |
| Q6_K | 210   | u8 ql[128]; u8 qh[64]; i8 scales[16]; f16 d                   |

Two-bit planes (Q2_K qs, the low bits of Q3_K, the high bits of Q6_K): of each 128 weights, byte l holds l, l + 32,
l + 64, l + 96 from the low bits up. Four-bit planes (Q4_K, Q5_K): of each 64, byte l holds l and l + 32; Q6_K ql: of
each 128, byte l < 64 holds l and l + 64. One-bit planes (Q3_K hmask, Q5_K qh): byte l, bit k is weight 32 k + l.

Q2_K scales[j]: scale low, min high nibble. Q3_K scales: six bits of scale + 32; the low nibbles of 0..7 and 8..15 share
bytes 0..7, the upper pair of j is in byte 8 + j % 4 at bit 2 (j / 4). Q4_K and Q5_K scales: bytes 0..3 scales 0..3,
bytes 4..7 mins 0..3, bytes 8..11 the low nibbles of scale and min 4..7, whose upper pairs top bytes 0..7.
Q3_K codes are stored + 4 (hmask is the third bit), Q6_K codes + 32.
"""

from __future__ import annotations

import numpy as np

from tightship.formats.layouts.k_quants import Q2K, Q3K, Q4K, Q5K, Q6K
from tightship.formats.packings.ggml_block import BlockType, as_bytes, cut, halves, join
from tightship.layout import Arrays

SUPER = 256


def _pack_pairs(q: np.ndarray) -> np.ndarray:
    """uint8 (blocks, 256), two bits used -> uint8 (blocks, 64)."""
    q = q.reshape(-1, 2, 4, 32)
    return (q[:, :, 0] | q[:, :, 1] << 2 | q[:, :, 2] << 4 | q[:, :, 3] << 6).reshape(-1, 64)


def _unpack_pairs(qs: np.ndarray) -> np.ndarray:
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    return (qs.reshape(-1, 2, 1, 32) >> shifts & 3).reshape(-1, SUPER)


def _pack_nibbles(q: np.ndarray) -> np.ndarray:
    """uint8 (blocks, 256), low four bits used -> uint8 (blocks, 128)."""
    q = q.reshape(-1, 4, 2, 32)
    return (q[:, :, 0] & 15 | q[:, :, 1] << 4).reshape(-1, 128)


def _unpack_nibbles(qs: np.ndarray) -> np.ndarray:
    qs = qs.reshape(-1, 4, 1, 32)
    return np.concatenate([qs & 15, qs >> 4], axis=2).reshape(-1, SUPER)


def _pack_bits(q: np.ndarray) -> np.ndarray:
    """uint8 (blocks, 256), the lowest bit used -> uint8 (blocks, 32)."""
    q = q.reshape(-1, 8, 32)
    result = q[:, 0] & 1
    for k in range(1, 8):
        result |= (q[:, k] & 1) << k
    return result


def _unpack_bits(qh: np.ndarray) -> np.ndarray:
    return np.unpackbits(qh.reshape(-1, 1, 32), axis=1, bitorder="little").reshape(-1, SUPER)


def _blocks(array: np.ndarray, entries: int) -> np.ndarray:
    """(rows, blocks * entries) of small integers -> uint8 (blocks, entries), negative ones in two's complement."""
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1, entries)


def _half(arrays: Arrays, key: str) -> np.ndarray:
    return as_bytes(arrays[key], arrays[key].size)


def _pack_q2(arrays: Arrays) -> np.ndarray:
    scales = _blocks(arrays["scales"], 16) | _blocks(arrays["mins"], 16) << 4
    qs = _pack_pairs(_blocks(arrays["codes"], SUPER))
    return join(len(arrays["codes"]), scales, qs, _half(arrays, "d"), _half(arrays, "dmin"))


def _unpack_q2(data: np.ndarray, cols: int) -> Arrays:
    scales, qs, d, dmin = cut(data, 16, 64, 2, 2)
    rows = len(data)
    return {
        "codes": _unpack_pairs(qs).reshape(rows, cols),
        "d": halves(d, rows),
        "dmin": halves(dmin, rows),
        "scales": (scales & 15).reshape(rows, -1),
        "mins": (scales >> 4).reshape(rows, -1),
    }


def _pack_q3(arrays: Arrays) -> np.ndarray:
    q = _blocks(arrays["codes"], SUPER) + np.uint8(4)
    six = _blocks(arrays["scales"], 16) + np.uint8(32)
    low = six[:, :8] & 15 | six[:, 8:] << 4
    tops = (six >> 4).reshape(-1, 4, 4)
    high = tops[:, 0] | tops[:, 1] << 2 | tops[:, 2] << 4 | tops[:, 3] << 6
    rows = len(arrays["codes"])
    return join(rows, _pack_bits(q >> 2), _pack_pairs(q & 3), low, high, _half(arrays, "d"))


def _unpack_q3(data: np.ndarray, cols: int) -> Arrays:
    hmask, qs, low, high, d = cut(data, 32, 64, 8, 4, 2)
    rows = len(data)
    six = np.concatenate([low & 15, low >> 4], axis=1)
    six |= (high.reshape(-1, 1, 4) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 4, 1) & 3).reshape(-1, 16) << 4
    codes = (_unpack_pairs(qs) | _unpack_bits(hmask) << 2) - np.uint8(4)
    return {
        "codes": codes.view(np.int8).reshape(rows, cols),
        "d": halves(d, rows),
        "scales": (six - np.uint8(32)).view(np.int8).reshape(rows, -1),
    }


def _pack_six(arrays: Arrays) -> np.ndarray:
    """The twelve bytes of eight scales and eight mins."""
    scales, mins = _blocks(arrays["scales"], 8), _blocks(arrays["mins"], 8)
    first = scales[:, :4] | scales[:, 4:] >> 4 << 6
    second = mins[:, :4] | mins[:, 4:] >> 4 << 6
    return np.concatenate([first, second, scales[:, 4:] & 15 | mins[:, 4:] << 4], axis=1)


def _unpack_six(packed: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    mins = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    return scales.reshape(rows, -1), mins.reshape(rows, -1)


def _pack_q4_or_q5(arrays: Arrays, bits: int) -> np.ndarray:
    q = _blocks(arrays["codes"], SUPER)
    high = [_pack_bits(q >> 4)] if bits == 5 else []
    steps = _half(arrays, "d"), _half(arrays, "dmin")
    return join(len(arrays["codes"]), *steps, _pack_six(arrays), *high, _pack_nibbles(q))


def _unpack_q4_or_q5(data: np.ndarray, cols: int, bits: int) -> Arrays:
    d, dmin, six, *planes = cut(data, 2, 2, 12, *((32, 128) if bits == 5 else (128,)))
    rows = len(data)
    codes = _unpack_nibbles(planes[-1])
    if bits == 5:
        codes |= _unpack_bits(planes[0]) << 4
    scales, mins = _unpack_six(six, rows)
    steps = {"d": halves(d, rows), "dmin": halves(dmin, rows)}
    return {"codes": codes.reshape(rows, cols), **steps, "scales": scales, "mins": mins}


def _pack_q6(arrays: Arrays) -> np.ndarray:
    q = _blocks(arrays["codes"], SUPER) + np.uint8(32)
    low = q.reshape(-1, 2, 2, 64)
    ql = (low[:, :, 0] & 15 | low[:, :, 1] << 4).reshape(-1, 128)
    return join(len(arrays["codes"]), ql, _pack_pairs(q >> 4), _blocks(arrays["scales"], 16), _half(arrays, "d"))


def _unpack_q6(data: np.ndarray, cols: int) -> Arrays:
    ql, qh, scales, d = cut(data, 128, 64, 16, 2)
    rows = len(data)
    low = ql.reshape(-1, 2, 1, 64)
    q = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, SUPER) | _unpack_pairs(qh) << 4
    return {
        "codes": (q - np.uint8(32)).view(np.int8).reshape(rows, cols),
        "d": halves(d, rows),
        "scales": scales.view(np.int8).reshape(rows, -1),
    }


TYPES = (
    BlockType("Q2_K", SUPER, 84, Q2K(), _pack_q2, _unpack_q2),
    BlockType("Q3_K", SUPER, 110, Q3K(), _pack_q3, _unpack_q3),
    BlockType("Q4_K", SUPER, 144, Q4K(), lambda a: _pack_q4_or_q5(a, 4), lambda d, n: _unpack_q4_or_q5(d, n, 4)),
    BlockType("Q5_K", SUPER, 176, Q5K(), lambda a: _pack_q4_or_q5(a, 5), lambda d, n: _unpack_q4_or_q5(d, n, 5)),
    BlockType("Q6_K", SUPER, 210, Q6K(), _pack_q6, _unpack_q6),
)
