"""MatMulNBits blobs: the operands of `com.microsoft.MatMulNBits` for a weight of shape (N, K) = (out, in).

| operand      | dtype   | shape                        | meaning                                                     |
|--------------|---------|------------------------------|-------------------------------------------------------------|
| B            | uint8   | (N, blocks, block*bits/8)    | unsigned codes, first column in the lowest bits of a byte   |
| scales       | float32 | (N, blocks)                  | one a block                                                 |
| zero_points  | uint8   | (N, ceil(blocks*bits/8))     | packed as the codes; absent means 2^(bits-1)                |
| offsets      | float32 | (blocks, N)                  | not an operand: the minimum of layouts with a free minimum  |

blocks = ceil(K / block); block is 16, 32, 64, 128 or 256; bits are 2, 4 or 8. A value is (code - zero_point) * scale.
Columns past K hold the code of zero. Definition: ContribOperators.md of ONNX Runtime, MatMulNBits.

Layouts of 3, 5, 6 and 7 bits go into the next wider container with the same integers, and so do 2 bits in blocks of 16,
for which there is no kernel. A group that is no legal block, or one without a kernel, is cut into smaller blocks that
repeat its scale. A layout with a free minimum (Q4_1, Q4_K, ...) is carried as codes with
zero point 0 and an `offsets` matrix: y = MatMulNBits(x) + block_sums(x) @ offsets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tightship.errors import Malformed
from tightship.formats.layouts.affine import Affine
from tightship.layout import AffineGrid, Arrays, Layout
from tightship.target import Refused

BLOCKS = (256, 128, 64, 32, 16)
_FAST_BLOCKS = {2: (128, 64, 32), 4: BLOCKS, 8: BLOCKS}  # others decode the whole matrix for every product
_RUN = 1 << 20  # elements that are packed at a time: rows are independent


@dataclass(frozen=True)
class _Twin:
    """A layout that is not affine groups by name, but is by its numbers: `block` columns share scale and minimum."""

    bits: int
    block: int
    minimum: bool


_TWINS = {
    "q2_k": _Twin(2, 16, minimum=True),
    "q3_k": _Twin(3, 16, minimum=False),
    "q4_1": _Twin(4, 32, minimum=True),
    "q4_k": _Twin(4, 32, minimum=True),
    "q5_1": _Twin(5, 32, minimum=True),
    "q5_k": _Twin(5, 32, minimum=True),
    "q6_k": _Twin(6, 16, minimum=False),
    "tq1_0": _Twin(2, 256, minimum=False),
    "tq2_0": _Twin(2, 256, minimum=False),
}


@dataclass(frozen=True)
class NBits:
    """How a matrix of `cols` columns lies in a MatMulNBits node.

    Attributes:
        bits: of the container, 2, 4 or 8.
        block: columns of a block.
        cols: K, columns of the matrix.
        zero_points: whether the zero-point operand is there.
        offsets: whether a free minimum travels beside the node.
    """

    bits: int
    block: int
    cols: int
    zero_points: bool
    offsets: bool = False

    @property
    def blocks(self) -> int:
        return -(-self.cols // self.block)

    def shapes(self, rows: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """dtype and shape of each operand for a matrix of `rows` rows."""
        found: dict[str, tuple[np.dtype, tuple[int, ...]]] = {
            "B": (np.dtype(np.uint8), (rows, self.blocks, self.block * self.bits // 8)),
            "scales": (np.dtype(np.float32), (rows, self.blocks)),
        }
        if self.zero_points:
            found["zero_points"] = (np.dtype(np.uint8), (rows, -(-self.blocks * self.bits // 8)))
        if self.offsets:
            found["offsets"] = (np.dtype(np.float32), (self.blocks, rows))
        return found

    def nbytes(self, rows: int) -> int:
        """Bytes of all operands of a matrix of `rows` rows."""
        return sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in self.shapes(rows).values())


def nbits_for(layout: Layout, cols: int, *, table: bool = False) -> NBits | Refused:
    """The container of a layout, or why there is none. A `table`, whose rows are looked up, has whole blocks."""
    if isinstance(layout, Affine):
        found = _container(layout.bits, layout.group_size or (cols if table else 0), cols)
        if found is None:
            return Refused(f"groups of {layout.group_size} do not divide into blocks of 16", ("int4-g16", "int4-g32"))
        return NBits(*found, cols, zero_points=not layout.symmetric)
    twin = _TWINS.get(layout.kind)
    found = _container(twin.bits, twin.block, cols) if twin else None
    if twin and found:
        return NBits(*found, cols, zero_points=twin.minimum, offsets=twin.minimum)
    return Refused(f"layout {layout.name} is not affine", ("int4-g32", "q4_k", "int8-g32"))


def _container(bits: int, group: int, cols: int) -> tuple[int, int] | None:
    """Bits and block of the narrowest container whose largest fitting block has a fast kernel.

    A block never straddles two groups; a group of 0 is the whole row, which any block fits.
    """
    for width in (w for w in _FAST_BLOCKS if bits <= w):
        fitting = (b for b in _FAST_BLOCKS[width] if (group % b == 0 if group else b <= cols))
        block = next(fitting, None if group else _FAST_BLOCKS[width][-1])
        if block is not None:
            return width, block
    return None


def pack(layout: Layout, arrays: Mapping[str, np.ndarray], spec: NBits) -> Arrays:
    """Operands of a quantized matrix: the same integers and scales, nothing rounded.

    Args:
        layout: of the arrays.
        arrays: logical arrays of `layout`, codes (rows, cols).
        spec: from `nbits_for(layout, cols)`.

    Raises:
        Malformed: a layout's scale is not constant over a block (the table above would be wrong).
    """
    step = max(1, _RUN // max(spec.cols, 1))
    runs = [slice(first, first + step) for first in range(0, len(arrays["codes"]), step)]
    parts = [_pack_rows(layout, {key: a[rows] for key, a in arrays.items()}, spec) for rows in runs]
    return {key: np.concatenate([p[key] for p in parts], axis=int(key == "offsets")) for key in parts[0]}


def _pack_rows(layout: Layout, arrays: Mapping[str, np.ndarray], spec: NBits) -> Arrays:
    codes = arrays["codes"].astype(np.int16)
    half = 1 << (spec.bits - 1)
    grid = layout.grid(arrays)
    if not isinstance(grid, AffineGrid):
        raise Malformed(f"layout {layout.name} is not affine")
    scales = _per_block(grid.scale, codes.shape, spec, "scale")
    if spec.offsets:
        zero = np.zeros(scales.shape, np.int16)
        unsigned = codes
        offsets = np.ascontiguousarray(_per_block(grid.offset, codes.shape, spec, "offset").T)
    else:
        zero = _zero_points(arrays, codes.shape, spec) + half
        unsigned = codes + half
        offsets = None
    operands = {"B": _pack_codes(unsigned, zero, spec), "scales": scales}
    if spec.zero_points:
        operands["zero_points"] = _pack_bits(zero.astype(np.uint8), spec.bits)
    if offsets is not None:
        operands["offsets"] = offsets
    return operands


def unpack(operands: Mapping[str, np.ndarray], spec: NBits) -> tuple[np.ndarray, np.ndarray]:
    """Unsigned codes (rows, cols) and zero points (rows, blocks), both uint8: the inverse of `pack`'s bit work."""
    rows = operands["B"].shape[0]
    codes = _unpack_bits(operands["B"].reshape(rows, -1), spec.bits)[:, : spec.cols]
    if "zero_points" in operands:
        zero = _unpack_bits(operands["zero_points"], spec.bits)[:, : spec.blocks]
    else:
        zero = np.full((rows, spec.blocks), 1 << (spec.bits - 1), np.uint8)
    return codes, zero


