"""Pruned models in whole builds: proven in every runtime, zeros counted in each artifact."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
EMBER = ROOT / "examples" / "ember"
TEXT = "The old ship lay at anchor in the bay, and nobody on the shore could say whence she had come. " * 40
SIZES = {"vocab_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "bos_token_id": 0,
         "eos_token_id": 0, "pad_token_id": 0}  # fmt: skip
MODELS = {
    "OPTForCausalLM": {**SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 128},
    "BloomForCausalLM": {"vocab_size": 320, "n_layer": 2, "n_head": 4, "hidden_size": 64, "bos_token_id": 0,
                         "eos_token_id": 0, "pad_token_id": 0},
    "MixtralForCausalLM": {**SIZES, "intermediate_size": 96, "num_key_value_heads": 2, "num_local_experts": 4,
                           "max_position_embeddings": 128},
}  # fmt: skip


def recipe_in(folder: Path, passes: list[dict[str, Any]], targets: list[str]) -> Path:
    (folder / "text.txt").write_text(TEXT)
    calibration = {"text": "text.txt", "tokens": 1024, "sequence": 64}
    content = {"calibration": calibration, "passes": passes, "targets": [{"to": t} for t in targets]}
    (folder / "recipe.yaml").write_text(json.dumps({**content, "gates": {"top1": 0.01}}))
    return folder / "recipe.yaml"


def random_model(name: str, sizes: dict[str, Any], tokenizer: Path, folder: Path) -> Path:
    """A model whose every parameter counts, with the tokenizer of another, saved to `folder`."""
    import torch
    import transformers

    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**sizes))
    with torch.no_grad():
        for word, parameter in model.named_parameters():
            parameter.normal_(1 if "norm" in word else 0, 0.2)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / file, folder / file)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("OPTForCausalLM", ["onnx", "safetensors"]),
        ("BloomForCausalLM", ["onnx", "gguf", "safetensors"]),
        ("MixtralForCausalLM", ["gguf", "onnx"]),
    ],
)
def test_sparse_opt_bloom_and_mixtral(
    name: str, targets: list[str], build_command: Callable[..., Any], qwen: Path, tmp_path: Path
) -> None:
    source = random_model(name, MODELS[name], qwen, tmp_path / "model")
    prune = {"use": "prune", "with": {"method": "sparsegpt", "sparsity": 0.5, "schedule": "owl"}}
    done = build_command(source, "--recipe", str(recipe_in(tmp_path, [prune], targets)))
    assert done.code == 0, done.body
    shares = {t["id"]: t["sparsity"] for t in done.body["result"]["targets"]}
    assert set(shares) == set(targets)
    assert max(shares.values()) - min(shares.values()) < 1e-9
    assert (done.output / "report-layers.svg").exists()


@pytest.mark.slow
def test_a_narrower_model_in_all_three(build_command: Callable[..., Any], tmp_path: Path) -> None:
    step = {"use": "prune-structured", "with": {"ffn": 0.25, "width": 0.12}}
    recipe = recipe_in(tmp_path, [step], ["gguf", "onnx", "safetensors"])
    done = build_command(EMBER, "--recipe", str(recipe))
    assert done.code == 0, done.body
    figures = done.body["result"]["stages"][0]["figures"]
    assert figures["ffn"] == {"asked": 0.25, "share": 0.25, "units": 576}
    assert figures["width"] == {"asked": 0.12, "share": 0.125, "units": 224}
    config = json.loads((done.output / "safetensors" / "config.json").read_text())
    assert (config["hidden_size"], config["intermediate_size"], config["head_dim"]) == (224, 576, 64)


@pytest.mark.slow
def test_blocks_of_unlike_widths_in_gguf_and_onnx(
    build_command: Callable[..., Any], qwen: Path, tmp_path: Path
) -> None:
    from gguf import GGUFReader

    sizes = {**SIZES, "num_hidden_layers": 3, "intermediate_size": 192, "max_position_embeddings": 128}
    source = random_model("LlamaForCausalLM", {**sizes, "num_key_value_heads": 4}, qwen, tmp_path / "model")
    step = {"use": "prune-structured", "with": {"ffn": 0.5, "heads": 0.5, "multiple": 16, "uniform": False}}
    done = build_command(source, "--recipe", str(recipe_in(tmp_path, [step], ["gguf", "onnx"])))
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
