"""Families whose past or attention is not Llama's, built into all three containers with every proof asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
LATENT = {
    **SIZES,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
THREE = ("--to", "gguf", "--to", "onnx", "--to", "safetensors")
FAMILIES = {
    "deepseek_v3": ("DeepseekV3ForCausalLM", LATENT),
    "mamba": ("MambaForCausalLM", {**SIZES, "state_size": 8}),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_container_is_proven(
    family: str, random_model: Callable[..., Path], build_command: Callable[..., Any]
) -> None:
    done = build_command(random_model(*FAMILIES[family]), "--quantize", "int8", *THREE)
    assert done.code == 0, done.body["error"]
    assert json.loads((done.output / "manifest.json").read_text())["accepted_unproven"] == []
    assert all(check["verdict"] == "pass" for check in done.checks.values())
    for target, runtime in (("gguf", "onnxruntime"), ("gguf", "llama.cpp"), ("onnx", "onnxruntime")):
        assert done.checks[f"{target}/{runtime}/graph/rel_l2"]["value"] <= 1e-5
    assert done.checks["onnx/onnxruntime/graph/rel_l2_through_cache"]["value"] <= 1e-5
