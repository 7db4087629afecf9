"""Another source's graph with ONNX Runtime's own attention put in; judged like every other candidate.

| pattern                            | check                              | rewritten to                     |
|------------------------------------|------------------------------------|----------------------------------|
| Attention with a mask and a cache  | keys and values have one head size | GroupQueryAttention              |
| the same with sinks, see cached.py | the same                           | GroupQueryAttention, `head_sink` |

GroupQueryAttention appends to the cache in place where the client gives past and present one buffer; that is what makes
it faster at long contexts. By itself it is wrong for padded batches: it takes a row's length for its number of unmasked
tokens, counted from the left. So the mask stays what it was and goes in as `attention_bias`, every row is said to be as
long as the longest (`seqlens_k` = total - 1), and positions are applied before it (`do_rotary` = 0) or by place: exact
for padding on either side. Windows are in the mask. Where heads have sinks, caches are no longer copied to be padded by
one key (`benchmarks/onnx_sinks.py`). Definition: ContribOperators.md of ONNX Runtime.

SkipSimplifiedLayerNormalization is left out: its kernel takes one and a half times as long as Add and RMSNormalization
(`benchmarks/onnx_norms.py`). One product for queries, keys and values: packed.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tightship.architecture import Architecture
from tightship.errors import Unsupported
from tightship.exporters.onnx_candidates.cached import Cached, cached
from tightship.exporters.onnx_candidates.graph_edits import constant, remove_unused
from tightship.exporters.onnx_candidates.packed import pack_attention
from tightship.exporters.onnx_candidates.skeleton import DECODER_TASKS, Candidate, Skeleton

if TYPE_CHECKING:
    import onnx_ir as ir

CONTRIB = "com.microsoft"
_INT32 = 6
_KEPT = ("scale", "softcap")
_KNOWN = {*_KEPT, "q_num_heads", "kv_num_heads"}


class FusedCandidate:
    """`inner`, rewritten; with `packed`, queries, keys and values of one product where that fits."""

    def __init__(self, inner: Candidate, *, packed: bool = False) -> None:
        self.inner = inner
        self.packed = packed

    @property
    def source(self) -> str:
        return f"{self.inner.source}, fused for ONNX Runtime"

    @property
    def rewrites(self) -> tuple[str, ...]:
        return (*self.inner.rewrites, "GroupQueryAttention", *["packed projections"] * self.packed)

    def build(
        self, config: Mapping[str, Any], architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]
    ) -> Skeleton:
        if architecture.task not in DECODER_TASKS:
            raise Unsupported("there is no attention with a cache to fuse")
        skeleton = self.inner.build(config, architecture, shapes)
        graph = skeleton.model.graph
        fused = fuse_attention(graph)
        if not fused:
            raise Unsupported("there is no attention with a cache to fuse")
        graph.opset_imports[CONTRIB] = 1
        remove_unused(skeleton.model)
        if self.packed:
            pack_attention(skeleton.model, int(architecture.hyper(config)["context"]))
        return skeleton


def shares_cache(graph: ir.Graph) -> bool:
    """Whether past and present may be one buffer: every cached attention appends in place."""
    kinds = {node.op_type for node in graph}
    return "GroupQueryAttention" in kinds and "Attention" not in kinds


def fuse_attention(graph: ir.Graph) -> int:
    """Attention to GroupQueryAttention; all of them or, where one does not fit, none. How many there were."""
    nodes = [node for node in graph if node.op_type == "Attention" and not node.domain]
    found = [attention for node in nodes if (attention := cached(node)) is not None and _fits(node, attention)]
    if not found or len(found) < len(nodes):
        return 0
    last, total = _lengths(graph)
    for node, attention in zip(nodes, found, strict=True):
        *operands, mask = attention.inputs
        sinks = [] if attention.sinks is None else [attention.sinks]
        inputs = [*operands, last, total, None, None, None, mask, *sinks]
        keep = {name: node.attributes[name].as_float() for name in _KEPT if name in node.attributes}
        heads = dict(zip(("num_heads", "kv_num_heads"), attention.heads, strict=True))
        grouped = _contrib("GroupQueryAttention", inputs, {**heads, **keep, "do_rotary": 0}, len(attention.outputs))
        _replace(graph, attention.nodes, grouped, dict(enumerate(attention.outputs)))
    return len(found)


def _fits(node: ir.Node, attention: Cached) -> bool:
    """Heads of one size for keys and values, and nothing that the kernel does not have."""
    past = [value.shape[3] for value in attention.inputs[3:5] if value.shape is not None]
    return {*node.attributes} <= _KNOWN and len(past) == 2 and past[0] == past[1]


def _lengths(graph: ir.Graph) -> tuple[ir.Value, ir.Value]:
    """(batch) int32, last position of every row, and the total length, from the shapes of the inputs."""
    import onnx_ir as ir

    inputs = {value.name: value for value in graph.inputs}
    one = constant(graph, "gqa.one", np.ones(1, np.int32))
    batch = ir.node("Shape", [inputs["input_ids"]], {"start": 0, "end": 1})
    length = ir.node("Shape", [inputs["attention_mask"]], {"start": 1, "end": 2})
    narrow = ir.node("Cast", [length.outputs[0]], {"to": _INT32})
    scalar = ir.node("Squeeze", [narrow.outputs[0]])
    before = ir.node("Sub", [narrow.outputs[0], one])
    last = ir.node("Expand", [before.outputs[0], batch.outputs[0]])
    nodes = [batch, length, narrow, scalar, before, last]
    for node, word in zip(nodes, ("batch", "length", "narrow", "total", "before", "last"), strict=True):
        node.name = node.outputs[0].name = f"gqa.{word}"
    graph.insert_before(graph[0], nodes)
    return last.outputs[0], scalar.outputs[0]


def _contrib(op: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any], outputs: int) -> ir.Node:
    import onnx_ir as ir

    return ir.node(op, inputs, attributes, domain=CONTRIB, num_outputs=outputs)


def _replace(graph: ir.Graph, old: Sequence[ir.Node], new: ir.Node, outputs: Mapping[int, ir.Value]) -> None:
    """Put `new` in the place of `old`; the values of `outputs`, by place, hand over their names and readers."""
    from onnx_ir import convenience

    new.name = old[-1].name
    for place, fresh in enumerate(new.outputs):
        former = outputs.get(place)
        fresh.name = former.name if former is not None else ""
        if former is not None:
            fresh.type, fresh.shape = former.type, former.shape
    kept = [new.outputs[place] for place in outputs]
    convenience.replace_nodes_and_values(graph, old[0], old, [new], list(outputs.values()), kept)
