"""Sequence to sequence (arXiv 1706.03762): the decoder's graph, which serves prompt and single steps alike.

The decoder projects the cross-attention's keys and values of those source positions that its cache does not hold yet:
all of them in the first call, none in later ones, although clients give `encoder_hidden_states` every time. So one
graph without branches takes the place of the usual two.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tightship.exporters.onnx_candidates.attention import Sight, attention, score_scale
from tightship.exporters.onnx_candidates.embeddings import embedded
from tightship.exporters.onnx_candidates.feed_forward import feed_forward
from tightship.exporters.onnx_candidates.graph_builder import FLOAT
from tightship.exporters.onnx_candidates.network import Network
from tightship.exporters.onnx_candidates.positions import bucket_biases, has_buckets, hidden_where_not, kept_keys
from tightship.exporters.onnx_candidates.skeleton import BATCH, PAST_SOURCE, SEQUENCE, SOURCE

if TYPE_CHECKING:
    import onnx_ir as ir

_OWN, _CROSS = ".decoder", ".encoder"  # in the names of the caches
_TOKENS_AXIS = 2


@dataclass(frozen=True)
class Source:
    """What the encoder gave.

    Attributes:
        fresh: (batch, source positions that are not in the cache, hidden).
        mask: float, added to the scores of all source positions.
    """

    fresh: ir.Value
    mask: ir.Value


def target_decoder(net: Network) -> None:
    """The decoder's graph: target ids, the encoder's states and the past in, logits and the grown caches out."""
    blocks = range(int(net.hyper["layers"]))
    ids = net.input("input_ids", (BATCH, SEQUENCE))
    for block, cache in itertools.product(blocks, (_OWN, _CROSS)):  # optimum goes by the order of inputs
        _past(net, block, cache)
    source = _source(net, ids)
    held = net.length(_past(net, 0, _OWN)[0], _TOKENS_AXIS)
    total = net.op("Add", held, net.length(ids))
    places = net.range(held, total)
    sights = _own_sights(net, places, net.range(net.integer(0), total))
    x = embedded(net, ids, lambda: places)
    for block in blocks:
        x = _layer(net, block, x, sights[block], source)
    x = net.normed(x, None, "output_norm")
    if net.answer(net.family.narrowed):
        x = net.scaled(x, net.width**-0.5)
    logits = net.linear(x, None, "output", tied="token_embd")
    net.output("logits", logits, (BATCH, SEQUENCE, net.vocabulary))
    net.present()


def _source(net: Network, ids: ir.Value) -> Source:
    mask = net.input("encoder_attention_mask", (BATCH, SOURCE))
    states = net.input("encoder_hidden_states", (BATCH, SOURCE, net.width), FLOAT)
    held = net.op("Shape", _past(net, 0, _CROSS)[0], start=_TOKENS_AXIS, end=_TOKENS_AXIS + 1)
    end = net.integers(np.iinfo(np.int64).max)
    fresh = net.op("Slice", states, held, end, net.integers(1))
    rows = net.op("Concat", net.integers(1, 1), net.op("Shape", ids, start=1, end=2), net.integers(1), axis=0)
    seen = net.op("Expand", hidden_where_not(net, kept_keys(net, mask)), rows)
    return Source(net.shaped(fresh, (BATCH, None, net.width)), seen)


def _own_sights(net: Network, queries: ir.Value, keys: ir.Value) -> list[Sight]:
    """What the decoder's blocks see of its own text: all up to now. Rows start together, so nothing is padded."""
    row, column = net.op("Unsqueeze", keys, net.integers(0)), net.op("Unsqueeze", queries, net.integers(1))
    mask = net.op("Unsqueeze", hidden_where_not(net, net.op("LessOrEqual", row, column)), net.integers(0, 1))
    layers = int(net.hyper["layers"])
    if not has_buckets(net):
        return [Sight(mask, cache=_OWN)] * layers
    biases = bucket_biases(net, queries, keys, layers, ahead=False)
    return [Sight(net.op("Add", mask, bias), cache=_OWN) for bias in biases]


def _layer(net: Network, block: int, x: ir.Value, sight: Sight, source: Source) -> ir.Value:
    """Own attention, cross-attention and MLP; norms before each where the block has such, else behind the sums."""
    own = attention(net, block, net.normed(x, block, "attn_norm"), sight)
    x = net.normed(net.op("Add", x, own), block, "attn_output_norm")
    cross = _cross_attention(net, block, net.normed(x, block, "cross_attn_norm"), source)
    x = net.normed(net.op("Add", x, cross), block, "cross_attn_output_norm")
    fed = feed_forward(net, block, net.normed(x, block, "ffn_norm"))
    return net.normed(net.op("Add", x, fed), block, "layer_output_norm")


def _cross_attention(net: Network, block: int, x: ir.Value, source: Source) -> ir.Value:
    """Queries of the target; keys and values of the source, fresh ones behind those of the cache.

    They are joined outside of the Attention operator, whose kernel in ONNX Runtime refuses a call without any new key.
    """
    size = int(net.hyper["head_dim"])
    heads = net.rows(block, "cross_attn_q") // size
    query = net.heads_first(net.linear(x, block, "cross_attn_q"), heads)
    fresh = (net.linear(source.fresh, block, f"cross_attn_{part}") for part in "kv")
    past = _past(net, block, _CROSS)
    grown = [
        net.op("Concat", old, net.heads_first(new, heads, size), axis=_TOKENS_AXIS)
        for old, new in zip(past, fresh, strict=True)
    ]
    net.keep(past, grown)
    y = net.heads_last(net.op("Attention", query, *grown, source.mask, scale=score_scale(net, block, size)))
    return net.linear(net.shaped(y, (BATCH, SEQUENCE, heads * size)), block, "cross_attn_output")


def _past(net: Network, block: int, cache: str) -> tuple[ir.Value, ir.Value]:
    """Keys and values of either cache as they come in."""
    size = int(net.hyper["head_dim"])
    shape = (net.rows(block, "attn_q") // size, size)
    if cache == _OWN:
        return net.past(block, shape, shape, cache=cache)
    return net.past(block, shape, shape, cache=cache, lengths=(PAST_SOURCE, SOURCE))
