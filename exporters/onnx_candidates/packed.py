"""GroupQueryAttention that takes queries, keys and values as one, and rotates them itself.

| pattern                                  | check                                   | rewritten to             |
|------------------------------------------|-----------------------------------------|--------------------------|
| GroupQueryAttention of three products of | whole heads are rotated, by angles that | Concat of the products,  |
| one input, queries and keys behind a     | follow from the position element by     | GroupQueryAttention with |
| RotaryEmbedding, or neither of them      | element                                 | `do_rotary`, or without  |

The Concat goes when weights are placed: three products become one (exporters/onnx_joined.py). Four operators fewer in
every block are what single tokens of a small model wait for (`benchmarks/onnx_fusions.py`).

The operator looks angles up by place. In a first prompt column c stands at c, whatever is padding; scores depend on
differences of positions alone, so rows padded on the left come out right all the same. Later tokens are told where they
stand: padding in front of a row counts, padding behind a prompt does not. `position_ids` is no input any more. The
tables of cosines and sines are as long as the context; they are nodes on constants, which ONNX Runtime computes once
when it loads the graph, so the file does not grow. Models whose tables would be large keep their RotaryEmbedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.exporters.onnx_candidates.graph_edits import constant, remove_unused
from tightship.exporters.onnx_joined import is_stored

if TYPE_CHECKING:
    import onnx_ir as ir

MOST_ELEMENTS = 1 << 21  # of a table; 8 MiB
_WIDTHS = 16  # what a head's width must be a multiple of
_BY_ELEMENT = ("Cast", "Unsqueeze", "Mul", "Cos", "Sin")
_COS = 7  # of GroupQueryAttention's inputs; sines and places follow
_QUERIES_KEYS_VALUES = 3
_INT64 = 7


def packs(checkpoint: Checkpoint) -> bool:
    """Whether the operator can rotate heads of this model, by a table that is not too large."""
    size, context = int(checkpoint.hyper.get("head_dim") or 0), int(checkpoint.hyper.get("context") or 0)
    return size > 0 and size % _WIDTHS == 0 and 0 < context * size // 2 <= MOST_ELEMENTS


def pack_attention(model: ir.Model, context: int) -> int:
    """Rewrite every GroupQueryAttention that fits; how many there were. `context`: how many positions tables hold."""
    graph = model.graph
    tables = _Tables(graph, context)
    angles: dict[ir.Value | None, ir.Value | None] = {}
    found = 0
    for node in [n for n in graph if n.op_type == "GroupQueryAttention"]:
        makers = [value.producer() for value in node.inputs[:2] if value is not None]
        turns = [maker for maker in makers if maker is not None and maker.op_type == "RotaryEmbedding"]
        products = _products(node, turns)
        if products is None or not _alike(turns):
            continue
        given = turns[0].inputs[1:] if turns else ()
        angles |= {value: tables.of(value) for value in given if value not in angles}
        if any(angles[value] is None for value in given):
            continue
        rotation = [*(angles[value] for value in given), tables.places] if turns else []
        _rewrite(graph, node, products, turns, rotation)
        found += 1
    if found:
        tables.place()
        remove_unused(model)
        for value in [v for v in graph.inputs if tables.nodes and v.name == "position_ids" and not v.uses()]:
            graph.inputs.remove(value)
    return found


def _products(node: ir.Node, turns: list[ir.Node]) -> list[ir.Value] | None:
    """Queries, keys and values: one input's products by a weight each, with a bias or without; None if they are not."""
    before = {turn.outputs[0]: turn.inputs[0] for turn in turns}
    found = [before.get(value, value) if value is not None else None for value in node.inputs[:_QUERIES_KEYS_VALUES]]
    values = [value for value in found if value is not None and len(value.uses()) == 1]
    sources = [_multiplied(value) for value in values]
    one = len(sources) == _QUERIES_KEYS_VALUES and None not in sources and len(set(sources)) == 1
    return values if one else None


def _multiplied(value: ir.Value) -> tuple[ir.Value | None, bool] | None:
    """What a weight multiplies to give a value, and whether a bias comes on top; None if it is no product."""
    maker = value.producer()
    biased = maker is not None and maker.op_type == "Add" and is_stored(maker.inputs[1])
    if biased and maker is not None and maker.inputs[0] is not None and len(maker.inputs[0].uses()) == 1:
        maker = maker.inputs[0].producer()
    product = maker is not None and maker.op_type == "MatMul" and is_stored(maker.inputs[1])
    return (maker.inputs[0], biased) if product and maker is not None else None


