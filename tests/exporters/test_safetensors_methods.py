"""Every quantized form of safetensors as transformers loads it: nothing missing, every value ours."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from tightship.activations import Activations
from tightship.checkpoint import Checkpoint
from tightship.exporters.to_safetensors import SafetensorsExporter
from tightship.formats.layouts import parse_layout
from tightship.opening import open_checkpoint
from tightship.target import Target, TargetPlan
from tightship.validators.runtimes.transformers_client import load as client_load
from tightship.weights import Quantized

IDS = torch.arange(24)[None] % 90 + 3


@pytest.fixture(scope="module")
def llama(tiny_directory: Callable[[str], Path]) -> Checkpoint:
    return open_checkpoint(tiny_directory("llama"))


def quantized(
    checkpoint: Checkpoint, word: str, activations: Activations | None = None, without: Collection[str] = ()
) -> Checkpoint:
    """Every linear of the blocks rounded to a layout, its inputs said to be rounded too."""
    layout = parse_layout(word)
    changed = {
        i.name: Quantized.of(layout, layout.quantize(checkpoint.resolve(i.name).value()))
        for i in checkpoint.linears()
        if i.name not in without
    }
    said = {} if activations is None else {n.removesuffix(".weight"): activations for n in changed}
    return checkpoint.with_weights(changed).replace(activations=said)


def write(checkpoint: Checkpoint, folder: Path, **options: Any) -> TargetPlan:
    exporter, target = SafetensorsExporter(), Target("safetensors", None, options)
    plan = exporter.plan(checkpoint, target)
    folder.mkdir()
    exporter.export(checkpoint, plan, folder)
    assert plan.file_bytes == (folder / "model.safetensors").stat().st_size
    return plan


def load(folder: Path, dtype: Any = torch.float32, **options: Any) -> Any:
    model, report = transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, **options
    )
    assert not any(report.values()), report
    return model.eval()


def dequantized(folder: Path) -> Any:
    """Decoded on loading; transformers then has no use for static scales of activations."""
    return client_load(folder, json.loads((folder / "config.json").read_text()), "graph")


def assert_same(checkpoint: Checkpoint, model: Any) -> None:
    state = model.state_dict()
    for name in checkpoint.weights:
        np.testing.assert_array_equal(state[name].numpy(), checkpoint.resolve(name).value(), err_msg=name)


def section(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


FORMS = {
    "fp8-e4m3": "naive-quantized",
    "fp8-e4m3-channel": "naive-quantized",
    "fp8-e4m3-block": "naive-quantized",
    "mxfp8": "mxfp8-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "nvfp4-scaled": "nvfp4-pack-quantized",
}


@pytest.mark.parametrize("word", FORMS)
def test_floats_of_few_bits_are_loaded_as_ours(word: str, llama: Checkpoint, tmp_path: Path) -> None:
    if word == "nvfp4":  # GGML's blocks are 64 wide
        down = [i.name for i in llama.linears() if i.shape[1] % 64]
        checkpoint = quantized(llama, word, without=down)
    else:
        checkpoint = quantized(llama, word)
    write(checkpoint, tmp_path / "out")
    assert section(tmp_path / "out")["config_groups"]["group_0"]["format"] == FORMS[word]
    assert_same(checkpoint, dequantized(tmp_path / "out"))
    with torch.no_grad():
        lazily = load(tmp_path / "out", torch.bfloat16)(IDS).logits.float()
        plain = dequantized(tmp_path / "out")(IDS).logits
    assert float((lazily - plain).norm() / plain.norm()) < 0.05


ROUNDED = {
    "int8-dynamic": ("int8-channel", Activations("int8-dynamic"), ()),
    "int8-dynamic-asym": ("int8-channel", Activations("int8-dynamic-asym"), ()),
    "int8-static": ("int8-channel", Activations("int8-static", 0.05), ("input_scale",)),
    "int8-static-asym": (
        "int8-channel",
        Activations("int8-static-asym", 0.05, -7),
        ("input_scale", "input_zero_point"),
    ),
    "w4a8": ("int4-g32", Activations("int8-dynamic"), ()),
    "fp8-dynamic": ("fp8-e4m3-channel", Activations("fp8-dynamic"), ()),
    "fp8-static": ("fp8-e4m3", Activations("fp8-static", 0.01), ("input_scale",)),
    "fp8-block": ("fp8-e4m3-block", Activations("fp8-dynamic"), ()),
    "mxfp8": ("mxfp8", Activations("mxfp8-dynamic"), ()),
    "nvfp4": ("nvfp4-scaled", Activations("nvfp4-local", 600.0), ("input_global_scale",)),
}


@pytest.mark.parametrize("case", ROUNDED)
def test_rounded_activations(case: str, llama: Checkpoint, tmp_path: Path) -> None:
    """Decoded, the weights are ours; loaded as it is, compressed-tensors rounds the inputs, and the logits move."""
    word, activations, suffixes = ROUNDED[case]
    checkpoint = quantized(llama, word, activations)
    plan = write(checkpoint, tmp_path / "out")
    stored = load_file(tmp_path / "out/model.safetensors")
    first = "model.layers.0.self_attn.q_proj"
    assert {n.removeprefix(f"{first}.") for n in stored if n.startswith(f"{first}.input")} == set(suffixes)
    if activations.scale is not None:
        assert float(stored[f"{first}.{suffixes[0]}"]) == np.float32(activations.scale)
        assert {t.name for t in plan.tensors} >= {f"{first}.{s}" for s in suffixes}
    assert_same(checkpoint, dequantized(tmp_path / "out"))
    narrow = "fp4" in word or word == "mxfp8"
    with torch.no_grad():
        live = load(tmp_path / "out", torch.bfloat16 if narrow else torch.float32)(IDS).logits.float()
        plain = dequantized(tmp_path / "out")(IDS).logits
    assert 1e-4 < float((live - plain).norm() / plain.norm()) < 0.9


def test_scales_of_the_cache(llama: Checkpoint, tmp_path: Path) -> None:
    checkpoint = quantized(llama, "fp8-e4m3-channel", Activations("fp8-dynamic"))
    cache = {
        f"model.layers.{i}.self_attn.{w}": Activations("fp8-static", 0.5 + i)
        for i in (0, 1)
        for w in ("k_scale", "v_scale")
    }
    checkpoint = checkpoint.replace(activations={**checkpoint.activations, **cache})
    write(checkpoint, tmp_path / "out")
    assert section(tmp_path / "out")["kv_cache_scheme"]["type"] == "float"
    model = load(tmp_path / "out")
    assert float(model.model.layers[1].self_attn.k_scale) == 1.5
    with torch.no_grad():
        assert torch.isfinite(model(IDS).logits).all()
