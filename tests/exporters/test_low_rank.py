"""Low rank in files: transformers with factors put in by hand, llama.cpp with the adapter, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from tightship.checkpoint import Checkpoint
from tightship.errors import Malformed, Unsupported
from tightship.exporters import exporter_for
from tightship.formats.layouts import parse_layout
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.passes import pass_for
from tightship.passes.base import Run
from tightship.target import Target, TargetPlan
from tightship.validators.runtimes import llama_adapter, llama_cpp, transformers_client
from tightship.weights import Dense, Factored, Quantized, Sum

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
IDS = np.random.default_rng(0).integers(1, 96, (2, 24))
Tiny = Callable[[str], Checkpoint]


def corrected(checkpoint: Checkpoint, word: str = "int4-g32", base: bool = True) -> Checkpoint:
    """Every linear rounded, with a random residual that says much; ranks differ."""
    rng, layout = np.random.default_rng(1), parse_layout(word)
    changed: dict[str, Any] = {}
    for number, info in enumerate(checkpoint.linears()):
        rank, (out, cols) = 2 + number % 3, info.shape
        factors = [Dense.of((0.3 * rng.standard_normal(s)).astype(np.float32)) for s in ((out, rank), (rank, cols))]
        rounded = Quantized.of(layout, layout.quantize(checkpoint.resolve(info.name).value()))
        changed[info.name] = Sum(rounded, Factored(*factors)) if base else rounded
    return checkpoint.with_weights(changed)


def written(checkpoint: Checkpoint, folder: Path, container: str = "safetensors") -> TargetPlan:
    folder.mkdir()
    exporter = exporter_for(container)
    plan = exporter.plan(checkpoint, Target(container))
    exported = exporter.export(checkpoint, plan, folder, lambda *_: None)
    ending = ".gguf" if container == "gguf" else ".safetensors"
    assert plan.file_bytes == sum((folder / f).stat().st_size for f in exported.files if f.endswith(ending))
    return plan


def logits_of(model: Any) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = model.eval()(torch.from_numpy(IDS)).logits.numpy()
    return found


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float((np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).max())


def test_a_correction_is_a_peft_adapter(tiny: Tiny, tmp_path: Path) -> None:
    """Rank, alpha and names read as PEFT reads them, merged into transformers' weights by hand."""
    checkpoint = corrected(tiny("llama"))
    plan = written(checkpoint, tmp_path / "out")
    dequantize = transformers.CompressedTensorsConfig(dequantize=True)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, quantization_config=dequantize, output_loading_info=True
    )
    assert not any(info.values())
    plain = logits_of(model)
    config = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    assert len(tensors) == 2 * len(config["target_modules"]) == 2 * len(list(checkpoint.linears()))
    for name in config["target_modules"]:
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        rank, alpha = (
            config[f"{word}_pattern"].get(name, config[key]) for word, key in (("rank", "r"), ("alpha", "lora_alpha"))
        )
        assert (a.shape[0], b.shape[1]) == (rank, rank)
        model.get_submodule(name).weight.data += alpha / rank * b @ a
    expected = ModelView(checkpoint).outputs(IDS)["logits"]
    assert distance(logits_of(model), expected) <= 1e-5
    assert distance(plain, expected) > 0.1
    assert {t.layout for t in plan.tensors if "LoRA" in t.storage} == {"int4-g32"}


@pytest.mark.parametrize(("family", "quantize"), [("llama-tied", False), ("llama", True), ("gpt2", False)])
def test_factored_modules(family: str, quantize: bool, tiny: Tiny, tmp_path: Path) -> None:
    """config.json and names suffice to put them in the place of linear modules; transformers does not open the file."""
    low = pass_for("low-rank", {"rank": 8 if family == "gpt2" else 24, "dtype": "f32"}).apply(tiny(family), Run())
    if quantize:
        low = pass_for("quantize", {"layout": "int8-channel"}).apply(low, Run())
    written(low, tmp_path / "out")
    with pytest.raises(OSError, match="no file named"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    _, arrays = transformers_client.run({"artifact": str(tmp_path / "out"), "mode": "graph"}, {"input_ids": IDS})
    assert distance(arrays["logits"], ModelView(low).outputs(IDS)["logits"]) <= 1e-5
    config = json.loads((tmp_path / "out/config.json").read_text())
    ranks = [w.rank for w in low.weights.values() if isinstance(w, Factored)]
    assert list(config["low_rank"].values()) == ranks
    if not quantize:
        tensors = load_file(tmp_path / "out/factored.safetensors")
        for name in config["low_rank"]:
            product = tensors[f"{name}.left.weight"] @ tensors[f"{name}.right.weight"]
            np.testing.assert_allclose(product, low.weights[f"{name}.weight"].value(), atol=1e-5)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "llama-int8", "llama-corrected"])
