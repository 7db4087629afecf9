"""Attention of one block, written with the Attention operator of opset 23."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tightship.exporters.onnx_candidates.network import Network
from tightship.exporters.onnx_candidates.positions import Turn
from tightship.exporters.onnx_candidates.skeleton import BATCH, SEQUENCE

if TYPE_CHECKING:
    import onnx_ir as ir

Projected = tuple["ir.Value", int]  # (batch, sequence, width), width


@dataclass(frozen=True)
class Sight:
    """What queries see and where they stand.

    Attributes:
        mask: float, added to the scores; None where everything is seen.
        turn: (cos, sin, rotated width or 0), or None without rotation.
        cache: what names of the cache have behind the block's number; None where no past comes in.
        chosen: (batch, sequence) bool, global tokens, or None.
        everything: the mask of global tokens.
        rows: (sequence, sequence) rows of a table of distances, or None.
        kept: (batch, sequence, 1) float, 1 for tokens that are no padding, for blocks with a recurrence.
    """

    mask: ir.Value | None
    turn: Turn | None = None
    cache: str | None = None
    chosen: ir.Value | None = None
    everything: ir.Value | None = None
    rows: ir.Value | None = None
    kept: ir.Value | None = None


@dataclass(frozen=True)
class Parts:
    """Queries, keys and values (batch, sequence, heads * size), rotated, and how many heads they are."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    heads: int
    kv_heads: int
    scale: float


def attention(net: Network, block: int, x: ir.Value, sight: Sight) -> ir.Value:
    """Projections, optional norms of queries and keys, rotation, the Attention operator, output projection."""
    size = int(net.hyper["head_dim"])
    query, key, value = projections(net, block, x, size)
    heads, kv_heads = query[1] // size, key[1] // size
    q = _placed(net, block, query[0], sight, ("attn_q_norm", heads))
    k = _placed(net, block, key[0], sight, ("attn_k_norm", kv_heads))
    parts = Parts(q, k, clipped(net, value[0]), heads, kv_heads, score_scale(net, block, size))
    cache = sight.cache
    past = () if cache is None else net.past(block, (kv_heads, size), (kv_heads, size), cache=cache)
    sinks = net.has(block, "attn_sinks")
    y = with_sinks(net, block, parts, sight.mask, past) if sinks else plain(net, parts, sight.mask, past)
    return net.linear(net.shaped(y, (BATCH, SEQUENCE, heads * size)), block, "attn_output")


def plain(net: Network, parts: Parts, mask: ir.Value | None, past: Sequence[ir.Value]) -> ir.Value:
    """The Attention operator, soft cap and cache included."""
    attributes: dict[str, Any] = {"q_num_heads": parts.heads, "kv_num_heads": parts.kv_heads, "scale": parts.scale}
    if net.option("attn_logit_softcapping"):
        attributes["softcap"] = float(net.option("attn_logit_softcapping"))
    inputs = (parts.query, parts.key, parts.value, mask, *past)
    y, *present = net.ops("Attention", *inputs, outputs=1 + len(past), **attributes)
    if past:
        net.keep(past, present)
    return y


def with_sinks(net: Network, block: int, parts: Parts, mask: ir.Value | None, past: Sequence[ir.Value]) -> ir.Value:
    """Attention to one key more, whose score is a parameter of the head and whose value is zero (gpt-oss)."""
    query = net.heads_first(parts.query, parts.heads)
    new = [net.heads_first(y, parts.kv_heads) for y in (parts.key, parts.value)]
    grown = [net.op("Concat", old, y, axis=2) for old, y in zip(past, new, strict=True)]
    net.keep(past, grown)
    one_more = net.integers(0, 0, 0, 0, 0, 0, 1, 0)
    key, value = (net.op("Pad", y, one_more, net.number(0.0)) for y in grown)
    wide = net.op("Expand", mask, net.integers(1, parts.heads, 1, 1))
    sinks = net.op("Reshape", net.parameter(block, "attn_sinks"), net.integers(1, parts.heads, 1, 1))
    rows = net.op("Concat", net.op("Shape", wide, start=0, end=3), net.integers(1), axis=0)
    seen = net.op("Concat", wide, net.op("Expand", sinks, rows), axis=3)
    return net.heads_last(net.op("Attention", query, key, value, seen, scale=parts.scale))


