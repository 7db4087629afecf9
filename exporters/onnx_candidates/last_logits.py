"""Another source's decoder that gives the logits of the last token alone, unless it is asked for more.

| pattern                                            | check                    | rewritten to                    |
|----------------------------------------------------|--------------------------|---------------------------------|
| MatMul by the head, and what is made of that alone | its left side is a value | Slice of the last tokens before |

`num_logits_to_keep` is an int64 scalar, a graph input with a default (an initializer of the same name), so that clients
that do not know it need not feed it: 1, the last token; 0, all of them, as transformers counts.
onnxruntime-genai looks for an axis of 1 in `logits`, and reads one row of a prompt then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tightship.architecture import Architecture
from tightship.errors import Unsupported
from tightship.exporters.onnx_candidates.graph_edits import constant
from tightship.exporters.onnx_candidates.skeleton import BATCH, DECODER_TASKS, KEPT, Candidate, Skeleton

if TYPE_CHECKING:
    import onnx_ir as ir

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

    logits = next(value for value in graph.outputs if value.name == "logits")
    head = logits.producer()
    while head is not None and head.op_type in _BEHIND:
        head = head.inputs[0].producer() if head.inputs[0] is not None else None
    hidden = head.inputs[0] if head is not None and head.op_type == "MatMul" else None
    if head is None or hidden is None:
        raise Unsupported("the logits of this graph are not a product by one matrix")
    kept = constant(graph, KEPT, np.asarray(1))
    graph.inputs.append(kept)
    ends = constant(graph, f"{KEPT}.end", np.asarray([np.iinfo(np.int64).max]))
    tokens, shape = (
        constant(graph, f"{KEPT}.axis", np.asarray([1])),
        constant(graph, f"{KEPT}.shape", np.asarray([1])),
    )
    back = ir.node("Neg", [kept])
    start = ir.node("Reshape", [back.outputs[0], shape])
    cut = ir.node("Slice", [hidden, start.outputs[0], ends, tokens])
    for node, word in ((back, "back"), (start, "start"), (cut, "tokens")):
        node.name = node.outputs[0].name = f"{KEPT}.{word}"
    width = hidden.shape[2] if hidden.shape is not None else None
    cut.outputs[0].type, cut.outputs[0].shape = hidden.type, ir.Shape([BATCH, None, width])
    graph.insert_before(head, [back, start, cut])
    head.replace_input_with(0, cut.outputs[0])
    logits.shape = ir.Shape([BATCH, 1, logits.shape[2] if logits.shape is not None else None])
