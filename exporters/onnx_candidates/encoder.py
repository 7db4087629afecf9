"""Bidirectional encoders: from BERT to ModernBERT and Longformer, by `families.FAMILIES` and the roles of tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tightship.exporters.onnx_candidates.attention import Sight, attention
from tightship.exporters.onnx_candidates.disentangled import disentangled, distance_rows
from tightship.exporters.onnx_candidates.embeddings import embedded, has_places
from tightship.exporters.onnx_candidates.feed_forward import feed_forward
from tightship.exporters.onnx_candidates.global_attention import global_attention, global_tokens
from tightship.exporters.onnx_candidates.graph_builder import INT64
from tightship.exporters.onnx_candidates.heads import heads
from tightship.exporters.onnx_candidates.network import Network
from tightship.exporters.onnx_candidates.positions import (
    bucket_biases,
    has_buckets,
    hidden_where_not,
    kept_keys,
    near,
    rotation,
)
from tightship.exporters.onnx_candidates.skeleton import BATCH, SEQUENCE

if TYPE_CHECKING:
    import onnx_ir as ir


def encoder(net: Network) -> None:
    """The whole graph: token ids in, what the task wants out."""
    ids = net.input("input_ids", (BATCH, SEQUENCE))
    mask = net.input("attention_mask", (BATCH, SEQUENCE))
    if net.family.encoder:
        x = _embedded(net, ids)
    else:
        x = embedded(net, ids, lambda: _positions(net, ids), 0 if net.family.counted_positions else None)
    layers = int(net.option("num_hidden_layers", net.hyper["layers"]))
    share = layers // int(net.hyper["layers"])  # ALBERT: so many layers are one block
    sights = _sights(net, ids, mask, layers)
    for layer, sight in enumerate(sights):
        x = layer_of(net, layer // share, x, sight)
    if net.has(0, "ffn_norm"):  # norms before each half leave the last sum bare
        x = net.norm(x, None, "output_norm")
    heads(net, x, mask)


def layer_of(net: Network, block: int, x: ir.Value, sight: Sight) -> ir.Value:
    """Attention and MLP, norms before them where the block has such, else behind the sums."""
    before = net.normed(x, block, "attn_norm")
    if net.has(block, "attn_q_global"):
        attended = global_attention(net, block, before, sight)
    elif net.has(None, "rel_embd"):
        attended = disentangled(net, block, before, sight)
    else:
        attended = attention(net, block, before, sight)
    x = net.normed(net.op("Add", x, attended), block, "attn_output_norm")
    fed = feed_forward(net, block, net.normed(x, block, "ffn_norm"))
    return net.normed(net.op("Add", x, fed), block, "layer_output_norm")


def _embedded(net: Network, ids: ir.Value) -> ir.Value:
    """Tokens, positions and types, their norm, and the step to the width of the blocks."""
    x = net.lookup("token_embd", ids)
    if net.has(None, "position_embd"):
        x = net.op("Add", x, net.lookup("position_embd", _positions(net, ids)))
    if net.has(None, "token_types"):
        x = net.op("Add", x, net.lookup("token_types", net.input("token_type_ids", (BATCH, SEQUENCE))))
    x = net.norm(x, None, "token_embd_norm")
    return net.linear(x, None, "token_embd_proj") if net.has(None, "token_embd_proj") else x


def _positions(net: Network, ids: ir.Value) -> ir.Value:
    """0, 1, 2, ...; or counted over tokens that are no padding, from behind the padding's row (RoBERTa)."""
    if not net.family.counted_positions:
        return net.range(net.integer(0), net.length(ids))
    padding = net.integer(int(net.option("pad_token_id")))
    real = net.op("Cast", net.op("Not", net.op("Equal", ids, padding)), to=INT64)
    counted = net.op("Mul", net.op("CumSum", real, net.integer(1)), real)
    return net.op("Add", counted, padding)


def _sights(net: Network, ids: ir.Value, mask: ir.Value, layers: int) -> list[Sight]:
    """What each layer sees: everything that is no padding, within its window if it has one."""
    kept = kept_keys(net, mask)
    length = net.op("Shape", ids, start=1, end=2)
    square = net.op("Concat", net.integers(1, 1), length, net.integers(1), axis=0)
    if net.has(0, "attn_q_global"):
        chosen = global_tokens(net)
        windows = [int(window) for window in net.option("attention_window")]
        masks = {
            w: hidden_where_not(net, global_tokens_or_near(net, ids, kept, chosen, w)) for w in dict.fromkeys(windows)
        }
        everything = net.op("Expand", hidden_where_not(net, kept), square)
        return [Sight(masks[w], chosen=chosen, everything=everything) for w in windows]
    whole = net.op("Expand", hidden_where_not(net, kept), square)
    if has_buckets(net):
        places = net.range(net.integer(0), net.length(ids))
        return [Sight(net.op("Add", whole, bias)) for bias in bucket_biases(net, places, places, layers)]
    if net.has(None, "rel_embd"):
        return [Sight(whole, rows=distance_rows(net, ids))] * layers
    if has_places(net):
        return [Sight(whole)] * layers
    return _rotated(net, ids, kept, whole, layers)


def global_tokens_or_near(net: Network, ids: ir.Value, kept: ir.Value, chosen: ir.Value, window: int) -> ir.Value:
    """(batch, 1, sequence, sequence) bool: keys within half a window, and global ones everywhere (Longformer)."""
    wide = net.op("Unsqueeze", chosen, net.integers(1, 2))
    return net.op("And", net.op("Or", near(net, ids, window // 2), wide), kept)


def _rotated(net: Network, ids: ir.Value, kept: ir.Value, whole: ir.Value, layers: int) -> list[Sight]:
    positions = net.op("Unsqueeze", net.range(net.integer(0), net.length(ids)), net.integers(0))
    positions = net.op("Expand", positions, net.op("Shape", ids))
    types = list(net.option("layer_types") or ["full_attention"] * layers)
    found = {}
    for kind in dict.fromkeys(types):
        mask = whole
        if kind == "sliding_attention":
            mask = hidden_where_not(net, net.op("And", near(net, ids, int(net.option("sliding_window"))), kept))
        found[kind] = Sight(mask, rotation(net, positions, kind))
    return [found[kind] for kind in types]