def _alike(turns: list[ir.Node]) -> bool:
    """Whether queries and keys are rotated in the same way, whole heads of them, or neither is."""
    if not turns:
        return True
    ways = {(*turn.inputs[1:], _number(turn, "interleaved")) for turn in turns}
    whole = all(_number(turn, "rotary_embedding_dim") == 0 and len(turn.inputs) == 3 for turn in turns)
    return len(turns) == 2 and len(ways) == 1 and whole


def _number(node: ir.Node, name: str) -> int:
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None else 0


def _rewrite(
    graph: ir.Graph, node: ir.Node, products: list[ir.Value], turns: list[ir.Node], rotation: list[ir.Value | None]
) -> None:
    import onnx_ir as ir

    joined = ir.node("Concat", products, {"axis": -1})
    joined.name = joined.outputs[0].name = f"{node.name}.packed"
    graph.insert_before(node, joined)
    for index, value in enumerate((joined.outputs[0], None, None)):
        node.replace_input_with(index, value)
    if turns:
        for index, value in enumerate(rotation, start=_COS):
            node.replace_input_with(index, value)
        node.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)
        node.attributes["rotary_interleaved"] = ir.AttrInt64("rotary_interleaved", _number(turns[0], "interleaved"))


class _Tables:
    """Values (batch, sequence, pairs) that follow from `position_ids`, computed for every position there is.

    Attributes:
        nodes: that are to stand in front of the graph.
    """

    def __init__(self, graph: ir.Graph, context: int) -> None:
        self.graph = graph
        self.context = context
        self.known: dict[ir.Value, ir.Value | None] = {}
        self.nodes: list[ir.Node] = []

    def of(self, value: ir.Value | None) -> ir.Value | None:
        """(context, pairs) of a value; None if it does not follow element by element."""
        rows = self._rows(value) if value is not None else None
        return None if rows is None else self._op("Squeeze", [rows, self._constant("first", [0])])

    @cached_property
    def places(self) -> ir.Value:
        """(batch, sequence) int64 of new tokens: how many tokens, and padding in front of all, come before each."""
        inputs = {value.name: value for value in self.graph.inputs}
        mask, one = inputs["attention_mask"], self._constant("step", 1)
        tokens = self._op("CumSum", [mask, one])
        leading = self._op("Cast", [self._op("Equal", [tokens, self._constant("start", 0)])], to=_INT64)
        counted = self._op("CumSum", [self._op("Add", [mask, leading]), one])
        new = self._op("Neg", [self._op("Shape", [inputs["input_ids"]], start=1, end=2)])
        last = [new, self._constant("last", [np.iinfo(np.int64).max]), self._constant("axis", [1])]
        return self._op("Slice", [self._op("Sub", [counted, one]), *last])

    def place(self) -> None:
        """Put the nodes in front of everything."""
        for index, node in enumerate(self.nodes):
            node.name = node.outputs[0].name = f"positions.{node.op_type}_{index}"
        self.graph.insert_before(self.graph[0], self.nodes)

    def _rows(self, value: ir.Value) -> ir.Value | None:
        """(1, context, ...)."""
        if value not in self.known:
            self.known[value] = self._computed(value)
        return self.known[value]

    def _computed(self, value: ir.Value) -> ir.Value | None:
        maker = value.producer()
        if value.const_value is not None:
            return value
        if maker is None:
            return self._every() if value.name == "position_ids" else None
        if maker.op_type not in _BY_ELEMENT or maker.domain:
            return None
        inputs = [self._rows(given) for given in maker.inputs if given is not None]
        return None if None in inputs else self._op(maker.op_type, inputs, list(maker.attributes.values()))

    def _every(self) -> ir.Value:
        """(1, context) int64: 0, 1, ..."""
        bounds = [self._constant(word, n) for word, n in (("start", 0), ("stop", self.context), ("step", 1))]
        return self._op("Unsqueeze", [self._op("Range", bounds), self._constant("first", [0])])

    def _op(
        self, kind: str, inputs: Sequence[ir.Value | None], attributes: Sequence[ir.Attr] = (), **numbers: int
    ) -> ir.Value:
        import onnx_ir as ir

        more = [ir.AttrInt64(name, number) for name, number in numbers.items()]
        self.nodes.append(ir.Node("", kind, inputs, [*attributes, *more]))
        return self.nodes[-1].outputs[0]

    def _constant(self, word: str, number: int | list[int]) -> ir.Value:
        return constant(self.graph, f"positions.{word}", np.asarray(number, np.int64))
