"""Rules about GGUF files: keys that llama.cpp fills in by itself, and keys that it never reads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from tightship.validators.lint.artifact import Artifact
from tightship.validators.lint.rules import rule

Found = Iterator[tuple[str, str]]
_COMMIT = "llama.cpp 0c1e57098"
_MEASURED = f"{_COMMIT}, measured: identical logits"
_BOTH = "llama.cpp ollama"
_NO_WINDOW = ("llama", "qwen2", "starcoder2", "phi3")
_YARN_READERS = ("grok", "mistral3")
_SCALED_SOFTMAX = ("granite", "granitemoe")
_SCALED_LOGITS = ("granite", "granitemoe", "command-r", "cohere2")
_SECOND_SCALE = ("llama", "qwen3", "qwen3moe", "qwen2moe", "cohere2", "granite", "mistral3", "deepseek2")
_NO_ROPE = ("gpt2", "bloom", "mpt", "bert", "t5", "mamba")


def key(artifact: Artifact, suffix: str) -> Any:
    """A hyper-parameter of the file's architecture."""
    metadata = artifact.gguf.metadata
    return metadata.get(f"{metadata.get('general.architecture')}.{suffix}")


def arch(artifact: Artifact) -> str:
    return str(artifact.gguf.metadata.get("general.architecture"))


@rule("window-ignored", "gguf", _BOTH, "quiet", f"{_MEASURED} (llama, qwen2); phi3: PR #13676")
def window_ignored(artifact: Artifact) -> Found:
    """The key loads, and attention stays full."""
    if arch(artifact) in _NO_WINDOW and key(artifact, "attention.sliding_window"):
        yield "attention.sliding_window", f"{arch(artifact)} computes full attention all the same"


@rule("window-pattern", "gguf", _BOTH, "quiet", f"{_COMMIT}, measured: nmse 0.39; the rest is dense")
def window_pattern(artifact: Artifact) -> Found:
    """The length of the pattern is not checked."""
    pattern, blocks = key(artifact, "attention.sliding_window_pattern"), key(artifact, "block_count")
    if isinstance(pattern, (list, np.ndarray)) and len(pattern) != blocks:
        yield "attention.sliding_window_pattern", f"has {len(pattern)} entries for {blocks} blocks"


@rule("rope-factor-needs-type", "gguf", _BOTH, "quiet", f"{_COMMIT}, measured: linear interpolation, nmse 0.12")
def rope_factor_needs_type(artifact: Artifact) -> Found:
    """A factor without a type is applied as linear."""
    if key(artifact, "rope.scaling.factor") and key(artifact, "rope.scaling.type") is None:
        yield "rope.scaling.type", "is absent, and the factor is applied as linear interpolation"


@rule("rope-types", "gguf", _BOTH, "loud", f"{_COMMIT} llama-model.cpp: any other string aborts")
def rope_types(artifact: Artifact) -> Found:
    """none, linear, yarn, longrope."""
    kind = key(artifact, "rope.scaling.type")
    if kind not in (None, "none", "linear", "yarn", "longrope"):
        yield "rope.scaling.type", f"is {kind!r}"


@rule("yarn-keys", "gguf", _BOTH, "quiet", f"{_MEASURED}: read by grok and mistral3 alone")
def yarn_keys(artifact: Artifact) -> Found:
    """YaRN's betas and factors."""
    for suffix in ("yarn_beta_fast", "yarn_beta_slow", "yarn_ext_factor", "yarn_attn_factor"):
        if arch(artifact) not in _YARN_READERS and key(artifact, f"rope.scaling.{suffix}") is not None:
            yield f"rope.scaling.{suffix}", f"{arch(artifact)} ignores it"


@rule("rope-said", "gguf", _BOTH, "quiet", f"{_COMMIT} load_hparams: base 10000, full rotation where absent")
def rope_said(artifact: Artifact) -> Found:
    """Defaults that need not be the model's."""
    if arch(artifact) in _NO_ROPE:
        return
    for suffix, what in (("rope.freq_base", "10000 is used"), ("rope.dimension_count", "every dimension is rotated")):
        if key(artifact, suffix) is None:
            yield suffix, f"is absent: {what}"


