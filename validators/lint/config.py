"""Rules about config.json and what every safetensors loader makes of it."""

from __future__ import annotations

from collections.abc import Iterator

from tightship.validators.lint.artifact import Artifact
from tightship.validators.lint.rules import rule

Found = Iterator[tuple[str, str]]
_SILU_ONLY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


@rule(
    "rope-both-forms", "safetensors", "vllm tgi ollama", "quiet",
    "TGI db931fcf and Ollama convert/convert_llama.go@fb3076099 know only rope_theta; vLLM PR #42624 (transformers 4)",
)  # fmt: skip
def rope_both_forms(artifact: Artifact) -> Found:
    """transformers 5 writes rope_parameters alone; readers of the old names fall back to base 10000."""
    new = artifact.config.get("rope_parameters") or {}
    if new and "rope_theta" not in artifact.config and "rope_theta" in new:
        yield "config.json", "rope_theta stands in rope_parameters alone: older readers use 10000"


@rule("rope-one-type", "safetensors", "vllm sglang tgi", "note", "ExLlamaV2 config.py@da07fac asserts on both keys")
def rope_one_type(artifact: Artifact) -> Found:
    """`type` beside `rope_type`."""
    scaling = artifact.config.get("rope_scaling") or {}
    if "type" in scaling and "rope_type" in scaling:
        yield "rope_scaling", "has both `type` and `rope_type`; write `rope_type` alone"


@rule(
    "tied-head", "safetensors", "vllm sglang", "quiet",
    "vLLM model files: AutoWeightsLoader(skip_prefixes=['lm_head.'] if tie_word_embeddings)",
)  # fmt: skip
def tied_head(artifact: Artifact) -> Found:
    """A head in the file of a tied model is skipped."""
    stored = [name for name in artifact.shapes if name.startswith("lm_head.")]
    if artifact.config.get("tie_word_embeddings") and stored:
        yield stored[0], "config.json ties the embeddings, so every lm_head tensor is ignored"


@rule("silu-only", "safetensors", "vllm sglang", "loud", "vLLM and SGLang Llama-family MLPs: 'Only silu is supported'")
def silu_only(artifact: Artifact) -> Found:
    """Llama-like blocks take no other activation."""
    classes, activation = artifact.config.get("architectures") or [], artifact.config.get("hidden_act", "silu")
    if any(name in _SILU_ONLY for name in classes) and activation != "silu":
        yield "hidden_act", f"is {activation}; the MLP of {classes[0]} takes silu alone"


@rule(
    "half-range",
    "safetensors",
    "vllm",
    "quiet",
    "vLLM creates scales in the run dtype: a bf16 file run as fp16 casts them",
)
def half_range(artifact: Artifact) -> Found:
    """Scales beyond float16."""
    for name in artifact.shapes:
        if name.endswith((".weight_scale", ".scales")) and artifact.read(name).astype("f4").max(initial=0) > 65504:
            yield name, "a scale beyond 65504 becomes infinite in float16"