def test_low_rank_opens_as_it_was_written(family: str, tiny: Tiny, tmp_path: Path) -> None:
    """The same factors, and the same files when it is written again."""
    name, _, how = family.partition("-") if family != "llama-tied" else (family, "", "")
    low = corrected(tiny(name)) if how == "corrected" else None
    low = low or pass_for("low-rank", {"rank": 8, "dtype": "f32"}).apply(tiny(name), Run())
    if how == "int8":
        low = pass_for("quantize", {"layout": "int8-channel"}).apply(low, Run())
    written(low, tmp_path / "out")
    opened = open_checkpoint(tmp_path / "out")
    kind = Sum if how == "corrected" else Factored
    for info in low.linears():
        found = opened.weights[info.name]
        assert isinstance(found, kind)
        np.testing.assert_array_equal(found.value(), low.weights[info.name].value())
    np.testing.assert_array_equal(
        ModelView(opened, threads=1).outputs(IDS)["logits"], ModelView(low, threads=1).outputs(IDS)["logits"]
    )
    assert ("low_rank" in opened.config, len(opened.source.paths)) == (False, 4 if how == "corrected" else 2)
    written(opened, tmp_path / "again")
    for file in ("config.json", *(f.name for f in (tmp_path / "out").glob("*.safetensors"))):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


def test_low_rank_that_is_not_whole_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    written(pass_for("low-rank", {"rank": 8}).apply(tiny("llama"), Run()), tmp_path / "low")
    config = tmp_path / "low/config.json"
    said = json.loads(config.read_text())
    first = next(iter(said["low_rank"]))
    for wrong, match in (({first: 7}, "where rank 7 is said"), ({"model.x": 8}, "missing"), (8, "no map")):
        ranks = {**said["low_rank"], **wrong} if isinstance(wrong, dict) else wrong
        config.write_text(json.dumps({**said, "low_rank": ranks}))
        with pytest.raises(Malformed, match=match):
            open_checkpoint(tmp_path / "low")
    written(corrected(tiny("llama")), tmp_path / "sum")
    config = tmp_path / "sum/adapter/adapter_config.json"
    said = json.loads(config.read_text())
    for changes, error, match in (
        ({"lora_alpha": 2 * said["r"]}, Unsupported, "by 2"),
        ({"use_dora": True}, Unsupported, "use_dora"),
        ({"target_modules": said["target_modules"][1:]}, Malformed, "does not name"),
    ):
        config.write_text(json.dumps({**said, **changes}))
        with pytest.raises(error, match=match):
            open_checkpoint(tmp_path / "sum")


def test_a_correction_is_an_adapter_that_llama_cpp_adds(
    save_model: Callable[..., Path], byte_level: Path, tmp_path: Path
) -> None:
    sizes = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    checkpoint = corrected(open_checkpoint(save_model("LlamaForCausalLM", sizes, byte_level)), "q8_0")
    plan = written(checkpoint, tmp_path / "out", "gguf")
    job = {"artifact": str(tmp_path / "out"), "main": f"{checkpoint.name}.gguf", "mode": "graph"}
    expected = ModelView(checkpoint).outputs(IDS)["logits"]
    for decode in (0, 3):
        _, arrays = llama_adapter.run({**job, "decode": decode}, {"input_ids": IDS})
        assert distance(arrays["logits"], expected) <= 1e-5
    _, plain = llama_cpp.run(job, {"input_ids": IDS})
    assert distance(plain["logits"], expected) > 0.1
    assert "ADAPTER ./residual.gguf" in (tmp_path / "out/Modelfile").read_text()
    assert any("--lora residual.gguf" in note for note in plan.notes)


def test_what_cannot_hold_low_rank_is_refused_in_the_plan(tiny: Tiny) -> None:
    low = pass_for("low-rank", {"rank": 8}).outline(tiny("llama"))
    with pytest.raises(Unsupported, match="made of factors") as caught:
        exporter_for("gguf").plan(low, Target("gguf"))
    assert "merge: true" in (caught.value.hint or "")
    merged = pass_for("low-rank", {"rank": 8, "merge": True}).outline(tiny("llama"))
    assert exporter_for("safetensors").plan(merged, Target("safetensors")).file_bytes > 0
    mixture = pass_for("low-rank", {"rank": 8}).outline(tiny("mixtral"))
    with pytest.raises(Unsupported, match="one stack"):
        exporter_for("safetensors").plan(mixture, Target("safetensors"))
    with pytest.raises(Unsupported, match="models that write text"):
        exporter_for("gguf").plan(corrected(open_checkpoint(EXAMPLES / "ember-bert"), "q8_0"), Target("gguf"))
