"""A codebook with ONNX's standard operators: Cast, Gather, MatMul.

Right operand of a MatMul, weight (N, K) = (out, in) turned to (K, N):

| operand | type  | shape   | meaning                                   |
|---------|-------|---------|-------------------------------------------|
| codes   | UINT4 | (K, N)  | which value; two a byte, first one low    |
| table   | FLOAT | (size,) | the values                                |

    weight = Gather(table, Cast(codes, INT32))

Both inputs are initializers, so ONNX Runtime folds the product's operand to float32 when it loads the model: the file
is small, memory and speed are those of float32.
"""

from __future__ import annotations

from tightship.errors import Malformed
from tightship.formats.layouts.codebook import Codebook
from tightship.formats.packings.onnx_blocked import FLOAT, UINT4, lanes
from tightship.layout import Arrays


def codebook_shapes(layout: Codebook, rows: int, cols: int) -> dict[str, tuple[int, tuple[int, ...]]]:
    """TensorProto type and shape of each operand."""
    return {"codes": (UINT4, (cols, rows)), "table": (FLOAT, (layout.size,))}


def pack_codebook(arrays: Arrays) -> Arrays:
    """The operands as bytes in file order.

    Raises:
        Malformed: the rows do not share one table.
    """
    table = arrays["table"]
    if (table != table[0]).any():
        raise Malformed("the rows of a codebook have different tables")
    return {"codes": lanes(arrays["codes"].T, UINT4), "table": table[0]}
