"""Text that the source writes: one stage a build, the same for all passes, and pinned by its digest."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tightship.calibration_text import read
from tightship.durable import sha256_file
from tightship.errors import GateFailed
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.passes import pass_for
from tightship.planning import make_plan
from tightship.recipe import Recipe, Step
from tightship.settings import Settings
from tightship.stages import Stage, Workshop, conditions, first_state, run_stage
from tightship.target import no_progress
from tightship.texts import generated_windows

pytest.importorskip("torch")
EMBER = Path(__file__).parents[2] / "examples" / "ember"


def workshop(work: Path, **calibration: Any) -> Workshop:
    recipe = Recipe.from_json({"calibration": {"text": "self", "tokens": 128, "sequence": 32, **calibration}})
    state = first_state(open_checkpoint(EMBER))
    return Workshop(recipe, Settings(work=work, threads=1), no_progress, {"source": state})


def quantized(shop: Workshop, solver: str) -> list[dict[str, Any]]:
    """The log of pruning half of everything, then quantizing."""
    state = shop.results["source"]
    for use, options in (("prune", {"sparsity": 0.5}), ("quantize", {"solver": solver, "layout": "int4"})):
        state = run_stage(state, Stage(Step(use, use), pass_for(use, options)), shop)
    return list(state.log)


def test_the_source_writes_whatever_passes_came_before(tmp_path: Path) -> None:
    shop = workshop(tmp_path)
    log = quantized(shop, "importance")
    assert [entry["use"] for entry in log] == ["prune", "write-text", "quantize"]
    view = ModelView(shop.results["source"].checkpoint, threads=1)
    expected = np.stack(generated_windows(view, tokens=128, sequence=32, seed=0))
    digest = hashlib.sha256(expected.astype("<i8").tobytes()).hexdigest()
    assert log[1]["figures"]["self"] == {"tokens": 128, "sha256": digest}
    found = read(shop, conditions(shop.settings))
    np.testing.assert_array_equal(np.stack(found.written), expected)
    assert quantized(workshop(tmp_path), "rtn")[-1]["use"] == "quantize"  # nothing calibrated, nothing written
    assert [entry["state"] for entry in quantized(workshop(tmp_path), "importance")][1:] == ["reused", "reused"]


def test_the_source_writes_where_no_text_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def write(view: ModelView, **options: Any) -> tuple[np.ndarray, ...]:
        asked.append(options)
        return generated_windows(view, **{**options, "tokens": 64, "sequence": 32})

    monkeypatch.setattr("tightship.texts.generated_windows", write)
    shop = workshop(tmp_path)
    unsaid = Workshop(Recipe.from_json({}), shop.settings, no_progress, shop.results)
    assert [entry["use"] for entry in quantized(unsaid, "importance")] == ["prune", "write-text", "quantize"]
    assert asked == [{"tokens": 65536, "sequence": 512, "seed": 0}]
    recipe = {"source": str(EMBER), "passes": [{"use": "quantize", "with": {"layout": "int4", "solver": "gptq"}}]}
    plan = make_plan(Recipe.from_json({**recipe, "targets": [{"to": "gguf"}]}), shop.settings)
    assert any("writes itself" in note for note in plan.notes)


def test_a_pin_holds_the_text(tmp_path: Path) -> None:
    digest = quantized(workshop(tmp_path), "importance")[1]["figures"]["self"]["sha256"]
    quantized(workshop(tmp_path, sha256=digest), "importance")
    with pytest.raises(GateFailed, match=f"{digest}.*{'0' * 64}"):
        quantized(workshop(tmp_path, sha256="0" * 64), "importance")
    with pytest.raises(GateFailed, match="pins"):
        quantized(workshop(tmp_path, tokens=64, sha256=digest), "importance")


def test_a_pin_holds_a_file(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("The old ship lay at anchor in the bay. " * 20)
    pinned = {"text": str(file), "sha256": sha256_file(file)}
    quantized(workshop(tmp_path, **pinned), "importance")
    file.write_text("Another text altogether, and none that anybody pinned. " * 20)
    with pytest.raises(GateFailed, match="pins"):
        quantized(workshop(tmp_path, **pinned), "importance")
