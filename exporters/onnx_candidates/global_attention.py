"""Longformer's attention (arXiv 2004.05150): a window, and tokens that everyone sees, with projections of their own.

Computed densely, (sequence, sequence) scores a head: right for every length and window, without the paper's saving of
memory. `global_attention_mask` is a graph input, 1 at global tokens; classifiers of texts take their first token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tightship.exporters.onnx_candidates.attention import Parts, Sight, plain
from tightship.exporters.onnx_candidates.graph_builder import BOOL
from tightship.exporters.onnx_candidates.network import Network
from tightship.exporters.onnx_candidates.skeleton import BATCH, SEQUENCE

if TYPE_CHECKING:
    import onnx_ir as ir


def global_tokens(net: Network) -> ir.Value:
    """(batch, sequence) bool."""
    if net.architecture.task != "text-classification":
        return net.op("Cast", net.input("global_attention_mask", (BATCH, SEQUENCE)), to=BOOL)
    ids = net.input("input_ids", (BATCH, SEQUENCE))
    first = net.op("Equal", net.range(net.integer(0), net.length(ids)), net.integer(0))
    return net.op("Expand", first, net.op("Shape", ids))


def global_attention(net: Network, block: int, x: ir.Value, sight: Sight) -> ir.Value:
    """Local projections for everyone; global tokens get what the global projections give instead."""
    size = int(net.hyper["head_dim"])
    count = int(net.hyper["heads"])
    seen = []
    for end, mask in (("", sight.mask), ("_global", sight.everything)):
        query, key, value = (net.linear(x, block, f"attn_{part}{end}") for part in "qkv")
        seen.append(plain(net, Parts(query, key, value, count, count, size**-0.5), mask, ()))
    local, wide = seen
    chosen = net.op("Unsqueeze", sight.chosen, net.integers(2))
    y = net.shaped(net.op("Where", chosen, wide, local), (BATCH, SEQUENCE, count * size))
    return net.linear(y, block, "attn_output")
