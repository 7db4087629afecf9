"""Whole builds to GGUF of families with graphs of their own: proven in llama.cpp and ONNX Runtime, nothing waived."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

LATENT = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 256, "q_lora_rank": 32, "kv_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
    "pad_token_id": 0,
}  # fmt: skip
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
MODELS: dict[str, tuple[str, str, Mapping[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", "unigram", {**T5, "vocab_size": 2048, "eos_token_id": 1, "pad_token_id": 0}),
    "deepseek": ("DeepseekV3ForCausalLM", "byte_level", LATENT),
    "mamba": ("MambaForCausalLM", "byte_level", {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_everything_is_proven(
    name: str, save_model: Callable[..., Path], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    class_name, tokenizer, config = MODELS[name]
    source = save_model(class_name, config, request.getfixturevalue(tokenizer), std=0.05)
    command = [sys.executable, "-P", "-m", "tightship", "build", str(source), "--to", "gguf:q8_0"]
    done = subprocess.run(
        [*command, "-o", "out", "--work", "work", "--json"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    body = json.loads(done.stdout)
    assert done.returncode == 0, body
    for target in body["result"]["targets"]:
        verdicts = {check["id"]: check["verdict"] for check in target["checks"]}
        assert set(verdicts.values()) == {"pass"}, verdicts
        assert {check["runtime"] for check in target["checks"]} >= {"llama.cpp", "onnxruntime"}
