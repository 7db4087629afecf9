"""Forms of quantized checkpoints that we do not write: desc_act, AutoRound, gpt-oss, bitsandbytes.

What the tools' own decoders say of checkpoints that they wrote: benchmarks/foreign_sources.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tightship.checkpoint import Checkpoint
from tightship.errors import Malformed, TightshipError, Unsupported
from tightship.exporters.to_gguf import GgufExporter
from tightship.exporters.to_safetensors import SafetensorsExporter
from tightship.formats.layouts import parse_layout
from tightship.formats.quantized import read_quantized
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.target import Target
from tightship.weights import Dense, Quantized

QUERY = "model.layers.0.self_attn.q_proj"


def saved(checkpoint: Checkpoint, word: str, folder: Path, form: str | None) -> Path:
    """Every linear in a layout, as our exporter writes it."""
    layout, exporter = parse_layout(word), SafetensorsExporter()
    changed = {
        i.name: Quantized.of(layout, layout.quantize(checkpoint.resolve(i.name).value())) for i in checkpoint.linears()
    }
    made, target = checkpoint.with_weights(changed), Target("safetensors", None, {"format": form} if form else {})
    folder.mkdir()
    exporter.export(made, exporter.plan(made, target), folder)
    return folder


def edited(folder: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> Checkpoint:
    # Copies: what `load_file` gives is mapped from the file that is written anew.
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def source(qwen: Path) -> Checkpoint:
    return open_checkpoint(qwen)


# --- columns in the order of activations ------------------------------------------------------------------------


def in_the_order_of_activations(tensors: dict[str, torch.Tensor], section: dict[str, Any]) -> None:
    cols = tensors[f"{QUERY}.g_idx"].numel()
    order = torch.randperm(cols, generator=torch.Generator().manual_seed(1)) // 32
    tensors[f"{QUERY}.g_idx"] = order.to(torch.int32)
    section["desc_act"] = True


def test_gptq_with_desc_act(source: Checkpoint, tmp_path: Path) -> None:
    """W[o, i] = (code[i, o] - zero point[g_idx[i], o]) * scale[g_idx[i], o], taken from the words bit by bit."""
    opened = edited(saved(source, "int4-g32-asym", tmp_path / "a", "gptq_v2"), in_the_order_of_activations)
    tensors = load_file(tmp_path / "a/model.safetensors")
    words, zeros, scales, order = (
        tensors[f"{QUERY}.{key}"].numpy() for key in ("qweight", "qzeros", "scales", "g_idx")
    )
    expected = np.empty((words.shape[1], len(order)))
    for i, group in enumerate(order):
        for o in range(words.shape[1]):
            code = words[i // 8, o] >> 4 * (i % 8) & 15
            zero = zeros[group, o // 8] >> 4 * (o % 8) & 15
            expected[o, i] = float(code - zero) * float(scales[group, o])
    weight = opened.resolve(f"{QUERY}.weight")
    assert isinstance(weight, Quantized)
    assert weight.layout.name == "int4-g1-asym"
    np.testing.assert_array_equal(weight.value(), expected.astype(np.float32))
    other = opened.resolve("model.layers.0.self_attn.k_proj.weight")
    assert isinstance(other, Quantized)
    assert other.layout.name == "int4-g32-asym"


def test_who_keeps_the_codes_of_desc_act(source: Checkpoint, tmp_path: Path) -> None:
    opened = edited(saved(source, "int4-g32", tmp_path / "a", "gptq"), in_the_order_of_activations)
    with pytest.raises(Unsupported, match="int4-g1 exactly") as caught:
        GgufExporter().plan(opened, Target("gguf"))
    assert caught.value.tensor == f"{QUERY}.weight"
    exporter = SafetensorsExporter()
    (tmp_path / "b").mkdir()
    exporter.export(opened, exporter.plan(opened, Target("safetensors")), tmp_path / "b")
    first, again = (c.resolve(f"{QUERY}.weight") for c in (opened, open_checkpoint(tmp_path / "b")))
    assert isinstance(first, Quantized)
    assert isinstance(again, Quantized)
    np.testing.assert_array_equal(again.read()["codes"], first.read()["codes"])


def test_compressed_tensors_with_actorder_group(source: Checkpoint, tmp_path: Path) -> None:
    def shuffled(tensors: dict[str, torch.Tensor], _section: dict[str, Any]) -> None:
        cols = int(tensors[f"{QUERY}.weight_shape"][1])
        tensors[f"{QUERY}.weight_g_idx"] = (torch.arange(cols).flip(0) // 32).to(torch.int32)

    folder = saved(source, "int4-g32", tmp_path / "a", None)
    plain = open_checkpoint(folder).resolve(f"{QUERY}.weight")
    assert isinstance(plain, Quantized)
    arrays = plain.read()
    opened = edited(folder, shuffled).resolve(f"{QUERY}.weight")
    # Groups from the last column on: the scales of the row, reversed.
    expected = arrays["codes"] * np.repeat(arrays["scale"].astype(np.float32), 32, axis=1)[:, ::-1]
    np.testing.assert_array_equal(opened.value(), expected)


# --- AutoRound --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "packing", "word"),
    [
        ("gptq", "auto_round:auto_gptq", "int4-g32"),
        ("gptq_v2", "auto_round", "int4-g32-asym"),
        ("awq", "auto_round:auto_awq", "int4-g32-asym"),
    ],
)
def test_auto_round(form: str, packing: str, word: str, source: Checkpoint, tmp_path: Path) -> None:
    """The same tensors as GPTQ and AWQ, under a section of its own; g_idx is left out."""

    def renamed(tensors: dict[str, torch.Tensor], section: dict[str, Any]) -> None:
        section.clear()
        section |= {"quant_method": "auto-round", "packing_format": packing, "bits": 2, "group_size": 64}
        section |= {"sym": not word.endswith("asym"), "data_type": "int"}
        section["extra_config"] = {r"model\.layers\..*": {"bits": 4, "group_size": 32, "sym": None}}
        for name in [n for n in tensors if n.endswith("g_idx")]:
            del tensors[name]

    folder = saved(source, word, tmp_path / "a", form)
    before = open_checkpoint(folder)
    expected = {info.name: before.resolve(info.name).value() for info in before.linears()}
    opened = edited(folder, renamed)
    for name, value in expected.items():
        weight = opened.resolve(name)
        assert isinstance(weight, Quantized)
        assert weight.layout.name == word
        np.testing.assert_array_equal(weight.value(), value)


def test_packings_of_auto_round_that_are_not_read(source: Checkpoint, tmp_path: Path) -> None:
    def other(_tensors: dict[str, torch.Tensor], section: dict[str, Any]) -> None:
        section |= {"quant_method": "auto-round", "packing_format": "auto_round:mlx"}

    with pytest.raises(Unsupported, match="auto_round:mlx"):
        edited(saved(source, "int4-g32", tmp_path / "a", "gptq"), other)


@pytest.mark.parametrize("settings", [["a"], {"(": {"bits": 4}}])
def test_settings_by_module_that_are_none(settings: Any, source: Checkpoint, tmp_path: Path) -> None:
    folder = saved(source, "int4-g32", tmp_path / "a", "gptq")
    with pytest.raises(Malformed, match="extra_config"):
        edited(folder, lambda _, section: section.update(extra_config=settings))


# --- gpt-oss ----------------------------------------------------------------------------------------------------


def test_gpt_oss_in_mxfp4(tmp_path: Path) -> None:
    """transformers' own decoder, and a model that computes."""
    from transformers import GptOssConfig, GptOssForCausalLM
    from transformers.integrations import mxfp4

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, "num_local_experts": 4}
    GptOssForCausalLM(GptOssConfig(**sizes, **more)).save_pretrained(tmp_path)
    tensors, expected = load_file(tmp_path / "model.safetensors"), {}
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, cols, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, cols // 32, 16), dtype=torch.uint8)
        scales = torch.randint(110, 124, (experts, rows, cols // 32), dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        expected[name] = mxfp4._convert_moe_packed_tensors(blocks, scales).float().numpy()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    opened = open_checkpoint(tmp_path)
    for name, value in expected.items():
        weight = opened.resolve(name)
        assert isinstance(weight, Dense)
        assert (weight.dtype, weight.read_rows is not None) == ("bf16", True)
        np.testing.assert_array_equal(weight.value(), value)
        np.testing.assert_array_equal(weight.rows()(1, 3).astype(np.float32), value[1:3])
    logits = ModelView(opened).outputs(np.arange(12).reshape(1, 12))["logits"]
    assert np.isfinite(logits).all()


# --- bitsandbytes -----------------------------------------------------------------------------------------------


def four_bits(nested: bool) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Tensors of a 6 x 32 matrix in blocks of 64, and its values, element by element."""
    rng = np.random.default_rng(0)
    packed, table = rng.integers(0, 256, (96, 1), dtype=np.uint8), np.sort(rng.normal(size=16)).astype(np.float32)
    factor = rng.uniform(0.5, 2, 3).astype(np.float32)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [6, 32]}
    tensors = {"a.weight": packed, "a.weight.quant_map": table, "a.weight.absmax": factor}
    if nested:
        inner, outer = rng.normal(size=256).astype(np.float32), rng.uniform(1, 2, 2).astype(np.float32)
        codes = rng.integers(0, 256, 3, dtype=np.uint8)
        state |= {"nested_blocksize": 2, "nested_dtype": "float32", "nested_offset": 0.25}
        tensors |= {"a.weight.absmax": codes, "a.weight.nested_quant_map": inner, "a.weight.nested_absmax": outer}
        factor = np.array([inner[c] * outer[i // 2] + np.float32(0.25) for i, c in enumerate(codes)], np.float32)
    tensors["a.weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    flat = packed.reshape(-1)
    values = [table[flat[i // 2] >> 4 if i % 2 == 0 else flat[i // 2] & 15] * factor[i // 64] for i in range(192)]
    return tensors, np.array(values, np.float32).reshape(6, 32)


def opened_as(method: str, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    return read_quantized({"quant_method": method}, {name: Dense.of(array) for name, array in tensors.items()})[0]


@pytest.mark.parametrize("nested", [False, True])
def test_four_bits_of_bitsandbytes(nested: bool) -> None:
    tensors, expected = four_bits(nested)
    found = opened_as("bitsandbytes", {**tensors, "b": np.ones(2, np.float32)})
    assert set(found) == {"a.weight", "b"}
    np.testing.assert_array_equal(found["a.weight"].value(), expected)


def test_eight_bits_of_bitsandbytes() -> None:
    codes = np.random.default_rng(0).integers(-127, 128, (4, 8), dtype=np.int8)
    row_max = np.array([1.27, 2.54, 0.5, 127], np.float32)
    found = opened_as("bitsandbytes", {"a.weight": codes, "a.SCB": row_max, "a.weight_format": np.uint8(0)})["a.weight"]
    assert found.layout == parse_layout("int8-channel").__class__(bits=8, group_size=0, scale_dtype="f32")
    np.testing.assert_allclose(found.value(), codes * row_max[:, None].astype(np.float64) / 127, rtol=1e-7)


@pytest.mark.parametrize(
    ("method", "change", "error", "message"),
    [
        ("bitsandbytes", {"a.weight.absmax": np.ones(2, np.float32)}, Malformed, "do not fit|hold no"),
        ("bitsandbytes", {"a.weight.quant_map": None}, Malformed, "quant_map is missing"),
        ("bitsandbytes", {"a.weight.quant_state.bitsandbytes__nf4": None}, Malformed, "has one quant_state"),
        ("bitsandbytes", {"a.weight.quant_state.bitsandbytes__nf4": b"{"}, Malformed, "quant_state of a.weight"),
        ("bitsandbytes", {"a.weight.quant_state.bitsandbytes__nf4": b'{"shape": [0, 3]}'}, Malformed, "has shape"),
        (
            "bitsandbytes",
            {"a.weight.quant_state.bitsandbytes__nf4": b'{"shape": [6, 32], "blocksize": 0}'},
            Malformed,
            "blocksize 0",
        ),
        ("bitsandbytes", {"a.SCB": np.ones(3, np.float32)}, Malformed, "SCB of shape"),
        (
            "mxfp4",
            {"m.x_blocks": np.zeros((2, 3, 16), np.uint8), "m.x_scales": np.zeros((2, 3))},
            Malformed,
            "blocks of shape",
        ),
        ("mxfp4", {"m.x_blocks": np.zeros((2, 3, 1, 16), np.uint8)}, Malformed, "x_scales is missing"),
    ],
)
def test_faults(method: str, change: dict[str, Any], error: type[TightshipError], message: str) -> None:
    tensors = four_bits(False)[0] | {
        key: np.frombuffer(value, np.uint8) if isinstance(value, bytes) else value for key, value in change.items()
    }
    with pytest.raises(error, match=message):
        opened_as(method, {name: array for name, array in tensors.items() if array is not None})


def test_tiled_rows_are_refused() -> None:
    tensors = {"a.weight": np.zeros((2, 4), np.int8), "a.SCB": np.ones(2, np.float32), "a.weight_format": np.uint8([1])}
    with pytest.raises(Unsupported, match="tiles"):
        opened_as("bitsandbytes", tensors)
