"""Where tokens stand and whom they see: rotation, biases by distance, masks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from tightship.errors import Unsupported
from tightship.exporters.onnx_candidates.graph_builder import BFLOAT16, BOOL, FLOAT, LOWEST
from tightship.exporters.onnx_candidates.network import Network

if TYPE_CHECKING:
    import onnx_ir as ir

Turn = tuple["ir.Value", "ir.Value", int]
_FARTHEST = 128  # tokens; MPNet has no word for it
# The others change their frequencies with the prompt.
_FIXED_ROPES = ("default", "linear", "llama3", "yarn", "ntk_alpha")


def rotation(net: Network, positions: ir.Value, kind: str) -> Turn:
    """cos and sin (batch, sequence, pairs), and the rotated width where it is not the whole head (else 0)."""
    if net.family.rotary_width:
        return _plain_rotation(net, positions, int(net.option(net.family.rotary_width)))
    rotary = net.rotary
    prefix = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
    types = getattr(rotary, "rope_type", "default")
    rope = types[kind] if isinstance(types, dict) else types
    frequencies = _numpy(getattr(rotary, f"{prefix}inv_freq"))
    table = net.constant(f"rope.{kind}.inv_freq", frequencies)
    sized = net.family.sized_rotation and rope != "default"
    if rope == "longrope" and not sized:
        table = _by_length(net, positions, table, prefix, kind)
    elif rope not in (*_FIXED_ROPES, "longrope"):
        raise Unsupported(f"rope type {rope!r} changes its frequencies with the prompt")
    scaling = float(getattr(rotary, f"{prefix}attention_scaling", 1.0))
    angles = _angles(net, positions, table)
    cos, sin = (net.op(function, angles) for function in ("Cos", "Sin"))
    if sized:
        size = _size_by_length(net, positions)
        cos, sin = net.op("Mul", cos, size), net.op("Mul", sin, size)
    else:
        cos, sin = net.scaled(cos, scaling), net.scaled(sin, scaling)
    return cos, sin, _partial(net, 2 * len(frequencies))


def _size_by_length(net: Network, positions: ir.Value) -> ir.Value:
    """What sines are multiplied with, a scalar: one number within the original context, another beyond it."""
    rope = net.resolved.rope_parameters
    within, beyond = (net.number(float(rope[f"{word}_mscale"])) for word in ("short", "long"))
    return _beyond(net, positions, int(rope["original_max_position_embeddings"]), beyond, within)


def _plain_rotation(net: Network, positions: ir.Value, width: int) -> Turn:
    """RoPE as published (arXiv 2104.09864, eq. 15), base 10000."""
    table = net.constant("rope.inv_freq", (10000.0 ** (-np.arange(0, width, 2) / width)).astype(np.float32))
    angles = _angles(net, positions, table)
    return net.op("Cos", angles), net.op("Sin", angles), _partial(net, width)


def sinusoids(net: Network, positions: ir.Value) -> ir.Value:
    """(batch, sequence, hidden) sines, then cosines, of geometric frequencies from 1.

    They end at 1/10000 (`inclusive`: tensor2tensor's), or one step before it (`published`: arXiv 1706.03762, 3.5).
    """
    half = net.width // 2
    steps = half - 1 if net.family.sinusoidal == "inclusive" else half
    frequencies = np.exp(-np.arange(half) * math.log(10000) / steps).astype(np.float32)
    angles = _angles(net, positions, net.constant("positions.frequencies", frequencies))
    return net.op("Concat", net.op("Sin", angles), net.op("Cos", angles), axis=-1)


def _angles(net: Network, positions: ir.Value, frequencies: ir.Value) -> ir.Value:
    return net.op("Mul", net.op("Unsqueeze", net.op("Cast", positions, to=FLOAT), net.integers(-1)), frequencies)


def _partial(net: Network, width: int) -> int:
    return 0 if width == int(net.hyper["head_dim"]) else width


def _by_length(net: Network, positions: ir.Value, short: ir.Value, prefix: str, kind: str) -> ir.Value:
    """LongRoPE (arXiv 2402.13753): other frequencies once a position lies beyond the original context."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = net.resolved.rope_parameters
    rope = rope[kind] if prefix else rope
    original = int(rope["original_max_position_embeddings"])
    options = {"layer_type": kind} if prefix else {}
    found, _ = ROPE_INIT_FUNCTIONS["longrope"](net.resolved, None, seq_len=original + 1, **options)
    long = net.constant(f"rope.{kind}.long_inv_freq", _numpy(found))
    return _beyond(net, positions, original, long, short)


def _beyond(net: Network, positions: ir.Value, original: int, beyond: ir.Value, within: ir.Value) -> ir.Value:
    """One value where a position lies beyond the original context, the other where none does."""
    farthest = net.op("ReduceMax", positions, keepdims=0)
    return net.op("Where", net.op("Greater", farthest, net.integer(original - 1)), beyond, within)


def _numpy(tensor: Any) -> np.ndarray:
    return np.asarray(tensor.detach().numpy(), np.float32)


def causal_mask(net: Network, ids: ir.Value, mask: ir.Value, window: int | None) -> ir.Value:
    """(batch, 1, sequence, total) float: 0 where a query sees a key, LOWEST elsewhere."""
    new, total = net.length(ids), net.length(mask)
    query = net.op("Unsqueeze", net.range(net.op("Sub", total, new), total), net.integers(1))
    key = net.op("Unsqueeze", net.range(net.integer(0), total), net.integers(0))
    seen = net.op("LessOrEqual", key, query)
    if window:
        seen = net.op("And", seen, net.op("Greater", key, net.op("Sub", query, net.integer(int(window)))))
    both = net.op("And", net.op("Unsqueeze", seen, net.integers(0, 1)), kept_keys(net, mask))
    return hidden_where_not(net, both)


def kept_keys(net: Network, mask: ir.Value) -> ir.Value:
    """(batch, 1, 1, keys) bool of an attention mask (batch, keys)."""
    return net.op("Cast", net.op("Unsqueeze", mask, net.integers(1, 2)), to=BOOL)


def kept_tokens(net: Network, ids: ir.Value, mask: ir.Value) -> ir.Value:
    """(batch, sequence, 1) float: 1 for tokens that are no padding, from the mask's last places."""
    total = net.op("Shape", mask, start=1, end=2)
    first = net.op("Sub", total, net.op("Shape", ids, start=1, end=2))
    new = net.op("Slice", mask, first, total, net.integers(1))
    return net.op("Unsqueeze", net.op("Cast", new, to=FLOAT), net.integers(2))


def hidden_where_not(net: Network, seen: ir.Value) -> ir.Value:
    """0 where true, LOWEST where false: what is added to scores."""
    return net.op("Where", seen, net.number(0.0), net.number(LOWEST))


def near(net: Network, ids: ir.Value, reach: int) -> ir.Value:
    """(sequence, sequence) bool: keys at most `reach` away on either side."""
    places = net.range(net.integer(0), net.length(ids))
    apart = net.op("Sub", net.op("Unsqueeze", places, net.integers(1)), net.op("Unsqueeze", places, net.integers(0)))
    return net.op("LessOrEqual", net.op("Abs", apart), net.integer(reach))


def by_distance(net: Network, queries: ir.Value, keys: ir.Value, name: str, rows: np.ndarray) -> ir.Value:
    """(queries, keys) int64: `rows` (2 n + 1,) of key minus query from -n to n; farther ones count as n away.

    `queries` and `keys` are the places of either, int64 vectors.
    """
    reach = len(rows) // 2
    apart = net.op("Sub", net.op("Unsqueeze", keys, net.integers(0)), net.op("Unsqueeze", queries, net.integers(1)))
    held = net.op("Clip", apart, net.integer(-reach), net.integer(reach))
    return net.op("Gather", net.constant(name, np.ascontiguousarray(rows)), net.op("Add", held, net.integer(reach)))


def has_buckets(net: Network) -> bool:
    """Whether scores get a learned number by distance."""
    return net.has(None, "rel_bias") or net.has(0, "attn_rel_b")


def bucket_biases(
    net: Network, queries: ir.Value, keys: ir.Value, layers: int, *, ahead: bool = True
) -> list[ir.Value]:
    """Of each layer (1, heads, queries, keys): a learned number for each bucket of distances and head.

    T5 (arXiv 1910.10683), section 2.1. The table is the model's, that of a first block, or a block's own (UMT5).
    `ahead` is whether keys ahead of a query have buckets of their own.
    """
    own = [block for block in range(layers) if net.has(block, "attn_rel_b")]
    tables: list[tuple[int | None, str]] = [(block, "attn_rel_b") for block in own] or [(None, "rel_bias")]
    buckets, farthest = net.rows(*tables[0]), int(net.option("relative_attention_max_distance", _FARTHEST))
    rows = t5_buckets(np.arange(-farthest, farthest + 1), buckets, farthest, ahead=ahead)
    places = by_distance(net, queries, keys, f"{tables[0][1]}.rows", rows)
    looked_up = [net.op("Transpose", net.lookup(role, places, block), perm=[2, 0, 1]) for block, role in tables]
    found = [net.op("Unsqueeze", bias, net.integers(0)) for bias in looked_up]
    return found if len(found) == layers else found * layers


def t5_buckets(distances: np.ndarray, buckets: int, farthest: int, *, ahead: bool = True) -> np.ndarray:
    """Bucket of key minus query, int64: exact when near, logarithmic up to `farthest`.

    Half of them are for keys ahead, or none, where those share bucket 0. In float32, as transformers rounds them.
    """
    half = buckets // 2 if ahead else buckets
    exact = half // 2
    size = np.abs(distances) if ahead else np.maximum(-distances, 0)
    steps = np.log(np.maximum(size, 1).astype(np.float32) / exact) / math.log(farthest / exact) * (half - exact)
    far = np.minimum(exact + steps.astype(np.int64), half - 1)
    return np.where(ahead & (distances > 0), half, 0) + np.where(size < exact, size, far)


def alibi(net: Network, mask: ir.Value, heads: int) -> ir.Value:
    """(batch, heads, 1, total): place of each key, counted over unmasked ones or over all, times the head's slope.

    ALiBi (arXiv 2108.12409), section 3; a query's own position adds the same to all of its scores. Falcon was trained
    with places, slopes and products in bfloat16, added to scores before those are scaled.
    """
    if net.family.alibi == "indexed":
        row = net.op("Unsqueeze", net.range(net.integer(0), net.length(mask)), net.integers(0))
        places = net.op("Cast", row, to=FLOAT)
    else:
        counted = net.op("Sub", net.op("CumSum", mask, net.integer(1)), net.integer(1))
        places = net.op("Cast", net.op("Mul", counted, mask), to=FLOAT)
    places, factors = net.op("Unsqueeze", places, net.integers(1, 2)), slopes(heads).reshape(1, heads, 1, 1)
    if net.family.alibi != "scaled":
        return net.op("Mul", places, net.constant("alibi.slopes", factors))
    factors = factors.astype(ml_dtypes.bfloat16).astype(np.float32)
    bias = net.op("Mul", _rounded(net, places), net.constant("alibi.slopes", factors))
    return net.op("Div", _rounded(net, bias), net.number(math.sqrt(int(net.hyper["head_dim"]))))


def _rounded(net: Network, x: ir.Value) -> ir.Value:
    """The bfloat16 that is nearest to a float, as a float."""
    return net.op("Cast", net.op("Cast", x, to=BFLOAT16), to=FLOAT)


def slopes(heads: int) -> np.ndarray:
    """(heads,) float32 factors: powers of 2 ** (-8 / heads), between those of the next power of two if it is none."""
    whole = 2 ** math.floor(math.log2(heads))
    found = [2.0 ** (-8.0 * i / whole) for i in range(1, whole + 1)]
    found += [2.0 ** (-4.0 * i / whole) for i in range(1, 2 * (heads - whole), 2)]
    return np.asarray(found, np.float32)