def score_scale(net: Network, block: int, size: int) -> float:
    """The factor on scores."""
    word = net.family.attention_scale
    if word == "none" or not net.answer(net.family.scaled):
        factor = 1.0
    elif word is not None:
        factor = float(net.option(word))
    else:
        factor = float(net.option("query_pre_attn_scalar", size) ** -0.5)
    return factor / (block + 1) if net.answer(net.family.by_layer) else factor


def projections(net: Network, block: int, x: ir.Value, size: int) -> list[Projected]:
    """(value, width) of queries, keys and values."""
    if not net.has(block, "attn_qkv"):
        roles = [f"attn_{letter}" for letter in "qkv"]
        return [(net.linear(x, block, role), net.rows(block, role)) for role in roles]
    kv = int(net.hyper_of(block)["kv_heads"]) * size
    whole = net.rows(block, "attn_qkv")
    widths = (whole - 2 * kv, kv, kv)
    if net.family.fused == "groups":
        return _ungrouped(net, net.linear(x, block, "attn_qkv"), widths, size)
    if net.family.fused == "quarters":
        return _unquartered(net, net.linear(x, block, "attn_qkv"), kv)
    starts = (0, widths[0], widths[0] + kv)
    return [
        (net.linear(x, block, "attn_qkv", rows=(start, start + width)), width)
        for start, width in zip(starts, widths, strict=True)
    ]


def _ungrouped(net: Network, fused: ir.Value, widths: tuple[int, int, int], size: int) -> list[Projected]:
    """Apart what lies as (key heads, query heads of the group + key + value, size)."""
    queries, groups = widths[0] // size, widths[1] // size
    apart = net.op("Reshape", fused, net.integers(0, 0, groups, queries // groups + 2, size))
    parts = net.ops("Split", apart, net.integers(queries // groups, 1, 1), outputs=3, axis=3)
    joined = [net.op("Reshape", part, net.integers(0, 0, -1)) for part in parts]
    return [(net.shaped(y, (BATCH, SEQUENCE, width)), width) for y, width in zip(joined, widths, strict=True)]


def _unquartered(net: Network, fused: ir.Value, width: int) -> list[Projected]:
    """Apart what lies as (4, query + value + key, a quarter of the heads): CodeGen's four processors."""
    apart = net.op("Reshape", fused, net.integers(0, 0, 4, 3, width // 4))
    q, v, k = net.ops("Split", apart, outputs=3, axis=3, num_outputs=3)
    return [
        (net.shaped(net.op("Reshape", y, net.integers(0, 0, -1)), (BATCH, SEQUENCE, width)), width) for y in (q, k, v)
    ]


def clipped(net: Network, x: ir.Value) -> ir.Value:
    """Queries, keys or values within the config's bound, if it has one."""
    bound = net.hyper.get("clamp_kqv") or net.option("clip_qkv")
    return net.clipped(x, -float(bound), float(bound)) if bound else x


def _placed(net: Network, block: int, x: ir.Value, sight: Sight, norm: tuple[str, int]) -> ir.Value:
    """Queries or keys normed, clipped and rotated, the norm before the rotation or behind it."""
    role, heads = norm
    if net.family.late_head_norm:
        return _head_norm(net, _turned(net, clipped(net, x), sight, heads), block, role, heads)
    return _turned(net, clipped(net, _head_norm(net, x, block, role, heads)), sight, heads)


def _turned(net: Network, x: ir.Value, sight: Sight, heads: int) -> ir.Value:
    if sight.turn is None:
        return x
    cos, sin, width = sight.turn
    return net.op(
        "RotaryEmbedding",
        x,
        cos,
        sin,
        num_heads=heads,
        rotary_embedding_dim=width,
        interleaved=int(net.family.interleaved),
    )


def _head_norm(net: Network, x: ir.Value, block: int, role: str, heads: int) -> ir.Value:
    """The norm of queries or keys: over each head, or over all of them where the weight is as wide."""
    if not net.has(block, role):
        return x
    size = int(net.hyper["head_dim"])
    if heads > 1 and net.rows(block, role) == heads * size:
        return net.norm(x, block, role)
    apart = net.op("Reshape", x, net.integers(0, 0, heads, -1))
    whole = net.op("Reshape", net.norm(apart, block, role), net.integers(0, 0, -1))
    return net.shaped(whole, (BATCH, SEQUENCE, heads * size))
