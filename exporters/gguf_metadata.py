"""Metadata of a GGUF file, apart from the tokenizer: what it is, where it came from, and every hyper-parameter.

The loader fills in what is missing without a word (rope base 10000, full rotation, soft caps of 50 and 30), so nothing
that it reads is left out, and what it ignores must be neutral in config.json, or the model is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gguf import GGML_QUANT_VERSION, LlamaFileType

from tightship import __version__
from tightship.checkpoint import Checkpoint, digest_json
from tightship.errors import Unsupported, UsageError
from tightship.exporters.gguf_rope import rope
from tightship.formats.gguf_file import Field
from tightship.per_layer import has_unlike_layers
from tightship.untrusted import strict_json

# Config keys that change what a model computes, and the values that change nothing. A family that maps a key names it
# in its architecture file; for all others anything else is refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None,),
    "attn_output_gate": (None, False),
    "clip_qkv": (None,),
    "embedding_multiplier": (None, 1, 1.0),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "no_rope_layers": (None, []),
    "partial_rotary_factor": (None, 1, 1.0),
    "qk_layernorm": (None, False),
    "query_pre_attn_scalar": (None,),
    "residual_multiplier": (None, 1, 1.0),
    "scale_emb": (None, 1),
    "use_qk_norm": (None, False),
}
_FLOAT_KEYS = ("softcapping", "scale", "epsilon", "freq_base", "freq_base_swa", "alibi_bias", "clamp_kqv")
_POOLING = {"pooling_mode_mean_tokens": 1, "pooling_mode_cls_token": 2, "pooling_mode_lasttoken": 3}


def general_fields(checkpoint: Checkpoint, arch: str) -> tuple[dict[str, Field], list[str]]:
    """What the model is and which bytes it was made from; and notes for the user."""
    source = checkpoint.source
    fields = {
        "general.architecture": Field("str", arch),
        "general.type": Field("str", "model"),
        "general.name": Field("str", checkpoint.name),
        "tightship.version": Field("str", __version__),
        "tightship.source.identity": Field("str", source.identity),
        "tightship.source.sha256": Field("str", digest_json(source.to_json()["files"])),
    }
    if source.revision:
        fields["tightship.source.revision"] = Field("str", source.revision)
    if passes := _recipe(checkpoint.history):
        fields["tightship.recipe"] = Field("str", json.dumps(passes, sort_keys=True, separators=(",", ":")))
    notes = []
    lowered = checkpoint.name.lower()
    named = "phi-3" in lowered or "phi3" in lowered
    # The loader turns on whitespace rules of Phi-3's tokenizer for every model whose name holds this word, and breaks
    # off where its special tokens are not in the vocabulary.
    wanted = arch == "phi3" and _has_phi3_tokens(checkpoint.files)
    if named and not wanted:
        del fields["general.name"]
        notes.append(f"general.name is left out: {checkpoint.name!r} would make llama.cpp tokenize as for Phi-3")
    if wanted and not named:
        fields["general.name"] = Field("str", f"phi-3 {checkpoint.name}")
    return fields, notes


def _recipe(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The passes and what they were told, without those of a scheme: `general.file_type` names it."""
    told = []
    for step in (entry for entry in history if "use" in entry):  # others are what a pass noted of itself
        options = {key: value for key, value in step.get("with", {}).items() if value not in (None, {}, [], ())}
        if step["use"] != "quantize" or "layout" in options or "bytes" in options:
            told.append({"use": step["use"], "with": options})
    return told


def _has_phi3_tokens(files: Mapping[str, bytes]) -> bool:
    """Whether the tokenizer is Phi-3's own (Phi-4-mini has its architecture and another tokenizer)."""
    name = "tokenizer.json"
    if name not in files:
        return False
    tokens = {entry.get("content") for entry in strict_json(files[name], name).get("added_tokens", ())}
    return {"</s>", "<unk>", "<s>", "<|endoftext|>"} <= tokens


