"""Bytes of the GGML four-bit table types IQ4_NL, IQ4_XS, MXFP4, NVFP4 (little endian; ggml-common.h).

| type   | weights | bytes | fields in order                                         |
|--------|---------|-------|---------------------------------------------------------|
| IQ4_NL | 32      | 18    | f16 d; u8 qs[16]                                        |
| IQ4_XS | 256     | 136   | f16 d; u16 scales_h; u8 scales_l[4]; u8 qs[128]         |
| MXFP4  | 32      | 17    | u8 e (E8M0); u8 qs[16]                                  |
| NVFP4  | 64      | 36    | u8 d[4] (UE4M3); u8 qs[32]                              |

Of each 32 weights (NVFP4: 16), byte j of qs holds weight j in its low nibble and j + 16 (NVFP4: j + 8) in the high one.
IQ4_XS scale j is stored + 32: low four bits in nibble j % 2 of scales_l[j / 2], upper two at bit 2 j of scales_h.
"""

from __future__ import annotations

import numpy as np

from tightship.formats.layouts.iq4 import IQ4NL, IQ4XS
from tightship.formats.layouts.mx import MXFP4, NVFP4
from tightship.formats.packings.ggml_block import BlockType, as_bytes, cut, halves, join
from tightship.layout import Arrays


def _pack_nibbles(codes: np.ndarray, group: int) -> np.ndarray:
    """uint8 codes -> uint8 (groups, group / 2)."""
    q = codes.reshape(-1, 2, group // 2)
    return q[:, 0] | q[:, 1] << 4


def _unpack_nibbles(qs: np.ndarray, group: int, shape: tuple[int, int]) -> np.ndarray:
    qs = qs.reshape(-1, group // 2)
    return np.concatenate([qs & 15, qs >> 4], axis=1).reshape(shape)


def _pack_iq4_nl(arrays: Arrays) -> np.ndarray:
    d = arrays["d"]
    return join(len(d), as_bytes(d, d.size), _pack_nibbles(arrays["codes"], 32))


def _unpack_iq4_nl(data: np.ndarray, cols: int) -> Arrays:
    d, qs = cut(data, 2, 16)
    return {"codes": _unpack_nibbles(qs, 32, (len(data), cols)), "d": halves(d, len(data))}


def _pack_iq4_xs(arrays: Arrays) -> np.ndarray:
    d = arrays["d"]
    six = arrays["scales"].reshape(-1, 8).view(np.uint8) + np.uint8(32)
    low = six[:, 0::2] & 15 | six[:, 1::2] << 4
    pairs = six >> 4
    high = np.stack(
        [pairs[:, k] | pairs[:, k + 1] << 2 | pairs[:, k + 2] << 4 | pairs[:, k + 3] << 6 for k in (0, 4)], 1
    )
    qs = _pack_nibbles(arrays["codes"], 32).reshape(-1, 128)
    return join(len(d), as_bytes(d, d.size), high, low, qs)


def _unpack_iq4_xs(data: np.ndarray, cols: int) -> Arrays:
    d, high, low, qs = cut(data, 2, 2, 4, 128)
    rows = len(data)
    six = np.stack([low & 15, low >> 4], axis=2).reshape(-1, 8)
    six |= (high[:, :, None] >> np.array([0, 2, 4, 6], np.uint8) & 3).reshape(-1, 8) << 4
    scales = (six - np.uint8(32)).view(np.int8).reshape(rows, -1)
    return {"codes": _unpack_nibbles(qs, 32, (rows, cols)), "d": halves(d, rows), "scales": scales}


def _pack_mxfp4(arrays: Arrays) -> np.ndarray:
    scale = arrays["scale"]
    return join(len(scale), scale.reshape(-1, 1), _pack_nibbles(arrays["codes"], 32))


def _unpack_mxfp4(data: np.ndarray, cols: int) -> Arrays:
    scale, qs = cut(data, 1, 16)
    return {"codes": _unpack_nibbles(qs, 32, (len(data), cols)), "scale": scale.reshape(len(data), -1)}


def _pack_nvfp4(arrays: Arrays) -> np.ndarray:
    scale = arrays["scale"]
    return join(len(scale), scale.reshape(-1, 4), _pack_nibbles(arrays["codes"], 16).reshape(-1, 32))


def _unpack_nvfp4(data: np.ndarray, cols: int) -> Arrays:
    scale, qs = cut(data, 4, 32)
    return {"codes": _unpack_nibbles(qs, 16, (len(data), cols)), "scale": scale.reshape(len(data), -1)}


TYPES = (
    BlockType("IQ4_NL", 32, 18, IQ4NL(), _pack_iq4_nl, _unpack_iq4_nl),
    BlockType("IQ4_XS", 256, 136, IQ4XS(), _pack_iq4_xs, _unpack_iq4_xs),
    BlockType("MXFP4", 32, 17, MXFP4(), _pack_mxfp4, _unpack_mxfp4),
    BlockType("NVFP4", 64, 36, NVFP4(), _pack_nvfp4, _unpack_nvfp4),
)
