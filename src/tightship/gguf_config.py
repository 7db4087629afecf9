"""config.json of a GGUF file's metadata: the inverse of exporters/gguf_metadata.py and gguf_rope.py.

Keys that the family's data reads come from the metadata; what the loader's graph does in every case is said in the
config's words; what only the tensors tell (biases, Falcon's generations) is read off their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tightship.architecture import Architecture, full_layers
from tightship.errors import Malformed, Unsupported
from tightship.expressions import holds, literal

Metadata = Mapping[str, Any]


def contradicts(architecture: Architecture, metadata: Metadata) -> bool:
    """Whether the file has another value for something that is constant in the family (DeepSeek-V2 and -V3)."""
    gguf = architecture.gguf or {}
    given = {key: metadata.get(f"{gguf['arch']}.{key}", value) for key, value in gguf.get("constants", {}).items()}
    return given != gguf.get("constants", {})


def config_of(architecture: Architecture, metadata: Metadata, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the metadata: every key that the family's data reads, and what the class needs beside them.

    Raises:
        Malformed: a key that every file has is missing.
        Unsupported: sizes that differ by layer, a rope scaling that config.json cannot say.
    """
    gguf = architecture.gguf or {}
    found = _found(architecture, metadata, tensors)
    config: dict[str, Any] = {"architectures": [architecture.classes[0]], "model_type": architecture.model_types[0]}
    config["tie_word_embeddings"] = found["tied"]
    for name, alternatives in architecture.config.items():
        options = alternatives if isinstance(alternatives, list) else [alternatives]
        first = str(options[0]).partition("?")[0].removesuffix("[]")
        if first.isidentifier() and (found.get(name) is not None or "none" in options):
            config[first] = found.get(name)
    config |= _told_by_tensors(gguf, found, tensors)
    config |= _demanded(architecture, config, int(found["layers"]))
    if gguf["rope"] != "none":
        rope = config["rope_parameters"] = rope_parameters(architecture, metadata, found, tensors)
        if rope.get("rope_type") == "longrope":  # Phi-3's class reads it here
            config["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    for kind in ("bos", "eos", "padding"):
        number = metadata.get(f"tokenizer.ggml.{kind}_token_id")
        if number is not None:
            config[f"{kind.replace('padding', 'pad')}_token_id"] = int(number)
    return config | _biases(tensors)


def _found(architecture: Architecture, metadata: Metadata, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Canonical hyper-parameters of the metadata."""
    gguf = architecture.gguf or {}
    arch = gguf["arch"]
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise Malformed("there is no token_embd.weight", tensor="token_embd.weight")
    found = {
        "layers": _count(metadata, arch, "block_count"),
        "hidden": _count(metadata, arch, "embedding_length"),
        "ffn": _count(metadata, arch, "feed_forward_length"),
        "heads": _count(metadata, arch, "attention.head_count"),
        "context": _count(metadata, arch, "context_length"),
        "norm_eps": decimal(_need(metadata, arch, gguf["norm_key"])),
        "activation": next(iter(gguf["activation"]), None),
        "vocab": embedding.shape[0],
        "tied": "output.weight" not in tensors,
        "token_types": metadata.get("tokenizer.ggml.token_type_count"),
    }
    if found["layers"] > len(tensors):
        raise Malformed(f"{arch}.block_count is {found['layers']}, more than the file has tensors")
    found["kv_heads"] = metadata.get(f"{arch}.attention.head_count_kv", found["heads"])
    found["head_dim"] = metadata.get(f"{arch}.attention.key_length", found["hidden"] // max(found["heads"], 1))
    if "rope_dim" in architecture.config:  # heads of a part that turns and one that does not
        found["rope_dim"] = _need(metadata, arch, "rope.dimension_count")
        found["nope_dim"] = found["head_dim"] - found["rope_dim"]
    for suffix, name in gguf.get("keys", {}).items():
        if f"{arch}.{suffix}" in metadata:
            found[name] = metadata[f"{arch}.{suffix}"]
    return found


def _told_by_tensors(
    gguf: Mapping[str, Any], found: Mapping[str, Any], tensors: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Config keys of the first of the family's `readings` that fits the file."""
    for reading in gguf.get("readings", ()):
        if reading.get("has", "token_embd.weight") in tensors and holds(reading.get("when", {}), found):
            told: Mapping[str, Any] = reading["config"]
            return told
    return {}


def _demanded(architecture: Architecture, config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """What the loader's graph does in every case, in the config's words: what a file of this architecture says."""
    found: dict[str, Any] = {}
    for rule in (architecture.gguf or {}).get("requires", ()):
        key = rule["key"]
        if key in config or "." in key or "when" in rule:
            continue
        if len(rule.get("allowed", ())) == 1:
            found[key] = rule["allowed"][0]
        elif "equals" in rule:
            found[key] = literal(rule["equals"], architecture.hyper(config))
        elif "full_every" in rule:
            period, place = full_layers(rule)
            kinds = ("sliding_attention", "full_attention")
            found[key] = [kinds[i % period == place] for i in range(layers)]
        elif "zero_every" in rule:
            found[key] = [int(i % int(rule["zero_every"]) != 0) for i in range(1, layers + 1)]
    return found


def _need(metadata: Metadata, arch: str, suffix: str) -> Any:
    value = metadata.get(f"{arch}.{suffix}")
    if value is None:
        raise Malformed(f"the metadata lack {arch}.{suffix}")
    if isinstance(value, np.ndarray):
        raise Unsupported(f"{arch}.{suffix} differs by layer, which config.json cannot say")
    return value


def _count(metadata: Metadata, arch: str, suffix: str) -> int:
    value = _need(metadata, arch, suffix)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise Malformed(f"{arch}.{suffix} is {value!r}, not a count")
    return value


def _biases(tensors: Mapping[str, Any]) -> dict[str, bool]:
    """The switches by which Llama, GLM and their like make biases."""
    return {
        "attention_bias": not {"blk.0.attn_q.bias", "blk.0.attn_output.bias"}.isdisjoint(tensors),
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
    }


def decimal(value: float) -> float:
    """The shortest decimal number that is this float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def rope_parameters(
    architecture: Architecture, metadata: Metadata, found: Mapping[str, Any], tensors: Mapping[str, Any]
) -> dict[str, Any]:
    """Rotary settings in transformers' words; those of sliding layers apart where they have a base of their own.

    Raises:
        Unsupported: a scaling that config.json cannot say, or factors that are not Llama 3's.
    """
    arch = (architecture.gguf or {})["arch"]
    parameters = _width(architecture, metadata, found)
    parameters["rope_theta"] = decimal(metadata.get(f"{arch}.rope.freq_base", 10000.0))
    parameters |= _scaling(arch, metadata, parameters["rope_theta"], tensors)
    local = metadata.get(f"{arch}.rope.freq_base_swa")
    if local is None:
        return parameters
    return {
        "full_attention": parameters,
        "sliding_attention": {"rope_type": "default", "rope_theta": decimal(local)},
    }


def _width(architecture: Architecture, metadata: Metadata, found: Mapping[str, Any]) -> dict[str, Any]:
    """The share of each head that turns, where the family says it so."""
    arch = (architecture.gguf or {})["arch"]
    width = int(metadata.get(f"{arch}.rope.dimension_count", found["head_dim"]))
    if width == found["head_dim"] or "rope_dim" in found:
        return {}
    if "rotary" not in architecture.config:
        raise Unsupported(f"{arch} rotates {width} of {found['head_dim']} dimensions, which is not mapped back")
    return {"partial_rotary_factor": width / found["head_dim"]}


def _scaling(arch: str, metadata: Metadata, base: float, tensors: Mapping[str, Any]) -> dict[str, Any]:
    if "rope_freqs.weight" in tensors:
        return _llama3(tensors["rope_freqs.weight"].weight().value(), base)
    linear = f"{arch}.rope.scaling.factor" in metadata
    kind = metadata.get(f"{arch}.rope.scaling.type", "linear" if linear else "none")
    if kind == "none":
        return {"rope_type": "default"}
    if kind == "longrope":
        return _longrope(arch, metadata, tensors)
    if kind not in ("linear", "yarn"):
        raise Unsupported(f"rope scaling {kind!r} of a GGUF file is not mapped back")
    scaling = {"rope_type": kind, "factor": decimal(_need(metadata, arch, "rope.scaling.factor"))}
    if kind == "yarn":
        original = _need(metadata, arch, "rope.scaling.original_context_length")
        scaling["original_max_position_embeddings"] = int(original)
    multiplier = metadata.get(f"{arch}.rope.scaling.yarn_log_multiplier")
    if multiplier:
        scaling["mscale"] = scaling["mscale_all_dim"] = decimal(10 * multiplier)
    return scaling


def _llama3(factors: np.ndarray, base: float) -> dict[str, Any]:
    """Llama 3.1's settings, if these are the factors that they give."""
    from tightship.exporters.gguf_rope import llama3_factors

    given = {"factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    given["original_max_position_embeddings"] = 8192
    if not np.allclose(llama3_factors(given, base, 2 * len(factors)), factors, rtol=1e-5):
        raise Unsupported("rope_freqs.weight does not hold Llama 3's factors", tensor="rope_freqs.weight")
    return {"rope_type": "llama3"} | given


def _longrope(arch: str, metadata: Metadata, tensors: Mapping[str, Any]) -> dict[str, Any]:
    scaling: dict[str, Any] = {"rope_type": "longrope"}
    for kind in ("long", "short"):
        name = f"rope_factors_{kind}.weight"
        if name not in tensors:
            raise Malformed("longrope needs its factors", tensor=name)
        scaling[f"{kind}_factor"] = [decimal(value) for value in tensors[name].weight().value()]
    scaling["original_max_position_embeddings"] = int(_need(metadata, arch, "rope.scaling.original_context_length"))
    attention = metadata.get(f"{arch}.rope.scaling.attn_factor")
    return scaling | ({} if attention is None else {"attention_factor": decimal(attention)})
