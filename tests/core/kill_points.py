"""Builds that are killed (SIGKILL) at one event after the other; run as a program by test_pipeline.py.

An event is a progress call, or anything that makes bytes durable or visible: fsync, rename, replace. Each build is a
forked process. After a kill the output must be absent, the old artifact, or the new one; the next build must give the
bytes of one that was never killed.

Usage: kill_points.py SOURCE SCRATCH STEP [RECIPE], prints one JSON object. RECIPE is a file of JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import tightship
from tightship import pipeline
from tightship.durable import sha256_file
from tightship.report import TargetReport
from tightship.target import sorted_files

RECIPE = {
    "passes": [
        {"use": "drop-layers", "with": {"layers": [1]}},
        {"use": "prune", "with": {"sparsity": 0.5, "scope": "global"}},
        {"use": "quantize", "with": {"layout": "int4"}},
    ],
    "targets": [{"to": "gguf"}, {"to": "safetensors"}],
}


class Counter:
    """Counts events; at number `fatal` the process kills itself."""

    def __init__(self, fatal: int) -> None:
        self.count = 0
        self.fatal = fatal

    def __call__(self, *_: Any) -> None:
        self.count += 1
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(self, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            self()
            return original(*arguments, **named)

        setattr(owner, name, counted)


def unproven(_: pipeline.Proofs, artifact: pipeline.Artifact) -> TargetReport:
    """The proof is not what is tested here."""
    return TargetReport(artifact.plan.target.id, 0, artifact.plan.bits_per_weight, 0.0, None, [])


def build(recipe_json: dict[str, Any], source: str, output: Path, work: Path, fatal: int) -> int:
    """Fork a build; its number of events, or minus the signal that ended it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        counter = Counter(fatal)
        counter.before(os, "fsync")
        counter.before(Path, "rename")
        counter.before(Path, "replace")
        try:
            recipe = tightship.Recipe.from_json(recipe_json)
            tightship.build(source, output=output, recipe=recipe, work=work, threads=1, force=True, progress=counter)
            os.write(writing, str(counter.count).encode())
        except BaseException:  # a forked child must never run on in the parent's code
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    return int(answer) if answer else -os.WTERMSIG(status)


def content(output: Path) -> dict[str, str] | None:
    """Digest of every file but the reports (they say how a stage was had), None for no output."""
    if not output.exists():
        return None
    return {n: sha256_file(output / n) for n in sorted_files(output) if not n.startswith("report.")}


def main(source: str, scratch: Path, step: int, recipe: dict[str, Any]) -> dict[str, Any]:
    """Try every `step`-th event; what was found."""
    warm = scratch / "warm"  # compiles kernels here, so that no fork has to
    pipeline.Proofs.of = unproven
    tightship.build(source, output=warm / "out", recipe=tightship.Recipe.from_json(recipe), work=warm / "work")
    events = build(recipe, source, scratch / "reference" / "out", scratch / "reference" / "work", 0)
    good = content(scratch / "reference" / "out")
    found: dict[str, Any] = {"events": events, "files": len(good or {}), "killed": 0, "wrong": [], "states": {}}
    for fatal in range(step, events + 1, step):
        place = scratch / f"kill-{fatal}"
        with_old = fatal % 2 == 0
        if with_old:
            shutil.copytree(scratch / "reference" / "out", place / "out")
        if build(recipe, source, place / "out", place / "work", fatal) != -signal.SIGKILL:
            found["wrong"].append(f"event {fatal}: not killed")
            continue
        found["killed"] += 1
        state = content(place / "out")
        word = "nothing" if state is None else "whole" if state == good else "broken"
        found["states"][word] = found["states"].get(word, 0) + 1
        if word == "broken":
            found["wrong"].append(f"event {fatal}: a broken output")
        if build(recipe, source, place / "out", place / "work", 0) < 0 or content(place / "out") != good:
            found["wrong"].append(f"event {fatal}: the next build made other bytes")
        if sorted(p.name for p in place.iterdir()) != ["out", "work"]:
            found["wrong"].append(f"event {fatal}: rubbish beside the output")
        shutil.rmtree(place)
    return found


if __name__ == "__main__":
    scratch, every = Path(sys.argv[2]), int(sys.argv[3])
    chosen = json.loads(Path(sys.argv[4]).read_text()) if len(sys.argv) > 4 else {"build": RECIPE}
    print(json.dumps({name: main(sys.argv[1], scratch / name, every, recipe) for name, recipe in chosen.items()}))
