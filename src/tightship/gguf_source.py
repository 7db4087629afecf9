"""A GGUF file as a checkpoint: on-disk names of its family, rows back in their order, codes kept as they are.

The inverse of exporters/to_gguf.py, for families whose architecture file has a GGUF section: tensors are found under
their GGUF names, permuted rows are put back, stacks of experts are taken apart, and config.json is written from the
metadata. Nothing is decoded: a Q4_K tensor stays Q4_K.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tightship.architecture import Architecture, TensorInfo, TensorRule, all_architectures, full_layers, literal
from tightship.checkpoint import Checkpoint, Source, check_tensors
from tightship.errors import Malformed, Unsupported
from tightship.target import Progress, no_progress
from tightship.weights import Alias, Dense, Quantized, Weight

Metadata = Mapping[str, Any]


def open_gguf(path: str | Path, progress: Progress = no_progress, *, hashed: bool = True) -> Checkpoint:
    """Open a GGUF file, or the first of its shards.

    Raises:
        UsageError: no such file.
        Malformed: the file breaks the container's rules, or its tensors do not fit its metadata.
        Unsupported: an architecture, tensor type, tokenizer or rope scaling that we cannot say in config.json.
    """
    from tightship.exporters.gguf_tokenizer_files import tokenizer_files
    from tightship.formats.gguf_shards import read_shards

    path = Path(path)
    file = read_shards(path)
    architecture = _family(file.metadata)
    config = _config(architecture, file.metadata, file.tensors)
    weights = _weights(architecture, config, file.tensors)
    checkpoint = Checkpoint(
        name=_name(str(file.metadata.get("general.name") or path.stem)),
        config=config,
        weights=weights,
        files=tokenizer_files(file.metadata),
        architecture=architecture,
        source=Source(path.name, None, (), {p.name: p for p in file.paths}),
    )
    architecture.check_supported(config)
    check_tensors(checkpoint)
    return checkpoint.replace(source=checkpoint.source.hashed(progress)) if hashed else checkpoint


def _name(text: str) -> str:
    """A file's own word for itself as a part of file names: letters, digits and `._+-`, nothing hidden or long."""
    return re.sub(r"[^\w.+-]+", "-", text).strip(".-")[:96] or "model"


def _family(metadata: Metadata) -> Architecture:
    """The family of the file's architecture, with experts or without; its namesake where several share one."""
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise Unsupported(f"this GGUF file holds no model: its general.type is {kind!r}")
    arch = metadata["general.architecture"]
    candidates = [a for a in all_architectures() if a.gguf is not None and a.gguf["arch"] == arch]
    if not candidates:
        raise Unsupported(f"GGUF architecture {arch!r} cannot be opened as a source", hint="start from the original")
    experts = bool(metadata.get(f"{arch}.expert_count"))
    fitting = [a for a in candidates if any("{e}" in rule.disk for rule in a.tensors) == experts]
    whole = [a for a in fitting if all(_derivable(rule, a) for rule in a.tensors)]
    if not whole:
        raise Unsupported(
            f"a {arch} file lacks tensors that a checkpoint of its family needs",
            hint="start from the original",
        )
    return next((a for a in whole if a.family == arch), whole[0])


def _derivable(rule: TensorRule, architecture: Architecture) -> bool:
    """Whether a file can hold the tensor, or a checkpoint do without it."""
    borrowed = {borrower for borrower, _ in architecture.ties}
    return bool(rule.gguf or rule.optional or rule.when or rule.disk in borrowed)


# --- config.json ------------------------------------------------------------------------------------------------


