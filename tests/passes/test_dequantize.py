"""Leaving a grid, outright; and GPTQ on the grids of few-bit floats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tightship.errors import UsageError
from tightship.formats.layouts import parse_layout
from tightship.opening import open_checkpoint
from tightship.passes import pass_for
from tightship.passes.base import Run
from tightship.passes.hessian import loss
from tightship.passes.quantize.feedback import Feedback, round_with_feedback
from tightship.weights import Dense, Quantized

FIRST = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_values_are_kept_and_the_grid_is_gone(dtype: str, qwen: Path) -> None:
    checkpoint = open_checkpoint(qwen)
    step = pass_for("quantize", {"layout": "fp8-e4m3-channel", "activations": "fp8-dynamic"}, "p", Path)
    solved = step.apply(checkpoint, Run())
    plain = pass_for("dequantize", {"dtype": dtype}, "p", Path).apply(solved, Run())
    before, after = solved.resolve(FIRST), plain.resolve(FIRST)
    assert isinstance(before, Quantized)
    assert isinstance(after, Dense)
    assert after.dtype == dtype
    np.testing.assert_allclose(after.value(), before.value(), rtol=0 if dtype == "f32" else 2**-8)
    assert not plain.activations
    with pytest.raises(UsageError, match="no weight is quantized"):
        pass_for("dequantize", {}, "p", Path).requires(checkpoint)


@pytest.mark.parametrize("word", ["fp8-e4m3", "fp8-e4m3-channel", "fp8-e4m3-block", "mxfp8", "mxfp4", "nvfp4-scaled"])
@pytest.mark.parametrize("actorder", [True, False])
def test_gptq_rounds_on_float_grids(word: str, actorder: bool) -> None:
    """Correlated inputs: feedback has less calibration loss than rounding to nearest."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(512, 160)) @ (rng.normal(size=(160, 160)) * np.arange(1, 161) ** -0.7)
    second, w = x.T @ x / 512, rng.normal(0, 0.05, (96, 160)).astype(np.float32)
    layout = parse_layout(word)
    plain = layout.quantize(w)
    fed = round_with_feedback(w, second, layout, Feedback(actorder=actorder))
    layout.check(fed, w.shape)
    assert loss(w - layout.values(fed), second) < 0.9 * loss(w - layout.values(plain), second)
