"""Two processes under torchrun train what one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tightship.errors import UsageError
from tightship.passes.base import Run
from tightship.passes.training import Training, fit

EMBER = Path(__file__).resolve().parents[2] / "examples" / "ember"
SCRIPT = Path(__file__).with_name("two_ranks.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def build(place: Path, *launcher: str) -> bytes:
    """The weights that the script publishes."""
    words = [sys.executable, *launcher, str(SCRIPT), str(EMBER), str(place / "out"), str(place / "work")]
    done = subprocess.run(
        words, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return (place / "out/safetensors/model.safetensors").read_bytes()


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one(tmp_path: Path) -> None:
    """The same global batch: two micro-batches a step, both in one process or one in each; text of the model's own."""
    one = build(tmp_path / "one")
    assert build(tmp_path / "two", *TORCHRUN) == one


def test_micro_batches_that_cannot_be_shared_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="cannot be shared by 2 processes"):
        fit({}, lambda _: None, Training(accumulate=3), 1, Run())  # type: ignore[arg-type, return-value]
