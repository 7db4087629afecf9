"""Rounded activations and floats of few bits through whole builds: every proof passes, and the files say the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors import safe_open

import tightship

ROOT = Path(__file__).resolve().parents[2]
EMBER = ROOT / "examples" / "ember"
TEXT = ROOT / "examples" / "recipes" / "novel.txt"


def built(source: Path, output: Path, recipe: dict[str, Any]) -> Path:
    made = tightship.Recipe.from_json({"threads": 1, **recipe})
    tightship.build(source, output=output, recipe=made, work=output.parent / "work")
    return output


def initializers(folder: Path) -> dict[str, np.ndarray]:
    return {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(folder / "model.onnx").graph.initializer}


def tensors(folder: Path) -> dict[str, Any]:
    """By torch, which knows the types of few bits."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


def ranges(tmp_path: Path, **options: Any) -> dict[str, tuple[float, int]]:
    """Module -> scale and zero point (signed) of its inputs, from the published file of a build that passed."""
    recipe = {
        "calibration": {"text": str(TEXT), "tokens": 1024, "sequence": 128},
        "targets": [{"to": "onnx", "scheme": "int8-static", "with": options}],
        "gates": {"kl_mean": 0.1},
    }
    folder = built(EMBER, tmp_path / "-".join(map(str, options.values())), recipe)
    held = initializers(folder / "onnx-int8-static")
    modules = [name.removesuffix(".input_scale") for name in held if name.endswith(".input_scale")]
    return {m: (float(held[f"{m}.input_scale"]), int(held[f"{m}.input_zero_point"]) - 128) for m in modules}


@pytest.mark.slow
def test_static_activations_by_each_method(tmp_path: Path) -> None:
    """Matrices that read the same input share its range."""
    extremes = ranges(tmp_path, activations="int8-static")
    percentile = ranges(tmp_path, activation_range="percentile", percentile=99.9)
    entropy = ranges(tmp_path, activation_range="entropy", activations="int8-static")
    assert len(extremes) == len(percentile) == len(entropy) == 8
    assert {zero for _, zero in (*extremes.values(), *entropy.values())} == {0}
    assert any(zero for _, zero in percentile.values())
    for module, (scale, _) in extremes.items():
        assert percentile[module][0] <= 2 * scale * 127 / 255 * 1.0001  # both tails, in 255 steps
        assert entropy[module][0] <= scale * 1.0001
    assert sum(entropy[m][0] < 0.95 * extremes[m][0] for m in extremes) >= 1


@pytest.mark.slow
def test_dynamic_activations_of_a_pass_in_onnx_and_safetensors(tmp_path: Path) -> None:
    """One solve; the integers and scales of both files are the same."""
    recipe = {
        "passes": [{"use": "quantize", "with": {"layout": "int8-channel", "activations": "int8-dynamic"}}],
        "targets": [{"to": "onnx"}, {"to": "safetensors"}],
        "gates": {"kl_mean": 0.01},
    }
    folder = built(EMBER, tmp_path / "out", recipe)
    held, theirs = initializers(folder / "onnx"), tensors(folder / "safetensors")
    found = [name for name, tensor in theirs.items() if str(tensor.dtype) == "torch.int8"]
    assert len(found) == 14
    for name in found:
        np.testing.assert_array_equal(held[f"{name}.codes"].astype(np.int16) - 128, theirs[name].numpy().T)
        scale = theirs[name.removesuffix("weight") + "weight_scale"].float().numpy()
        np.testing.assert_array_equal(held[f"{name}.scales"], scale[:, 0])


@pytest.mark.slow
@pytest.mark.usefixtures("without_proof")
@pytest.mark.parametrize(("scheme", "suffix"), [("fp8", "weight"), ("mxfp4", "weight_packed")])
def test_checkpoints_in_floats_of_few_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, suffix: str
) -> None:
    """A checkpoint as other tools publish it goes to ONNX with its codes, bit for bit, and is proven there."""
    source = built(EMBER, tmp_path / "first", {"targets": [{"to": "safetensors", "scheme": scheme}]})
    monkeypatch.undo()
    source = source / f"safetensors-{scheme}"
    folder = built(source, tmp_path / "second", {"targets": [{"to": "onnx"}], "gates": {"kl_mean": 1e-6}})
    theirs = tensors(source)
    found = [name.removesuffix(f".{suffix}") for name in theirs if name.endswith(f"proj.{suffix}")]
    assert len(found) == 14
    held = {i.name: i for i in onnx.load(folder / "onnx" / "model.onnx").graph.initializer}
    for name in found:
        import torch

        codes = np.frombuffer(held[f"{name}.weight.codes"].raw_data, np.uint8)
        bytes_ = theirs[f"{name}.{suffix}"].view(torch.uint8).numpy()
        if scheme == "mxfp4":  # two codes a byte, first low; theirs by rows of the weight, ours by its columns
            bytes_, codes = (np.stack([b & 15, b >> 4], axis=-1).reshape(*b.shape[:-1], -1) for b in (bytes_, codes))
        np.testing.assert_array_equal(codes.reshape(bytes_.shape[::-1]).T, bytes_)


@pytest.mark.slow
def test_experts_in_one_node_hold_the_integers_of_their_twins(
    tiny_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    """Every proof passes, genai's among them; the stacks of QMoE say what safetensors says of each expert."""
    recipe = {
        "passes": [{"use": "quantize", "with": {"layout": "int4"}}],
        "targets": [{"to": "onnx", "with": {"experts": "qmoe", "logits": "last"}}, {"to": "safetensors"}],
        "gates": {"top1": 0.0},
    }
    folder = built(tiny_directory("mixtral"), tmp_path / "out", recipe)
    targets = {t["id"]: t for t in json.loads((folder / "report.json").read_text())["targets"]}
    assert "experts in QMoE, fused for ONNX Runtime, logits of the last token" in targets["onnx"]["graph_source"]
    found = {t: {c["metric"]: c for c in target["checks"] if c["kind"] == "values"} for t, target in targets.items()}
    assert found["safetensors"]["integers_unlike_other_targets"]["value"] == 0
    digests = [found[t]["integers"]["extra"] for t in ("onnx", "safetensors")]
    assert digests[0] == digests[1]
    assert digests[0]["tensors"] == 2 * (4 + 4 * 3)
    runtimes = {c["runtime"] for c in targets["onnx"]["checks"] if c["kind"] == "runtime"}
    assert {"onnxruntime", "onnxruntime-genai"} <= runtimes
