"""SIGKILL in the middle of every pass that trains: the next build ends in the bytes of one that was never killed.

Each pass trains a tiny model for a few steps, through the real pipeline. Killed are real processes, at every n-th event
(a step, a flush, a rename); what a killed build leaves in the store is all that the next one has.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TEXT = "The old ship lay at anchor in the bay, and nobody on the shore could say whence she came. " * 12
SMALL = {"tokens": 512, "sequence": 32, "batch": 2, "snapshot": 3}  # eight steps a fit
PRUNED = {"use": "prune", "with": {"sparsity": 0.5}}
PASSES: dict[str, list[dict[str, Any]]] = {
    "distill": [
        {"use": "distill", "with": {"student": {"every": 2}, "features": {"hidden": 1.0}, "written": 64, **SMALL}}
    ],
    "recover-full": [PRUNED, {"use": "recover", "with": {"method": "full", "accumulate": 2, **SMALL}}],
    "recover-norms": [PRUNED, {"use": "recover", "with": {"method": "norms", **SMALL}}],
    "recover-lora": [PRUNED, {"use": "recover", "with": {"method": "lora", **SMALL}}],
    "recover-blockwise": [
        PRUNED,
        {"use": "recover", "inputs": {"teacher": "source"}, "with": {"method": "blockwise", **SMALL}},
    ],
    "qat": [{"use": "qat", "with": {"layout": "int4", **SMALL}}],
    "prune-in-steps": [{"use": "prune", "with": {"method": "wanda", "sparsity": 0.6, "steps": 2, "recover": SMALL}}],
}


EVERY = 13  # events


@pytest.fixture(scope="module")
def killed(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `kill_points.py` found of each of the passes, all in one process that forks; forks want one thread."""
    place = tmp_path_factory.mktemp("killed")
    (place / "text.txt").write_text(TEXT)
    calibration = {"text": str(place / "text.txt"), "tokens": 256, "sequence": 32}
    recipes = {
        name: {"passes": passes, "calibration": calibration, "targets": [{"to": "safetensors"}]}
        for name, passes in PASSES.items()
    }
    (place / "recipes.json").write_text(json.dumps(recipes))
    script = Path(__file__).with_name("kill_points.py")
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(qwen), str(place), str(EVERY), str(place / "recipes.json")],
        capture_output=True,
        text=True,
        timeout=900,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
def test_kill_9_in_the_middle_of(killed: dict[str, Any], name: str) -> None:
    found = killed[name]
    assert found["wrong"] == []
    assert found["killed"] == found["events"] // EVERY >= 2
    assert found["states"].keys() <= {"nothing", "whole"}
