"""Comparing outputs, and runs that give none."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from tightship.validators.fidelity import Run, compare, execute, failed_run, figure_with_its_gelu, judged
from tightship.validators.runtimes import child
from tightship.validators.runtimes.child import Limits, RuntimeDied, RuntimeMissing
from tightship.validators.text import TextWindows

RNG = np.random.default_rng(0)
MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
WINDOWS = TextWindows(MASK + 4, MASK, "random", targets=np.full((2, 4), -1), scored=MASK.astype(bool))
LOGITS = RNG.normal(size=(2, 4, 8)).astype(np.float32)
GRAPH = Run("llama.cpp", "llama_cpp", "graph")


def test_equal_outputs_have_no_distance() -> None:
    figures = compare({"logits": LOGITS}, {"logits": LOGITS.copy()}, WINDOWS)
    assert (figures["rel_l2"], figures["top1"], figures["positions"]) == (0, 1, 6)


def test_padded_positions_do_not_count() -> None:
    other = LOGITS.copy()
    other[1, 2:] = 99
    assert compare({"logits": LOGITS}, {"logits": other}, WINDOWS)["rel_l2"] == 0
    other[1, 1] = 99
    assert compare({"logits": LOGITS}, {"logits": other}, WINDOWS)["rel_l2"] > 1


def test_relative_distance_by_hand() -> None:
    """One of six positions off by (3, 4): 5 over the norm of all real positions."""
    other = LOGITS.copy()
    other[0, 0, :2] += [3, 4]
    norm = math.sqrt(float((LOGITS[0].astype(float) ** 2).sum() + (LOGITS[1, :2].astype(float) ** 2).sum()))
    assert compare({"logits": LOGITS}, {"logits": other}, WINDOWS)["rel_l2"] == pytest.approx(5 / norm, rel=1e-6)


def test_the_output_that_is_farthest_off_decides() -> None:
    hidden = RNG.normal(size=(2, 4, 6)).astype(np.float32)
    reference = {"logits": LOGITS, "last_hidden_state": hidden}
    near, far = (
        {"logits": LOGITS * 1.01, "last_hidden_state": hidden * 1.5},
        {"logits": LOGITS, "last_hidden_state": hidden},
    )
    assert compare(reference, near, WINDOWS)["rel_l2"] == pytest.approx(0.5, rel=1e-6)
    assert compare(reference, far, WINDOWS)["rel_l2"] == 0


def test_only_rows_that_were_run_are_compared() -> None:
    assert compare({"logits": LOGITS}, {"logits": LOGITS[:1]}, WINDOWS)["positions"] == 4


def test_nan_is_no_agreement() -> None:
    other = LOGITS.copy()
    other[0, 0, 0] = np.nan
    figures = compare({"logits": LOGITS}, {"logits": other}, WINDOWS)
    (check,) = judged(GRAPH, figures, "gguf", "f32", None)
    assert check.verdict == "fail"


def test_outputs_that_cannot_be_compared_are_errors() -> None:
    with pytest.raises(ValueError, match="has shape"):
        compare({"logits": LOGITS}, {"logits": LOGITS[..., :7]}, WINDOWS)
    with pytest.raises(ValueError, match="last_hidden_state"):
        compare({"logits": LOGITS}, {"last_hidden_state": LOGITS}, WINDOWS)


def test_thresholds_come_from_the_table() -> None:
    figures = compare({"logits": LOGITS}, {"logits": LOGITS * np.float32(1.001)}, WINDOWS)
    (graph,) = judged(GRAPH, figures, "gguf", "quantized", "1")
    (runtime,) = judged(Run("llama.cpp", "llama_cpp", "runtime"), figures, "gguf", "quantized", "1")
    assert (graph.verdict, graph.id, graph.threshold_source) == (
        "fail",
        "gguf/llama.cpp/graph/rel_l2",
        "tolerances.toml",
    )
    assert (runtime.verdict, runtime.kind) == ("pass", "runtime")


def test_dead_and_missing_runtimes_are_checks() -> None:
    dead = failed_run(GRAPH, "gguf", RuntimeDied("llama_cpp was ended by SIGABRT", log="GGML_ASSERT", tensor="x"))
    assert (dead.verdict, dead.tensor, dead.extra["log"]) == ("fail", "x", "GGML_ASSERT")
    missing = failed_run(GRAPH, "gguf", RuntimeMissing("no cyllama"))
    assert (missing.verdict, missing.reason) == ("not_run", "no cyllama")
    cached = failed_run(Run("onnxruntime", "onnx_runtime", "graph", decode=True), "onnx", ValueError("shape"))
    assert cached.id == "onnx/onnxruntime/graph/outputs_through_cache"


def test_a_run_through_the_cache_takes_one_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "echo_runtime.py").write_text("def run(job, arrays):\n    return {'job': job}, arrays\n")
    monkeypatch.setitem(child.RUNTIMES, "onnx_runtime", "echo_runtime")
    monkeypatch.setattr(child, "_ENVIRONMENT", (*child._ENVIRONMENT, "PYTHONPATH"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run = Run("onnxruntime", "onnx_runtime", "graph", decode=True)
    outputs, about = execute(run, tmp_path, "model.onnx", WINDOWS, Limits(threads=2))
    assert outputs["input_ids"].tolist() == WINDOWS.ids[:1].tolist()
    assert (about["job"]["want"], about["job"]["mode"], about["job"]["threads"]) == ("decode", "graph", 2)


def test_gelu_figure_is_the_median_over_positions() -> None:
    """Five positions exact, one far off: the median is 0, and nothing is judged."""
    other = LOGITS.copy()
    other[0, 0] *= 3
    check = figure_with_its_gelu({"logits": LOGITS}, {"logits": other}, WINDOWS, "gguf")
    assert (check.value, check.op, check.metric) == (0, "report", "rel_l2_median_with_its_gelu")
    check = figure_with_its_gelu({"logits": LOGITS}, {"logits": LOGITS * 3}, WINDOWS, "gguf")
    assert check.value == pytest.approx(2, rel=1e-6)
