"""Whether a second graph over the same data is the published one with a single Slice more.

What is proven of `model.onnx` then holds for `genai.onnx`, whose logits are those of the last token. Values are
compared by what made them, whatever they are called: nodes in order, with their attributes, on initializers of the same
content.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tightship.validators.onnx_probe import OnnxGraph

if TYPE_CHECKING:
    import onnx

Fault = tuple[str | None, str]
_ROWS = (-1, np.iinfo(np.int64).max, 1)  # from the last one on, to the end, along the tokens
_Shape = tuple[str, str, tuple[bytes, ...], tuple[str, ...]]


def twin_faults(main: Path, twin: Path) -> Iterator[Fault]:
    """What tells two graphs apart, beyond a Slice of the last token in the second one; (tensor, sentence) each."""
    first, second = OnnxGraph(main), OnnxGraph(twin)
    cuts = [node for node in second.model.graph.node if _cuts(second, node)]
    if len(cuts) != 1:
        yield None, f"{twin.name} has {len(cuts)} nodes that cut out the last token, where one is expected"
        return
    inputs, more = (sorted(v.name for v in g.model.graph.input) for g in (first, second))
    ours, theirs = _shape(first), _shape(second, cuts[0])
    if inputs != more or ours != theirs:
        yield None, f"{twin.name} computes something else than {main.name} with the last token cut out"
        return
    own = {*cuts[0].input[1:]}
    for name in sorted({*first.initializers} ^ {*second.initializers} - own):
        yield name, f"only one of {main.name} and {twin.name} has it"
    for name in sorted({*first.initializers} & {*second.initializers}):
        if not _same(first, second, name):
            yield name, f"{main.name} and {twin.name} read different values"


def _cuts(graph: OnnxGraph, node: onnx.NodeProto) -> bool:
    given = [graph.initializers.get(name) for name in node.input[1:]]
    known = node.op_type == "Slice" and len(given) == len(_ROWS) and None not in given
    return known and tuple(int(graph.array(t).item()) for t in given if t is not None) == _ROWS


def _shape(graph: OnnxGraph, without: onnx.NodeProto | None = None) -> tuple[list[_Shape], Mapping[str, str]]:
    """Nodes, and where each output comes from; a value of a node is called by the node's place."""
    places = {name: name for name in (*graph.initializers, *(v.name for v in graph.model.graph.input), "")}
    found: list[_Shape] = []
    for node in graph.model.graph.node:
        inputs = tuple(places[name] for name in node.input)
        if node == without:
            places[node.output[0]] = inputs[0]
            continue
        attributes = tuple(sorted(a.SerializeToString(deterministic=True) for a in node.attribute))
        places.update({name: f"{len(found)}/{index}" for index, name in enumerate(node.output) if name})
        found.append((node.domain, node.op_type, attributes, inputs))
    return found, {value.name: places[value.name] for value in graph.model.graph.output}


def _same(first: OnnxGraph, second: OnnxGraph, name: str) -> bool:
    """By the place of the bytes if it is one, otherwise byte by byte, in the same file."""
    ours, theirs = first.initializers[name], second.initializers[name]
    if ours.SerializeToString(deterministic=True) == theirs.SerializeToString(deterministic=True):
        return True
    files = [[e.value for e in tensor.external_data if e.key == "location"] for tensor in (ours, theirs)]
    if files[0] != files[1]:
        return False
    left, right = first.array(ours), second.array(theirs)
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
