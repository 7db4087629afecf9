"""Values out of a table, times scales, with ONNX's standard operators: FP8, MXFP4, NVFP4, IQ4, codebooks.

Right operand of a MatMul, weight (N, K) = (out, in) turned to (K, N):

| operand | type                  | shape       | meaning                                                       |
|---------|-----------------------|-------------|---------------------------------------------------------------|
| codes   | FLOAT8E4M3FN or UINT4 | (K, N)      | the value itself, or which of the table; two a byte, first low |
| table   | FLOAT                 | (size,)     | the values, with UINT4                                         |
| scales  | FLOAT or narrower     | (blocks, N) | one a block of columns, (1, 1) for the whole matrix; no codebooks |
| divisor | FLOAT                 | ()          | nvfp4-scaled: what the products are divided by                 |

Scales are BFLOAT16 for MX and NVFP4, FLOAT16 for IQ4_NL: types that hold theirs exactly.

    weight = (Cast(codes) or Gather(table, Cast(codes, INT32))) * Gather(Cast(scales), block of column) / divisor

Everything is an initializer, so ONNX Runtime computes the weight once, when it loads the model: the file is small,
memory and speed are those of float32. `DequantizeLinear` would say FP8 as well, but is not folded: its product is
computed anew for every token, twenty times slower. There is no kernel for FLOAT4E2M1. Each step rounds once, exactly as
the layouts do: table values have at most 8 significant bits.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tightship.dtypes import BY_ONNX
from tightship.errors import Malformed
from tightship.formats.layouts.codebook import Codebook
from tightship.formats.layouts.float8 import Float8
from tightship.formats.packings.onnx_blocked import BFLOAT16, FLOAT, FLOAT8, FLOAT16, UINT4, lanes
from tightship.layout import Arrays, Layout, TableGrid

_GROUPS = {"mxfp8": 32, "mxfp4": 32, "nvfp4": 16, "nvfp4-scaled": 16, "iq4_nl": 32, "iq4_xs": 32}
_LEVELS = 16
_NARROW = {"mxfp8": BFLOAT16, "mxfp4": BFLOAT16, "nvfp4": BFLOAT16, "nvfp4-scaled": BFLOAT16, "iq4_nl": FLOAT16}

Shapes = dict[str, tuple[int, tuple[int, ...]]]


def fits(layout: Layout) -> bool:
    """Whether a layout's values come out of a table."""
    return isinstance(layout, Codebook | Float8) or layout.kind in _GROUPS


def group_of(layout: Layout) -> int:
    """Columns that share a scale; 0 for whole rows, or where there are no scales."""
    return layout.group_size if isinstance(layout, Float8) else _GROUPS.get(layout.kind, 0)


def block_of_column(layout: Layout, cols: int) -> np.ndarray:
    """(cols,) int64: which row of `scales` is each column's."""
    return np.arange(cols) // (group_of(layout) or cols)


def shapes(layout: Layout, rows: int, cols: int) -> Shapes:
    """TensorProto type and shape of each operand."""
    if isinstance(layout, Codebook):
        return {"codes": (UINT4, (cols, rows)), "table": (FLOAT, (layout.size,))}
    found: Shapes = {"codes": (FLOAT8, (cols, rows))}
    if not _is_float8(layout):
        found = {"codes": (UINT4, (cols, rows)), "table": (FLOAT, (_LEVELS,))}
    blocks = -(-cols // (group_of(layout) or cols))
    found["scales"] = (_NARROW.get(layout.kind, FLOAT), (1, 1) if _one_scale(layout) else (blocks, rows))
    if layout.kind == "nvfp4-scaled":
        found["divisor"] = (FLOAT, ())
    return found


def pack(layout: Layout, arrays: Mapping[str, np.ndarray]) -> Arrays:
    """The operands as bytes in file order.

    Raises:
        Malformed: rows that should share a table, a scale or a divisor do not.
    """
    codes = arrays["codes"].T
    if isinstance(layout, Codebook):
        return {"codes": lanes(codes, UINT4), "table": _shared(arrays["table"], "table")}
    divisor = arrays.get("divisor")
    grid = layout.grid({**arrays, "divisor": np.ones_like(divisor)} if divisor is not None else arrays)
    if not isinstance(grid, TableGrid):
        raise Malformed(f"layout {layout.name} has no table")
    wide = np.broadcast_to(np.asarray(grid.scale, np.float32), arrays["codes"].shape)
    stored = BY_ONNX[_NARROW.get(layout.kind, FLOAT)].numpy
    scales = wide[:, :: group_of(layout) or wide.shape[1]].T.astype(stored)
    if _is_float8(layout):
        found = {"codes": np.ascontiguousarray(codes)}
    else:
        found = {"codes": lanes(codes, UINT4), "table": np.asarray(grid.table, np.float32)}
    found["scales"] = _shared(scales.T, "scale")[None] if _one_scale(layout) else np.ascontiguousarray(scales)
    return found if divisor is None else found | {"divisor": _shared(divisor, "divisor")[0]}


def _is_float8(layout: Layout) -> bool:
    return isinstance(layout, Float8) or layout.kind == "mxfp8"


def _one_scale(layout: Layout) -> bool:
    return isinstance(layout, Float8) and not layout.tile_rows and not layout.group_size


def _shared(by_row: np.ndarray, what: str) -> np.ndarray:
    """The row that all rows are."""
    if (by_row != by_row[0]).any():
        raise Malformed(f"the rows of a matrix with one {what} have different ones")
    return by_row[0]
