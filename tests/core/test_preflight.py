"""Warnings fire on models made to deserve them, and only where something is taken away."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from tightship import preflight
from tightship.checkpoint import Checkpoint
from tightship.planning import make_plan
from tightship.recipe import Recipe, Step
from tightship.settings import Settings
from tightship.target import Target
from tightship.validators.render import render
from tightship.weights import Dense

EMBER = Path(__file__).parents[2] / "examples" / "ember"


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "SMALL", 1)


def changed(checkpoint: Checkpoint, change: Callable[[np.ndarray], None]) -> Checkpoint:
    found = {}
    for info in checkpoint.linears():
        values = checkpoint.resolve(info.name).value().copy()
        change(values)
        found[info.name] = Dense.of(values)
    return checkpoint.with_weights(found)


def zeros(values: np.ndarray) -> None:
    values[:, ::10] = 0


def outlier(values: np.ndarray) -> None:
    values[0, 0] = 100


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(
    ("change", "words"), [(zeros, r"sparse already: 1[01]%"), (outlier, "precision counts: 14 of 14")]
)
def test_constructed_faults(
    change: Callable[[np.ndarray], None], words: str, tiny: Callable[[str], Checkpoint]
) -> None:
    before = tiny("llama")
    assert preflight.warnings(before, {"mask"}) == ()
    (found,) = preflight.warnings(changed(before, change), {"mask"})
    assert re.search(words, found)
    assert preflight.warnings(changed(before, change), {"grid"}) == ()


@pytest.mark.parametrize(("scheme", "count"), [("q4_k_m", 1), ("q8_0", 0), (None, 0)])
def test_a_pruned_source_whose_zeros_a_target_would_fill(scheme: str | None, count: int, tmp_path: Path) -> None:
    source = shutil.copytree(EMBER, tmp_path / "sparse")
    file = source / "model.safetensors"
    tensors = load_file(file)
    for name, values in tensors.items():
        if "_proj" in name:
            values[:, ::4] = 0
    save_file(tensors, file, {"format": "pt"})
    for folder, expected in ((EMBER, 0), (source, count)):
        plan = make_plan(Recipe(source=str(folder), targets=(Target("gguf", scheme),)), Settings(tmp_path))
        assert len(plan.warnings) == expected
    if count:
        assert "25% of the weights" in plan.warnings[0]
        assert "q4_k" in plan.warnings[0]


def test_kurtosis_by_definition() -> None:
    values = np.random.default_rng(0).normal(3, 2, 100_000)
    assert preflight.kurtosis(values) == pytest.approx(3, abs=0.1)
    assert preflight.kurtosis(np.array([-1.0, 1.0])) == 1
    assert preflight.kurtosis(np.ones(5)) == 0


def test_the_plan_warns_of_small_models_and_the_report_repeats_it(
    tiny_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    source, targets = str(tiny_directory("llama")), (Target("onnx"),)
    for passes, count in ((), 0), ((Step("prune", "prune", options={"sparsity": 0.5}),), 1):
        plan = make_plan(Recipe(source=source, passes=passes, targets=targets), Settings(tmp_path))
        assert len(plan.warnings) == len(plan.to_json()["warnings"]) == count
        assert ("small (0.1 million" in plan.summary()) is bool(count)
    page = render({"verdict": "pass", "targets": [], "stages": [], "environment": {}, "warnings": plan.warnings})
    assert plan.warnings[0] in page
