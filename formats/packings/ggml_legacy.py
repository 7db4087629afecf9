"""Bytes of the 32-weight GGML blocks Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 (little endian; ggml-common.h).

| type | bytes | fields in order                          | value          |
|------|-------|------------------------------------------|----------------|
| Q8_0 | 34    | f16 d; i8 q[32]                          | d * q          |
| Q4_0 | 18    | f16 d; u8 qs[16]                         | d * (q - 8)    |
| Q4_1 | 20    | f16 d; f16 m; u8 qs[16]                  | d * q + m      |
| Q5_0 | 22    | f16 d; u32 qh; u8 qs[16]                 | d * (q - 16)   |
| Q5_1 | 24    | f16 d; f16 m; u32 qh; u8 qs[16]          | d * q + m      |

qs[j] holds weight j in its low nibble and weight j + 16 in its high nibble; bit j of qh is the fifth bit of weight j.
"""

from __future__ import annotations

import numpy as np

from tightship.formats.layouts.affine import Affine
from tightship.formats.layouts.ggml_affine import Q4_1, Q5_1
from tightship.formats.packings.ggml_block import BlockType, as_bytes, cut, halves, join
from tightship.layout import Arrays


def pack_nibbles(q: np.ndarray) -> np.ndarray:
    """uint8 (blocks, 32), low four bits used -> uint8 (blocks, 16)."""
    return (q[:, :16] & 15) | (q[:, 16:] << 4)


def unpack_nibbles(qs: np.ndarray) -> np.ndarray:
    """Inverse of `pack_nibbles`."""
    return np.concatenate([qs & 15, qs >> 4], axis=1)


def _pack_codes(codes: np.ndarray, offset: int, bits: int) -> np.ndarray:
    """Codes in -offset.. -> uint8 (blocks, 16), with the plane of fifth bits in front where there is one."""
    q = (codes.reshape(-1, 32).view(np.uint8) + np.uint8(offset)).view(np.uint8)
    if bits == 4:
        return pack_nibbles(q)
    return np.concatenate([np.packbits(q >> 4, axis=1, bitorder="little"), pack_nibbles(q)], axis=1)


def _unpack_codes(fields: list[np.ndarray], cols: int) -> np.ndarray:
    """[qs] or [qh, qs] -> uint8 (rows, cols), unsigned codes."""
    q = unpack_nibbles(fields[-1])
    if len(fields) == 2:
        q |= np.unpackbits(fields[0], axis=1, bitorder="little") << 4
    return q.reshape(-1, cols)


def _pack_symmetric(arrays: Arrays, bits: int) -> np.ndarray:
    scale = arrays["scale"]
    d = as_bytes(scale, scale.size)
    if bits == 8:
        return join(len(scale), d, as_bytes(arrays["codes"], scale.size))
    return join(len(scale), d, _pack_codes(arrays["codes"], 1 << (bits - 1), bits))


def _unpack_symmetric(data: np.ndarray, cols: int, bits: int) -> Arrays:
    sizes = {8: (2, 32), 5: (2, 4, 16), 4: (2, 16)}[bits]
    d, *fields = cut(data, *sizes)
    if bits == 8:
        codes = fields[0].view(np.int8).reshape(-1, cols)
    else:
        codes = (_unpack_codes(fields, cols) - np.uint8(1 << (bits - 1))).view(np.int8)
    return {"codes": codes, "scale": halves(d, len(data))}


def _pack_minimum(arrays: Arrays, bits: int) -> np.ndarray:
    d, m = arrays["d"], arrays["m"]
    return join(len(d), as_bytes(d, d.size), as_bytes(m, m.size), _pack_codes(arrays["codes"], 0, bits))


def _unpack_minimum(data: np.ndarray, cols: int, bits: int) -> Arrays:
    d, m, *fields = cut(data, 2, 2, *((4, 16) if bits == 5 else (16,)))
    return {"codes": _unpack_codes(fields, cols), "d": halves(d, len(data)), "m": halves(m, len(data))}


TYPES = (
    BlockType("Q8_0", 32, 34, Affine(bits=8), lambda a: _pack_symmetric(a, 8), lambda d, n: _unpack_symmetric(d, n, 8)),
    BlockType("Q4_0", 32, 18, Affine(bits=4), lambda a: _pack_symmetric(a, 4), lambda d, n: _unpack_symmetric(d, n, 4)),
    BlockType("Q5_0", 32, 22, Affine(bits=5), lambda a: _pack_symmetric(a, 5), lambda d, n: _unpack_symmetric(d, n, 5)),
    BlockType("Q4_1", 32, 20, Q4_1(), lambda a: _pack_minimum(a, 4), lambda d, n: _unpack_minimum(d, n, 4)),
    BlockType("Q5_1", 32, 24, Q5_1(), lambda a: _pack_minimum(a, 5), lambda d, n: _unpack_minimum(d, n, 5)),
)
