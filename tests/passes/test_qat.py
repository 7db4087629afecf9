"""Quantization-aware training: exported integers are those training computed with, and training helps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tightship.checkpoint import Checkpoint
from tightship.formats.layouts import parse_layout
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.passes.base import Run
from tightship.passes.divergence import Yardstick
from tightship.passes.fake_quant import fake_quantized
from tightship.passes.qat import Qat
from tightship.passes.quantize import Quantize
from tightship.texts import token_windows
from tightship.weights import Quantized

EMBER = Path(__file__).parents[2] / "examples" / "ember"
TEXT = (
    "The old ship lay at anchor in the bay, and nobody on the shore could say whence she had come. "
    "A boy of ten stood by the wall with his dog, and told all who would hear that he had seen a light in her. " * 20
)


@pytest.fixture(scope="module")
def ember() -> Checkpoint:
    return open_checkpoint(EMBER)


@pytest.mark.parametrize("word", ["int4", "int3-g32-asym", "int8-channel", "q4_k"])
@pytest.mark.parametrize("codes", [True, False])
def test_exported_values_are_those_that_were_trained(word: str, codes: bool) -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((6, 256)).astype(np.float32)
    layout = parse_layout(word)
    leaf = fake_quantized(Quantized.of(layout, layout.quantize(w)), w, "cpu", codes=codes)
    with torch.no_grad():
        for tensor in leaf.tensors.values():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    exact = 0 if word.startswith("int") else 1e-6  # a K-quant's minimum is subtracted in float32 while training
    np.testing.assert_allclose(leaf.weight().value(), leaf.value().detach().numpy(), rtol=0, atol=exact)


@pytest.mark.parametrize("word", ["int4", "int3-g32-asym"])
def test_gradients_are_those_of_lsq(word: str) -> None:
    """d value / d scale by hand: code - zero - w / scale inside the range, the limit outside."""
    rng = np.random.default_rng(1)
    w = rng.standard_normal((3, 64)).astype(np.float32)
    layout = parse_layout(word)
    arrays = layout.quantize(0.6 * w)  # so that some weights lie outside
    leaf = fake_quantized(Quantized.of(layout, arrays), w, "cpu", codes=True)
    leaf.value().sum().backward()
    scale = arrays["scale"].astype(np.float64)[..., None]
    zero = arrays["zero_point"].astype(np.float64)[..., None] if "zero_point" in arrays else 0.0
    exact = w.reshape(3, 2, 32) / scale
    low, high = layout.lo - zero, layout.hi - zero  # type: ignore[attr-defined]
    inside = (exact >= low) & (exact <= high)
    by_scale = np.where(inside, np.rint(exact) - exact, np.clip(exact, low, high)).sum(axis=2)
    found = leaf.tensors["scale"].grad.numpy() / scale[..., 0]  # the logarithm's, over the scale
    np.testing.assert_allclose(found, by_scale, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(leaf.tensors["w"].grad.numpy(), inside.reshape(3, 64).astype(np.float32))


@pytest.mark.slow
def test_both_phases_bring_the_model_nearer(ember: Checkpoint) -> None:
    windows = token_windows(ember, [TEXT], tokens=512, sequence=64)
    figures: dict[str, Any] = {}
    run = Run(threads=1, texts=(TEXT,), tokens=2048, sequence=64, report=figures.__setitem__)
    how = {"layout": "int2-asym", "tokens": 2048, "sequence": 64, "batch": 4, "snapshot": 8, "rate": 1e-3}
    results = {
        "rounded": Quantize(solver="importance", layout="int2-asym").apply(ember, run),
        "blocks": Qat(phases=("blocks",), **how).apply(ember, run),
        "both": Qat(**how).apply(ember, run),
    }
    away = {}
    for name, result in results.items():
        view = ModelView(ember, threads=1)
        yardstick = Yardstick(view, windows)
        view._module = ModelView(result, threads=1).module()
        away[name] = yardstick.divergence()
    assert away["blocks"] < 0.8 * away["rounded"]
    assert away["both"] < away["blocks"]
    assert figures["model"]["held_out_after"] < figures["model"]["held_out_before"]


@pytest.mark.slow
def test_scales_of_gptq_are_trained_under_its_codes(ember: Checkpoint) -> None:
    windows = token_windows(ember, [TEXT], tokens=512, sequence=64)
    run = Run(threads=1, texts=(TEXT,), tokens=2048, sequence=64)
    how = {"layout": "int2-asym", "tokens": 1024, "sequence": 64, "batch": 4, "snapshot": 8}
    solved = Quantize(solver="gptq", layout="int2-asym").apply(ember, run)
    trained = Qat(solver="gptq", phases=("model",), **how).apply(ember, run)
    away = []
    for result in (solved, trained):
        view = ModelView(ember, threads=1)
        yardstick = Yardstick(view, windows)
        view._module = ModelView(result, threads=1).module()
        away.append(yardstick.divergence())
    assert away[1] < away[0]
    for info in ember.linears():
        before, after = (result.weights[info.name].read() for result in (solved, trained))
        np.testing.assert_array_equal(before["codes"], after["codes"])
        assert not np.array_equal(before["scale"], after["scale"])
