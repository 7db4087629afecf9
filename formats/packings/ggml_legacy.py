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

from typing import Any

import numpy as np

from tightship.formats.jit import kernel
from tightship.formats.layouts.affine import Affine
from tightship.formats.layouts.ggml_affine import Q4_1, Q5_1
from tightship.formats.packings.ggml_block import BlockType, as_bytes, cut, halves, join
from tightship.layout import Arrays


@kernel
def _write_codes(codes: Any, offset: int, header: int, fifth: bool, out: Any) -> None:
    """uint8 codes (blocks, 32), stored + offset, behind the header of every block of `out` (blocks, bytes)."""
    shift, at = np.uint8(offset), header + 4 if fifth else header
    for block in range(len(codes)):
        q, row = codes[block], out[block]
        for j in range(16):
            row[at + j] = np.uint8((q[j] + shift) & 15) | np.uint8((q[j + 16] + shift) << 4)
        if fifth:
            for k in range(4):
                bits = 0
                for j in range(8):
                    bits |= (np.uint8(q[8 * k + j] + shift) >> 4) << j
                row[header + k] = bits


def _pack(steps: tuple[np.ndarray, ...], codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 (rows, bytes of a row) of float16 steps, one of each a block, and codes from -2^(bits-1), or 0 if uint8."""
    header, fifth = 2 * len(steps), bits == 5
    out = np.empty((codes.size // 32, header + (20 if fifth else 16)), np.uint8)
    for place, step in enumerate(steps):
        out.view("<f2")[:, place] = step.reshape(-1)
    offset = 1 << (bits - 1) if codes.dtype == np.int8 else 0
    _write_codes(np.ascontiguousarray(codes).view(np.uint8).reshape(-1, 32), offset, header, fifth, out)
    return out.reshape(len(codes), -1)


def _unpack_codes(fields: list[np.ndarray], cols: int) -> np.ndarray:
    """[qs] or [qh, qs] -> uint8 (rows, cols), unsigned codes."""
    qs = fields[-1]
    q = np.concatenate([qs & 15, qs >> 4], axis=1)
    if len(fields) == 2:
        q |= np.unpackbits(fields[0], axis=1, bitorder="little") << 4
    return q.reshape(-1, cols)


def _pack_symmetric(arrays: Arrays, bits: int) -> np.ndarray:
    scale, codes = arrays["scale"], arrays["codes"]
    if bits == 8:
        return join(len(codes), as_bytes(scale, scale.size), as_bytes(codes, scale.size))
    return _pack((scale,), codes, bits)


def _unpack_symmetric(data: np.ndarray, cols: int, bits: int) -> Arrays:
    d, *fields = cut(data, *{8: (2, 32), 5: (2, 4, 16), 4: (2, 16)}[bits])
    if bits == 8:
        codes = fields[0].view(np.int8).reshape(-1, cols)
    else:
        codes = (_unpack_codes(fields, cols) - np.uint8(1 << (bits - 1))).view(np.int8)
    return {"codes": codes, "scale": halves(d, len(data))}


def _pack_minimum(arrays: Arrays, bits: int) -> np.ndarray:
    return _pack((arrays["d"], arrays["m"]), arrays["codes"], bits)


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
