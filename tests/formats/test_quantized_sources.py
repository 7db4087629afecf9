"""Checkpoints that are quantized already: every form opens again with the same codes, and goes on elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import load_file, save_file

from tightship.activations import Activations
from tightship.checkpoint import Checkpoint
from tightship.errors import Malformed, Unsupported
from tightship.exporters.to_gguf import GgufExporter
from tightship.exporters.to_safetensors import SafetensorsExporter
from tightship.formats.layouts import parse_layout
from tightship.opening import open_checkpoint
from tightship.target import Target, no_progress
from tightship.validators.fidelity import Run, storage_word
from tightship.weights import Quantized

FIRST = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def source(qwen: Path) -> Checkpoint:
    return open_checkpoint(qwen)


def written(
    checkpoint: Checkpoint, word: str, folder: Path, inputs: Activations | None = None, **options: Any
) -> Checkpoint:
    """Every linear in a layout, written to `folder`; the checkpoint that was written."""
    layout = parse_layout(word)
    changed = {
        i.name: Quantized.of(layout, layout.quantize(checkpoint.resolve(i.name).value())) for i in checkpoint.linears()
    }
    said = {} if inputs is None else {n.removesuffix(".weight"): inputs for n in changed}
    made = checkpoint.with_weights(changed).replace(activations=said)
    exporter, target = SafetensorsExporter(), Target("safetensors", None, options)
    folder.mkdir()
    exporter.export(made, exporter.plan(made, target), folder)
    return made


CASES: dict[str, tuple[str, Activations | None, dict[str, str]]] = {
    "pack": ("int4-g32", None, {}),
    "pack-3-asym": ("int3-channel-asym", None, {}),
    "int": ("int8-channel", Activations("int8-static-asym", 0.25, -3), {}),
    "w4a8": ("int4-g32", Activations("int8-dynamic"), {}),
    "fp8-tensor": ("fp8-e4m3", Activations("fp8-static", 0.5), {}),
    "fp8-channel": ("fp8-e4m3-channel", Activations("fp8-dynamic"), {}),
    "fp8-block": ("fp8-e4m3-block", None, {}),
    "mxfp8": ("mxfp8", None, {}),
    "mxfp4": ("mxfp4", Activations("mxfp4-dynamic"), {}),
    "nvfp4": ("nvfp4-scaled", Activations("nvfp4-local", 512.0), {}),
    "gptq": ("int4-g32", None, {"format": "gptq"}),
    "gptq_v2": ("int8-g32-asym", None, {"format": "gptq_v2"}),
    "awq": ("int4-g32-asym", None, {"format": "awq"}),
    "fp8": ("fp8-e4m3-block", None, {"format": "fp8"}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_we_write_opens_again(case: str, source: Checkpoint, tmp_path: Path) -> None:
    word, inputs, options = CASES[case]
    made = written(source, word, tmp_path / "out", inputs, **options)
    again = open_checkpoint(tmp_path / "out")
    assert "quantization_config" not in again.config
    assert set(again.weights) == set(made.weights)
    for info in made.linears():
        ours, theirs = made.resolve(info.name), again.resolve(info.name)
        assert isinstance(ours, Quantized)
        assert isinstance(theirs, Quantized)
        assert theirs.layout == ours.layout
        found = theirs.read()
        for key, array in ours.read().items():
            np.testing.assert_array_equal(found[key], array, err_msg=f"{info.name} {key}")
    expected = Activations("fp8-dynamic-g128") if case == "fp8" else inputs
    assert again.activations.get(FIRST) == expected


def test_gguf_says_that_scales_of_activations_stay_behind(source: Checkpoint, tmp_path: Path) -> None:
    written(source, "int8-channel", tmp_path / "out", Activations("int8-static", 0.25))
    again = open_checkpoint(tmp_path / "out")
    plan = GgufExporter().plan(again, Target("gguf"))
    assert any("no place in GGUF" in note for note in plan.notes)
    assert storage_word(plan, again, Run("llama.cpp", "llama_cpp", "graph")) == "quantized"


def in_gguf(checkpoint: Checkpoint, folder: Path) -> dict[str, tuple[str, np.ndarray]]:
    """GGUF type and decoded values of every tensor, by gguf's own reader."""
    exporter, target = GgufExporter(), Target("gguf")
    folder.mkdir()
    exported = exporter.export(checkpoint, exporter.plan(checkpoint, target), folder, no_progress)
    tensors = GGUFReader(folder / exported.main).tensors
    return {t.name: (t.tensor_type.name, dequantize(t.data, t.tensor_type)) for t in tensors}


@pytest.mark.parametrize(
    ("case", "kind"),
    [("gptq", "Q4_0"), ("awq", "Q4_1"), ("pack-3-asym", "Q4_0"), ("mxfp4", "MXFP4"), ("int", "Q8_0")],
)
def test_codes_are_kept_in_gguf(case: str, kind: str, source: Checkpoint, tmp_path: Path) -> None:
    word, inputs, options = CASES[case]
    written(source, word, tmp_path / "out", inputs, **options)
    again = open_checkpoint(tmp_path / "out")
    found, values = in_gguf(again, tmp_path / "gguf")["blk.0.attn_v.weight"]
    assert found == kind
    np.testing.assert_array_equal(values, again.resolve("model.layers.0.self_attn.v_proj.weight").value())


