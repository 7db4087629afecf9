"""Further families through llama.cpp: experts, fused matrices, shifted norms, windows, soft caps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tightship.errors import Unsupported
from tightship.exporters.to_gguf import GgufExporter
from tightship.formats.gguf_file import read_gguf
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.target import Target
from tightship.validators.stored_gguf import GgufStored
from tightship.validators.values import prove_values

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
GEMMA = {**SIZES, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
FALCON = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": 64,
}
T5 = {"vocab_size": 512, "d_model": 64, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4}
MPT = {"vocab_size": 512, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}
STRETCHED = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0, "alpha": 1000.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
SHARED = {**EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48}
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
LATENT |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 2, "moe_intermediate_size": 32}
LATENT |= {"num_key_value_heads": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
MSCALE = {"mscale": 0.7, "mscale_all_dim": 0.7}
SCALES = {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3, "logits_scaling": 3.0}
NEOX = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 2, "moe_intermediate_size": 32}
ROUTED |= {"first_k_dense_replace": 1, "num_key_value_heads": 4, "sliding_window": None}
SPECIAL = {f"{kind}_token_id": 0 for kind in ("pad", "bos", "eos", "cls", "sep")}
BASES = {
    "full_attention": {"rope_type": "default", "rope_theta": 2e3},
    "sliding_attention": {"rope_type": "default", "rope_theta": 3e2},
}
EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": (
        "MixtralForCausalLM",
        {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        {**SIZES, **EXPERTS, "head_dim": 16, "moe_intermediate_size": 32, "norm_topk_prob": True},
    ),
    "qwen2-moe": ("Qwen2MoeForCausalLM", {**SIZES, **SHARED}),
    "seed-oss": ("SeedOssForCausalLM", {**SIZES, "head_dim": 32, "attention_out_bias": False}),
    "hunyuan": ("HunYuanDenseV1ForCausalLM", {**SIZES, "head_dim": 32, "tie_word_embeddings": True}),
    "hunyuan-stretched": ("HunYuanDenseV1ForCausalLM", {**SIZES, "head_dim": 32, "rope_parameters": STRETCHED}),
    "hunyuan-moe": (
        "HunYuanMoEV1ForCausalLM",
        {**SIZES, "head_dim": 32, "num_experts": 4, "moe_topk": [2, 2], "tie_word_embeddings": True},
    ),
    "dots1": ("Dots1ForCausalLM", {**NEOX, **ROUTED, "norm_topk_prob": True, "routed_scaling_factor": 2.0}),
    "dots1-shares": ("Dots1ForCausalLM", {**NEOX, **ROUTED, "norm_topk_prob": False}),
    "umt5": ("UMT5ForConditionalGeneration", {**T5, "num_layers": 3, "feed_forward_proj": "relu"}),
    "olmoe": ("OlmoeForCausalLM", {**SIZES, **EXPERTS, "num_key_value_heads": 4}),
    "olmo2": ("Olmo2ForCausalLM", SIZES),
    "granite": ("GraniteForCausalLM", {**SIZES, **SCALES, "attention_bias": True, "mlp_bias": True}),
    "stablelm": ("StableLmForCausalLM", {**SIZES, "use_qkv_bias": True}),
    "stablelm-parallel": ("StableLmForCausalLM", {**SIZES, "use_parallel_residual": True}),
    "cohere": ("CohereForCausalLM", {**SIZES, "logit_scale": 0.3}),
    "olmo": ("OlmoForCausalLM", {**SIZES, "eos_token_id": 0}),
    "olmo-clamped": ("OlmoForCausalLM", {**SIZES, "eos_token_id": 0, "clip_qkv": 0.5, "tie_word_embeddings": True}),
    "smollm3": ("SmolLM3ForCausalLM", {**SIZES, "num_hidden_layers": 5, "pad_token_id": 0}),
    "smollm3-yarn": (
        "SmolLM3ForCausalLM",
        {**SIZES, "num_hidden_layers": 4, "pad_token_id": 0, "rope_parameters": YARN},
    ),
    "glm4": ("Glm4ForCausalLM", {**SIZES, "head_dim": 32, "pad_token_id": 0}),
    "glm4-rotated": (
        "Glm4ForCausalLM",
        {**SIZES, "pad_token_id": 0, "head_dim": 16, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
    ),
    "deepseek2": ("DeepseekV2ForCausalLM", {**SIZES, **LATENT, "routed_scaling_factor": 3.0}),
    "deepseek2-lite": (
        "DeepseekV2ForCausalLM",
        {**SIZES, **LATENT, "q_lora_rank": None, "num_hidden_layers": 27, "rope_parameters": {**YARN, **MSCALE}},
    ),
    "deepseek3": ("DeepseekV3ForCausalLM", {**SIZES, **LATENT, "rope_parameters": {**YARN, **MSCALE}}),
    "deepseek3-groups": (
        "DeepseekV3ForCausalLM",
        {**SIZES, **LATENT, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "norm_topk_prob": False},
    ),
    "mamba": ("MambaForCausalLM", {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}),
    "t5": ("T5ForConditionalGeneration", T5),
    "t5-untied": (
        "T5ForConditionalGeneration",
        {**T5, "num_layers": 3, "num_decoder_layers": 2, "tie_word_embeddings": False},
    ),
    "nomic-bert": ("NomicBertModel", NEOX),
    "phi3": ("Phi3ForCausalLM", {**SIZES, "pad_token_id": 0, "sliding_window": None}),
    "phi3-longrope": ("Phi3ForCausalLM", {**SIZES, "pad_token_id": 0, "sliding_window": None, "rope_parameters": LONG}),
}
GELU: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("Gemma2ForCausalLM", {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma2-uncapped": (
        "Gemma2ForCausalLM",
        {**GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": ("Gemma3ForCausalLM", {**GEMMA, "num_hidden_layers": 6}),
    "gemma3-scaled": (
        "Gemma3ForCausalLM",
        {
            **GEMMA,
            "num_hidden_layers": 6,
            "final_logit_softcapping": 3.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 3e3},
            },
        },
    ),
    "gemma": ("GemmaForCausalLM", {**SIZES, "head_dim": 32}),
    "bert": ("BertModel", NEOX),
    "modernbert": ("ModernBertModel", {**NEOX, **SPECIAL, "num_hidden_layers": 5, "local_attention": 12}),
    "modernbert-rotated": (
        "ModernBertModel",
        {**NEOX, **SPECIAL, "num_hidden_layers": 4, "local_attention": 7, "rope_parameters": BASES},
    ),
    "umt5-gated": ("UMT5ForConditionalGeneration", T5),
    "t5-gated": ("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu", "num_layers": 3}),
    "starcoder2": ("Starcoder2ForCausalLM", SIZES),
    "phi": ("PhiForCausalLM", SIZES),
    "gpt-neox": ("GPTNeoXForCausalLM", NEOX),
    "gpt-neox-sequential": ("GPTNeoXForCausalLM", {**NEOX, "use_parallel_residual": False}),
    "bloom": ("BloomForCausalLM", {"vocab_size": 512, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "mpt": ("MptForCausalLM", MPT),
    "mpt-clamped": ("MptForCausalLM", {**MPT, "n_heads": 6, "d_model": 96, "attn_config": {"clip_qkv": 0.5}}),
    "falcon-7b": ("FalconForCausalLM", FALCON),
    "falcon-40b": ("FalconForCausalLM", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b": (
        "FalconForCausalLM",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-separate": ("FalconForCausalLM", {**FALCON, "multi_query": False}),
}


def relative(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Relative L2 distance of each position."""
    distance = np.linalg.norm(found.astype(np.float64) - expected, axis=-1)
    return distance / np.linalg.norm(expected.astype(np.float64), axis=-1)


