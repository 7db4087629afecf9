"""The whole proof of an artifact: faithful ones pass in every runtime, sabotaged bytes are caught and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tightship.checkpoint import Checkpoint
from tightship.errors import EnvironmentFailure
from tightship.exporters.to_onnx import OnnxExporter
from tightship.report import Report, TargetReport
from tightship.target import Target, no_progress
from tightship.validators.gates import parse_gates
from tightship.validators.parity import judge
from tightship.validators.prove import ProofSettings, Prover, References
from tightship.validators.runtimes import child

# The tiny model is random: how much it loses says nothing, so the gate lets everything pass.
SETTINGS = ProofSettings(windows=2, length=24, seconds=120, gates=parse_gates({"top1": 0.0}))
O = "model.layers.1.self_attn.o_proj.weight"  # noqa: E741
BIAS = "model.layers.1.self_attn.k_proj.bias"


@pytest.fixture(scope="module")
def references(original: Checkpoint) -> References:
    return References(original, SETTINGS)


@pytest.fixture
def prove(original: Checkpoint, references: References) -> Callable[..., TargetReport]:
    def make(artifact: Any, settings: ProofSettings = SETTINGS) -> TargetReport:
        shared = references if settings is SETTINGS else None
        references.digests.clear()  # artifacts of different tests need not hold the same integers
        prover = Prover(original, artifact.compressed, settings, shared)
        return prover.prove(artifact.plan, artifact.directory, artifact.exported)

    return make


def failed(report: TargetReport) -> dict[str, Any]:
    return {c.id.removeprefix(f"{report.id}/"): c for c in report.checks if c.verdict != "pass"}


def values_of(report: TargetReport) -> dict[str, Any]:
    return {c.id.removeprefix(f"{report.id}/"): c.value for c in report.checks}


def test_gguf_passes_in_llama_cpp_and_onnx_runtime(exports: Callable[..., Any], prove: Callable[..., Any]) -> None:
    report = prove(exports("gguf", "int8"))
    assert failed(report) == {}
    found = values_of(report)
    assert found["llama.cpp/graph/rel_l2"] < 1e-5
    assert found["onnxruntime/graph/rel_l2"] < 1e-5
    assert found["llama.cpp/tokenizer/encoding_mismatches"] == 0
    # The runtime's own rounding is far above the graph's, and the weights' loss is its own figure.
    assert found["llama.cpp/runtime/rel_l2"] > 10 * found["llama.cpp/graph/rel_l2"]
    assert found["torch/loss/rel_l2"] > 1e-3
    assert report.bits_per_weight == pytest.approx(exports("gguf", "int8").plan.bits_per_weight)
    assert len({c.id for c in report.checks}) == len(report.checks)


def test_onnx_passes_in_onnx_runtime_and_genai(exports: Callable[..., Any], prove: Callable[..., Any]) -> None:
    report = prove(exports("onnx", "int4"))
    assert failed(report) == {}
    found = values_of(report)
    assert found["onnxruntime/graph/rel_l2_through_cache"] < 1e-5
    assert {"onnxruntime/runtime/rel_l2", "onnxruntime-genai/runtime/rel_l2"} <= set(found)
    assert report.graph_source


@pytest.mark.slow
def test_safetensors_passes_in_transformers(exports: Callable[..., Any], prove: Callable[..., Any]) -> None:
    report = prove(exports("safetensors", "int4"))
    assert failed(report) == {}
    found = values_of(report)
    assert found["transformers/graph/rel_l2"] < 1e-5
    assert found["onnxruntime/graph/rel_l2"] < 1e-5


@pytest.mark.slow
def test_uncompressed_targets_lose_nothing(exports: Callable[..., Any], prove: Callable[..., Any]) -> None:
    found = values_of(prove(exports("onnx")))
    assert found["torch/loss/rel_l2"] == 0
    assert found["onnxruntime/loss/top1"] == 1


@pytest.mark.parametrize("container", ["gguf", "onnx"])
def test_transposed_square_matrix(staged: Callable[..., Any], prove: Callable[..., Any], container: str) -> None:
    artifact = staged(container)
    name = {"gguf": "blk.1.attn_output.weight", "onnx": O}[container]
    artifact.edit(name, lambda a: a.reshape(64, 64).T.reshape(-1), np.float32)
    found = failed(prove(artifact))
    assert f"reader/values/mismatches/{O}" in found
    assert "onnxruntime/graph/rel_l2" in found  # and so it is seen by running the file alone


@pytest.mark.slow
def test_dropped_bias(staged: Callable[..., Any], prove: Callable[..., Any]) -> None:
    artifact = staged("gguf")
    artifact.edit("blk.1.attn_k.bias", np.zeros_like)
    found = failed(prove(artifact))
    assert f"reader/values/mismatches/{BIAS}" in found
    assert "llama.cpp/graph/rel_l2" in found


def test_zeroed_packed_tensor(staged: Callable[..., Any], prove: Callable[..., Any]) -> None:
    artifact = staged("onnx", "int4")
    artifact.edit(f"{O}.B", np.zeros_like)
    found = failed(prove(artifact))
    assert found[f"reader/values/mismatches/{O}"].tensor == O
    assert "onnxruntime/graph/rel_l2" in found


def test_scale_off_by_its_last_bit(staged: Callable[..., Any], prove: Callable[..., Any]) -> None:
    """Too small for any output to show: only the stored values tell."""
    artifact = staged("onnx", "int8")
    artifact.edit(f"{O}.scales", lambda a: np.concatenate([a[:9], a[9:10] ^ 1, a[10:]]), np.uint32)
    found = failed(prove(artifact))
    values = {f"reader/values/mismatches/{O}", f"reader/values/integers/{O}"}
    twin = f"reader/structure/config/{O}.scales"  # small, so it lies in model.onnx, and genai.onnx reads another
    assert set(found) == {*values, twin}


def test_two_tokens_swapped(staged: Callable[..., Any], prove: Callable[..., Any]) -> None:
    artifact = staged("gguf")
    path = artifact.directory / artifact.exported.main
    data = path.read_bytes()
    # Two letters change places in the token list: strings of one byte behind a length of eight bytes.
    first, second = b"\x01\0\0\0\0\0\0\0e", b"\x01\0\0\0\0\0\0\0t"
    places = data.index(first), data.index(second)
    edited = bytearray(data)
    for place, piece in zip(places, (second, first), strict=True):
        edited[place : place + len(piece)] = piece
    path.write_bytes(edited)
    found = failed(prove(artifact))
    assert "reader/tokenizer/vocabulary_mismatches" in found
    assert "llama.cpp/tokenizer/encoding_mismatches" in found
    assert "llama.cpp/graph/rel_l2" not in found


def test_tokenizer_file_of_another_model(staged: Callable[..., Any], prove: Callable[..., Any]) -> None:
    artifact = staged("onnx")
    path = artifact.directory / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    found = failed(prove(artifact))
    assert set(found) == {"reader/tokenizer/changed_files"}
    assert "tokenizer.json" in found["reader/tokenizer/changed_files"].reason


@pytest.mark.slow
def test_truncated_file(staged: Callable[..., Any], prove: Callable[..., Any]) -> None:
    artifact = staged("gguf", "int8")
    path = artifact.directory / artifact.exported.main
    path.write_bytes(path.read_bytes()[:-1000])
    found = failed(prove(artifact))
    assert "reader/structure/readable" in found
    assert any(name.startswith("llama.cpp/graph/outputs") for name in found)
    assert "llama.cpp/loss/outputs" in found


def test_surplus_and_missing_files(staged: Callable[..., Any], prove: Callable[..., Any]) -> None:
    artifact = staged("onnx")
    (artifact.directory / "notes.txt").write_text("left over")
    assert failed(prove(artifact))["reader/structure/files"].reason == "notes.txt was not written by the exporter"


def test_a_runtime_that_is_not_there_must_be_accepted(
    exports: Callable[..., Any], prove: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(child.RUNTIMES, "genai", "no_such_module_anywhere")
    report = prove(exports("onnx", "int4"))
    (check,) = failed(report).values()
    assert (check.runtime, check.verdict) == ("onnxruntime-genai", "not_run")
    assert Report([], [report], {}).verdict == "fail"
    assert Report([], [report], {}, accepted_unproven=("onnxruntime-genai",)).verdict == "pass"


@pytest.mark.slow
def test_gates_of_the_recipe_judge_the_shipped_runtime(exports: Callable[..., Any], prove: Callable[..., Any]) -> None:
    strict = ProofSettings(windows=2, length=24, seconds=120, gates=parse_gates({"kl_mean": 1e-9, "top1": 0.0}))
    found = failed(prove(exports("onnx", "int4"), strict))
    assert set(found) == {"onnxruntime/loss/kl_mean"}
    assert found["onnxruntime/loss/kl_mean"].threshold_source == "recipe"


@pytest.mark.slow
def test_targets_with_other_integers_are_told_apart(original: Checkpoint, exports: Callable[..., Any]) -> None:
    shared = References(original, SETTINGS)
    for container, layout in (("onnx", "int4"), ("gguf", "int8")):
        artifact = exports(container, layout)
        prover = Prover(original, artifact.compressed, SETTINGS, shared)
        report = prover.prove(artifact.plan, artifact.directory, artifact.exported)
    (check,) = failed(report).values()
    assert (check.metric, check.value) == ("integers_unlike_other_targets", 14)


def test_no_tokenizer_is_proven_on_its_own_text(original: Checkpoint, tmp_path: Path) -> None:
    bare = original.replace(files={})
    exporter = OnnxExporter(judge=judge)
    plan = exporter.plan(bare, Target("onnx"))
    exported = exporter.export(bare, plan, tmp_path, no_progress)
    report = Prover(bare, bare, SETTINGS).prove(plan, tmp_path, exported)
    assert failed(report) == {}
    note = next(c.extra["note"] for c in report.checks if c.kind == "tokenizer")
    assert "no tokenizer" in note


def test_a_tensor_that_cannot_fit_is_refused_before_any_work(original: Checkpoint) -> None:
    with pytest.raises(EnvironmentFailure, match=r"embed_tokens.*largest tensor"):
        References(original, ProofSettings(memory=100_000))


def test_task_metric_of_the_recipe(exports: Callable[..., Any], prove: Callable[..., Any], tmp_path: Path) -> None:
    data = tmp_path / "task.jsonl"
    lines = [
        {"prompt": "the ", "choices": ["cat", "dog"], "label": 0},
        {"prompt": "a ", "choices": ["b", "c"], "label": 0},
    ]
    data.write_text("\n".join(json.dumps(line) for line in lines))
    gates = parse_gates({"task": {"metric": "accuracy", "data": str(data), "min": 0.0}})
    report = prove(exports("onnx", "int8"), ProofSettings(windows=1, length=16, seconds=120, gates=gates))
    check = next(c for c in report.checks if c.metric == "accuracy")
    assert (check.verdict, check.runtime, check.extra["examples"]) == ("pass", "onnxruntime", 2)
    assert 0 <= check.value <= 1
    assert failed(report) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("container", "word"), [("gguf", "int8"), ("onnx", "int4"), ("safetensors", None), ("safetensors", "int4")]
)
def test_a_model_larger_than_memory_is_proven_over_mapped_files(
    original: Checkpoint, exports: Callable[..., Any], prove: Callable[..., Any], container: str, word: str | None
) -> None:
    artifact = exports(container, word)
    small = References(original, SETTINGS)
    small.mapped = True
    report = Prover(original, artifact.compressed, SETTINGS, small).prove(
        artifact.plan, artifact.directory, artifact.exported
    )
    assert failed(report) == {}
    assert {c.id for c in report.checks} >= {c.id for c in prove(artifact).checks if c.kind in ("graph", "runtime")}
    assert small.windows.origin == "shipped"  # writing would read all weights once a token


def test_what_does_not_fit_twice_is_mapped(original: Checkpoint) -> None:
    bytes_ = original.float32_bytes
    assert References(original, ProofSettings(memory=2 * bytes_ - 1)).mapped
    assert not References(original, ProofSettings(memory=2 * bytes_)).mapped
    assert References(original, ProofSettings(memory=2 * bytes_ - 1)).limits.mapped == 2 * bytes_
