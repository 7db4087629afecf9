"""Computes products, attention and what lies between them in float16; the rest stays float32.

| computed in float16                                   | float32                                                   |
|-------------------------------------------------------|-----------------------------------------------------------|
| MatMul by a weight stored in float16, but the logits' | logits, norms, the residual sum                           |
| attention, rotation, the caches of keys and values    | softmax (`softmax_precision`, or the kernel's own way)    |
| biases, activations, gates: fed by the above alone    | masks, angles, everything else                            |

The residual sum is float32 since it outgrows float16 in families trained in bfloat16. Masks are cut at float16's lowest
number before they are cast: -inf would make rows that see nothing not a number. Casts stand where the two meet; those
that undo each other are not written. Inputs and outputs are float32 but for the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from tightship.errors import Unsupported
from tightship.exporters.onnx_nodes import NodeWriter

if TYPE_CHECKING:
    import onnx_ir as ir

_FLOAT, _FLOAT16 = 1, 10
_LOWEST = np.float32(np.finfo(np.float16).min)
_ATTENTION = ("Attention", "GroupQueryAttention")
_BETWEEN = ("Add", "Mul", "Sigmoid", "Gelu", "Relu", "Tanh", "Clip", "Split", "Reshape", "Transpose", "RotaryEmbedding")
_MASKS = {"Attention": 3, "GroupQueryAttention": 10}
_OTHERWISE = {"Reshape": (1,), "Split": (1,), "RotaryEmbedding": (3,), "GroupQueryAttention": (5, 6, 9)}  # integers


def to_half(writer: NodeWriter) -> None:
    """Rewrite a graph whose weights are placed; see the module docstring."""
    _Half(writer).run()


class _Half:
    """One graph on its way; `narrow` knows what was computed or cast in float16."""

    def __init__(self, writer: NodeWriter) -> None:
        self.writer = writer
        self.graph = writer.graph
        self.narrow: dict[ir.Value, ir.Value] = {}  # float32 value -> the same in float16

    def run(self) -> None:
        nodes = list(self.graph)
        for value in _cache(self.graph):
            value.type = _half_tensor()
        for node in nodes:
            if self._belongs(node):
                self._lower(node)

    def _belongs(self, node: ir.Node) -> bool:
        if node.op_type in _ATTENTION or _joins(node):
            return True
        if any(value.is_graph_output() for value in node.outputs):
            return False
        if node.op_type == "MatMul":
            return _stored(node.inputs[1]) is not None and not _is_logits(node)
        if node.op_type not in _BETWEEN:
            return False
        moving = [value for _, value in _floats(node) if value.producer() is not None and _stored(value) is None]
        if node.op_type == "RotaryEmbedding":
            moving = moving[:1]  # angles are float32 and cast
        return bool(moving) and all(value in self.narrow for value in moving)

    def _lower(self, node: ir.Node) -> None:
        if node.op_type == "Attention":
            node.attributes["softmax_precision"] = _integer("softmax_precision", _FLOAT)
        for index, value in list(_floats(node)):
            node.replace_input_with(index, self._narrowed(value, mask=_MASKS.get(node.op_type) == index))
        for value in node.outputs:
            if str(value.name).startswith("present.") or not value.name:
                continue
            readers = list(value.uses())
            cast = self.writer.node("Cast", [value], {"to": _FLOAT})
            wide = cast.outputs[0]
            wide.type, wide.shape = value.type, value.shape
            value.type = _half_tensor()
            self.graph.insert_after(node, cast)
            for reader, index in readers:
                reader.replace_input_with(index, wide)
            self.narrow[wide] = value

    def _narrowed(self, value: ir.Value, *, mask: bool) -> ir.Value:
        stored = _stored(value)
        if stored is not None:
            return stored
        if value.dtype == _half():
            return value
        if value not in self.narrow:
            nodes: list[ir.Node] = []
            low = self.writer.number("half.lowest", np.asarray(_LOWEST))
            kept = self.writer.append(nodes, "Max", [value, low]) if mask else value
            self.narrow[value] = self.writer.append(nodes, "Cast", [kept], {"to": _FLOAT16})
            self.writer.insert_after(value, nodes)
        return self.narrow[value]


def _cache(graph: ir.Graph) -> list[ir.Value]:
    """The keys and values that come in and go out.

    Raises:
        Unsupported: something else than attention reads or makes them.
    """
    past = [value for value in graph.inputs if str(value.name).startswith("past_key_values.")]
    present = [value for value in graph.outputs if str(value.name).startswith("present.")]
    nodes = [reader for value in past for reader, _ in value.uses()]
    nodes += [node for value in present if (node := value.producer()) is not None]
    if any(node.op_type not in (*_ATTENTION, "Shape") and not _joins(node) for node in nodes):
        raise Unsupported(
            "float16 is for caches of plain attention; this family computes with its own in float32",
            hint="use the scheme fp16: stored so, computed in float32",
        )
    return past + present


def _joins(node: ir.Node) -> bool:
    """Whether it joins keys or values to a cache that attention alone reads, as in cross-attention."""
    grown = node.outputs[0]
    readers = (reader.op_type for reader, _ in grown.uses())
    return node.op_type == "Concat" and grown.is_graph_output() and all(kind in _ATTENTION for kind in readers)


def _floats(node: ir.Node) -> Iterator[tuple[int, ir.Value]]:
    """Inputs that are floats, with their places."""
    others = _OTHERWISE.get(node.op_type, ())
    given = ((i, value) for i, value in enumerate(node.inputs) if value is not None and i not in others)
    return ((i, value) for i, value in given if value.dtype is None or value.dtype.is_floating_point())


def _stored(value: ir.Value | None) -> ir.Value | None:
    """The float16 initializer whose wide form a value is."""
    node = value.producer() if value is not None else None
    source = node.inputs[0] if node is not None and node.op_type == "Cast" else None
    return source if source is not None and source.producer() is None and source.dtype == _half() else None


def _is_logits(node: ir.Node) -> bool:
    """Whether a product ends in an output, through operators that work element by element."""
    open_values = [node.outputs[0]]
    while open_values:
        value = open_values.pop()
        if value.is_graph_output():
            return True
        readers = [reader for reader, _ in value.uses()]
        if any(reader.op_type not in ("Add", "Mul", "Div", "Tanh") for reader in readers):
            return False
        open_values += [reader.outputs[0] for reader in readers]
    return False


def _half() -> ir.DataType:
    import onnx_ir as ir

    return ir.DataType.FLOAT16


def _half_tensor() -> ir.TensorType:
    """A type of its own: those of a graph are shared between its values."""
    import onnx_ir as ir

    return ir.TensorType(_half())


def _integer(name: str, value: int) -> ir.Attr:
    import onnx_ir as ir

    return ir.AttrInt64(name, value)
