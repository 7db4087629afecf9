"""report.md: what a reader must find, and tables that stay tables."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

from tightship.report import Report, TargetReport, judge, not_run
from tightship.validators.render import pictures, render, summary


def report(*, broken: bool = False) -> dict:
    place = {"target": "gguf", "kind": "graph", "runtime": "llama.cpp"}
    error = 4e-3 if broken else 4e-7
    checks = [
        judge(**place, metric="rel_l2", value=error, op="<=", threshold=1e-5, source="tolerances.toml"),
        judge(target="gguf", kind="runtime", runtime="llama.cpp", metric="rel_l2", value=0.0049),
        judge(target="gguf", kind="loss", runtime="torch", metric="rel_l2", value=0.044),
        judge(target="gguf", kind="loss", runtime="llama.cpp", metric="kl_mean", value=0.009, op="<=", threshold=0.05),
        judge(target="gguf", kind="loss", runtime="llama.cpp", metric="top1", value=0.918),
        judge(
            target="gguf", kind="values", runtime="reader", metric="integers", value=0, op="==", threshold=0,
            extra={"sha256": "ab" * 32, "tensors": 14},
        ),
        judge(
            target="gguf", kind="tokenizer", runtime="llama.cpp", metric="encoding_mismatches", value=int(broken),
            op="==", threshold=0, reason="'a|b'\nis cut differently" if broken else None, tensor=None,
        ),
    ]  # fmt: skip
    other = [
        judge(
            target="onnx", kind="values", runtime="reader", metric="integers", value=0, op="==", threshold=0,
            extra={"sha256": "ab" * 32, "tensors": 14},
        )
    ]  # fmt: skip
    if broken:
        place = {"target": "onnx", "kind": "runtime", "runtime": "onnxruntime-genai"}
        other.append(not_run(**place, metric="outputs", reason="not installed"))
    targets = [
        TargetReport("gguf", 1442482, 6.161, 0.1163, None, checks),
        TargetReport("onnx", 2884964, 12.3, 0.1163, "mobius-onnx 0.1.0", other),
    ]
    stages = [{"id": "p", "use": "prune", "state": "made", "figures": {"w": {"error": 0.5}}}]
    return json.loads(json.dumps(Report(stages, targets, {"threads": 2, "versions": {"torch": "2.13"}}).to_json()))


def rows(text: str, first: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith(f"| {first}")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_verdict_comes_first() -> None:
    assert render(report()).startswith("# The proof passed\n\n2 artifacts, 8 checks passed.\n")
    assert render(report(broken=True)).startswith("# The proof FAILED: nothing was published\n\n2 artifacts, 6 checks ")


def test_what_failed_stands_above_the_figures_with_its_reason() -> None:
    text = render(report(broken=True))
    assert text.index("## What did not pass") < text.index("## Artifacts")
    assert "**FAIL** `gguf/llama.cpp/graph/rel_l2`: rel_l2 is 0.004, needs <= 1e-05" in text
    assert "**not run** `onnx/onnxruntime-genai/runtime/outputs`: not installed" in text
    assert "## What did not pass" not in render(report())


def test_three_error_budgets_and_loss_of_each_artifact() -> None:
    (row,) = rows(render(report()), "`gguf`")
    assert row == [
        "`gguf`", "pass", "1.44 MB", "█" * 12, "6.161", "11.6 %", "4e-07", "0.0440", "0.0049", "0.009", "91.8 %",
    ]  # fmt: skip
    (row,) = rows(render(report()), "`onnx`")
    assert row[3] == "█" * 24
    assert row[6:] == ["", "", "", "", ""]


def test_every_table_is_rectangular() -> None:
    for block in re.findall(r"(?:^\|.*\n)+", render(report(broken=True)), re.MULTILINE):
        lines = block.splitlines()
        assert len({len(re.split(r"(?<!\\)\|", line)) for line in lines}) == 1
        assert len({len(line) for line in lines}) == 1
        assert re.fullmatch(r"\|(-+:?\|)+", lines[1])


def test_same_integers_are_said() -> None:
    assert "- `gguf`, `onnx` hold the same integers and scales (sha256 `abababababababab`)." in render(report())


def test_every_check_is_in_the_tables() -> None:
    data = report(broken=True)
    text = render(data)
    for target in data["targets"]:
        section = text[text.index(f"## `{target['id']}`") :]
        for check in target["checks"]:
            assert any(cells[1] == check["metric"] for cells in rows(section, check["runtime"]))


def test_console_lines() -> None:
    good, other = summary(report())
    assert good == (
        "gguf: proven; 1.44 MB, 6.16 bits a weight; "
        "container 4e-07, weights 0.0440, runtime 0.0049, KL 0.009, top-1 91.8 %"
    )
    assert other == "onnx: proven; 2.88 MB, 12.30 bits a weight"
    bad = summary(report(broken=True))
    assert bad[0].startswith("gguf: 2 of 7 checks did not pass; ")
    assert bad[1] == "  gguf/llama.cpp/graph/rel_l2: rel_l2 is 0.004, needs <= 1e-05"


def test_the_picture_has_a_line_for_each_artifact_with_logits() -> None:
    data = report()
    assert pictures(data) == {}
    assert "report.svg" not in render(data)
    place = {"target": "gguf", "runtime": "llama.cpp", "metric": "kl_mean"}
    data["targets"][0]["checks"].append(
        judge(**place, kind="loss", value=0.01, extra={"kl_by_position": [0.1, 0.01]}).to_json()
    )
    drawn = pictures(data)["report.svg"]
    assert drawn.count("<polyline") == 1
    assert "gguf in llama.cpp" in drawn
    assert "(report.svg)" in render(data)


def test_sparsity_and_loss_of_each_matrix_in_table_and_picture() -> None:
    data = report()
    name = "model.layers.{}.mlp.{}.weight"
    figures = {
        name.format(0, "up_proj"): {"sparsity": 0.7, "loss": 0.25, "tokens": 10},
        name.format(1, "up_proj"): {"sparsity": 0.75, "loss": 0.5, "tokens": 10},
        name.format(1, "experts.0.w1"): {"sparsity": 0.5, "loss": 0.1, "tokens": 3},
        name.format(1, "experts.1.w1"): {"sparsity": 0.7, "loss": 0.3, "tokens": 7},
        "lm_head.weight": {"loss": 1.0},
    }
    data["stages"] = [{"id": "p", "use": "prune", "state": "made", "figures": figures}]
    lines = [line.replace(" ", "") for line in render(data).splitlines()]
    assert "|block|mlp.up_proj|mlp.experts.*.w1|" in lines
    assert "|0|70.0%,0.25||" in lines
    assert "|1|75.0%,0.5|60.0%,0.2|" in lines
    drawn = pictures(data)["report-layers.svg"]
    texts = [node.text for node in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")]
    assert {"70.0%, 0.25", "75.0%, 0.5", "60.0%, 0.2"} <= set(texts)
    shades = re.findall(r"hsl\(210,65%,(\d+)%\)", drawn)
    assert [int(shade) for shade in shades] == [65, 100, 50, 96]  # between the least and the largest share, or white
