"""Pruned models in whole builds: proven in every runtime, zeros counted in each artifact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, dequantize
from safetensors.numpy import load_file

from tightship.opening import open_checkpoint

ROOT = Path(__file__).resolve().parents[2]
EMBER = ROOT / "examples" / "ember"
LLAMA = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128, "bos_token_id": 0,
         "eos_token_id": 0, "pad_token_id": 0}  # fmt: skip
# What each family can lose, and config.json afterwards. OPT's and BLOOM's heads share the hidden size out.
SMALLER: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "OPTForCausalLM": ({"use": "prune-structured", "with": {"ffn": 0.34}}, {"ffn_dim": 64}),
    "BloomForCausalLM": ({"use": "drop-layers", "with": {"count": 1}}, {"n_layer": 1}),
    "MixtralForCausalLM": (
        {"use": "prune-structured", "with": {"ffn": 0.34, "heads": 0.5, "experts": 0.5}},
        {"intermediate_size": 64, "num_attention_heads": 2, "num_local_experts": 2},
    ),
}


@pytest.mark.slow
def test_sparse_opt_bloom_and_mixtral(
    small_family: tuple[str, Path, tuple[str, ...]], build_command: Callable[..., Any], recipe_in: Callable[..., str]
) -> None:
    _, source, targets = small_family
    prune = {"use": "prune", "with": {"method": "sparsegpt", "sparsity": 0.5, "schedule": "owl"}}
    done = build_command(source, "--recipe", recipe_in([prune], targets))
    assert done.code == 0, done.body
    shares = {t["id"]: t["sparsity"] for t in done.body["result"]["targets"]}
    assert set(shares) == set(targets)
    pruned = [info.name for info in open_checkpoint(source).linears()]
    tensors = load_file(done.output / "safetensors" / "model.safetensors")
    zeros, total = (sum(int(f(tensors[name])) for name in pruned) for f in (lambda w: (w == 0).sum(), np.size))
    assert zeros == round(0.5 * total)
    assert set(shares.values()) == {round(zeros / total, 6)}
    for file in (done.output / "gguf").glob("*.gguf"):
        stored = [t for t in GGUFReader(file).tensors if t.name.startswith("blk") and "norm" not in t.name]
        # Biases are random, and so is the router, so that every zero is a pruned weight.
        assert sum(int((dequantize(t.data, t.tensor_type) == 0).sum()) for t in stored) == zeros
    assert (done.output / "report-layers.svg").exists()


@pytest.mark.slow
def test_smaller_opt_bloom_and_mixtral(
    small_family: tuple[str, Path, tuple[str, ...]], build_command: Callable[..., Any], recipe_in: Callable[..., str]
) -> None:
    name, source, targets = small_family
    step, sizes = SMALLER[name]
    done = build_command(source, "--recipe", recipe_in([step], targets))
    assert done.code == 0, done.body
    assert {check["verdict"] for check in done.checks.values()} == {"pass"}
    config = json.loads((done.output / "safetensors" / "config.json").read_text())
    assert {key: config[key] for key in sizes} == sizes


@pytest.mark.slow
def test_a_narrower_model_in_all_three(build_command: Callable[..., Any], recipe_in: Callable[..., str]) -> None:
    step = {"use": "prune-structured", "with": {"ffn": 0.25, "width": 0.12}}
    done = build_command(EMBER, "--recipe", recipe_in([step], ["gguf", "onnx", "safetensors"]))
    assert done.code == 0, done.body
    figures = done.body["result"]["stages"][0]["figures"]
    assert figures["ffn"] == {"asked": 0.25, "share": 0.25, "units": 576}
    assert figures["width"] == {"asked": 0.12, "share": 0.125, "units": 224}
    config = json.loads((done.output / "safetensors" / "config.json").read_text())
    assert (config["hidden_size"], config["intermediate_size"], config["head_dim"]) == (224, 576, 64)


@pytest.mark.slow
def test_blocks_of_unlike_widths_in_gguf_and_onnx(
    build_command: Callable[..., Any], random_model: Callable[..., Path], recipe_in: Callable[..., str]
) -> None:
    source = random_model("LlamaForCausalLM", LLAMA, std=0.2)
    step = {"use": "prune-structured", "with": {"ffn": 0.5, "heads": 0.5, "multiple": 16, "uniform": False}}
    done = build_command(source, "--recipe", recipe_in([step], ["gguf", "onnx"]))
    assert done.code == 0, done.body
    checks = {(c["target"], c["runtime"]): c["value"] for c in done.checks.values() if c["metric"] == "rel_l2"
              and c["kind"] == "graph"}  # fmt: skip
    assert checks["gguf", "llama.cpp"] <= 1e-5
    assert checks["onnx", "onnxruntime"] <= 1e-5
    fields = GGUFReader(next((done.output / "gguf").glob("*.gguf"))).fields
    assert fields["general.architecture"].contents() == "deci"
    table = json.loads((done.output / "onnx" / "config.json").read_text())["per_layer_config"]
    for key, word in (("feed_forward_length", "intermediate_size"), ("attention.head_count", "num_attention_heads"),
                      ("attention.head_count_kv", "num_key_value_heads")):  # fmt: skip
        found = fields[f"deci.{key}"].contents()
        assert found == [table[str(n)][word] for n in range(3)]
        assert len(set(found)) > 1
    assert not (done.output / "onnx" / "genai_config.json").exists()
    again = build_command(next((done.output / "gguf").glob("*.gguf")), "--to", "onnx", "--to", "gguf:q8_0")
    assert again.code == 0, again.body
    assert {c["verdict"] for c in again.checks.values()} == {"pass"}
    assert json.loads((again.output / "onnx" / "config.json").read_text())["per_layer_config"] == table
