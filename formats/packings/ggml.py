"""GGML tensor bytes from logical arrays and back, by type name. Byte tables are in the `ggml_*` modules of this room.

| type | bytes a weight | fields                                  |
|------|----------------|-----------------------------------------|
| F32  | 4              | IEEE binary32, little endian            |
| F16  | 2              | IEEE binary16, little endian            |
| BF16 | 2              | upper half of binary32, rounded to even |
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from tightship.errors import Malformed, Unsupported
from tightship.formats.layouts.affine import Affine
from tightship.formats.packings import ggml_four_bit, ggml_grid, ggml_k, ggml_legacy, ggml_ternary
from tightship.formats.packings.ggml_block import BlockType
from tightship.layout import Arrays, Layout

_MODULES = (ggml_legacy, ggml_k, ggml_four_bit, ggml_ternary, ggml_grid)
BLOCK_TYPES: dict[str, BlockType] = {t.name: t for module in _MODULES for t in module.TYPES}
FLOAT_TYPES: dict[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_TWINS = {(8, True): "Q8_0", (5, True): "Q5_0", (4, True): "Q4_0", (5, False): "Q5_1", (4, False): "Q4_1"}
# The narrowest symmetric type that holds the differences code - zero point, by their bits.
_HOLDERS = {2: "Q4_0", 3: "Q4_0", 4: "Q4_0", 5: "Q5_0", 6: "Q8_0", 7: "Q8_0", 8: "Q8_0"}


def ggml_type_for(layout: Layout) -> str | None:
    """The GGML type that says every value of `layout`, or None.

    An affine layout fits where its groups are whole blocks of 32 (`-channel`: rows of whole blocks) and its scales are
    float16; a longer group repeats its scale. Widths that GGML lacks, and offsets that are no float16
    (`wide_offset`, as AWQ has them), go into the next wider symmetric type: code - zero point, at the same scale.
    """
    if isinstance(layout, Affine):
        if layout.group_size % 32 or layout.scale_dtype != "f16":
            return None
        twin = None if layout.wide_offset else _TWINS.get((layout.bits, layout.symmetric))
        return twin or _HOLDERS.get(layout.bits + (not layout.symmetric))
    name = layout.name.upper()
    return name if name in BLOCK_TYPES else None


def row_bytes(type_name: str, cols: int) -> int:
    """Bytes of a row of `cols` weights.

    Raises:
        Unsupported: unknown type, or `cols` is not a multiple of its block.
    """
    if type_name in FLOAT_TYPES:
        return cols * FLOAT_TYPES[type_name].itemsize
    kind = _block_type(type_name)
    if cols % kind.block:
        raise Unsupported(
            f"{type_name} stores rows in blocks of {kind.block} weights, found {cols} columns",
            hint="choose a type with a smaller block, or leave this tensor out",
        )
    return cols // kind.block * kind.nbytes


def pack_ggml(type_name: str, quantized_arrays: Arrays, layout: Layout) -> np.ndarray:
    """uint8 (rows, row_bytes) of a matrix in `layout`, without rounding anything.

    Raises:
        Unsupported: the type cannot carry this layout, or these arrays, exactly.
    """
    kind = _block_type(type_name)
    if ggml_type_for(layout) != type_name:
        raise Unsupported(f"{type_name} cannot carry layout {layout.name} exactly")
    row_bytes(type_name, quantized_arrays["codes"].shape[1])
    arrays = _as_blocks(quantized_arrays, layout, type_name) if isinstance(layout, Affine) else quantized_arrays
    return kind.pack(arrays)


def unpack_ggml(type_name: str, data: np.ndarray, cols: int) -> tuple[Layout, Arrays]:
    """The layout and logical arrays of uint8 `data`, (rows, row_bytes).

    Raises:
        Malformed: the bytes of a row do not fit `cols`.
        Unsupported: unknown type, or `cols` is not a multiple of its block.
    """
    kind = _block_type(type_name)
    expected = row_bytes(type_name, cols)
    if data.ndim != 2 or data.shape[1] != expected:
        raise Malformed(f"{type_name} rows of {cols} weights have {expected} bytes, found an array of {data.shape}")
    return kind.layout, kind.unpack(data, cols)


def pack_floats(type_name: str, values: np.ndarray) -> np.ndarray:
    """uint8 (rows, row_bytes) of a (rows, cols) float array as F32, F16 or BF16, rounded to nearest even.

    Raises:
        Unsupported: not a float type, or a finite value overflows it.
    """
    target = _float_type(type_name)
    if values.dtype == target:
        return np.ascontiguousarray(values).view(np.uint8)
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(values.astype(target))
    lost = int(np.count_nonzero(np.isinf(stored)) - np.count_nonzero(np.isinf(values)))
    if lost:
        raise Unsupported(f"{lost} finite values overflow {type_name}", hint="use F32 or BF16 for this tensor")
    return stored.view(np.uint8)


def unpack_floats(type_name: str, data: np.ndarray) -> np.ndarray:
    """Inverse of `pack_floats`: (rows, cols) in the type's own dtype."""
    return np.ascontiguousarray(data).view(_float_type(type_name))


def _block_type(type_name: str) -> BlockType:
    found = BLOCK_TYPES.get(type_name)
    if found is None:
        raise Unsupported(f"GGML type {type_name!r} is not packed here; known: {', '.join(BLOCK_TYPES)}")
    return found


def _float_type(type_name: str) -> np.dtype:
    found = FLOAT_TYPES.get(type_name)
    if found is None:
        raise Unsupported(f"GGML type {type_name!r} is not a plain float type; known: {', '.join(FLOAT_TYPES)}")
    return found


def _as_blocks(arrays: Arrays, layout: Affine, type_name: str) -> Arrays:
    """Affine arrays in the terms of the block type: one scale (and minimum) for every 32 weights."""
    cols = arrays["codes"].shape[1]
    repeats = (layout.group_size or cols) // 32
    scale = np.repeat(arrays["scale"], repeats, axis=1)
    if layout.symmetric:
        return {"codes": arrays["codes"], "scale": scale}
    if type_name in _HOLDERS.values():
        zero = np.repeat(arrays["zero_point"], layout.group_size or cols, axis=1)
        return {"codes": arrays["codes"] - zero, "scale": scale}
    steps = layout.lo - arrays["zero_point"].astype(np.float64)
    exact = np.repeat(steps * arrays["scale"].astype(np.float64), repeats, axis=1)
    with np.errstate(over="ignore"):
        m = exact.astype(np.float16)
    wrong = int(np.count_nonzero(m != exact))
    if wrong:
        raise Unsupported(
            f"{type_name} stores a float16 minimum, and {wrong} of {exact.size} offsets of {layout.name} are not one",
            hint=f"quantize with {layout.name} here, whose scales are chosen to fit, or use a symmetric layout",
        )
    codes = (arrays["codes"].view(np.uint8) - np.uint8(layout.lo & 255)).astype(np.uint8)
    return {"codes": codes, "d": scale, "m": m}
