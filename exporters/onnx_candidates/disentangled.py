"""DeBERTa's attention (arXiv 2006.03654, eq. 4; log buckets of version 2): content to content, content to position and
position to content, positions projected like content."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from tightship.errors import Unsupported
from tightship.exporters.onnx_candidates.attention import Sight
from tightship.exporters.onnx_candidates.network import Network
from tightship.exporters.onnx_candidates.positions import by_distance
from tightship.exporters.onnx_candidates.skeleton import BATCH, SEQUENCE

if TYPE_CHECKING:
    import onnx_ir as ir


def distance_rows(net: Network, ids: ir.Value) -> ir.Value:
    """(sequence, sequence) int64: the row of the position table for query minus key."""
    span = net.rows(None, "rel_embd") // 2
    longest = int(net.option("max_relative_positions", -1))
    longest = longest if longest > 0 else int(net.option("max_position_embeddings"))
    distances = np.arange(-longest, longest + 1)
    rows = np.clip(_buckets(distances, int(net.option("position_buckets", -1)), longest) + span, 0, 2 * span - 1)
    places = net.range(net.integer(0), net.length(ids))
    return by_distance(net, places, places, "rel_embd.rows", rows[::-1].astype(np.int64))


def _buckets(distances: np.ndarray, count: int, longest: int) -> np.ndarray:
    """transformers' own buckets, asked of it: the logarithm's rounding decides at the edges."""
    if count <= 0:
        return distances
    import torch
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    return np.asarray(make_log_bucket_position(torch.from_numpy(distances), count, longest).long().numpy())


def disentangled(net: Network, block: int, x: ir.Value, sight: Sight) -> ir.Value:
    """Scores of three kinds under one softmax; the scale counts the kinds."""
    kinds = set(net.option("pos_att_type") or ())
    if not kinds <= {"c2p", "p2c"} or sight.rows is None:
        raise Unsupported(f"pos_att_type {sorted(kinds)} is not written down here")
    heads, size = int(net.hyper["heads"]), int(net.hyper["head_dim"])
    factor = 1 / math.sqrt(size * (1 + len(kinds)))
    query, key, value = (net.heads_first(net.linear(x, block, f"attn_{p}"), heads) for p in "qkv")
    scores = net.op("MatMul", query, net.op("Transpose", key, perm=[0, 1, 3, 2]))
    if "c2p" in kinds:
        scores = net.op("Add", scores, _to_positions(net, query, _placed(net, block, "attn_k", heads), sight.rows))
    if "p2c" in kinds:
        turned = _to_positions(net, key, _placed(net, block, "attn_q", heads), sight.rows, mirrored=True)
        scores = net.op("Add", scores, net.op("Transpose", turned, perm=[0, 1, 3, 2]))
    shares = net.op("Softmax", net.op("Add", net.scaled(scores, factor), sight.mask), axis=-1)
    y = net.heads_last(net.op("MatMul", shares, value))
    return net.linear(net.shaped(y, (BATCH, SEQUENCE, heads * size)), block, "attn_output")


def _placed(net: Network, block: int, role: str, heads: int) -> ir.Value:
    """(1, heads, size, rows) projected position table."""
    table = net.op("Unsqueeze", net.parameter(None, "rel_embd"), net.integers(0))
    if net.has(None, "rel_embd_norm"):
        table = net.norm(table, None, "rel_embd_norm")
    rows, width = net.rows(None, "rel_embd"), net.width
    return net.op(
        "Transpose",
        net.heads_first(net.linear(net.shaped(table, (1, rows, width)), block, role), heads),
        perm=[0, 1, 3, 2],
    )


def _to_positions(net: Network, x: ir.Value, placed: ir.Value, rows: ir.Value, *, mirrored: bool = False) -> ir.Value:
    """(batch, heads, sequence, sequence): x against the position of each pair's distance; `mirrored` for x the key.

    With x the key, distances are still query minus key, so the table of rows is read the other way round.
    """
    every = net.op("MatMul", x, placed)
    chosen = net.op("Transpose", rows, perm=[1, 0]) if mirrored else rows
    shape = net.op("Concat", net.op("Shape", every, start=0, end=2), net.op("Shape", chosen), axis=0)
    return net.op("GatherElements", every, net.op("Expand", chosen, shape), axis=3)
