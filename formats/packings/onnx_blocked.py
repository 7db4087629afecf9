"""Blocked quantization with standard operators: the operands of ONNX `DequantizeLinear`, and of lookups.

Right operand of a MatMul, weight (N, K) = (out, in) turned to (K, N), axis 0:

| operand     | type                    | shape            | meaning                                              |
|-------------|-------------------------|------------------|------------------------------------------------------|
| codes       | INT4 / INT8             | (K, N)           | signed codes; INT4 packs two a byte, first one low   |
| scales      | FLOAT                   | (blocks, N)      | one a block of `block_size` rows                     |
| zero_points | INT4 / INT8             | (blocks, N)      | absent means 0                                       |
| offsets     | FLOAT                   | (blocks, N)      | not an operand: the minima of layouts that have them |

One scale a row and 8 bits, as integer kernels want it: codes UINT8 (K, N), scales FLOAT (N), zero points UINT8 (N),
all 128, axis 1, no `block_size`. Unsigned, since ONNX Runtime multiplies UINT8 by INT8 on processors without VNNI in
16-bit sums that saturate, and UINT8 by UINT8 exactly everywhere.

With a free minimum the codes are UINT4 / UINT8 and the zero point is 0. The table of a lookup holds the same bytes.
Gather takes no 4-bit type, so it reads pairs of them, neighbours in a row of (K, N), as one UINT8 (K, N / 2); codes of
an odd number of rows are INT8. ONNX Runtime fuses only what one node reads, so where lookup and head share a table the
bytes have two names, and lie in the file once.

Definition: DequantizeLinear-21 of ONNX; INT4 packing: docs/docsgen/source/technical/int4.md of ONNX.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tightship.formats.packings import matmul_nbits
from tightship.formats.packings.matmul_nbits import NBits
from tightship.layout import Arrays, Layout

# TensorProto.DataType; FLOAT8 is FLOAT8E4M3FN.
FLOAT, UINT8, INT8, FLOAT16, BFLOAT16, FLOAT8, UINT4, INT4 = 1, 2, 3, 10, 16, 17, 21, 22
BITS = {FLOAT: 32, UINT8: 8, INT8: 8, FLOAT16: 16, BFLOAT16: 16, FLOAT8: 8, UINT4: 4, INT4: 4}


@dataclass(frozen=True)
class Blocked:
    """How a matrix lies in DequantizeLinear.

    Attributes:
        nbits: the same matrix as MatMulNBits would hold it; blocks, zero points and offsets are the same.
        whole: every code in a byte of its own.
    """

    nbits: NBits
    whole: bool = False

    @property
    def code_type(self) -> int:
        """TensorProto type of the codes."""
        if self.whole or self.nbits.bits == 8:
            return UINT8 if self.nbits.offsets else INT8
        return UINT4 if self.nbits.offsets else INT4

    @property
    def paired(self) -> bool:
        """Whether two codes share a byte."""
        return BITS[self.code_type] == 4

    def shapes(self, rows: int) -> dict[str, tuple[int, tuple[int, ...]]]:
        """TensorProto type and shape of each operand for a matrix of `rows` rows."""
        found: dict[str, tuple[int, tuple[int, ...]]] = {
            "codes": (self.code_type, (self.nbits.cols, rows)),
            "scales": (FLOAT, (self.nbits.blocks, rows)),
        }
        if self.nbits.zero_points and not self.nbits.offsets:
            found["zero_points"] = (self.code_type, (self.nbits.blocks, rows))
        if self.nbits.offsets:
            found["offsets"] = (FLOAT, (self.nbits.blocks, rows))
        return found

    def lookup_shapes(self, rows: int) -> dict[str, tuple[int, tuple[int, ...]]]:
        """The same bytes in types that Gather takes, by operand."""
        if not self.paired:
            return self.shapes(rows)
        return {
            key: (kind, shape) if kind == FLOAT else (UINT8, (shape[0], shape[1] // 2))
            for key, (kind, shape) in self.shapes(rows).items()
        }

    def nbytes(self, rows: int) -> int:
        """Bytes of all operands."""
        return sum(-(-math.prod(shape) * BITS[kind] // 8) for kind, shape in self.shapes(rows).values())


def channel_shapes(rows: int, cols: int) -> dict[str, tuple[int, tuple[int, ...]]]:
    """TensorProto type and shape of the operands of a symmetric 8-bit matrix with one scale a row: axis 1."""
    return {"codes": (UINT8, (cols, rows)), "scales": (FLOAT, (rows,)), "zero_points": (UINT8, (rows,))}


def pack_channels(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Those operands: codes turned to (K, N), scales (N), zero points (N)."""
    codes = np.ascontiguousarray(arrays["codes"].T).view(np.uint8) ^ np.uint8(128)
    scales = arrays["scale"][:, 0].astype(np.float32)
    return {"codes": codes, "scales": scales, "zero_points": np.full(len(scales), 128, np.uint8)}


def pack(layout: Layout, arrays: Mapping[str, np.ndarray], spec: Blocked) -> Arrays:
    """Operands as bytes in file order: the same integers and scales, nothing rounded. INT4 operands are 1-D bytes."""
    operands = matmul_nbits.pack(layout, arrays, spec.nbits)
    unsigned, zero = matmul_nbits.unpack(operands, spec.nbits)
    half = np.uint8(0 if spec.nbits.offsets else 1 << (spec.nbits.bits - 1))
    packed = {"codes": lanes(unsigned.T - half, spec.code_type), "scales": operands["scales"].T}
    shapes = spec.shapes(unsigned.shape[0])
    if "zero_points" in shapes:
        packed["zero_points"] = lanes(zero.T - half, spec.code_type)
    if "offsets" in shapes:
        packed["offsets"] = operands["offsets"]
    return packed


def lanes(codes: np.ndarray, kind: int) -> np.ndarray:
    """Codes in two's complement, uint8, packed in file order."""
    flat = np.ascontiguousarray(codes).reshape(-1)
    if BITS[kind] == 8:
        return flat
    nibbles = np.zeros(flat.size + flat.size % 2, np.uint8)
    nibbles[: flat.size] = flat & 0x0F
    return nibbles[0::2] | (nibbles[1::2] << np.uint8(4))
