"""Checkpoint -> GGUF -> checkpoint for every family that has a GGUF form: the same weights, the same logits."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from tightship.architecture import all_architectures
from tightship.exporters.gguf_tokenizer import tokenizer_fields
from tightship.exporters.gguf_tokenizer_files import tokenizer_files
from tightship.gguf_source import open_gguf
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.weights import Alias

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
NEOX = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
SPECIAL = {f"{kind}_token_id": 0 for kind in ("pad", "bos", "eos", "cls", "sep")}
GEMMA = {**SIZES, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}
FALCON = {key: NEOX[key] for key in NEOX if key != "intermediate_size"}
LATENT = {
    **SIZES,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "pad_token_id": 0,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32}
ROUTED |= {"first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.0}
MSCALE = {"mscale": 1.0, "mscale_all_dim": 1.0}
ROUNDED = ("gemma", "gemma2", "gemma3", "mamba", "t5", "umt5")  # the file holds a function of some weights
MODELS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**SIZES, "attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("LlamaForCausalLM", {**SIZES, "head_dim": 32, "tie_word_embeddings": True}),
    "llama-rope3": ("LlamaForCausalLM", {**SIZES, "rope_parameters": LLAMA3}),
    "llama-yarn": ("LlamaForCausalLM", {**SIZES, "rope_parameters": YARN}),
    "qwen2": ("Qwen2ForCausalLM", SIZES),
    "qwen3": ("Qwen3ForCausalLM", {**SIZES, "head_dim": 16}),
    "mixtral": ("MixtralForCausalLM", {**SIZES, **EXPERTS}),
    "olmo": ("OlmoForCausalLM", {**SIZES, "eos_token_id": 0, "clip_qkv": 0.5}),
    "seed-oss": ("SeedOssForCausalLM", {**SIZES, "head_dim": 32, "attention_out_bias": False}),
    "hunyuan": ("HunYuanDenseV1ForCausalLM", {**SIZES, "head_dim": 32}),
    "hunyuan-moe": ("HunYuanMoEV1ForCausalLM", {**SIZES, "head_dim": 32, "num_experts": 4, "moe_topk": 2}),
    "dots1": (
        "Dots1ForCausalLM",
        {**NEOX, **ROUTED, "num_key_value_heads": 4, "sliding_window": None},
    ),
    "smollm3": ("SmolLM3ForCausalLM", {**SIZES, "num_hidden_layers": 5, "pad_token_id": 0}),
    "glm4": ("Glm4ForCausalLM", {**SIZES, "head_dim": 16, "pad_token_id": 0}),
    "phi": ("PhiForCausalLM", SIZES),
    "gpt-neox": ("GPTNeoXForCausalLM", NEOX),
    "stablelm": ("StableLmForCausalLM", SIZES),
    "cohere": ("CohereForCausalLM", {**SIZES, "logit_scale": 0.3}),
    "gemma2": ("Gemma2ForCausalLM", GEMMA),
    "gemma3": ("Gemma3ForCausalLM", {**GEMMA, "num_hidden_layers": 6}),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    ),
    "bloom": ("BloomForCausalLM", {"vocab_size": 512, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "mpt": ("MptForCausalLM", {"vocab_size": 512, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}),
    "mamba": ("MambaForCausalLM", {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2}),
    "nomic-bert": ("NomicBertModel", NEOX),
    "modernbert": ("ModernBertModel", {**NEOX, **SPECIAL, "num_hidden_layers": 4, "local_attention": 12}),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 512, "d_model": 64, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4},
    ),
    "umt5": (
        "UMT5ForConditionalGeneration",
        {"vocab_size": 512, "d_model": 64, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4},
    ),
    "t5-gated": (
        "T5ForConditionalGeneration",
        {
            "vocab_size": 512,
            "d_model": 64,
            "d_kv": 12,
            "d_ff": 96,
            "num_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        },
    ),
    "falcon": ("FalconForCausalLM", FALCON),
    "falcon-grouped": ("FalconForCausalLM", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-one-norm": (
        "FalconForCausalLM",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "bert": ("BertModel", {**NEOX, "type_vocab_size": 3}),
    "deepseek-v2": ("DeepseekV2ForCausalLM", LATENT),
    "deepseek-v3": ("DeepseekV3ForCausalLM", {**LATENT, "rope_parameters": {**YARN, **MSCALE}}),
    "granite": ("GraniteForCausalLM", {**SIZES, "embedding_multiplier": 12.0, "logits_scaling": 8.0}),
    "mistral": ("MistralForCausalLM", {**SIZES, "sliding_window": None}),
    "olmo2": ("Olmo2ForCausalLM", SIZES),
    "olmoe": ("OlmoeForCausalLM", {**NEOX, "num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}),
    "phi3": ("Phi3ForCausalLM", {**SIZES, "pad_token_id": 0, "sliding_window": None}),
    "phi3-long": (
        "Phi3ForCausalLM",
        {
            **SIZES,
            "pad_token_id": 0,
            "sliding_window": None,
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "original_max_position_embeddings": 16,
                "short_factor": [1.0, 1.1, 1.2, 1.3] * 2,
                "long_factor": [1.0, 2.0, 3.0, 4.0] * 2,
            },
        },
    ),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        {
            **SIZES,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
        },
    ),
    "starcoder2": ("Starcoder2ForCausalLM", {**SIZES, "sliding_window": None}),
    "gemma": ("GemmaForCausalLM", {**SIZES, "head_dim": 32}),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 0},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_weights_and_logits_come_back(name: str, save_model: Callable, byte_level: Path, to_file: Callable) -> None:
    original = open_checkpoint(save_model(*MODELS[name], byte_level))
    back = open_gguf(to_file(original)[1])
    assert back.architecture.family == {"mistral": "llama"}.get(name, original.architecture.family)
    dropped = {key for key, info in original.infos().items() if info.rule.role == "pooler"}
    assert set(back.weights) == set(original.weights) - dropped
    for key, weight in original.weights.items():
        if key in dropped:
            continue
        assert isinstance(weight, Alias) == isinstance(back.weights[key], Alias)
        first, second = original.resolve(key).value(), back.resolve(key).value()
        if name in ROUNDED:
            np.testing.assert_allclose(second, first, rtol=1e-6, atol=1e-7)
        else:
            assert np.array_equal(first, second), key
    ids = np.random.default_rng(0).integers(3, 500, (1, 24))
    first, second = (next(iter(ModelView(c).outputs(ids).values())) for c in (original, back))
    if name in ROUNDED:
        np.testing.assert_allclose(second, first, rtol=1e-3, atol=1e-4)
    else:
        np.testing.assert_array_equal(first, second)


def test_every_family_that_can_be_written_is_read() -> None:
    classes = {name for name, _ in MODELS.values()}
    written = [a for a in all_architectures() if a.gguf is not None]
    assert {a.family for a in written} == {a.family for a in written if classes.intersection(a.classes)}


@pytest.mark.parametrize("lowercase", [True, False])
def test_word_piece_comes_back(lowercase: bool, word_piece: Callable, strings: list[str], save_model: Callable) -> None:
    folder = word_piece(lowercase)
    checkpoint = open_checkpoint(save_model("BertModel", {**SIZES, "vocab_size": 2048}, folder))
    fields, _ = tokenizer_fields(checkpoint)
    files = tokenizer_files({key: field.value for key, field in fields.items()})
    first, second = (Tokenizer.from_str(f["tokenizer.json"].decode()) for f in (checkpoint.files, files))
    assert [e.ids for e in first.encode_batch(strings)] == [e.ids for e in second.encode_batch(strings)]


def test_bos_comes_back(train: Callable, save_model: Callable, to_file: Callable, tmp_path: Path) -> None:
    folder = train()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": True}))
    back = open_gguf(to_file(open_checkpoint(save_model("LlamaForCausalLM", SIZES, folder)))[1])
    for name, data in back.files.items():
        (tmp_path / name).write_bytes(data)
    ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert ours.encode("a").ids[0] == 0
    assert json.loads(back.files["tokenizer_config.json"])["add_bos_token"] is True