@rule("fused-biases", "gguf", _BOTH, "quiet", f"{_COMMIT} build_qkv, measured: one or two biases are dropped")
def fused_biases(artifact: Artifact) -> Found:
    """A fused qkv with some of the separate biases."""
    for name in artifact.gguf.tensors:
        stem = name.removesuffix("attn_qkv.weight")
        if stem == name or f"{stem}attn_qkv.bias" in artifact.gguf.tensors:
            continue
        count = sum(f"{stem}attn_{part}.bias" in artifact.gguf.tensors for part in "qkv")
        if count in (1, 2):
            yield name, f"{count} of three separate biases are there, and dropped"


@rule("soft-caps-said", "gguf", _BOTH, "quiet", f"{_COMMIT} gemma2.cpp, measured: caps of 50 and 30 where absent")
def soft_caps_said(artifact: Artifact) -> Found:
    """Gemma 2 without caps cannot be said by leaving them out."""
    for suffix in ("attn_logit_softcapping", "final_logit_softcapping"):
        if arch(artifact) == "gemma2" and key(artifact, suffix) is None:
            yield suffix, "is absent: llama.cpp caps by 50 and 30"


@rule("depth-decides", "gguf", _BOTH, "note", f"{_COMMIT}: attention scale by depth (gemma2: 46, gemma3: 62 blocks)")
def depth_decides(artifact: Artifact) -> Found:
    """A 27B with layers removed gets another attention scale."""
    deep = {"gemma2": 46, "gemma3": 62}.get(arch(artifact))
    if deep and key(artifact, "embedding_length") in (4608, 5376) and key(artifact, "block_count") != deep:
        yield "block_count", f"is not {deep}, so the attention scale is 1/sqrt(head_dim)"


@rule(
    "second-scale", "gguf", _BOTH, "quiet", f"{_COMMIT} llama-model.cpp 1634-1780: loaded, applied in some FFNs alone"
)
def second_scale(artifact: Artifact) -> Found:
    """NVFP4's `.scale` tensors."""
    scales = [name for name in artifact.gguf.tensors if name.endswith(".scale")]
    if scales and arch(artifact) not in _SECOND_SCALE:
        yield scales[0], f"{arch(artifact)} loads it and does not apply it"


@rule("expert-groups", "gguf", _BOTH, "quiet", f"{_COMMIT}: group-limited routing for any architecture")
def expert_groups(artifact: Artifact) -> Found:
    """expert_group_count where the model has no groups."""
    if (key(artifact, "expert_group_count") or 0) > 1 and arch(artifact) not in ("deepseek2", "glm4moe", "bailingmoe2"):
        yield "expert_group_count", f"{arch(artifact)} then routes within groups"


@rule(
    "scales-unread", "gguf", _BOTH, "quiet", f"{_MEASURED}: attention.scale and logit_scale outside granite and cohere"
)
def scales_unread(artifact: Artifact) -> Found:
    """Scales that only some architectures read."""
    for suffix, readers in (("attention.scale", _SCALED_SOFTMAX), ("logit_scale", _SCALED_LOGITS)):
        if key(artifact, suffix) is not None and arch(artifact) not in readers:
            yield suffix, f"{arch(artifact)} ignores it"


@rule("defaults-that-switch-off", "gguf", _BOTH, "quiet", f"{_COMMIT} mpt.cpp, command-r.cpp")
def defaults_that_switch_off(artifact: Artifact) -> Found:
    """ALiBi of MPT, logits of Command-R."""
    for family, suffix, what in (
        ("mpt", "attention.max_alibi_bias", "no ALiBi"),
        ("command-r", "logit_scale", "unscaled logits"),
    ):
        if arch(artifact) == family and key(artifact, suffix) is None:
            yield suffix, f"is absent: {what}"


