"""Bidirectional encoders, and the heads on top of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tightship.exporters.onnx_candidates.attention import Sight, attention
from tightship.exporters.onnx_candidates.feed_forward import feed_forward
from tightship.exporters.onnx_candidates.network import Network
from tightship.exporters.onnx_candidates.positions import hidden_where_not, kept_keys
from tightship.exporters.onnx_candidates.skeleton import BATCH, SEQUENCE

if TYPE_CHECKING:
    import onnx_ir as ir


def encoder(net: Network) -> None:
    """The whole graph: token ids in, what the task wants out."""
    _heads(net, _hidden(net), net.architecture.task)


def _hidden(net: Network) -> ir.Value:
    """The last hidden state."""
    ids = net.input("input_ids", (BATCH, SEQUENCE))
    mask = net.input("attention_mask", (BATCH, SEQUENCE))
    length = net.op("Shape", ids, start=1, end=2)
    positions = net.range(net.integer(0), net.op("Squeeze", length))
    x = net.op("Add", net.lookup("token_embd", ids), net.lookup("position_embd", positions))
    if net.has(None, "token_types"):
        x = net.op("Add", x, net.lookup("token_types", net.input("token_type_ids", (BATCH, SEQUENCE))))
    x = net.norm(x, None, "token_embd_norm")
    row = hidden_where_not(net, kept_keys(net, mask))
    square = net.op("Expand", row, net.op("Concat", net.integers(1, 1), length, net.integers(1), axis=0))
    for block in range(int(net.hyper["layers"])):
        attended = attention(net, block, x, Sight(square))
        x = net.norm(net.op("Add", x, attended), block, "attn_output_norm")
        x = net.norm(net.op("Add", x, feed_forward(net, block, x)), block, "layer_output_norm")
    return x


def _heads(net: Network, x: ir.Value, task: str) -> None:
    """What a task makes of the last hidden state."""
    if task == "fill-mask":
        turned = net.activation(net.linear(x, None, "output_transform"))
        logits = net.linear(net.norm(turned, None, "output_norm"), None, "output", tied="token_embd")
        net.output("logits", logits, (BATCH, SEQUENCE, net.vocabulary))
    if task in ("fill-mask", "feature-extraction"):
        net.output("last_hidden_state", x, (BATCH, SEQUENCE, net.width))
    elif task == "text-classification":
        first = net.shaped(net.op("Gather", x, net.integer(0), axis=1), (BATCH, net.width))
        pooled = net.op(net.family.pooled, net.linear(first, None, "pooler"))
        net.output("logits", net.linear(pooled, None, "cls"), (BATCH, net.rows(None, "cls")))
    elif task == "token-classification":
        net.output("logits", net.linear(x, None, "cls"), (BATCH, SEQUENCE, net.rows(None, "cls")))
    elif task == "question-answering":
        pair = net.ops("Split", net.linear(x, None, "cls"), outputs=2, axis=-1, num_outputs=2)
        for name, logits in zip(("start_logits", "end_logits"), pair, strict=True):
            net.output(name, net.op("Squeeze", logits, net.integers(-1)), (BATCH, SEQUENCE))
