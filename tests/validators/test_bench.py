"""`tightship bench`: every artifact is found, run in its own runtime, and compared round by round."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tightship.cli import main
from tightship.errors import UsageError
from tightship.exporters.to_gguf import GgufExporter
from tightship.exporters.to_onnx import OnnxExporter
from tightship.opening import open_checkpoint
from tightship.target import Target
from tightship.validators.bench import Bench, Measured, Plan, Subject, subjects
from tightship.validators.parity import judge

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder in GGUF and ONNX, an encoder in ONNX."""
    root = tmp_path_factory.mktemp("published")
    exporters = {"gguf": GgufExporter(), "onnx": OnnxExporter(judge=judge)}
    for name, container in (("ember", "gguf"), ("ember", "onnx"), ("ember-bert", "onnx")):
        checkpoint = open_checkpoint(EXAMPLES / name)
        directory = root / name / container
        directory.mkdir(parents=True)
        exporter = exporters[container]
        exporter.export(checkpoint, exporter.plan(checkpoint, Target(container)), directory)
    return root


def test_every_runtime_gives_its_figures(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = published.parent / "speed.svg"
    asked = ["--prompt", "9", "--decode", "3", "--rounds", "2", "--json", "--plot", str(plot)]
    assert main(["bench", str(published), *asked]) == 0
    found = {(a["name"], a["runtime"]): a for a in json.loads(capsys.readouterr().out)["result"]["artifacts"]}
    names = [("ember/gguf/ember.gguf", "llama.cpp"), ("ember/onnx", "onnxruntime")]
    names += [("ember/onnx", "onnxruntime-genai"), ("ember-bert/onnx", "onnxruntime")]
    assert list(found) == names
    for (name, _), artifact in found.items():
        assert artifact["prefill_tokens_per_second"] > 0
        assert (artifact["decode_tokens_per_second"] is None) == ("bert" in name)
        assert artifact["peak_memory_bytes"] > artifact["libraries_memory_bytes"] > 0
        assert len(artifact["rounds"]) == 2
    assert found[names[0]]["prefill_ratio"] == 1.0
    assert found[names[1]]["bytes"] == sum(p.stat().st_size for p in (published / "ember/onnx").iterdir())
    assert len(list(ElementTree.parse(plot).iter("{http://www.w3.org/2000/svg}rect"))) == 1 + 3 * 2


def answer(prefill: float, decode: float) -> dict[str, object]:
    return {
        "version": "v",
        "load": 1.0,
        "prefill": [prefill, 9.0],
        "decode": [decode],
        "memory": 2,
        "memory_libraries": 1,
    }


def test_ratios_are_taken_within_a_round() -> None:
    """A slow minute falls on both: 10 s against 5 s, then 100 s against 25 s, are ratios of 2 and 4."""
    subject = Subject("a", Path(), "m", "r", 1)
    base = Measured(subject, [answer(8.0, 10.0), answer(8.0, 100.0)])
    other = Measured(subject, [answer(4.0, 5.0), answer(4.0, 25.0)])
    _, second = Bench(Plan(prompt=16, decode=10), [base, other]).to_json()["artifacts"]
    assert second["prefill_tokens_per_second"] == 4.0
    assert second["prefill_ratio"] == 2.0
    assert second["decode_ratio"] == 3.0
    assert second["decode_tokens_per_second"] == (10 / 5 + 10 / 25) / 2


def test_shards_are_one_artifact_and_what_lies_beside_is_none(tmp_path: Path) -> None:
    for name in ("adapter.gguf", "imatrix.gguf"):
        (tmp_path / name).write_bytes(b"x")
    for index in (1, 2, 3):
        (tmp_path / f"m-0000{index}-of-00003.gguf").write_bytes(b"x" * index)
    (subject,) = subjects(tmp_path)
    assert (subject.main, subject.bytes) == ("m-00001-of-00003.gguf", 6)


def test_nothing_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError):
        subjects(tmp_path / "absent")
    assert main(["bench", str(tmp_path)]) == 2
    assert "holds no artifact" in capsys.readouterr().err
