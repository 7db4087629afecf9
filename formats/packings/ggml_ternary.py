"""Bytes of the GGML ternary blocks of 256 weights TQ1_0, TQ2_0 (little endian; ggml-common.h).

| type  | bytes | fields in order              |
|-------|-------|------------------------------|
| TQ1_0 | 54    | u8 qs[48]; u8 qh[4]; f16 d   |
| TQ2_0 | 66    | u8 qs[64]; f16 d             |

Trits are code + 1. TQ2_0: of each 128 weights, byte l of qs holds l, l + 32, l + 64, l + 96 from the low bits up.

TQ1_0: byte = ceil(256 t / 243), t the trits as a base-3 number of five digits, first weight first; trit n comes back as
the integer part of 3 * (byte * 3^n mod 256) / 256. qs[l], l < 32: weights l + 32 n; qs[32 + l], l < 16: 160 + l + 16 n;
qh[l]: 240 + l + 4 n, four trits and a zero.
"""

from __future__ import annotations

import numpy as np

from tightship.errors import Unsupported
from tightship.formats.layouts.ternary import TQ1, TQ2
from tightship.formats.packings.ggml_block import BlockType, as_bytes, cut, halves, join
from tightship.layout import Arrays

_RUNS = ((0, 32, 5), (160, 16, 5), (240, 4, 4))  # first weight, bytes, trits in a byte


def _trits(arrays: Arrays, top: int, name: str) -> np.ndarray:
    """uint8 (blocks, 256) of code + 1."""
    codes = arrays["codes"]
    if codes.size and (codes.min() < -1 or codes.max() > top):
        raise Unsupported(f"{name} stores codes -1..{top}, found {codes.min()}..{codes.max()}")
    return codes.reshape(-1, 256).view(np.uint8) + np.uint8(1)


def _pack_tq1(arrays: Arrays) -> np.ndarray:
    trits = _trits(arrays, 1, "TQ1_0").astype(np.uint16)
    fields: list[np.ndarray] = []
    for first, width, count in _RUNS:
        digits = trits[:, first : first + width * count].reshape(-1, count, width)
        number = (digits * np.uint16(3) ** np.arange(4, 4 - count, -1, dtype=np.uint16)[:, None]).sum(
            axis=1, dtype=np.uint16
        )
        fields.append(((number * np.uint16(256) + np.uint16(242)) // np.uint16(243)).astype(np.uint8))
    d = arrays["d"]
    return join(len(d), *fields, as_bytes(d, d.size))


def _unpack_tq1(data: np.ndarray, cols: int) -> Arrays:
    *fields, d = cut(data, 32, 16, 4, 2)
    parts = []
    for field, (_, width, count) in zip(fields, _RUNS, strict=True):
        powers = np.array([3**n for n in range(count)], np.uint8)
        shifted = (field[:, None, :] * powers[:, None]).astype(np.uint16)  # (blocks, count, width), modulo 256
        parts.append((shifted * np.uint16(3) >> 8).astype(np.uint8).reshape(-1, count * width))
    codes = (np.concatenate(parts, axis=1) - np.uint8(1)).view(np.int8)
    return {"codes": codes.reshape(len(data), cols), "d": halves(d, len(data))}


def _pack_tq2(arrays: Arrays) -> np.ndarray:
    q = _trits(arrays, 2, "TQ2_0").reshape(-1, 2, 4, 32)
    qs = (q[:, :, 0] | q[:, :, 1] << 2 | q[:, :, 2] << 4 | q[:, :, 3] << 6).reshape(-1, 64)
    d = arrays["d"]
    return join(len(d), qs, as_bytes(d, d.size))


def _unpack_tq2(data: np.ndarray, cols: int) -> Arrays:
    qs, d = cut(data, 64, 2)
    q = qs.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1) & 3
    return {"codes": (q - np.uint8(1)).view(np.int8).reshape(len(data), cols), "d": halves(d, len(data))}


TYPES = (
    BlockType("TQ1_0", 256, 54, TQ1(), _pack_tq1, _unpack_tq1),
    BlockType("TQ2_0", 256, 66, TQ2(), _pack_tq2, _unpack_tq2),
)
