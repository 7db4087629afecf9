"""Decoders that give the logits of a prompt's last token alone, which is all that generating text reads.

| pattern                                            | check                    | rewritten to                    |
|----------------------------------------------------|--------------------------|---------------------------------|
| MatMul by the head, and what is made of that alone | its left side is a value | Slice of the last tokens before |

Of a graph that is to be the only one, the number of tokens can be asked for: `num_logits_to_keep` is an int64 scalar, a
graph input with a default (an initializer of the same name), so that clients that do not know it need not feed it: 1,
the last token; 0, all of them, as transformers counts. Beside a graph of all logits there is a twin of one row, for
onnxruntime-genai: it looks for an axis of 1 in `logits`, and reads one row of a prompt then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tightship.architecture import Architecture
from tightship.errors import Unsupported
from tightship.exporters.onnx_candidates.graph_edits import constant
from tightship.exporters.onnx_candidates.skeleton import BATCH, DECODER_TASKS, KEPT, Candidate, Skeleton

if TYPE_CHECKING:
    import onnx_ir as ir

LAST = "last.tokens"  # the Slice of a twin, and what it gives
_BEHIND = ("Add", "Mul", "Div", "Tanh", "Cast", "Identity")  # between the head's product and the output


class LastLogitsCandidate:
    """`inner`, rewritten."""

    def __init__(self, inner: Candidate) -> None:
        self.inner = inner

    @property
    def source(self) -> str:
        return f"{self.inner.source}, logits of the last token"

    @property
    def rewrites(self) -> tuple[str, ...]:
        return (*self.inner.rewrites, KEPT)

    def build(
        self, config: Mapping[str, Any], architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]
    ) -> Skeleton:
        if architecture.task not in DECODER_TASKS:
            raise Unsupported("only a decoder of one graph has logits of a last token")
        skeleton = self.inner.build(config, architecture, shapes)
        keep_last(skeleton.model.graph)
        return skeleton


def keep_last(graph: ir.Graph) -> None:
    """Cut the head's input down to the tokens that are asked for.

    Raises:
        Unsupported: `logits` are not made of one product.
    """
    import onnx_ir as ir

    kept = constant(graph, KEPT, np.asarray(1))
    back = ir.node("Neg", [kept])
    start = ir.node("Reshape", [back.outputs[0], constant(graph, f"{KEPT}.shape", np.asarray([1]))])
    for node, word in ((back, "back"), (start, "start")):
        node.name = node.outputs[0].name = f"{KEPT}.{word}"
    _cut(graph, start.outputs[0], [back, start], f"{KEPT}.tokens")
    graph.inputs.append(kept)


def twin_of(skeleton: Skeleton) -> Skeleton:
    """The same graph with logits of the last token alone; `skeleton` stays as it is.

    Raises:
        Unsupported: `logits` are not made of one product.
    """
    model = skeleton.model.clone()
    _cut(model.graph, constant(model.graph, f"{LAST}.start", np.asarray([-1])), [], LAST)
    return replace(skeleton, model=model)


def _cut(graph: ir.Graph, start: ir.Value, before: list[ir.Node], name: str) -> None:
    """Put `before` and a Slice from `start` on, along the tokens, in front of the head."""
    import onnx_ir as ir

    logits = next(value for value in graph.outputs if value.name == "logits")
    head = logits.producer()
    while head is not None and head.op_type in _BEHIND:
        head = head.inputs[0].producer() if head.inputs[0] is not None else None
    hidden = head.inputs[0] if head is not None and head.op_type == "MatMul" else None
    if head is None or hidden is None:
        raise Unsupported(
            "the logits of this graph are not a product by one matrix, so those of the last token can't be had alone",
            hint="build with `logits: all`",
        )
    ends = constant(graph, f"{name}.end", np.asarray([np.iinfo(np.int64).max]))
    cut = ir.node("Slice", [hidden, start, ends, constant(graph, f"{name}.axis", np.asarray([1]))])
    cut.name = cut.outputs[0].name = name
    width = hidden.shape[2] if hidden.shape is not None else None
    cut.outputs[0].type, cut.outputs[0].shape = hidden.type, ir.Shape([BATCH, None, width])
    graph.insert_before(head, [*before, cut])
    head.replace_input_with(0, cut.outputs[0])
    logits.shape = ir.Shape([BATCH, 1, logits.shape[2] if logits.shape is not None else None])