def closing_fields(file_type: str | None) -> dict[str, Field]:
    """The two keys that llama-quantize puts at the end: the same content is then the same bytes."""
    fields = {"general.quantization_version": Field("u32", GGML_QUANT_VERSION)}
    if file_type is not None:
        fields["general.file_type"] = Field("u32", int(LlamaFileType[file_type]))
    return fields


def model_fields(checkpoint: Checkpoint, context: int | None = None) -> dict[str, Field]:
    """Hyper-parameters under the architecture's prefix. `context` lowers the context length.

    Raises:
        Unsupported: the family is not in GGUF, or a feature that its loader ignores.
    """
    config, hyper = checkpoint.config, checkpoint.hyper
    gguf = gguf_section(checkpoint)
    length = _context(checkpoint, context)
    _check_features(checkpoint, gguf, length)
    fields = {
        "vocab_size": Field("u32", hyper["vocab"]),
        "context_length": Field("u32", length),
        "embedding_length": Field("u32", hyper["hidden"]),
        "block_count": Field("u32", hyper["layers"]),
        "feed_forward_length": _width(checkpoint, "ffn"),
        gguf["norm_key"]: Field("f32", hyper["norm_eps"]),
        **_attention(checkpoint),
    }
    if gguf["rope"] != "none":
        fields |= rope(config, {**hyper, "head_dim": head_dim(hyper)}, gguf).fields
    for key, name in gguf.get("keys", {}).items():
        if hyper.get(name) is not None:
            fields[key] = _typed(key, hyper[name])
    for key, value in gguf.get("constants", {}).items():
        fields[key] = _typed(key, value)
    if fields.get("attention.causal") == Field("bool", False):
        fields["pooling_type"] = Field("u32", _pooling(checkpoint.files))
    prefixed = {f"{gguf['arch']}.{key}": field for key, field in fields.items()}
    if "token_types" in hyper:
        prefixed["tokenizer.ggml.token_type_count"] = Field("u32", hyper["token_types"])
    return prefixed


def _width(checkpoint: Checkpoint, name: str) -> Field:
    """A width of the blocks: a number, or one for each where blocks differ in widths."""
    if not has_unlike_layers(checkpoint.config):
        return Field("u32", checkpoint.hyper.get(name, 0))
    return Field("[u32]", checkpoint.widths(name))


def _attention(checkpoint: Checkpoint) -> dict[str, Field]:
    """Heads and their sizes; none in a model without attention."""
    hyper = checkpoint.hyper
    if "heads" not in hyper:
        return {"attention.head_count": Field("u32", 0)}
    return {
        "attention.head_count": _width(checkpoint, "heads"),
        "attention.head_count_kv": _width(checkpoint, "kv_heads" if "kv_heads" in hyper else "heads"),
        "attention.key_length": Field("u32", head_dim(hyper)),
        "attention.value_length": Field("u32", head_dim(hyper)),
    }


