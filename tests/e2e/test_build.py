"""The embedded checkpoint through everything: passes, export, every runtime, publication, verification."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import tightship
from tightship.cli import main
from tightship.errors import GateFailed
from tightship.exporters.to_gguf import GgufExporter

EMBER = Path(__file__).resolve().parents[2] / "examples" / "ember"


def checks(report: Mapping[str, Any], **wanted: str) -> list[Mapping[str, Any]]:
    found = [c for target in report["targets"] for c in target["checks"]]
    return [c for c in found if all(c[key] == value for key, value in wanted.items())]


def test_one_command_proves_and_publishes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["build", str(EMBER), "--quantize", "int4", "--to", "gguf", "-o", str(tmp_path / "out")]
    code = main([*words, "--work", str(tmp_path / "work"), "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert code == answer["exit_code"] == 0
    assert answer["result"]["verdict"] == "pass"
    kinds = {c["kind"] for c in checks(answer["result"])}
    assert kinds == {"structure", "values", "tokenizer", "graph", "runtime", "loss"}
    assert {c["runtime"] for c in checks(answer["result"], kind="graph")} == {"onnxruntime", "llama.cpp"}
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert main([*words, "--work", str(tmp_path / "work")]) == 2
    assert "exists" in capsys.readouterr().err


def test_one_flipped_bit_is_caught_named_and_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = GgufExporter.export

    def sabotaged(self: GgufExporter, checkpoint: Any, plan: Any, directory: Path, progress: Any) -> Any:
        exported = export(self, checkpoint, plan, directory, progress)
        data = bytearray((directory / exported.main).read_bytes())
        data[-7] ^= 0x40
        (directory / exported.main).write_bytes(bytes(data))
        return exported

    monkeypatch.setattr(GgufExporter, "export", sabotaged)
    with pytest.raises(GateFailed, match="gguf/reader/values") as caught:
        tightship.build(EMBER, output=tmp_path / "out", quantize="int4", to=["gguf"], work=tmp_path / "work")
    assert caught.value.tensor == "model.layers.1.mlp.up_proj.weight"
    assert [p.name for p in tmp_path.iterdir()] == ["work"]
    report = json.loads(next((tmp_path / "work").glob("runs/*/report.json")).read_text())
    assert report["verdict"] == "fail"


def test_a_budget_that_is_not_kept(tmp_path: Path) -> None:
    recipe = tightship.Recipe.from_json({"targets": [{"to": "gguf", "scheme": "q2_k"}], "gates": {"kl_mean": 1e-6}})
    with pytest.raises(GateFailed, match="loss/kl_mean"):
        tightship.build(EMBER, output=tmp_path / "out", recipe=recipe, work=tmp_path / "work")
    assert not (tmp_path / "out").exists()
