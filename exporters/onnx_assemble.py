"""Skeleton plus checkpoint -> files: the one road from a graph without weights to an artifact."""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.errors import Malformed, Unsupported
from tightship.exporters.onnx_activations import in_integers
from tightship.exporters.onnx_candidates.skeleton import MAIN, Skeleton
from tightship.exporters.onnx_emit import Emitter
from tightship.exporters.onnx_half import to_half
from tightship.exporters.onnx_joined import join_products
from tightship.exporters.onnx_stacks import stack_initializers
from tightship.exporters.onnx_storage import Style
from tightship.exporters.onnx_units import owner_of, units_of, unused_tensors
from tightship.formats.onnx_writer import Initializer, Part, write_parts
from tightship.target import Progress, no_progress

if TYPE_CHECKING:
    import onnx_ir as ir


def write_graph(
    skeleton: Skeleton,
    checkpoint: Checkpoint,
    directory: Path,
    style: Style,
    *,
    progress: Progress = no_progress,
) -> dict[str, int]:
    """Fill the skeleton with the checkpoint's weights and write its graphs; returns the bytes of each tensor.

    Consumes the skeleton. A weight that two graphs read is stored once.

    Raises:
        Unsupported: a weight has no exact form in ONNX, or the graphs do not read every weight.
    """
    dropped = unused_tensors(skeleton, checkpoint)
    if dropped:
        raise Unsupported(
            f"the graph does not read {len(dropped)} stored tensors: {', '.join(dropped[:8])}", tensor=dropped[0]
        )
    written: dict[str, dict[str, int]] = {}
    parts = {name: _filled(graph, checkpoint, style, written) for name, graph in skeleton.graphs.items()}
    write_parts(parts, directory, f"{MAIN}_data", progress)
    return {tensor: sum(found.values()) for tensor, found in written.items()}


def _filled(skeleton: Skeleton, checkpoint: Checkpoint, style: Style, written: dict[str, dict[str, int]]) -> Part:
    """One graph reading the stored weights. `written`: tensor -> initializer -> bytes."""
    import onnx_ir as ir

    graph = skeleton.model.graph
    emitter = Emitter(graph, style, in_integers(checkpoint))
    for unit in units_of(skeleton, checkpoint):
        first = len(emitter.initializers)
        emitter.place(unit)
        found = {item.name: 0 if item.same_as else item.nbytes for item in emitter.initializers[first:]}
        written.setdefault(unit.tensor, {}).update(found)
    for name, item in stack_initializers(skeleton, checkpoint, style).items():
        emitter.initializers.append(item)
        tensors = [*chain(*skeleton.stacks[name].tensors)]
        for tensor in tensors:
            written.setdefault(owner_of(checkpoint, tensor), {})[name] = item.nbytes // len(tensors)
    join_products(graph)
    if style.half:
        to_half(emitter)
    remove_dead(graph, ("Transpose", "Cast"))
    own = [_own(value) for value in graph.initializers.values()]
    graph.initializers.clear()
    return Part(ir.serde.serialize_model(skeleton.model), [*own, *emitter.constants], emitter.initializers)


def remove_dead(graph: ir.Graph, kinds: Collection[str]) -> None:
    """Nodes of these types that nobody reads: transposes that the units have looked through, casts that were undone."""
    for node in reversed(list(graph)):
        if node.op_type in kinds and not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
            graph.remove(node, safe=True)


def _own(value: ir.Value) -> Initializer:
    """A constant that the graph brought along."""
    tensor = value.const_value
    if tensor is None:
        raise Malformed("a graph source left an initializer without data and without a feed", tensor=value.name)
    data = np.asarray(tensor.numpy())  # a scalar stays a scalar
    return Initializer(str(value.name), tensor.dtype.value, tuple(data.shape), data.nbytes, lambda: data)