def gguf_section(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The GGUF part of the family's data.

    Raises:
        Unsupported: the family has none; the message says why.
    """
    architecture = checkpoint.architecture
    if architecture.gguf is None:
        why = architecture.gguf_refusal or "its architecture file has no GGUF section"
        raise Unsupported(f"{architecture.family} models cannot be written as GGUF: {why}")
    if not has_unlike_layers(checkpoint.config):
        return architecture.gguf
    return {**architecture.gguf, "arch": _unlike_arch(checkpoint)}


def _unlike_arch(checkpoint: Checkpoint) -> str:
    """llama.cpp's architecture for this family with widths of its own for each layer.

    Raises:
        Unsupported: there is none, or its one size of heads does not fit.
    """
    gguf = checkpoint.architecture.gguf or {}
    if "unlike_arch" not in gguf:
        raise Unsupported(
            f"llama.cpp has no {checkpoint.architecture.family} graph whose layers differ in width",
            hint="leave out uniform: false, or use ONNX",
        )
    sizes = {head_dim(checkpoint.hyper_of(n)) for n in range(int(checkpoint.hyper["layers"]))}
    if len(sizes) > 1:
        raise Unsupported(f"llama.cpp wants heads of one size in all layers, found {sorted(sizes)}")
    return str(gguf["unlike_arch"])


def head_dim(hyper: Mapping[str, Any]) -> int:
    return int(hyper.get("head_dim") or hyper["hidden"] // hyper["heads"])


def _context(checkpoint: Checkpoint, context: int | None) -> int:
    longest = int(checkpoint.hyper["context"])
    if context is None:
        return longest
    if not isinstance(context, int) or not 0 < context <= longest:
        raise UsageError(f"context must be 1 to {longest} for this model, found {context!r}")
    learned = [rule.disk for rule in checkpoint.architecture.tensors if rule.role == "position_embd"]
    if learned and context != longest:
        raise UsageError(
            f"this model's {longest} positions are learned, and llama.cpp takes their number for the context",
            hint="leave the context out",
        )
    return context


def _check_features(checkpoint: Checkpoint, gguf: Mapping[str, Any], length: int) -> None:
    config, hyper = checkpoint.config, checkpoint.hyper
    activation = hyper.get("activation")
    if "activation" in hyper and activation not in gguf["activation"]:
        raise Unsupported(
            f"llama.cpp's {gguf['arch']} computes {' or '.join(gguf['activation'])}, the model has {activation!r}",
            hint="use ONNX or safetensors for this model",
        )
    window = active_window(config)
    if gguf["window"] != "read" and window is not None and window < length:
        raise Unsupported(
            f"llama.cpp's {gguf['arch']} ignores sliding windows: the model attends to {window} tokens, the file would "
            f"attend to all {length}",
            hint=f"set the target's context to {window} (with: {{context: {window}}}), where the two are the same",
        )
    checkpoint.architecture.check_gguf(config)
    mapped = _mapped_keys(checkpoint)
    for key, neutral in _NEUTRAL.items():
        if key in config and key not in mapped and config[key] not in neutral:
            raise Unsupported(f"llama.cpp's {gguf['arch']} does not read {key}, and config.json says {config[key]!r}")


def active_window(config: Mapping[str, Any]) -> int | None:
    """The sliding window of a config.json, or None where no layer uses one."""
    window = config.get("sliding_window")
    if window is None or config.get("use_sliding_window") is False:
        return None
    layers = config.get("layer_types")
    if layers is not None and "sliding_attention" not in layers:
        return None
    return int(window)


def _mapped_keys(checkpoint: Checkpoint) -> set[str]:
    options = checkpoint.architecture.config.values()
    words = {str(word) for option in options for word in (option if isinstance(option, list) else [option])}
    rules = (*checkpoint.architecture.refuses, *(checkpoint.architecture.gguf or {}).get("requires", ()))
    refused = {str(rule["key"]) for rule in rules}
    return {word.partition("?")[0].split(".")[-1] for word in words | refused}


def _typed(key: str, value: Any) -> Field:
    if isinstance(value, list):
        return Field("[f32]" if any(isinstance(v, float) for v in value) else "[i32]", value)
    if isinstance(value, bool):
        return Field("bool", value)
    if isinstance(value, str):
        return Field("str", value)
    return Field("f32", value) if isinstance(value, float) or key.endswith(_FLOAT_KEYS) else Field("u32", value)


def _pooling(files: Mapping[str, bytes]) -> int:
    """llama.cpp's number for how a sentence-transformers model pools; 0 (not at all) where nothing is said.

    Raises:
        Unsupported: a way of pooling that llama.cpp lacks.
    """
    name = "1_Pooling/config.json"
    if name not in files:
        return 0
    modes = [key for key, on in strict_json(files[name], name).items() if key.startswith("pooling_mode") and on is True]
    if len(modes) != 1 or modes[0] not in _POOLING:
        raise Unsupported(f"{name}: llama.cpp pools by mean, by cls or by the last token, found {modes}")
    return _POOLING[modes[0]]