@pytest.mark.parametrize("name", [*EXACT, *GELU])
def test_logits_are_those_of_transformers(  # noqa: PLR0917 - fixtures
    name: str, save_model: Callable, byte_level: Path, to_file: Callable, steep: Callable, in_llama_cpp: Callable
) -> None:
    """The graph, at every position; what llama.cpp's table of GELU costs is measured elsewhere."""
    checkpoint = open_checkpoint(save_model(*{**EXACT, **GELU}[name], byte_level))
    checkpoint = steep(checkpoint) if name in GELU else checkpoint
    plan, file = to_file(checkpoint)
    proof = prove_values(checkpoint, plan, GgufStored(checkpoint, plan, [file]))
    assert [check for check in proof.checks if check.verdict == "fail"] == []
    ids = np.random.default_rng(1).integers(3, 500, (2, 40))
    what, found = next(iter(in_llama_cpp(file, ids).items()))
    distances = relative(found, ModelView(checkpoint).outputs(ids)[what])
    assert distances.max() <= 1e-5


@pytest.mark.parametrize(
    ("class_name", "config", "key"),
    [
        ("SeedOssForCausalLM", {**SIZES, "attention_out_bias": True}, "attention_out_bias"),
        ("HunYuanDenseV1ForCausalLM", {**SIZES, "head_dim": 16, "attention_bias": True}, "attention_bias"),
        ("HunYuanMoEV1ForCausalLM", {**SIZES, "head_dim": 16, "attention_bias": True}, "attention_bias"),
        ("Dots1ForCausalLM", {**NEOX, **ROUTED, "n_group": 2}, "n_group"),
        ("Dots1ForCausalLM", {**NEOX, **ROUTED, "num_key_value_heads": 2}, "num_key_value_heads"),
        ("Gemma2ForCausalLM", {**GEMMA, "query_pre_attn_scalar": 32}, "query_pre_attn_scalar"),
        ("Gemma2ForCausalLM", {**GEMMA, "num_hidden_layers": 46}, "num_hidden_layers"),
        ("Gemma2ForCausalLM", {**GEMMA, "tie_word_embeddings": False}, "tie_word_embeddings"),
        ("Gemma2ForCausalLM", {**GEMMA, "layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("Gemma3ForCausalLM", {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ("Gemma3ForCausalLM", {**GEMMA, "num_hidden_layers": 62}, "num_hidden_layers"),
        ("Gemma3ForCausalLM", {**GEMMA, "num_hidden_layers": 5}, "num_hidden_layers"),
        (
            "Gemma3ForCausalLM",
            {**GEMMA, "num_hidden_layers": 6, "attn_logit_softcapping": 50.0},
            "attn_logit_softcapping",
        ),
        ("Qwen3MoeForCausalLM", {**SIZES, **EXPERTS, "norm_topk_prob": False}, "norm_topk_prob"),
        ("Qwen2MoeForCausalLM", {**SIZES, **SHARED, "norm_topk_prob": True}, "norm_topk_prob"),
        ("OlmoeForCausalLM", {**SIZES, **EXPERTS}, "num_key_value_heads"),
        ("OlmoeForCausalLM", {**SIZES, **EXPERTS, "num_key_value_heads": 4, "clip_qkv": 8.0}, "clip_qkv"),
        ("FalconForCausalLM", {**FALCON, "alibi": True}, "alibi"),
        ("OlmoForCausalLM", {**SIZES, "attention_bias": True, "eos_token_id": 0}, "attention_bias"),
        ("SmolLM3ForCausalLM", {**SIZES, "pad_token_id": 0, "no_rope_layers": [1, 0]}, "no_rope_layers"),
        ("SmolLM3ForCausalLM", {**SIZES, "pad_token_id": 0, "mlp_bias": True}, "mlp_bias"),
        ("T5ForConditionalGeneration", {**T5, "num_decoder_layers": 3}, "num_decoder_layers"),
        (
            "T5ForConditionalGeneration",
            {**T5, "relative_attention_max_distance": 64},
            "relative_attention_max_distance",
        ),
        ("ModernBertModel", {**NEOX, **SPECIAL, "layer_types": ["full_attention"] * 2}, "layer_types"),
        ("ModernBertModel", {**NEOX, **SPECIAL, "norm_bias": True}, "norm_bias"),
        ("MptForCausalLM", {**MPT, "attn_config": {"softmax_scale": 0.1}}, "softmax_scale"),
        ("FalconForCausalLM", {**FALCON, "bias": True}, "bias"),
        ("FalconForCausalLM", {**FALCON, "parallel_attn": False}, "parallel_attn"),
    ],
)
def test_what_the_graph_does_not_compute_is_refused(
    class_name: str, config: dict[str, Any], key: str, save_model: Callable, byte_level: Path
) -> None:
    checkpoint = open_checkpoint(save_model(class_name, config, byte_level))
    with pytest.raises(Unsupported, match=key):
        GgufExporter().plan(checkpoint, Target("gguf"))


def test_what_transformers_assumes_about_rotation_is_written(
    save_model: Callable, byte_level: Path, to_file: Callable
) -> None:
    """A config of transformers 4 that says nothing: half of each head is rotated, not all of it."""
    checkpoint = open_checkpoint(
        save_model("Glm4ForCausalLM", {**SIZES, "head_dim": 16, "pad_token_id": 0}, byte_level)
    )
    silent = {key: value for key, value in checkpoint.config.items() if key != "rope_parameters"}
    _, file = to_file(checkpoint.replace(config=silent))
    assert read_gguf(file).metadata["glm4.rope.dimension_count"] == 8