def _config(architecture: Architecture, metadata: Metadata, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the metadata: every key that the family's data reads, and what the class needs beside them."""
    gguf = architecture.gguf or {}
    arch = gguf["arch"]
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise Malformed("there is no token_embd.weight", tensor="token_embd.weight")
    found = {
        "layers": _need(metadata, arch, "block_count"),
        "hidden": _need(metadata, arch, "embedding_length"),
        "ffn": _need(metadata, arch, "feed_forward_length"),
        "heads": _need(metadata, arch, "attention.head_count"),
        "context": _need(metadata, arch, "context_length"),
        "norm_eps": decimal(_need(metadata, arch, gguf["norm_key"])),
        "activation": next(iter(gguf["activation"]), None),
        "vocab": embedding.shape[0],
        "tied": "output.weight" not in tensors,
    }
    found["kv_heads"] = metadata.get(f"{arch}.attention.head_count_kv", found["heads"])
    found["head_dim"] = metadata.get(f"{arch}.attention.key_length", found["hidden"] // max(found["heads"], 1))
    for suffix, name in gguf.get("keys", {}).items():
        if f"{arch}.{suffix}" in metadata:
            found[name] = metadata[f"{arch}.{suffix}"]
    config: dict[str, Any] = {"architectures": [architecture.classes[0]], "model_type": architecture.model_types[0]}
    config["tie_word_embeddings"] = found["tied"]
    for name, alternatives in architecture.config.items():
        first = str(alternatives[0] if isinstance(alternatives, list) else alternatives)
        if first.isidentifier() and found.get(name) is not None:
            config[first] = found[name]
    config |= _demanded(architecture, config, int(found["layers"]))
    if gguf["rope"] != "none":
        config["rope_parameters"] = rope_parameters(
            metadata, arch, found, tensors, partial="rotary" in architecture.config
        )
    for kind in ("bos", "eos", "padding"):
        number = metadata.get(f"tokenizer.ggml.{kind}_token_id")
        if number is not None:
            config[f"{kind.replace('padding', 'pad')}_token_id"] = int(number)
    return config | _biases(tensors)


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
    metadata: Metadata, arch: str, found: Mapping[str, Any], tensors: Mapping[str, Any], *, partial: bool = False
) -> dict[str, Any]:
    """Rotary settings in transformers' words; those of sliding layers apart where they have a base of their own.

    `partial` says that the family can rotate a part of each head.

    Raises:
        Unsupported: a scaling that config.json cannot say, or factors that are not Llama 3's.
    """
    parameters = _one_kind(metadata, arch, found, tensors, partial)
    local = metadata.get(f"{arch}.rope.freq_base_swa")
    if local is None:
        return parameters
    return {
        "full_attention": parameters,
        "sliding_attention": {"rope_type": "default", "rope_theta": decimal(local)},
    }


def _one_kind(
    metadata: Metadata, arch: str, found: Mapping[str, Any], tensors: Mapping[str, Any], partial: bool
) -> dict[str, Any]:
    from tightship.exporters.gguf_rope import llama3_factors

    kind = metadata.get(
        f"{arch}.rope.scaling.type", "none" if f"{arch}.rope.scaling.factor" not in metadata else "linear"
    )
    width = int(metadata.get(f"{arch}.rope.dimension_count", found["head_dim"]))
    parameters: dict[str, Any] = {"rope_theta": decimal(metadata.get(f"{arch}.rope.freq_base", 10000.0))}
    if width != found["head_dim"] and partial:
        parameters["partial_rotary_factor"] = width / found["head_dim"]
    elif width != found["head_dim"]:
        raise Unsupported(f"{arch} rotates {width} of {found['head_dim']} dimensions, which is not mapped back")
    if "rope_freqs.weight" in tensors:
        factors = tensors["rope_freqs.weight"].weight().value()
        given = {"factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        given["original_max_position_embeddings"] = 8192
        if not np.allclose(llama3_factors(given, parameters["rope_theta"], width), factors, rtol=1e-5):
            raise Unsupported("rope_freqs.weight does not hold Llama 3's factors", tensor="rope_freqs.weight")
        return parameters | {"rope_type": "llama3"} | given
    if kind in ("linear", "yarn"):
        parameters |= {"rope_type": kind, "factor": decimal(_need(metadata, arch, "rope.scaling.factor"))}
        if kind == "yarn":
            original = _need(metadata, arch, "rope.scaling.original_context_length")
            parameters["original_max_position_embeddings"] = int(original)
        return parameters
    if kind != "none":
        raise Unsupported(f"rope scaling {kind!r} of a GGUF file is not mapped back")
    return parameters | {"rope_type": "default"}


# --- weights ----------------------------------------------------------------------------------------------------


def _weights(architecture: Architecture, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Weight]:
    weights: dict[str, Weight] = {}
    used = {"rope_freqs.weight"}
    hyper = architecture.hyper(config)
    for name, info in architecture.lookup(config).items():
        stored = info.rule.gguf and info.rule.gguf.format(i=info.block, e=info.expert)
        if stored in tensors:
            used.add(str(stored))
            weights[name] = _back(tensors[str(stored)].weight(), info, hyper)
    surplus = sorted(set(tensors) - used)
    if surplus:
        raise Malformed(f"{len(surplus)} tensors mean nothing to {architecture.family}", tensor=surplus[0])
    if hyper["tied"]:
        weights |= {borrower: Alias(owner) for borrower, owner in architecture.ties if owner in weights}
    return weights


def _back(weight: Dense | Quantized, info: TensorInfo, hyper: Mapping[str, Any]) -> Dense | Quantized:
    """The weight in the checkpoint's order: one expert of a stack, rows put back, a shift taken off."""
    from tightship.exporters.gguf_tensors import FORMULAS, computed, row_order

    if info.expert is not None:
        weight = _expert(weight, info)
    word = info.rule.transform
    if word is None:
        return weight
    if word in FORMULAS:
        return computed(Dense(weight.shape, "f32", weight.value), FORMULAS[word][1], hyper)
    order = np.argsort(row_order(word, weight.shape[0], hyper))
    if isinstance(weight, Quantized):
        return weight.take_rows(order)
    return Dense(weight.shape, weight.dtype, lambda: weight.read()[order])


def _expert(weight: Dense | Quantized, info: TensorInfo) -> Dense | Quantized:
    number, rows = int(info.expert or 0), info.shape[0]
    if isinstance(weight, Quantized):
        return weight.take_rows(range(number * rows, (number + 1) * rows))
    return Dense(weight.shape[1:], weight.dtype, lambda: weight.read()[number])
