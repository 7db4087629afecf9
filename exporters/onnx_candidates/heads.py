"""What a task makes of an encoder's last hidden state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tightship.exporters.onnx_candidates.graph_builder import FLOAT
from tightship.exporters.onnx_candidates.network import Network
from tightship.exporters.onnx_candidates.skeleton import BATCH, SEQ2SEQ, SEQUENCE

if TYPE_CHECKING:
    import onnx_ir as ir


def heads(net: Network, x: ir.Value, mask: ir.Value) -> None:
    """Outputs of the architecture's task from x (batch, sequence, hidden)."""
    task = net.architecture.task
    if task == "fill-mask":
        logits = net.linear(_transformed(net, x), None, "output", tied="token_embd")
        net.output("logits", logits, (BATCH, SEQUENCE, net.vocabulary))
    if task in ("fill-mask", "feature-extraction", SEQ2SEQ):
        net.output("last_hidden_state", x, (BATCH, SEQUENCE, net.width))
    elif task == "text-classification":
        net.output("logits", net.linear(_pooled(net, x, mask), None, "cls"), (BATCH, net.rows(None, "cls")))
    elif task == "token-classification":
        net.output("logits", net.linear(_transformed(net, x), None, "cls"), (BATCH, SEQUENCE, net.rows(None, "cls")))
    elif task == "question-answering":
        both = net.linear(_transformed(net, x), None, "cls")
        pair = net.ops("Split", both, outputs=2, axis=-1, num_outputs=2)
        for name, logits in zip(("start_logits", "end_logits"), pair, strict=True):
            net.output(name, net.op("Squeeze", logits, net.integers(-1)), (BATCH, SEQUENCE))


def _transformed(net: Network, x: ir.Value) -> ir.Value:
    """The dense layer, activation and norm in front of a head, where the model has them."""
    if not net.has(None, "output_transform"):
        return x
    turned = net.activation(net.linear(x, None, "output_transform"))
    apart = net.has(None, "output_transform_norm")  # where output_norm is that of the blocks
    return net.norm(turned, None, "output_transform_norm" if apart else "output_norm")


def _pooled(net: Network, x: ir.Value, mask: ir.Value) -> ir.Value:
    """The first position, or the mean of those unmasked, through the pooler or the layers before the head."""
    if net.option("classifier_pooling") == "mean":
        weights = net.op("Unsqueeze", net.op("Cast", mask, to=FLOAT), net.integers(-1))
        total = net.op("ReduceSum", net.op("Mul", x, weights), net.integers(1), keepdims=0)
        first = net.op("Div", total, net.op("ReduceSum", weights, net.integers(1), keepdims=0))
    else:
        first = net.op("Gather", x, net.integer(0), axis=1)
    first = net.shaped(first, (BATCH, net.width))
    if net.has(None, "pooler"):
        return net.op(net.family.pooled, net.linear(first, None, "pooler"))
    return _transformed(net, first)