def edited(folder: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> Path:
    """Tensors and quantization section changed in place."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_awq_with_full_scales_goes_to_q5_0(source: Checkpoint, tmp_path: Path) -> None:
    """AutoAWQ's scales use all of float16's mantissa, so -Z * S is no float16; code - zero point still is five bits."""

    def full_scales(tensors: dict[str, torch.Tensor], _section: dict[str, Any]) -> None:
        for name in [n for n in tensors if n.endswith(".scales")]:
            tensors[name] = (tensors[name].float() * 1.0437).half()

    written(source, "int4-g32-asym", tmp_path / "out", format="awq")
    again = open_checkpoint(edited(tmp_path / "out", full_scales))
    found, values = in_gguf(again, tmp_path / "gguf")["blk.0.attn_v.weight"]
    assert found == "Q5_0"
    np.testing.assert_array_equal(values, again.resolve("model.layers.0.self_attn.v_proj.weight").value())


def test_scales_as_llm_compressor_writes_them(source: Checkpoint, tmp_path: Path) -> None:
    """bfloat16 scales: eight bits of mantissa, which float16 holds in its range."""

    def narrow(tensors: dict[str, torch.Tensor], _section: dict[str, Any]) -> None:
        for name in [n for n in tensors if n.endswith("weight_scale")]:
            tensors[name] = tensors[name].bfloat16()

    written(source, "int4-g32", tmp_path / "out")
    again = open_checkpoint(edited(tmp_path / "out", narrow))
    weight = again.resolve(f"{FIRST}.weight")
    assert isinstance(weight, Quantized)
    assert weight.layout == parse_layout("int4-g32")
    stored = load_file(tmp_path / "out/model.safetensors")[f"{FIRST}.weight_scale"]
    np.testing.assert_array_equal(weight.read()["scale"], stored.float().numpy())


def test_fp8_is_refused_in_gguf(source: Checkpoint, tmp_path: Path) -> None:
    written(source, "fp8-e4m3-channel", tmp_path / "out")
    with pytest.raises(Unsupported, match="fp8-e4m3-channel"):
        GgufExporter().plan(open_checkpoint(tmp_path / "out"), Target("gguf"))


def say(key: str, value: Any) -> Callable[[dict[str, torch.Tensor], dict[str, Any]], None]:
    return lambda _tensors, section: section.update({key: value})


def misplaced(tensors: dict[str, torch.Tensor], _section: dict[str, Any]) -> None:
    tensors[f"{FIRST}.g_idx"] = tensors[f"{FIRST}.g_idx"] + 1


def dropped(suffix: str) -> Callable[[dict[str, torch.Tensor], dict[str, Any]], None]:
    def change(tensors: dict[str, torch.Tensor], _section: dict[str, Any]) -> None:
        del tensors[f"{FIRST}.{suffix}"]

    return change


def widened(tensors: dict[str, torch.Tensor], _section: dict[str, Any]) -> None:
    tensors[f"{FIRST}.scales"] = torch.cat([tensors[f"{FIRST}.scales"]] * 2)


@pytest.mark.parametrize(
    ("case", "change", "error", "message"),
    [
        ("pack", say("quant_method", "exl2"), Unsupported, "exl2.*not read"),
        ("pack", say("config_groups", {}), Malformed, "no group of quantization_config"),
        ("pack", dropped("weight_scale"), Malformed, "weight_scale"),
        ("pack", say("sparsity_config", {"targets": ["Linear"]}), Unsupported, "sparse"),
        ("gptq", say("checkpoint_format", "gptq_v2"), Malformed, "not the middle code"),
        ("gptq", misplaced, Malformed, "groups 1 to 2 of 2"),
        ("gptq", dropped("qzeros"), Malformed, "qzeros is missing"),
        ("gptq", widened, Malformed, "its scales has shape"),
        ("gptq", say("bits", 5), Unsupported, "with 5 bits"),
        ("awq", say("version", "gemv"), Unsupported, "gemm is read|version 'gemv'"),
        ("fp8", say("activation_scheme", "static"), Malformed, "no scale of the inputs"),
        ("fp8", say("weight_block_size", [32, 32]), Malformed, "weight_scale_inv has shape"),
    ],
)  # fmt: skip
def test_faults_are_named(  # noqa: PLR0917 - pytest fills them in by name
    case: str, change: Callable[..., None], error: type[Exception], message: str, source: Checkpoint, tmp_path: Path
) -> None:
    word, inputs, options = CASES[case]
    written(source, word, tmp_path / "out", inputs, **options)
    with pytest.raises(error, match=message):
        open_checkpoint(edited(tmp_path / "out", change))


def test_what_mlc_compiled_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "mlc-chat-config.json").write_text("{}")
    with pytest.raises(Unsupported, match="compiled for MLC"):
        open_checkpoint(tmp_path)
