"""A small random model with the flags of a real one: what the parity check runs.

Sizes shrink; everything that says *how* something is computed stays: activation, biases, norms, ties, layer types, rope
type and its factors. Bounds that a short prompt would never reach are pulled below it: the attention window, rope's
original context, soft caps. Every parameter is random, since default initialisation (zero biases, unit norms) hides a
parameter that a graph drops.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tightship.architecture import TensorInfo
from tightship.checkpoint import Checkpoint, Source
from tightship.exporters import onnx_stacks
from tightship.formats.layouts import parse_layout
from tightship.per_layer import KEY, has_unlike_layers, shared_config
from tightship.weights import Alias, Dense, Quantized, Weight

HIDDEN, HEADS, HEAD_DIM, FFN, VOCABULARY = 64, 4, 16, 96, 211
LATENT = {"q_rank": 24, "kv_rank": 32, "nope_dim": 16, "rope_dim": 8, "v_dim": 12}  # none is another, or half of it
CONTEXT = 64
WINDOW = 5
ORIGINAL_CONTEXT = 16
BUCKETED = 24
ATTENTION_CAP, LOGIT_CAP = 3.0, 4.0
EXPERTS = 4
EXPERT_LAYOUT = parse_layout("int4-g16")  # the only groups that all sizes here are multiples of
MOST_LAYERS = 8
_TOKENS = {"bos_token_id": 2, "eos_token_id": 3}
_LONGROPE = ("short_factor", "long_factor")


def small_checkpoint(real: Checkpoint, seed: int = 0) -> Checkpoint:
    """A random model in memory with the flags of `real`, tied and optional tensors as there."""
    config = small_config(real)
    rng = np.random.default_rng(seed)
    infos = [i for i in real.architecture.lookup(config).values() if not i.rule.optional or i.name in real.weights]
    owners = {name: w.owner for name, w in real.weights.items() if isinstance(w, Alias)}
    stored_ties = {b: o for b, o in real.architecture.ties if b not in real.weights or b in owners}
    weights: dict[str, Weight] = {}
    for info in infos:
        if info.name in stored_ties:
            if info.name in owners:
                weights[info.name] = Alias(stored_ties[info.name])
            continue
        weights[info.name] = Dense.of(random_tensor(info, rng))
    small = Checkpoint(real.name, config, weights, {}, real.architecture, Source("parity", None, ()))
    return small.with_weights(in_integers(small)) if onnx_stacks.fits(real) else small


def in_integers(small: Checkpoint) -> dict[str, Weight]:
    """The experts rounded, as those are that QMoE may multiply with: it takes no floats."""
    values = {name: small.resolve(name).value() for name in onnx_stacks.experts_of(small)}
    return {name: Quantized.of(EXPERT_LAYOUT, EXPERT_LAYOUT.quantize(value)) for name, value in values.items()}


def random_tensor(info: TensorInfo, rng: np.random.Generator) -> np.ndarray:
    """float32 values that keep activations near one and make attention sharp enough to show a wrong mask."""
    shape = info.shape
    noise = rng.standard_normal(shape).astype(np.float32)
    if info.rule.kind == "norm":
        return 1 + np.float32(0.3) * noise
    if info.rule.kind in ("embedding", "position"):
        return noise
    if len(shape) < 2:
        return np.float32(0.3) * noise
    gain = 1.5 if info.rule.role in ("attn_q", "attn_k", "attn_qkv", "attn_q_b") else 1.0
    return noise * np.float32(gain / math.sqrt(shape[-1]))


def small_config(real: Checkpoint) -> dict[str, Any]:
    """config.json of the small model."""
    config = copy.deepcopy(dict(real.config))
    hyper = real.hyper
    keys = real.architecture.config
    heads, kv_heads = int(hyper.get("heads", 1)), int(hyper.get("kv_heads", hyper.get("grouped_kv_heads", 1)))
    small_kv = 1 if kv_heads == 1 else (HEADS if kv_heads == heads else 2)
    # A head size of its own stays one of its own: hidden / heads must be wrong for it.
    wide = "head_dim" in hyper and int(hyper["head_dim"]) * heads != int(hyper["hidden"])
    sizes = {
        "hidden": HIDDEN,
        "heads": HEADS,
        "kv_heads": small_kv,
        "grouped_kv_heads": small_kv,
        "head_dim": 2 * HEAD_DIM if wide else HEAD_DIM,
        "ffn": FFN,
        "given_ffn": FFN,
        "expert_ffn": FFN // 2,
        "shared_ffn": FFN // 2,
        "inner": 2 * HIDDEN,
        **LATENT,
        "vocab": VOCABULARY,
        "context": CONTEXT,
        "dec_heads": HEADS if hyper.get("dec_heads") == heads else HEADS // 2,
        "dec_ffn": FFN if hyper.get("dec_ffn") == hyper.get("ffn") else FFN // 2,
    }
    if "image" in hyper:  # few patches of the real size
        sizes["image"] = 2 * int(hyper["patch"])
    for name, size in sizes.items():
        _set(config, keys.get(name), size)
    for key in ("word_embed_proj_dim",):  # OPT repeats hidden
        if key in config:
            config[key] = HIDDEN if config[key] == hyper["hidden"] else HIDDEN // 2
    if "rope_dim" in hyper and "head_dim" in config:  # DeepSeek repeats the rotated width
        config["head_dim"] = LATENT["rope_dim"]
    if "experts" in hyper:
        # Two experts at least in each group, and more than are used.
        least = max(EXPERTS, 2 * int(hyper.get("groups", 0)), int(hyper.get("experts_used", 0)) + 1)
        _set(config, keys["experts"], min(least, int(hyper["experts"])))
    _shrink_bounds(config)
    _shrink_rope(config, int(_rotary_width(config, real)))
    _shrink_tokens(config)
    _shrink_depth(config, real)
    if has_unlike_layers(config):
        own = {key for widths in config[KEY].values() for key in widths}
        config[KEY] = {"0": {key: max(1, config[key] // 2) for key in sorted(own)}}  # half as wide as the others
    return config


def _set(config: dict[str, Any], alternatives: Any, value: Any) -> None:
    """Write a value under the first alternative that the config has."""
    for path in alternatives if isinstance(alternatives, list) else [alternatives]:
        *parents, last = str(path).split(".")
        place: Any = config
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
        if isinstance(place, dict) and place.get(last) is not None:
            place[last] = value
            return


def _shrink_bounds(config: dict[str, Any]) -> None:
    for key in ("sliding_window", "attention_window", "local_attention", "window_size"):
        if isinstance(config.get(key), int):
            config[key] = min(config[key], WINDOW)
        elif isinstance(config.get(key), list):  # Longformer: one a layer, each even
            config[key] = [min(size, WINDOW - 1) for size in config[key]]
    if config.get("relative_attention_max_distance"):
        config["relative_attention_max_distance"] = min(config["relative_attention_max_distance"], BUCKETED)
    for key, cap in (("attn_logit_softcapping", ATTENTION_CAP), ("final_logit_softcapping", LOGIT_CAP)):
        if config.get(key):
            config[key] = cap


def _rotary_width(config: Mapping[str, Any], real: Checkpoint) -> float:
    hyper = real.architecture.hyper(config)
    partial = config.get("partial_rotary_factor") or (config.get("rope_parameters") or {}).get("partial_rotary_factor")
    return int(hyper.get("head_dim", HEAD_DIM)) * float(partial or 1.0)


def _shrink_rope(config: dict[str, Any], width: int) -> None:
    """Rope's original context below the prompt; per-dimension factors cut to the small head."""
    if isinstance(config.get("original_max_position_embeddings"), int):
        config["original_max_position_embeddings"] = ORIGINAL_CONTEXT
    for key in ("rope_parameters", "rope_scaling"):
        found = config.get(key)
        if not isinstance(found, dict):
            continue
        for scaling in (found, *(v for v in found.values() if isinstance(v, dict))):
            if isinstance(scaling.get("original_max_position_embeddings"), int):
                scaling["original_max_position_embeddings"] = ORIGINAL_CONTEXT
            for factors in _LONGROPE:
                if isinstance(scaling.get(factors), list):
                    scaling[factors] = scaling[factors][: width // 2]


def _shrink_tokens(config: dict[str, Any]) -> None:
    for key, small in _TOKENS.items():
        if config.get(key) is not None:
            config[key] = small
    # Position ids of RoBERTa-like models start after it, so a small one stays what it is.
    pad = config.get("pad_token_id")
    if isinstance(pad, int) and pad >= VOCABULARY:
        config["pad_token_id"] = 0


def _shrink_depth(config: dict[str, Any], real: Checkpoint) -> None:
    """The shortest run of first layers that shows every distinct one; a far one is pulled to the front."""
    layers = int(real.hyper["layers"])
    kinds = layer_kinds(real.config, layers)
    firsts = sorted({kinds.index(kind) for kind in kinds})
    depth = max(2, firsts[-1] + 1)
    listed = {key: value for key, value in config.items() if isinstance(value, list) and len(value) == layers}
    if depth > MOST_LAYERS:
        chosen = firsts if len(firsts) > 1 else [0, 1]
        depth = len(chosen)
        for key, value in listed.items():
            config[key] = [value[i] for i in chosen]
        if len(firsts) > 1:
            config["layer_types"] = [kinds[i][0] for i in chosen]
        if isinstance(config.get("max_window_layers"), int):
            config["max_window_layers"] = next((n for n, i in enumerate(chosen) if kinds[i][0] != kinds[0][0]), depth)
    else:
        depth = min(depth, layers)
        for key, value in listed.items():
            config[key] = value[:depth]
    keys = real.architecture.config
    _set(config, keys["layers"], depth)
    # Of two stacks both go by their own words; that one which stands for the encoder may be there as well.
    _set(config, keys.get("dec_layers"), min(depth, int(real.hyper.get("dec_layers", depth))))
    if "dec_layers" in keys:
        _set(config, "num_hidden_layers", depth)


def layer_kinds(config: Mapping[str, Any], layers: int) -> list[tuple[Any, ...]]:
    """What tells layers apart, one tuple a layer: the layer type, then every per-layer list of the config."""
    from transformers import CONFIG_MAPPING

    resolved = CONFIG_MAPPING[config["model_type"]].from_dict(shared_config(config))
    types = list(getattr(resolved, "layer_types", None) or ["full_attention"] * layers)
    lists = [
        value
        for key, value in sorted(resolved.to_dict().items())
        if isinstance(value, list) and len(value) == layers and key != "layer_types"
    ]
    mlp = [_is_moe(resolved.to_dict(), index) for index in range(layers)]
    return [(types[i], mlp[i], *(str(value[i]) for value in lists)) for i in range(layers)]


def _is_moe(config: Mapping[str, Any], index: int) -> bool:
    """Whether layer `index` has experts, for the keys by which configs say so."""
    if index in (config.get("mlp_only_layers") or ()):
        return False
    if index < int(config.get("first_k_dense_replace") or 0):
        return False
    step = int(config.get("decoder_sparse_step") or config.get("moe_layer_freq") or 1)
    return (index + 1) % step == 0
