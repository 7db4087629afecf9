"""Budgets of a recipe decide whether a build is published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tightship.cli import main

ROOT = Path(__file__).resolve().parents[2]
EMBER = ROOT / "examples" / "ember"
EXAMPLES = [
    {"prompt": "Once upon a", "choices": [" time", " qqq"], "label": 0},
    {"prompt": "The little girl", "choices": [" zxj", " was"], "label": 1},
    {"prompt": "She was very", "choices": [" happy", " xkq"], "label": 0},
    {"prompt": "He went to the", "choices": [" vvv", " park"], "label": 1},
]


def recipe(folder: Path, least: float) -> list[str]:
    (folder / "task.jsonl").write_text("".join(json.dumps(example) + "\n" for example in EXAMPLES))
    text = {
        "source": str(EMBER),
        "passes": [{"use": "quantize", "with": {"layout": "int8"}}],
        "targets": [{"to": "onnx"}],
        "gates": {"task": {"metric": "accuracy", "data": "task.jsonl", "min": least}},
    }
    (folder / "recipe.yaml").write_text(json.dumps(text))  # JSON is YAML
    place = ["-o", str(folder / "out"), "--work", str(folder / "work"), "--threads", "1", "--json"]
    return ["build", "--recipe", str(folder / "recipe.yaml"), *place]


@pytest.mark.slow
@pytest.mark.parametrize(("least", "code"), [(0.5, 0), (1.01, 1)])
def test_accuracy_on_examples(least: float, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(recipe(tmp_path, least)) == code
    body = json.loads(capsys.readouterr().out)
    assert (tmp_path / "out").exists() == (code == 0)
    place = tmp_path / "out" if code == 0 else next((tmp_path / "work").glob("runs/*"))
    report = json.loads((place / "report.json").read_text())
    (check,) = [c for c in report["targets"][0]["checks"] if c["metric"] == "accuracy"]
    assert (check["kind"], check["op"], check["threshold"]) == ("loss", ">=", least)
    assert check["verdict"] == ("pass" if code == 0 else "fail")
    assert check["value"] >= 0.75
    if code:
        assert "accuracy" in body["error"]["message"]
