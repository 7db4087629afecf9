"""Graphs written down here, from the roles that the architecture data give to tensors. Standard operators of opset 23.

Widths are read off the stored tensors, block by block, so blocks may differ in heads and in the width of their MLP.
Frequencies of the rotary embedding are transformers' own; cosines are computed in the graph, so no table limits the
context. What a family adds to the plain block is in `FAMILIES`; anything else that a config asks for is not seen here
and shows in the parity check.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tightship import __version__
from tightship.architecture import Architecture
from tightship.errors import Unsupported
from tightship.exporters.onnx_candidates.graph_edits import OPSET
from tightship.exporters.onnx_candidates.network import Network
from tightship.exporters.onnx_candidates.skeleton import (
    BATCH,
    DECODER_TASKS,
    SEQUENCE,
    TOTAL,
    Skeleton,
    outputs_of,
)

if TYPE_CHECKING:
    import onnx_ir as ir

LOWEST = float(np.finfo(np.float32).min)  # hides a position; unlike -inf, a row that sees nothing stays finite


@dataclass(frozen=True)
class Family:
    """What a family does that Llama does not.

    Attributes:
        encoder: bidirectional, norms after the residual (BERT).
        plus_one: norms multiply by 1 + weight (Gemma).
        embed_scale: embeddings times the square root of the width (Gemma).
        position_offset: rows of the position table before position 0 (OPT).
        norm_eps: of all norms, where the config has no key for it.
        parallel: attention and MLP read the same normed input (Falcon).
        pooled: the activation behind the pooler of a classifier.
        must: config keys with the only values that are written down here.
    """

    encoder: bool = False
    plus_one: bool = False
    embed_scale: bool = False
    position_offset: int = 0
    norm_eps: float = 1e-5
    parallel: bool = False
    pooled: str = "Tanh"
    must: tuple[tuple[str, Any], ...] = ()


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "phi3": Family(),
    "gemma2": Family(plus_one=True, embed_scale=True),
    "gemma3": Family(plus_one=True, embed_scale=True),
    "gpt2": Family(must=(("scale_attn_by_inverse_layer_idx", False), ("scale_attn_weights", True))),
    "opt": Family(position_offset=2, must=(("do_layer_norm_before", True),)),
    "falcon": Family(
        parallel=True,
        must=(("new_decoder_architecture", False), ("multi_query", True), ("parallel_attn", True), ("alibi", False)),
    ),
    "bert": Family(encoder=True),
    "distilbert": Family(encoder=True, norm_eps=1e-12, pooled="Relu"),
}
_FIXED_ROPES = ("default", "linear", "llama3", "yarn")  # the others change their frequencies with the prompt


class DirectCandidate:
    """Our own construction: milliseconds, no tracing."""

    source = f"tightship {__version__} blocks, opset {OPSET}"
    rewrites = ()

    def build(
        self, config: Mapping[str, Any], architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]
    ) -> Skeleton:
        family = FAMILIES.get(architecture.family)
        if family is None or family.encoder == (architecture.task in DECODER_TASKS):
            raise Unsupported(f"{architecture.family} for {architecture.task} is not written down here")
        for key, value in family.must:
            if config.get(key, value) != value:
                raise Unsupported(f"{architecture.family} with {key} = {config[key]!r} is not written down here")
        net = Network(config, architecture, shapes, plus_one=family.plus_one, norm_eps=family.norm_eps)
        outputs = outputs_of(architecture)
        if family.encoder:
            _heads(net, _encoder(net, config), architecture.task, family)
        else:
            _decoder(net, config, family, outputs)
        return net.skeleton()


def _decoder(net: Network, config: Mapping[str, Any], family: Family, outputs: tuple[str, ...]) -> None:
    ids = net.input("input_ids", (BATCH, SEQUENCE))
    mask = net.input("attention_mask", (BATCH, TOTAL))
    positions = net.input("position_ids", (BATCH, SEQUENCE))
    resolved = net.resolved
    types = list(getattr(resolved, "layer_types", None) or [])
    window = getattr(resolved, "sliding_window", None)
    layers = int(net.hyper["layers"])
    types = types or ["sliding_attention" if window else "full_attention"] * layers
    x = net.lookup("token_embd", ids)
    if family.embed_scale:
        x = net.op("Mul", x, net.number(math.sqrt(net.hyper["hidden"])))
    if net.has(None, "position_embd"):
        shifted = (
            net.op("Add", positions, net.integers(family.position_offset)) if family.position_offset else positions
        )
        x = net.op("Add", x, net.lookup("position_embd", shifted))
        turns: dict[str, Any] = {}
    else:
        turns = {kind: _rotation(net, positions, kind) for kind in dict.fromkeys(types)}
    masks = {kind: _causal_mask(net, ids, mask, window if "sliding" in kind else None) for kind in dict.fromkeys(types)}
    for block, kind in enumerate(types[:layers]):
        sight = Sight(masks[kind], turns.get(kind), cached=True)
        normed = net.norm(x, block, "attn_norm")
        attended = _attention(net, block, normed, sight, config)
        x = net.op("Add", x, _post(net, attended, block, "attn_post_norm"))
        if family.parallel:
            x = net.op("Add", x, _mlp(net, block, normed))
            continue
        x = net.op("Add", x, _post(net, _mlp(net, block, net.norm(x, block, "ffn_norm")), block, "ffn_post_norm"))
    logits = net.linear(net.norm(x, None, "output_norm"), None, "output", tied="token_embd")
    net.output(
        outputs[0], _capped(net, logits, config.get("final_logit_softcapping")), (BATCH, SEQUENCE, net.vocabulary)
    )
    net.present()


def _encoder(net: Network, config: Mapping[str, Any]) -> ir.Value:
    """The last hidden state."""
    ids = net.input("input_ids", (BATCH, SEQUENCE))
    mask = net.input("attention_mask", (BATCH, SEQUENCE))
    length = net.op("Shape", ids, start=1, end=2)
    positions = _range(net, net.integer(0), net.op("Squeeze", length))
    x = net.op("Add", net.lookup("token_embd", ids), net.lookup("position_embd", positions))
    if net.has(None, "token_types"):
        x = net.op("Add", x, net.lookup("token_types", net.input("token_type_ids", (BATCH, SEQUENCE))))
    x = net.norm(x, None, "token_embd_norm")
    seen = net.op("Cast", net.op("Unsqueeze", mask, net.integers(1, 2)), to=9)
    row = net.op("Where", seen, net.number(0.0), net.number(LOWEST))
    square = net.op("Expand", row, net.op("Concat", net.integers(1, 1), length, net.integers(1), axis=0))
    for block in range(int(net.hyper["layers"])):
        attended = _attention(net, block, x, Sight(square), config)
        x = net.norm(net.op("Add", x, attended), block, "attn_output_norm")
        x = net.norm(net.op("Add", x, _mlp(net, block, x)), block, "layer_output_norm")
    return x


def _heads(net: Network, x: ir.Value, task: str, family: Family) -> None:
    """What a task makes of the last hidden state."""
    if task == "fill-mask":
        turned = net.activation(net.linear(x, None, "output_transform"))
        logits = net.linear(net.norm(turned, None, "output_norm"), None, "output", tied="token_embd")
        net.output("logits", logits, (BATCH, SEQUENCE, net.vocabulary))
    if task in ("fill-mask", "feature-extraction"):
        net.output("last_hidden_state", x, (BATCH, SEQUENCE, int(net.hyper["hidden"])))
    elif task == "text-classification":
        first = net.op("Gather", x, net.integer(0), axis=1)
        pooled = net.op(family.pooled, net.linear(first, None, "pooler"))
        net.output("logits", net.linear(pooled, None, "cls"), (BATCH, net.rows(None, "cls")))
    elif task == "token-classification":
        net.output("logits", net.linear(x, None, "cls"), (BATCH, SEQUENCE, net.rows(None, "cls")))
    elif task == "question-answering":
        pair = net.ops("Split", net.linear(x, None, "cls"), outputs=2, axis=-1, num_outputs=2)
        for name, logits in zip(("start_logits", "end_logits"), pair, strict=True):
            net.output(name, net.op("Squeeze", logits, net.integers(-1)), (BATCH, SEQUENCE))


@dataclass(frozen=True)
class Sight:
    """What queries see and where they stand.

    Attributes:
        mask: float, added to the scores.
        turn: (cos, sin, rotated width or 0), or None without rotation.
        cached: whether keys and values of the past come in.
    """

    mask: ir.Value
    turn: tuple[ir.Value, ir.Value, int] | None = None
    cached: bool = False


def _attention(net: Network, block: int, x: ir.Value, sight: Sight, config: Mapping[str, Any]) -> ir.Value:
    """Projections, optional norms of queries and keys, rotation, the Attention operator, output projection."""
    size = int(net.hyper["head_dim"])
    q, k, v = _projections(net, block, x, size)
    heads = (q[1] // size, k[1] // size)
    query, key = (
        _head_norm(net, y[0], block, f"attn_{letter}_norm", n)
        for y, letter, n in ((q, "q", heads[0]), (k, "k", heads[1]))
    )
    if sight.turn:
        cos, sin, width = sight.turn
        query, key = (
            net.op("RotaryEmbedding", y, cos, sin, num_heads=n, rotary_embedding_dim=width)
            for y, n in ((query, heads[0]), (key, heads[1]))
        )
    attributes: dict[str, Any] = {"q_num_heads": heads[0], "kv_num_heads": heads[1]}
    attributes["scale"] = (config.get("query_pre_attn_scalar") or size) ** -0.5
    if config.get("attn_logit_softcapping"):
        attributes["softcap"] = float(config["attn_logit_softcapping"])
    past = net.past(block, heads[1], size) if sight.cached else ()
    y, *present = net.ops("Attention", query, key, v[0], sight.mask, *past, outputs=1 + len(past), **attributes)
    if past:
        net.keep(block, present)
    return net.linear(y, block, "attn_output")


def _projections(net: Network, block: int, x: ir.Value, size: int) -> list[tuple[ir.Value, int]]:
    """(value, width) of queries, keys and values; a fused matrix is read in three runs of rows."""
    if not net.has(block, "attn_qkv"):
        roles = [f"attn_{letter}" for letter in "qkv"]
        return [(net.linear(x, block, role), net.rows(block, role)) for role in roles]
    kv = int(net.hyper["kv_heads"]) * size
    widths = (net.rows(block, "attn_qkv") - 2 * kv, kv, kv)
    starts = (0, widths[0], widths[0] + kv)
    return [
        (net.linear(x, block, "attn_qkv", rows=(start, start + width)), width)
        for start, width in zip(starts, widths, strict=True)
    ]


def _head_norm(net: Network, x: ir.Value, block: int, role: str, heads: int) -> ir.Value:
    if not net.has(block, role):
        return x
    apart = net.op("Reshape", x, net.integers(0, 0, heads, -1))
    return net.op("Reshape", net.norm(apart, block, role), net.integers(0, 0, -1))


def _mlp(net: Network, block: int, x: ir.Value) -> ir.Value:
    if net.has(block, "ffn_gate_up"):
        half = net.rows(block, "ffn_gate_up") // 2
        gate, up = (net.linear(x, block, "ffn_gate_up", rows=rows) for rows in ((0, half), (half, 2 * half)))
        inner = net.op("Mul", net.activation(gate), up)
    elif net.has(block, "ffn_gate"):
        inner = net.op("Mul", net.activation(net.linear(x, block, "ffn_gate")), net.linear(x, block, "ffn_up"))
    else:
        inner = net.activation(net.linear(x, block, "ffn_up"))
    return net.linear(inner, block, "ffn_down")


def _post(net: Network, x: ir.Value, block: int, role: str) -> ir.Value:
    return net.norm(x, block, role) if net.has(block, role) else x


def _capped(net: Network, x: ir.Value, cap: float | None) -> ir.Value:
    if not cap:
        return x
    return net.op("Mul", net.op("Tanh", net.op("Div", x, net.number(cap))), net.number(cap))


def _rotation(net: Network, positions: ir.Value, kind: str) -> tuple[ir.Value, ir.Value, int]:
    """cos and sin (batch, sequence, pairs), and the rotated width where it is not the whole head (else 0)."""
    rotary = net.rotary()
    prefix = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
    types = getattr(rotary, "rope_type", "default")
    rope = types[kind] if isinstance(types, dict) else types
    if rope not in _FIXED_ROPES:
        raise Unsupported(f"rope type {rope!r} changes its frequencies with the prompt")
    frequencies = getattr(rotary, f"{prefix}inv_freq").detach().numpy().astype(np.float32)
    scaling = float(getattr(rotary, f"{prefix}attention_scaling", 1.0))
    table = net.constant(f"rope.{kind}.inv_freq", frequencies)
    angles = net.op("Mul", net.op("Unsqueeze", net.op("Cast", positions, to=1), net.integers(2)), table)
    cos, sin = net.op("Cos", angles), net.op("Sin", angles)
    if scaling != 1.0:
        cos, sin = (net.op("Mul", value, net.number(scaling)) for value in (cos, sin))
    width = 2 * len(frequencies)
    return cos, sin, 0 if width == int(net.hyper["head_dim"]) else width


def _causal_mask(net: Network, ids: ir.Value, mask: ir.Value, window: int | None) -> ir.Value:
    """(batch, 1, sequence, total) float: 0 where a query sees a key, LOWEST elsewhere."""
    new = net.op("Squeeze", net.op("Shape", ids, start=1, end=2))
    total = net.op("Squeeze", net.op("Shape", mask, start=1, end=2))
    query = net.op("Unsqueeze", _range(net, net.op("Sub", total, new), total), net.integers(1))
    key = net.op("Unsqueeze", _range(net, net.integer(0), total), net.integers(0))
    seen = net.op("LessOrEqual", key, query)
    if window:
        seen = net.op("And", seen, net.op("Greater", key, net.op("Sub", query, net.integer(int(window)))))
    kept = net.op("Cast", net.op("Unsqueeze", mask, net.integers(1, 2)), to=9)
    both = net.op("And", net.op("Unsqueeze", seen, net.integers(0, 1)), kept)
    return net.op("Where", both, net.number(0.0), net.number(LOWEST))


def _range(net: Network, start: ir.Value, stop: ir.Value) -> ir.Value:
    return net.op("Range", start, stop, net.integer(1))