@rule(
    "attention-without-ffn", "gguf", _BOTH, "quiet", f"{_COMMIT} deci.cpp, measured: the attention output is discarded"
)
def attention_without_ffn(artifact: Artifact) -> Found:
    """deci: heads kept, feed-forward width 0."""
    widths, heads = key(artifact, "feed_forward_length"), key(artifact, "attention.head_count")
    if arch(artifact) != "deci" or not isinstance(widths, (list, np.ndarray)):
        return
    for block, width in enumerate(widths):
        count = heads[block] if isinstance(heads, (list, np.ndarray)) else heads
        if width == 0 and count > 0:
            yield f"blk.{block}", "has attention and a feed-forward width of 0; use 1 with a zero ffn_down"


@rule("scalar-types", "gguf", _BOTH, "loud", f"{_COMMIT}, measured: wrong type i32 but expected u32")
def scalar_types(artifact: Artifact) -> Found:
    """Counts are unsigned; the reader tells a negative one apart."""
    for suffix in ("block_count", "context_length", "embedding_length"):
        if (key(artifact, suffix) or 0) <= 0:
            yield suffix, f"is {key(artifact, suffix)}"


@rule("pre-tokenizer", "gguf", _BOTH, "quiet", f"{_COMMIT} llama-vocab.cpp, measured: default splitting, BOS lost")
def pre_tokenizer(artifact: Artifact) -> Found:
    """Byte-level BPE without `tokenizer.ggml.pre`."""
    metadata = artifact.gguf.metadata
    if metadata.get("tokenizer.ggml.model") == "gpt2" and not metadata.get("tokenizer.ggml.pre"):
        yield "tokenizer.ggml.pre", "is absent: text is split by the default expression"


@rule(
    "unigram-keys",
    "gguf",
    _BOTH,
    "quiet",
    f"{_COMMIT} llama-vocab.cpp: zero scores; no normalisation; no leading space",
)
def unigram_keys(artifact: Artifact) -> Found:
    """What SentencePiece vocabularies must say."""
    metadata = artifact.gguf.metadata
    wanted = {"llama": ("scores",), "t5": ("scores", "precompiled_charsmap", "add_space_prefix")}
    for suffix in wanted.get(str(metadata.get("tokenizer.ggml.model")), ()):
        if metadata.get(f"tokenizer.ggml.{suffix}") is None:
            yield f"tokenizer.ggml.{suffix}", "is absent"


@rule("phi3-by-name", "gguf", _BOTH, "quiet", f"{_COMMIT}, measured: general.name decides about right-stripping")
def phi3_by_name(artifact: Artifact) -> Found:
    """A model called phi-3 that is none, or one that is not called so."""
    named = re.search(r"phi-?3", str(artifact.gguf.metadata.get("general.name", "")), re.IGNORECASE) is not None
    if named != (arch(artifact) == "phi3"):
        yield "general.name", "special tokens strip spaces by this name, not by the architecture"


@rule("finite-scales", "gguf", _BOTH, "quiet", f"{_COMMIT}: check_tensors is off, NaN and Inf load")
def finite_scales(artifact: Artifact) -> Found:
    """Every stored value, decoded."""
    for name, tensor in artifact.gguf.tensors.items():
        if not np.isfinite(tensor.weight().value()).all():
            yield name, "holds NaN or infinity"


@rule(
    "bos-said",
    "gguf",
    "ollama",
    "quiet",
    "Ollama llm/llama_server.go::tokenizerAddsBOS@fb3076099: absent means doubled",
)
def bos_said(artifact: Artifact) -> Found:
    """Ollama strips a rendered BOS only where the key says that llama.cpp adds one."""
    if artifact.gguf.metadata.get("tokenizer.ggml.add_bos_token") is None:
        yield "tokenizer.ggml.add_bos_token", "is absent: a template's BOS may be doubled"


@rule("erf-gelu", "gguf", _BOTH, "note", f"{_COMMIT} ggml-cpu/vec.h: tanh from a float16 table")
def erf_gelu(artifact: Artifact) -> Found:
    """Families with the erf form differ by some 1e-4 a layer."""
    if arch(artifact) in ("bert", "gptneox", "modern-bert", "falcon"):
        yield arch(artifact), "GELU is computed in its tanh form"
