"""The client runtimes against transformers called plainly, and their refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tightship.errors import Malformed
from tightship.validators.runtimes import genai, transformers_client
from tightship.validators.runtimes.child import Limits, RuntimeDied, RuntimeMissing, run_child

EMBER = Path(__file__).resolve().parents[3] / "examples" / "ember"
IDS = np.array([[5, 6, 7, 100, 200, 300, 41, 42, 9, 8], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]], np.int64)
LIMITS = Limits(seconds=120)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EMBER, tmp_path / "artifact"))


@pytest.fixture(scope="module")
def reference() -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(EMBER, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        return model(torch.from_numpy(IDS)).logits.numpy()


def test_transformers_graph_mode_is_the_reference(reference: np.ndarray) -> None:
    result, out = run_child("transformers_client", {"artifact": str(EMBER)}, {"input_ids": IDS}, limits=LIMITS)
    assert result["class"] == "LlamaForCausalLM"
    np.testing.assert_allclose(out["logits"], reference, atol=1e-5)


def test_missing_tensor_is_a_failure_with_its_name(artifact: Path) -> None:
    tensors = load_file(artifact / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, artifact / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Malformed, match="1 tensors are missing") as caught:
        transformers_client.run({"artifact": str(artifact)}, {"input_ids": IDS})
    assert caught.value.tensor == "model.layers.1.mlp.up_proj.weight"


def test_unused_tensor_is_a_failure_with_its_name(artifact: Path) -> None:
    tensors = load_file(artifact / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.bias"] = torch.ones(768)
    save_file(tensors, artifact / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeDied, match="not used") as caught:
        run_child("transformers_client", {"artifact": str(artifact)}, {"input_ids": IDS}, limits=LIMITS)
    assert caught.value.tensor == "model.layers.1.mlp.up_proj.bias"


def quantize_like_a_user(artifact: Path, format_name: str, scheme: dict, *, weights_only: bool) -> None:
    """Compress every linear of the blocks with compressed-tensors' own compressor and scales absmax / 7 or 127."""
    tensors = load_file(artifact / "model.safetensors")
    compressor = BaseCompressor.get_value_from_registry(format_name)
    top = 2 ** (scheme["weights"]["num_bits"] - 1) - 1
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        weight = tensors.pop(name).float()
        grouped = weight.reshape(weight.shape[0], -1, 32) if weights_only else weight[:, None]
        scale = grouped.abs().amax(-1) / top
        packed = compressor.compress({"weight": weight, "weight_scale": scale}, QuantizationScheme(**scheme))
        tensors.update({f"{name.removesuffix('weight')}{key}": value for key, value in packed.items()})
    save_file(
        {k: v.contiguous() for k, v in tensors.items()}, artifact / "model.safetensors", metadata={"format": "pt"}
    )
    config = json.loads((artifact / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": format_name,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {**scheme, "format": format_name}},
    }
    (artifact / "config.json").write_text(json.dumps(config))


INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
TOKENWISE = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def test_compressed_weights_load_without_loss(artifact: Path, reference: np.ndarray) -> None:
    quantize_like_a_user(artifact, "pack-quantized", {"targets": ["Linear"], "weights": INT4}, weights_only=True)
    _, graph = transformers_client.run({"artifact": str(artifact)}, {"input_ids": IDS})
    _, shipped = transformers_client.run({"artifact": str(artifact), "mode": "shipped"}, {"input_ids": IDS})
    error = np.abs(graph["logits"] - reference).max()
    assert 0.05 < error < 20  # int4 was really applied
    np.testing.assert_allclose(shipped["logits"], graph["logits"], atol=0.05 * error + 0.1)


def test_graph_mode_leaves_activations_alone(artifact: Path) -> None:
    scheme = {"targets": ["Linear"], "weights": INT8, "input_activations": TOKENWISE}
    quantize_like_a_user(artifact, "int-quantized", scheme, weights_only=False)
    weight_only = {"targets": ["Linear"], "weights": INT8}
    _, graph = transformers_client.run({"artifact": str(artifact)}, {"input_ids": IDS})
    _, shipped = transformers_client.run({"artifact": str(artifact), "mode": "shipped"}, {"input_ids": IDS})
    config = json.loads((artifact / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"] = {**weight_only, "format": "naive-quantized"}
    (artifact / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    _, no_activations = transformers_client.run({"artifact": str(artifact), "mode": "shipped"}, {"input_ids": IDS})
    np.testing.assert_allclose(graph["logits"], no_activations["logits"], atol=1e-4)
    assert np.abs(shipped["logits"] - graph["logits"]).max() > 1e-2


def test_quantization_without_its_package_did_not_run(artifact: Path) -> None:
    config = json.loads((artifact / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "torchao"}
    (artifact / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeMissing, match="torchao"):
        run_child("transformers_client", {"artifact": str(artifact)}, {"input_ids": IDS}, limits=LIMITS)


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("GPT2LMHeadModel", "AutoModelForCausalLM"),
        ("BertForMaskedLM", "AutoModelForMaskedLM"),
        ("BertModel", "AutoModel"),
        ("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
    ],
)
def test_auto_class(architecture: str, expected: str) -> None:
    assert transformers_client.auto_class({"architectures": [architecture]}) == expected


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ember as a genai decoder, its graph by mobius."""
    import mobius

    directory = tmp_path_factory.mktemp("decoder")
    mobius.build(str(EMBER), execution_provider="cpu", dtype="f32").save(str(directory), progress_bar=False)
    names = {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    present = {"present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
    decoder = {
        "filename": "model.onnx", "head_size": 64, "hidden_size": 256, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": 2, "session_options": {"provider_options": []},
        "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", **names},
        "outputs": {"logits": "logits", **present},
    }  # fmt: skip
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "vocab_size": 1024, "context_length": 512}
    config = {"model": {"type": "llama", **ids, "decoder": decoder}, "search": {"past_present_share_buffer": True}}
    (directory / "genai_config.json").write_text(json.dumps(config))
    return directory


def test_genai_logits_through_prefill_and_cache(decoder: Path, reference: np.ndarray) -> None:
    _, out = run_child("genai", {"artifact": str(decoder), "decode": 3}, {"input_ids": IDS}, limits=LIMITS)
    np.testing.assert_allclose(out["logits"], reference, atol=1e-4)


def test_genai_greedy_tokens(decoder: Path, reference: np.ndarray) -> None:
    job = {"artifact": str(decoder), "want": "generate", "tokens": 1}
    _, out = genai.run(job, {"input_ids": IDS})
    np.testing.assert_array_equal(out["tokens"][:, 0], reference[:, -1].argmax(-1))


def test_genai_declines_what_has_no_config() -> None:
    with pytest.raises(RuntimeMissing, match=r"genai_config\.json"):
        run_child("genai", {"artifact": str(EMBER)}, {"input_ids": IDS}, limits=LIMITS)
