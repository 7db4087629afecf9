"""Attention with a cache as graphs write it: one operator, or several where heads have sinks.

| inputs of Attention                                     | check                               | what is found       |
|---------------------------------------------------------|-------------------------------------|---------------------|
| query, key, value, mask, past key, past value           | it has three outputs                | these               |
| query; key and value, each behind Concat with the past  | heads come first by Reshape and     | these, as they were |
| and Pad; Concat of the mask and of a number of the head | Transpose, and last behind it       | before; the numbers |

The second attends to one key more, whose score is the sink of the head and whose value is zero (attention.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

_CACHED_INPUTS = 6  # query, key, value, mask, past key, past value
_HEADS = ("q_num_heads", "kv_num_heads")
_HEADS_FIRST = ("Transpose", "Reshape")  # from the end


@dataclass(frozen=True)
class Cached:
    """Attention to a cache.

    Attributes:
        nodes: Attention, and what follows it up to what comes out.
        inputs: queries, keys and values (batch, sequence, heads * size), past keys and values (batch, heads, past,
            size), the mask that is added to the scores.
        outputs: (batch, sequence, heads * size), grown keys and values.
        heads: of queries, of keys.
        sinks: (heads,), or None.
    """

    nodes: Sequence[ir.Node]
    inputs: Sequence[ir.Value]
    outputs: Sequence[ir.Value]
    heads: tuple[int, int]
    sinks: ir.Value | None = None


def cached(node: ir.Node) -> Cached | None:
    """What an Attention operator is, None if it is without a mask of floats or a cache."""
    if len(node.inputs) == _CACHED_INPUTS:
        query, key, value, mask, *past = node.inputs
        inputs = _all((query, key, value, *past, mask))
        if inputs is None or len(node.outputs) != 3:
            return None
        queries, keys = (node.attributes[name].as_int() for name in _HEADS)
        return Cached([node], inputs, node.outputs, (queries, keys))
    return _with_sinks(node)


def _with_sinks(node: ir.Node) -> Cached | None:
    query, key, value, seen = (*node.inputs, None, None, None, None)[:4]
    grown = [_before(y, "Pad") for y in (key, value)]
    new = [query, *(_second(y, "Concat") for y in grown)]
    past = [_before(y, "Concat") for y in grown]
    mask, sinks = _before(seen, "Concat", "Expand"), _before(_second(seen, "Concat"), "Expand", "Reshape")
    inputs = _all([*(_before(y, *_HEADS_FIRST) for y in new), *past, mask])
    behind = _behind(node, "Transpose", "Reshape")
    outputs = _all([behind[-1].outputs[0] if behind else None, *grown])
    counted = [y.shape[axis] for y, axis in ((sinks, 0), (past[0], 1)) if y is not None and y.shape is not None]
    heads = [count for count in counted if isinstance(count, int)]
    if inputs is None or outputs is None or len(heads) != 2:
        return None
    return Cached([node, *behind], inputs, outputs, (heads[0], heads[1]), sinks)


def _before(value: ir.Value | None, *kinds: str) -> ir.Value | None:
    """What goes in first where operators in a row, from the last, give a value; None if they are others."""
    for kind in kinds:
        node = value.producer() if value is not None else None
        value = node.inputs[0] if node is not None and node.op_type == kind else None
    return value


def _second(value: ir.Value | None, kind: str) -> ir.Value | None:
    """The second input of the operator that gives a value, if it is of this kind."""
    node = value.producer() if value is not None else None
    return node.inputs[1] if node is not None and node.op_type == kind else None


def _behind(node: ir.Node, *kinds: str) -> list[ir.Node]:
    """The operators that read nothing else, one after the other; empty if they are others."""
    found: list[ir.Node] = []
    for kind in kinds:
        readers = node.outputs[0].consumers()
        if len(readers) != 1 or readers[0].op_type != kind:
            return []
        node = readers[0]
        found.append(node)
    return found


def _all(values: Sequence[ir.Value | None]) -> list[ir.Value] | None:
    found = [value for value in values if value is not None]
    return found if len(found) == len(values) else None
