"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values of all heads come from one
narrow vector a token, and only a part of each head is rotated, with keys that all heads share.

The cache holds keys and values of the heads, not the narrow vector: a step then multiplies no past token again. Where
they differ in width, the narrower are filled up with zeros, so that one head size serves every client and operator.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tightship.exporters.onnx_candidates.attention import Parts, Sight, plain
from tightship.exporters.onnx_candidates.network import Network
from tightship.exporters.onnx_candidates.skeleton import BATCH, SEQUENCE

if TYPE_CHECKING:
    import onnx_ir as ir

_EPSILON = 1e-6  # of the norms of narrow vectors, whatever the config says of the others


def latent_attention(net: Network, block: int, x: ir.Value, sight: Sight) -> ir.Value:
    """Queries directly or through a narrow vector, keys and values through theirs, the Attention operator, output."""
    heads, still, turned, width = (int(net.hyper[key]) for key in ("heads", "nope_dim", "rope_dim", "v_dim"))
    rank, size = int(net.hyper["kv_rank"]), max(still + turned, width)
    query, moving = _apart(net, _queries(net, block, x), heads, (still, turned))
    query = net.op("Concat", query, _rotated(net, moving, sight, heads), axis=3)

    narrow, shared = _apart(net, net.linear(x, block, "attn_kv_a_mqa"), 1, (rank, turned))
    narrow = net.shaped(net.op("Squeeze", narrow, net.integers(2)), (BATCH, SEQUENCE, rank))
    narrow = net.norm(narrow, block, "attn_kv_a_norm", epsilon=_EPSILON)
    key, value = _apart(net, net.linear(narrow, block, "attn_kv_b"), heads, (still, width))
    shared = net.op("Expand", _rotated(net, shared, sight, 1), net.integers(1, 1, heads, 1))
    key = net.op("Concat", key, shared, axis=3)

    sizes = ((query, still + turned), (key, still + turned), (value, width))
    q, k, v = (_joined(net, y, heads, found, size) for y, found in sizes)
    parts = Parts(q, k, v, heads, heads, latent_scale(net, still + turned))
    y = plain(net, parts, sight.mask, net.past(block, (heads, size), (heads, size)))
    if size > width:
        kept = net.op("Slice", net.op("Reshape", y, net.integers(0, 0, heads, size)), *map(net.integers, (0, width, 3)))
        y = net.op("Reshape", kept, net.integers(0, 0, -1))
    return net.linear(net.shaped(y, (BATCH, SEQUENCE, heads * width)), block, "attn_output")


def latent_scale(net: Network, size: int) -> float:
    """The factor on scores: that of the head size, times the square of YaRN's temperature (arXiv 2309.00071, eq. 22),
    which `mscale_all_dim` moves here from the rotation, since half of a head is not rotated."""
    rope = net.resolved.rope_parameters
    moved, factor = rope.get("mscale_all_dim"), float(rope.get("factor") or 1)
    temperature = 0.1 * float(moved) * math.log(factor) + 1 if moved and factor > 1 else 1.0
    return float(size**-0.5 * temperature**2)


def _queries(net: Network, block: int, x: ir.Value) -> ir.Value:
    if not net.has(block, "attn_q_a"):
        return net.linear(x, block, "attn_q")
    narrow = net.norm(net.linear(x, block, "attn_q_a"), block, "attn_q_a_norm", epsilon=_EPSILON)
    return net.linear(narrow, block, "attn_q_b")


def _apart(net: Network, x: ir.Value, heads: int, widths: tuple[int, int]) -> tuple[ir.Value, ir.Value]:
    """(batch, sequence, heads * sum of widths) as two of (batch, sequence, heads, width)."""
    whole = net.op("Reshape", x, net.integers(0, 0, heads, sum(widths)))
    first, second = net.ops("Split", whole, net.integers(*widths), outputs=2, axis=3)
    return first, second


def _rotated(net: Network, x: ir.Value, sight: Sight, heads: int) -> ir.Value:
    """(batch, sequence, heads, width), every second feature with the one before it."""
    assert sight.turn is not None
    cos, sin, _ = sight.turn
    flat = net.op("Reshape", x, net.integers(0, 0, -1))
    turned = net.op("RotaryEmbedding", flat, cos, sin, num_heads=heads, interleaved=int(net.family.interleaved))
    return net.op("Reshape", turned, net.integers(0, 0, heads, -1))


def _joined(net: Network, x: ir.Value, heads: int, found: int, size: int) -> ir.Value:
    """(batch, sequence, heads * size) of heads of `found` features, zeros behind them."""
    if found < size:
        x = net.op("Pad", x, net.integers(0, 0, 0, 0, 0, 0, 0, size - found), net.number(0.0))
    return net.shaped(net.op("Reshape", x, net.integers(0, 0, -1)), (BATCH, SEQUENCE, heads * size))
