"""Windows against dense runs under an explicit band, in torch and ONNX Runtime; GGUF where the loader reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported, UsageError
from tightship.exporters import exporter_for
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.passes import pass_for
from tightship.passes.base import Run
from tightship.pipeline import exporter_of
from tightship.target import Target

torch = pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")

EMBER = Path(__file__).parents[2] / "examples" / "ember"
Tiny = Callable[[str], Checkpoint]
IDS = np.random.default_rng(0).integers(1, 96, (2, 24))


def windowed(checkpoint: Checkpoint, size: int) -> Checkpoint:
    step = pass_for("window", {"size": size})
    step.requires(checkpoint)
    return step.apply(checkpoint, Run())


def banded(checkpoint: Checkpoint, size: int) -> np.ndarray:
    """Logits of the dense model under a mask made here: key j is seen by query i where 0 <= i - j < size."""
    length = IDS.shape[1]
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    seen = (distance >= 0) & (distance < size)
    mask = torch.zeros(length, length).masked_fill(~seen, torch.finfo(torch.float32).min)
    mask = mask[None, None].expand(len(IDS), 1, length, length)
    with torch.no_grad():
        found: np.ndarray = ModelView(checkpoint).module()(torch.from_numpy(IDS), attention_mask=mask).logits.numpy()
    return found


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen2", "qwen3", "phi3"])
def test_a_wide_window_is_the_dense_model_bit_for_bit(family: str, tiny: Tiny) -> None:
    dense = tiny(family)
    wide = windowed(dense, 64)
    expected, found = (ModelView(c, threads=1).outputs(IDS)["logits"] for c in (dense, wide))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen2", "qwen3", "phi3"])
def test_a_window_is_a_dense_run_under_a_band(family: str, tiny: Tiny) -> None:
    dense = tiny(family)
    found = ModelView(windowed(dense, 5)).outputs(IDS)["logits"]
    np.testing.assert_allclose(found, banded(dense, 5), rtol=1e-4, atol=1e-4)
    assert np.abs(found - ModelView(dense).outputs(IDS)["logits"]).max() > 0.1


def test_onnx_runtime_sees_the_same_band(tiny: Tiny, tmp_path: Path) -> None:
    dense = tiny("llama")
    small = windowed(dense, 5)
    exporter = exporter_of("onnx")
    exporter.export(small, exporter.plan(small, Target("onnx")), tmp_path)
    session = ort.InferenceSession(str(tmp_path / "model.onnx"))
    feeds: dict[str, Any] = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
    for entry in session.get_inputs():
        if entry.name.startswith("past_key_values"):
            feeds[entry.name] = np.zeros((2, entry.shape[1], 0, entry.shape[3]), np.float32)
        elif entry.name == "position_ids":
            feeds[entry.name] = np.broadcast_to(np.arange(24), (2, 24)).copy()
    (logits,) = session.run(["logits"], feeds)
    np.testing.assert_allclose(logits, banded(dense, 5), rtol=1e-3, atol=1e-3)


def test_gguf_is_refused_where_the_loader_ignores_windows_and_gemma_is_not(tiny: Tiny) -> None:
    ember = open_checkpoint(EMBER)
    with pytest.raises(Unsupported, match="ignores sliding windows"):
        exporter_for("gguf").plan(windowed(ember, 64), Target("gguf"))
    harmless = Target("gguf", options={"context": 64})
    assert exporter_for("gguf").plan(windowed(ember, 64), harmless).file_bytes > 0
    assert windowed(tiny("gemma2"), 5).hyper["window_layers"] == [1, 1]


def test_families_without_a_word_for_it_are_refused(tiny: Tiny) -> None:
    for family in ("bert", "gpt2", "opt"):
        with pytest.raises(Unsupported, match="no word for a sliding window"):
            windowed(tiny(family), 8)
    with pytest.raises(UsageError, match="size"):
        pass_for("window", {"size": 0})
