"""GPTQ in whole builds: families in every container that they fit, safetensors schemes, and a GPTQ file as source."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tightship

EMBER = Path(__file__).resolve().parents[2] / "examples" / "ember"
TEXT = "The old ship lay at anchor in the bay, and nobody on the shore could say whence she had come. " * 40
SIZES = {"vocab_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "bos_token_id": 0,
         "eos_token_id": 0, "pad_token_id": 0}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "OPTForCausalLM": {**SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 128},
    "BloomForCausalLM": {"vocab_size": 1024, "n_layer": 2, "n_head": 4, "hidden_size": 64, "bos_token_id": 0,
                         "eos_token_id": 0, "pad_token_id": 0},
    "MixtralForCausalLM": {**SIZES, "intermediate_size": 96, "num_key_value_heads": 2, "num_local_experts": 4,
                           "max_position_embeddings": 128},
}  # fmt: skip


def tiny_model(name: str, folder: Path) -> Path:
    """A random model with the tokenizer of the embedded checkpoint."""
    import torch
    import transformers

    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**MODELS[name]))
    with torch.no_grad():
        for word, parameter in model.named_parameters():
            # A router that decides clearly: which expert is asked must not hang on rounded activations.
            parameter.normal_(1 if "norm" in word or "ln_" in word else 0, 1.0 if "gate.weight" in word else 0.1)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBER / file, folder / file)
    return folder


def recipe_in(folder: Path, passes: list[dict[str, Any]], targets: list[dict[str, Any]]) -> str:
    (folder / "text.txt").write_text(TEXT)
    calibration = {"text": "text.txt", "tokens": 1024, "sequence": 128}
    content = {"calibration": calibration, "passes": passes, "targets": targets, "gates": {"top1": 0.01}}
    (folder / "recipe.yaml").write_text(json.dumps(content))
    return str(folder / "recipe.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_families_through_gptq_to_artifacts(name: str, build_command: Callable[..., Any], tmp_path: Path) -> None:
    """OPT has no GGUF."""
    containers = ["onnx", "safetensors"] if name == "OPTForCausalLM" else ["gguf", "onnx", "safetensors"]
    source = tiny_model(name, tmp_path / "model")
    gptq = {"use": "quantize", "with": {"solver": "gptq", "layout": "int4"}}
    done = build_command(source, "--recipe", recipe_in(tmp_path, [gptq], [{"to": c} for c in containers]))
    assert done.code == 0, done.body
    (stage,) = done.body["result"]["stages"]
    solvers = {f["solver"] for f in stage["figures"].values() if "solver" in f}
    assert any(word.startswith("gptq") for word in solvers)
    assert {check["verdict"] for check in done.checks.values()} == {"pass"}


@pytest.mark.slow
def test_schemes_of_safetensors(build_command: Callable[..., Any]) -> None:
    targets = [word for scheme in ("w8a8", "mxfp4", "mxfp8") for word in ("--to", f"safetensors:{scheme}")]
    done = build_command(EMBER, *targets)
    assert done.code == 0, done.body
    assert {check["verdict"] for check in done.checks.values()} == {"pass"}


@pytest.fixture
def gptq_file(without_proof: None, tmp_path: Path) -> Path:  # noqa: ARG001 - it is proven when it is read again
    """The embedded checkpoint in the GPTQ format, solved by GPTQ."""
    target = {"to": "safetensors", "scheme": "gptq", "with": {"solver": "gptq"}}
    recipe = recipe_in(tmp_path, [], [target])
    tightship.build(EMBER, recipe=recipe, output=tmp_path / "out", work=tmp_path / "work", threads=1)
    return tmp_path / "out" / "safetensors-gptq"


@pytest.mark.slow
def test_a_gptq_file_goes_to_all_three_with_its_codes(gptq_file: Path, build_command: Callable[..., Any]) -> None:
    done = build_command(gptq_file, "--to", "gguf", "--to", "onnx", "--to", "safetensors")
    assert done.code == 0, done.body
    assert {check["verdict"] for check in done.checks.values()} == {"pass"}
    text = (done.output / "report.md").read_text()
    assert "`gguf`, `onnx`, `safetensors` hold the same integers and scales" in text
