"""A small language for graphs: inputs, operators by name, constants, outputs. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tightship.exporters.onnx_candidates.graph_edits import OPSET
from tightship.exporters.onnx_candidates.skeleton import Feed, Skeleton, Stack

if TYPE_CHECKING:
    import onnx_ir as ir

FLOAT, INT64, BOOL, BFLOAT16 = 1, 7, 9, 16
LOWEST = float(np.finfo(np.float32).min)  # hides a position; unlike -inf, a row that sees nothing stays finite
# Operators whose output has the shape of their first input.
_ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Clip", "Tanh", "Sigmoid", "Relu", "Gelu", "Softmax")
_ALIKE = (*_ELEMENTWISE, "RMSNormalization", "LayerNormalization", "RotaryEmbedding")


class GraphBuilder:
    """Collects inputs, nodes, initializers and outputs of one graph; `prefix` of all its names, for one within another.

    A graph within another may read the other's values.
    """

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self.feeds: dict[str, Feed] = {}
        self.stacks: dict[str, Stack] = {}
        self._values: dict[str, ir.Value] = {}
        self._nodes: list[ir.Node] = []
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []

    def input(self, name: str, axes: Sequence[int | str | None], kind: int = INT64) -> ir.Value:
        """A graph input."""
        name = self.prefix + name
        if name not in self._values:
            self._inputs.append(self._value(name, axes, kind))
        return self._values[name]

    def output(self, name: str, value: ir.Value, axes: Sequence[int | str]) -> None:
        """Name a value as a graph output."""
        import onnx_ir as ir

        value.name, value.type, value.shape = self.prefix + name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(axes)
        self._outputs.append(value)

    def op(self, kind: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """The output of a node."""
        return self.ops(kind, *inputs, **attributes)[0]

    def ops(
        self, kind: str, *inputs: ir.Value | None, outputs: int = 1, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """All outputs of a node; shapes are noted where they follow from the first input."""
        import onnx_ir as ir

        node = ir.node(kind, list(inputs), attributes, domain=domain, num_outputs=outputs)
        node.name = f"{self.prefix}{kind}_{len(self._nodes)}"
        for index, value in enumerate(node.outputs):
            value.name = node.name if not index else f"{node.name}.{index}"
        first = inputs[0] if inputs else None
        if first is not None and first.shape is not None and (kind in _ALIKE or kind == "MatMul"):
            axes: list[Any] = list(first.shape)
            other = inputs[1] if kind == "MatMul" else None
            if other is not None:
                axes[-1] = other.shape[-1] if other.shape is not None else None
            node.outputs[0].shape, node.outputs[0].type = ir.Shape(axes), first.type
        self._nodes.append(node)
        return node.outputs

    def shaped(self, value: ir.Value, axes: Sequence[int | str | None]) -> ir.Value:
        """Note the shape of a float value that does not follow from its operator; what reads weights relies on it."""
        import onnx_ir as ir

        value.shape, value.type = ir.Shape(axes), ir.TensorType(ir.DataType.FLOAT)
        return value

    def scaled(self, x: ir.Value, factor: float) -> ir.Value:
        """x times a number; x itself for 1."""
        return x if factor == 1.0 else self.op("Mul", x, self.number(factor))

    def clipped(self, x: ir.Value, lowest: float | None, highest: float | None) -> ir.Value:
        """x between two numbers, None for no bound."""
        bounds = [None if bound is None else self.number(float(bound)) for bound in (lowest, highest)]
        return self.op("Clip", x, *bounds)

    def number(self, value: float) -> ir.Value:
        """A float scalar."""
        return self.constant(f"float.{value!r}", np.asarray(value, np.float32))

    def integer(self, value: int) -> ir.Value:
        """An int64 scalar."""
        return self.constant(f"int.{value}", np.asarray(value, np.int64))

    def integers(self, *values: int) -> ir.Value:
        """An int64 vector."""
        return self.constant("ints." + ".".join(map(str, values)), np.asarray(values, np.int64))

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """An initializer with data."""
        import onnx_ir as ir

        if name not in self._values:
            value = self._value(name, array.shape, ir.DataType.from_numpy(array.dtype).value)
            value.const_value = ir.tensor(array, name=name)
        return self._values[name]

    def range(self, start: ir.Value, stop: ir.Value) -> ir.Value:
        """start, start + 1, ..., stop - 1 as int64 (n,)."""
        return self.op("Range", start, stop, self.integer(1))

    def length(self, x: ir.Value, axis: int = 1) -> ir.Value:
        """Size of an axis, an int64 scalar."""
        return self.op("Squeeze", self.op("Shape", x, start=axis, end=axis + 1))

    def fed(self, name: str, feed: Feed, shape: Sequence[int]) -> ir.Value:
        """An initializer whose data come from the checkpoint; the same one for the same name."""
        self.feeds[name] = feed
        return self._values.get(name) or self._value(name, shape, FLOAT)

    def stack(self, name: str, stack: Stack) -> ir.Value:
        """An initializer made of several of the checkpoint's; type and shape follow from what is stored."""
        import onnx_ir as ir

        self.stacks[name] = stack
        self._values[name] = ir.Value(name=name)
        return self._values[name]

    def graph(self, name: str) -> ir.Graph:
        """The finished graph."""
        import onnx_ir as ir

        made = {*self.feeds, *self.stacks}
        initializers = [v for n, v in self._values.items() if n in made or v.const_value is not None]
        domains = dict.fromkeys(sorted({node.domain for node in self._nodes if node.domain}), 1)
        return ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=initializers,
            opset_imports={"": OPSET, **domains},
            name=name,
        )

    def skeleton(self) -> Skeleton:
        """The finished graph with what its initializers hold."""
        import onnx_ir as ir

        return Skeleton(ir.Model(self.graph("main"), ir_version=10), self.feeds, self.stacks)

    def _value(self, name: str, axes: Sequence[int | str | None], kind: int) -> ir.Value:
        import onnx_ir as ir

        value = ir.Value(name=name, type=ir.TensorType(ir.DataType(kind)), shape=ir.Shape(axes))
        self._values[name] = value
        return value