def values(operands: Mapping[str, np.ndarray], spec: NBits) -> np.ndarray:
    """(rows, cols) float64: what the operands say."""
    codes, zero = unpack(operands, spec)
    spread = np.repeat(np.arange(spec.blocks), spec.block)[: spec.cols]
    scale = operands["scales"].astype(np.float64)[:, spread]
    found = (codes.astype(np.float64) - zero.astype(np.float64)[:, spread]) * scale
    if "offsets" in operands:
        found += operands["offsets"].astype(np.float64).T[:, spread]
    return found


def _per_block(column_wise: np.ndarray, shape: tuple[int, ...], spec: NBits, what: str) -> np.ndarray:
    full = np.broadcast_to(np.asarray(column_wise, np.float32), shape)
    first = np.ascontiguousarray(full[:, :: spec.block])
    bits = full.view(np.uint32)
    whole = spec.cols // spec.block * spec.block
    inside = bits[:, :whole].reshape(len(full), -1, spec.block) == bits[:, : whole : spec.block, None]
    if not (inside.all() and (bits[:, whole:] == bits[:, whole : whole + 1]).all()):
        raise Malformed(f"a {what} changes inside a block of {spec.block} columns")
    return first


def _zero_points(arrays: Mapping[str, np.ndarray], shape: tuple[int, ...], spec: NBits) -> np.ndarray:
    """Signed zero points (rows, blocks), 0 for symmetric layouts."""
    if "zero_point" not in arrays:
        return np.zeros((shape[0], spec.blocks), np.int16)
    stored = arrays["zero_point"]
    group = shape[1] // stored.shape[1]
    return stored[:, (np.arange(spec.blocks) * spec.block) // group].astype(np.int16)


def _pack_codes(unsigned: np.ndarray, zero: np.ndarray, spec: NBits) -> np.ndarray:
    rows, cols = unsigned.shape
    padded = np.empty((rows, spec.blocks * spec.block), np.uint8)
    padded[:, :cols] = unsigned
    padded[:, cols:] = zero[:, -1:]
    return _pack_bits(padded, spec.bits).reshape(rows, spec.blocks, spec.block * spec.bits // 8)


def _pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """(rows, n) small integers -> (rows, ceil(n*bits/8)) bytes, first code lowest."""
    per_byte = 8 // bits
    rows, count = codes.shape
    width = -(-count // per_byte)
    full = np.zeros((rows, width * per_byte), np.uint8)
    full[:, :count] = codes
    lanes = full.reshape(rows, width, per_byte)
    packed = lanes[:, :, 0].copy()
    for lane in range(1, per_byte):
        packed |= lanes[:, :, lane] << np.uint8(lane * bits)
    return packed


def _unpack_bits(packed: np.ndarray, bits: int) -> np.ndarray:
    per_byte = 8 // bits
    mask = np.uint8((1 << bits) - 1)
    lanes = [(packed >> np.uint8(lane * bits)) & mask for lane in range(per_byte)]
    return np.stack(lanes, axis=2).reshape(packed.shape[0], -1)
