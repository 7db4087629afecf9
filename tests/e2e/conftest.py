"""Builds of the embedded checkpoints as users make them, for tests that look at them from different sides."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tightship import pipeline
from tightship.report import TargetReport

ROOT = Path(__file__).resolve().parents[2]
EMBER = ROOT / "examples" / "ember"
THREE = ("--to", "gguf", "--to", "onnx", "--to", "safetensors")


@dataclass(frozen=True)
class Job:
    """A finished command: its exit code, the one object on stdout, and the directory it was to publish."""

    code: int
    body: dict[str, Any]
    output: Path

    @property
    def checks(self) -> dict[str, dict[str, Any]]:
        return {c["id"]: c for target in self.body["result"]["targets"] for c in target["checks"]}


def command(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`tightship ARGUMENTS` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "tightship", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="session")
def tightship_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    return command


@pytest.fixture(scope="session")
def build_command(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:
    """Runs `tightship build SOURCE ... --json` in a new directory."""

    def run(source: Path, *options: str, **environment: str) -> Job:
        place = tmp_path_factory.mktemp("job")
        work = ("-o", "out", "--work", "work", "--json")
        done = command("build", str(source), *options, *work, cwd=place, **environment)
        assert done.stdout, done.stderr[-3000:]
        return Job(done.returncode, json.loads(done.stdout), place / "out")

    return run


@pytest.fixture(scope="session")
def main_job(build_command: Callable[..., Job]) -> Job:
    """`tightship build examples/ember --quantize int4` to all three containers; not to be changed."""
    return build_command(EMBER, "--quantize", "int4", *THREE)


@pytest.fixture
def without_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds of this test publish what they export, unproven: for tests of the bytes alone."""

    def passed(_: Any, artifact: pipeline.Artifact) -> TargetReport:
        return TargetReport(artifact.plan.target.id, 0, artifact.plan.bits_per_weight, 0.0, None, [])

    monkeypatch.setattr(pipeline.Proofs, "of", passed)
