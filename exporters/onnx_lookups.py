"""Rows of a quantized table by token id.

| style    | nodes                                                                             |
|----------|-----------------------------------------------------------------------------------|
| contrib  | GatherBlockQuantized                                                              |
| portable | Gather of codes, scales and zero points along axis 1, DequantizeLinear, Transpose |

Four-bit codes lie two to a byte, and Gather takes whole bytes: byte id / 2 of each row, shifted right by 4 bits for odd
ids. What is left, a number of two's complement in four bits, is made unsigned by turning its highest bit (xor 8), as
which its zero is 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tightship.exporters.onnx_nodes import NodeWriter, rank_of
from tightship.formats.onnx_writer import Initializer
from tightship.formats.packings.matmul_nbits import NBits
from tightship.formats.packings.onnx_blocked import Blocked

if TYPE_CHECKING:
    import onnx_ir as ir

_UINT8 = 2
_ZERO = 8  # of a signed 4-bit number whose highest bit was turned


def views(
    name: str, items: Sequence[Initializer], blocked: Blocked, rows: int, *, shared: bool
) -> dict[str, Initializer]:
    """The operands `items` (in the order of `blocked.shapes`) as a lookup reads them, called NAME.lookup.OPERAND.

    With `shared` they are further names for bytes that another node reads, else those bytes themselves.
    """
    found = {}
    for (key, (kind, shape)), item in zip(blocked.lookup_shapes(rows).items(), items, strict=True):
        owner = item.name if shared else ""
        found[key] = Initializer(f"{name}.lookup.{key}", kind, shape, item.nbytes, item.read, owner)
    return found


def standard_rows(
    writer: NodeWriter, ids: ir.Value, operands: dict[str, ir.Value], blocked: Blocked, nodes: list[ir.Node]
) -> ir.Value:
    """(..., K) float32 rows of a table with standard operators."""
    scales = writer.append(nodes, "Gather", [operands["scales"], ids], {"axis": 1})
    packed = [operands[key] for key in ("codes", "zero_points") if key in operands]
    if blocked.paired:
        integers = _halves(writer, ids, packed, nodes)
        if len(packed) == 1:
            shape = writer.append(nodes, "Shape", [scales])
            zero = _uint8_tensor(_ZERO)
            integers.append(writer.append(nodes, "ConstantOfShape", [shape], {"value": zero}))
    else:
        integers = [writer.append(nodes, "Gather", [operand, ids], {"axis": 1}) for operand in packed]
    inputs = [integers[0], scales, *integers[1:]]
    values = writer.append(nodes, "DequantizeLinear", inputs, {"axis": 0, "block_size": blocked.nbits.block})
    return writer.append(nodes, "Transpose", [values], {"perm": [*range(1, rank_of(ids) + 1), 0]})


def contrib_rows(
    writer: NodeWriter, ids: ir.Value, operands: dict[str, ir.Value], spec: NBits, nodes: list[ir.Node]
) -> ir.Value:
    """The same with ONNX Runtime's own operator."""
    codes = writer.first("Reshape", operands["B"], [writer.integers([0, -1])])
    attributes = {"bits": spec.bits, "block_size": spec.block, "gather_axis": 0, "quantize_axis": 1}
    inputs = [codes, ids, operands["scales"], operands["zero_points"]]
    return writer.append(nodes, "GatherBlockQuantized", inputs, attributes, domain="com.microsoft")


def _halves(writer: NodeWriter, ids: ir.Value, packed: Sequence[ir.Value], nodes: list[ir.Node]) -> list[ir.Value]:
    """Columns `ids` of operands with two columns to a byte, unsigned about 8."""
    two, four = (writer.number(f"lookup.{n}", np.asarray(n, np.int64)) for n in (2, 4))
    low, sign = (writer.number(f"lookup.{n}", np.asarray(n, np.uint8)) for n in (15, _ZERO))
    byte = writer.append(nodes, "Div", [ids, two])
    odd = writer.append(nodes, "Mod", [ids, two])
    shift = writer.append(nodes, "Cast", [writer.append(nodes, "Mul", [odd, four])], {"to": _UINT8})
    found = []
    for operand in packed:
        pairs = writer.append(nodes, "Gather", [operand, byte], {"axis": 1})
        moved = writer.append(nodes, "BitShift", [pairs, shift], {"direction": "RIGHT"})
        code = writer.append(nodes, "BitwiseAnd", [moved, low])
        found.append(writer.append(nodes, "BitwiseXor", [code, sign]))
    return found


def _uint8_tensor(value: int) -> ir.TensorProtocol:
    import onnx_ir as ir

    return ir.tensor(np.asarray([value], np.uint8))
