"""Decoders with a KV cache: everything from Llama to BLOOM, by `families.FAMILIES`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tightship.exporters.onnx_candidates.attention import Sight, attention
from tightship.exporters.onnx_candidates.convolution import short_convolution
from tightship.exporters.onnx_candidates.embeddings import embedded, has_places
from tightship.exporters.onnx_candidates.feed_forward import feed_forward
from tightship.exporters.onnx_candidates.latent_attention import latent_attention
from tightship.exporters.onnx_candidates.network import Network
from tightship.exporters.onnx_candidates.positions import (
    Turn,
    alibi,
    causal_mask,
    kept_tokens,
    rotation,
)
from tightship.exporters.onnx_candidates.skeleton import BATCH, SEQUENCE, TOTAL
from tightship.exporters.onnx_candidates.state_space import state_space

if TYPE_CHECKING:
    import onnx_ir as ir

_RECURRENT = ("conv", "linear_attention")  # those that keep a state of fixed size
_LOCAL = ("sliding_attention", "local")  # words for layers that see a window


def decoder(net: Network) -> None:
    """The whole graph: token ids and the past in, logits and the grown cache out."""
    ids = net.input("input_ids", (BATCH, SEQUENCE))
    mask = net.input("attention_mask", (BATCH, TOTAL))
    if not net.architecture.recurrent:
        _positions(net)  # clients give them to every decoder with keys, whether it reads them or not
    x = embedded(net, ids, lambda: _positions(net))
    for block, sight in enumerate(_sights(net, ids, mask)):
        x = _block(net, block, x, sight)
    x = net.normed(x, None, "output_norm")
    if net.has(None, "output_proj"):
        x = net.linear(x, None, "output_proj")
    logits = net.linear(x, None, "output", tied="token_embd")
    net.output("logits", _scaled_logits(net, logits), (BATCH, SEQUENCE, net.vocabulary))
    net.present()


def _positions(net: Network) -> ir.Value:
    return net.input("position_ids", (BATCH, SEQUENCE))


def _sights(net: Network, ids: ir.Value, mask: ir.Value) -> list[Sight]:
    """What each block sees."""
    layers = int(net.hyper["layers"])
    window = net.option("sliding_window") or net.option("window_size")
    types = net.option("layer_types") or net.option("attention_layers")
    types = list(types or ["sliding_attention" if window else "full_attention"] * layers)[:layers]
    kinds = [kind for kind in dict.fromkeys(types) if kind not in _RECURRENT]
    masks = {kind: causal_mask(net, ids, mask, window if kind in _LOCAL else None) for kind in kinds}
    if net.family.alibi and net.option("alibi", True):
        bias = alibi(net, mask, int(net.hyper["heads"]))
        masks = {kind: net.op("Add", value, bias) for kind, value in masks.items()}
        return [Sight(masks[kind], None, cache="") for kind in types]
    turns: dict[str, Turn] = {}
    if not has_places(net):
        turns = {kind: rotation(net, _positions(net), kind) for kind in kinds}
    kept = kept_tokens(net, ids, mask) if len(kinds) < len({*types}) else None
    return [
        Sight(masks.get(kind), turns.get(kind) if _rotates(net, block, kind) else None, cache="", kept=kept)
        for block, kind in enumerate(types)
    ]


def _rotates(net: Network, block: int, kind: str) -> bool:
    word = net.family.rotated
    if word == "sliding":
        return kind in _LOCAL or not net.option("sliding_window")
    return word == "all" or bool(net.option(word)[block])


def _block(net: Network, block: int, x: ir.Value, sight: Sight) -> ir.Value:
    """Attention and MLP with their norms: before, behind, or side by side."""
    scale = float(net.option(net.family.residual_scale)) if net.family.residual_scale else 1.0
    if net.family.post_norm and not net.option(net.family.post_norm):
        x = net.norm(net.op("Add", x, _attended(net, block, x, sight)), block, "attn_norm")
        return net.norm(net.op("Add", x, feed_forward(net, block, x)), block, "ffn_norm")
    before = net.normed(x, block, "attn_norm")
    if net.has(block, "ssm_in"):
        return net.op("Add", x, state_space(net, block, before, sight))
    attended = net.normed(_attended(net, block, before, sight), block, "attn_post_norm")
    if net.answer(net.family.parallel):
        inner = net.norm(x, block, "ffn_norm") if net.has(block, "ffn_norm") else before
        return net.op("Add", x, net.scaled(net.op("Add", attended, feed_forward(net, block, inner)), scale))
    x = net.op("Add", x, net.scaled(attended, scale))
    behind = net.normed(feed_forward(net, block, net.normed(x, block, "ffn_norm")), block, "ffn_post_norm")
    return net.op("Add", x, net.scaled(behind, scale))


def _attended(net: Network, block: int, x: ir.Value, sight: Sight) -> ir.Value:
    if net.has(block, "shortconv_inproj"):
        return short_convolution(net, block, x, sight)
    latent = net.has(block, "attn_kv_a_mqa")
    return latent_attention(net, block, x, sight) if latent else attention(net, block, x, sight)


def _scaled_logits(net: Network, x: ir.Value) -> ir.Value:
    if net.family.logit_scale:
        key, divides = net.family.logit_scale
        factor = float(net.option(key, 1.0))
        x = net.op("Div", x, net.number(factor)) if divides else net.scaled(x, factor)
    cap = net.option("final_logit_softcapping")
    if not cap:
        return x
    return net.op("Mul", net.op("Tanh", net.op("Div", x, net.number(float(cap)))), net.number(float(cap)))
