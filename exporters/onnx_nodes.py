"""Puts nodes and initializers into a graph; knows no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tightship.errors import Unsupported
from tightship.formats.onnx_writer import Initializer

if TYPE_CHECKING:
    import onnx_ir as ir


class NodeWriter:
    """One graph. `initializers` are the weights in order of first use, `constants` what nodes need beside them."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.initializers: list[Initializer] = []
        self.constants: list[Initializer] = []
        self.values: dict[str, ir.Value] = {}
        self._last_head: ir.Node | None = None
        self._counter = 0

    def add(self, item: Initializer, *, constant: bool = False) -> ir.Value:
        """The value of an initializer, the same one for the same name."""
        import onnx_ir as ir

        if item.name not in self.values:
            kind = ir.TensorType(ir.DataType(item.data_type))
            self.values[item.name] = ir.Value(name=item.name, type=kind, shape=ir.Shape(item.shape))
            (self.constants if constant else self.initializers).append(item)
        return self.values[item.name]

    def number(self, name: str, array: np.ndarray) -> ir.Value:
        """A constant."""
        return self.add(Initializer.of(name, array), constant=True)

    def integers(self, numbers: Sequence[int]) -> ir.Value:
        """An int64 vector."""
        return self.number("shape_" + "_".join(str(n) for n in numbers), np.asarray(numbers, np.int64))

    def first(
        self,
        op: str,
        source: ir.Value,
        others: Sequence[ir.Value] = (),
        attributes: Mapping[str, Any] | None = None,
    ) -> ir.Value:
        """A node on an initializer, in front of everything; made once for each of them."""
        key = f"{source.name}.{op}"
        if key not in self.values:
            node = self.node(op, [source, *others], attributes)
            node.outputs[0].name = key
            if self._last_head is None:
                self.graph.insert_before(self.graph[0], node)
            else:
                self.graph.insert_after(self._last_head, node)
            self._last_head = node
            self.values[key] = node.outputs[0]
        return self.values[key]

    def append(
        self,
        nodes: list[ir.Node],
        op: str,
        inputs: Sequence[ir.Value],
        attributes: Mapping[str, Any] | None = None,
        domain: str = "",
    ) -> ir.Value:
        """The output of a new node at the end of `nodes`."""
        nodes.append(self.node(op, inputs, attributes, domain=domain))
        return nodes[-1].outputs[0]

    def insert_after(self, value: ir.Value, nodes: Sequence[ir.Node]) -> None:
        """Put nodes right behind the one that makes a value; in front of everything for a graph input."""
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], nodes)
        else:
            self.graph.insert_after(producer, nodes)

    def node(
        self,
        op: str,
        inputs: Sequence[ir.Value],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
    ) -> ir.Node:
        """A node that is in no graph yet."""
        import onnx_ir as ir

        node = ir.node(op, list(inputs), dict(attributes or {}), domain=domain, num_outputs=outputs)
        self._counter += 1
        node.name = f"weights.{op}_{self._counter}"
        for index, value in enumerate(node.outputs):
            value.name = f"{node.name}.{index}" if index else node.name
        if domain:
            self.graph.opset_imports.setdefault(domain, 1)
        return node


def rank_of(value: ir.Value) -> int:
    """How many axes a value has.

    Raises:
        Unsupported: the graph does not say.
    """
    if value.shape is None:
        raise Unsupported(f"the rank of {value.name} is not known in this graph")
    return len(value.shape)
