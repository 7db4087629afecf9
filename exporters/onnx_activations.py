"""Rounds the inputs of matrices to 8 bits in the graph, so that runtimes multiply integers.

| scale      | nodes before the product                                                    | behind it |
|------------|------------------------------------------------------------------------------|-----------|
| calibrated | QuantizeLinear, DequantizeLinear                                             |           |
| by token   | Abs, ReduceMax, Mul, Max, Div; then the same with scale 1 and zero point 128 | Mul       |

By token, x / s has its largest magnitude at 127 and s goes behind the product: what is left in front of the matrix has
one scale, which is what ONNX Runtime's integer kernel (MatMulIntegerToFloat) takes. Codes are unsigned about 128, the
same numbers: signed ones do not reach the kernel where several matrices share them. Activations in floats of 8 and 4
bits have no kernel: they stay float32, and the plan says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from tightship.activations import Activations, scheme_of
from tightship.checkpoint import Checkpoint
from tightship.exporters.onnx_nodes import NodeWriter

if TYPE_CHECKING:
    import onnx_ir as ir

_LARGEST = 127
_ZERO = 128
_TINY = np.float32(2.0**-100)  # the scale of a token of zeros


def in_integers(checkpoint: Checkpoint) -> Mapping[str, Activations]:
    """The activations that the graph rounds, by module."""
    return {module: a for module, a in checkpoint.activations.items() if scheme_of(a.scheme).numbers == "int8"}


def left_in_float32(checkpoint: Checkpoint) -> list[str]:
    """A sentence about activations that a pass or the source rounds and the graph does not."""
    others = checkpoint.activations.keys() - in_integers(checkpoint).keys()
    words = sorted({checkpoint.activations[module].scheme for module in others})
    return [f"{', '.join(words)} activations stay float32: ONNX Runtime has no kernel for them"] if words else []


def in_fixed_range(writer: NodeWriter, x: ir.Value, module: str, fixed: Activations) -> ir.Value:
    """x through 8 bits and back in a calibrated range, once for all matrices with this range."""
    key = f"{x.name}.rounded.{fixed.scale!r}.{fixed.zero_point}"
    if key not in writer.values:
        scale = writer.number(f"{module}.input_scale", np.asarray(fixed.scale, np.float32))
        zero = writer.number(f"{module}.input_zero_point", np.asarray((fixed.zero_point or 0) + _ZERO, np.uint8))
        nodes: list[ir.Node] = []
        writer.values[key] = _there_and_back(writer, x, scale, zero, nodes)
        writer.insert_after(x, nodes)
    return writer.values[key]


def by_token(writer: NodeWriter, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(x over its scales, through 8 bits and back; the scales (..., 1)), once for all matrices that multiply x."""
    key = f"{x.name}.rounded"
    if key not in writer.values:
        share, tiny, one = (
            writer.number(f"activations.{name}", np.asarray(value, np.float32))
            for name, value in (("share", 1 / _LARGEST), ("tiny", _TINY), ("one", 1))
        )
        zero = writer.number("activations.zero", np.asarray(_ZERO, np.uint8))
        nodes: list[ir.Node] = []
        last = writer.integers([-1])
        largest = writer.append(nodes, "ReduceMax", [writer.append(nodes, "Abs", [x]), last])
        # ONNX Runtime 1.31 reduces nothing where there is no row: an expert that no token chose.
        one_wide = [largest, writer.integers([0]), writer.integers([1]), last]
        largest = writer.append(nodes, "Slice", one_wide)
        scale = writer.append(nodes, "Max", [writer.append(nodes, "Mul", [largest, share]), tiny])
        unit = writer.append(nodes, "Div", [x, scale])
        writer.values[key] = _there_and_back(writer, unit, one, zero, nodes)
        writer.values[f"{key}.scale"] = scale
        writer.insert_after(x, nodes)
    return writer.values[key], writer.values[f"{key}.scale"]


def _there_and_back(writer: NodeWriter, x: ir.Value, scale: ir.Value, zero: ir.Value, nodes: list[ir.Node]) -> ir.Value:
    codes = writer.append(nodes, "QuantizeLinear", [x, scale, zero])
    return writer.append(nodes, "DequantizeLinear", [codes, scale, zero])
