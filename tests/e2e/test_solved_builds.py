"""GPTQ in whole builds: families in every container that they fit, safetensors schemes, and a GPTQ file as source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tightship

EMBER = Path(__file__).resolve().parents[2] / "examples" / "ember"


@pytest.mark.slow
def test_families_through_gptq_to_artifacts(
    small_family: tuple[str, Path, tuple[str, ...]], build_command: Callable[..., Any], recipe_in: Callable[..., str]
) -> None:
    _, source, containers = small_family
    gptq = {"use": "quantize", "with": {"solver": "gptq", "layout": "int4"}}
    done = build_command(source, "--recipe", recipe_in([gptq], containers))
    assert done.code == 0, done.body
    (stage,) = done.body["result"]["stages"]
    solvers = {f["solver"] for f in stage["figures"].values() if "solver" in f}
    assert any(word.startswith("gptq") for word in solvers)
    assert {check["verdict"] for check in done.checks.values()} == {"pass"}


@pytest.mark.slow
def test_schemes_of_safetensors(build_command: Callable[..., Any]) -> None:
    targets = [word for scheme in ("w8a8", "mxfp4", "mxfp8") for word in ("--to", f"safetensors:{scheme}")]
    done = build_command(EMBER, *targets)
    assert done.code == 0, done.body
    assert {check["verdict"] for check in done.checks.values()} == {"pass"}


@pytest.fixture
def gptq_file(
    without_proof: None,  # noqa: ARG001 - it is proven when it is read again
    recipe_in: Callable[..., str],
    tmp_path: Path,
) -> Path:
    """The embedded checkpoint in the GPTQ format, solved by GPTQ."""
    target = {"to": "safetensors", "scheme": "gptq", "with": {"solver": "gptq"}}
    recipe = recipe_in([], [target])
    tightship.build(EMBER, recipe=recipe, output=tmp_path / "out", work=tmp_path / "work", threads=1)
    return tmp_path / "out" / "safetensors-gptq"


@pytest.mark.slow
def test_a_gptq_file_goes_to_all_three_with_its_codes(gptq_file: Path, build_command: Callable[..., Any]) -> None:
    done = build_command(gptq_file, "--to", "gguf", "--to", "onnx", "--to", "safetensors")
    assert done.code == 0, done.body
    assert {check["verdict"] for check in done.checks.values()} == {"pass"}
    text = (done.output / "report.md").read_text()
    assert "`gguf`, `onnx`, `safetensors` hold the same integers and scales" in text
