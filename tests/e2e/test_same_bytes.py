"""The same source and recipe give the same files, wherever, whenever and on whatever processor."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
EMBER = ROOT / "examples" / "ember"
# The proof writes nothing that is published but its report, so it is left out here.
SCRIPT = """
import sys
from tightship import pipeline
from tightship.cli import main
from tightship.report import TargetReport
pipeline.Proofs.of = lambda self, a: TargetReport(a.plan.target.id, 0, 0.0, 0.0, None, [])
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_another_directory_hash_seed_thread_count_and_processor(main_job: Any, tmp_path: Path) -> None:
    place = tmp_path / "somewhere" / "else"
    place.mkdir(parents=True)
    shutil.copytree(EMBER, place / "ember")
    to = ["--to", "gguf", "--to", "onnx", "--to", "safetensors"]
    where = ["-o", "other", "--work", "there", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, "build", "ember", "--quantize", "int4", *to, *where],
        cwd=place,
        env={**os.environ, "PYTHONHASHSEED": "4321", "NUMBA_CPU_NAME": "generic", "TZ": "Asia/Kathmandu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (place / "other" / "manifest.json").read_bytes() == (main_job.output / "manifest.json").read_bytes()
