"""Speed, size and memory of artifacts in their runtimes. Each in a child process, in turn, several rounds of it.

Runs of one round follow each other at once, so what else the machine does in that minute falls on all of them; the
speed of one against another is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tightship.console import size, table
from tightship.errors import EnvironmentFailure, UsageError
from tightship.exporters.gguf_lora import NO_MODELS
from tightship.exporters.onnx_candidates.skeleton import ENCODER, GENAI
from tightship.progress import Progress, no_progress
from tightship.target import sorted_files, total_bytes
from tightship.validators.plots import bars_plot
from tightship.validators.runtimes.child import Limits, RuntimeMissing, run_child

_FURTHER_SHARD = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")
_RATES = ("prefill", "decode")


@dataclass(frozen=True)
class Subject:
    """One artifact in one runtime.

    Attributes:
        name: directory or file relative to what was asked, and the runtime.
        directory: of the artifact.
        main: the file that the runtime opens, relative to `directory`.
        runtime: a key of `runtimes.speed.ENGINES`.
        bytes: of the artifact: everything in its directory, or the GGUF file with its shards.
    """

    name: str
    directory: Path
    main: str
    runtime: str
    bytes: int


@dataclass(frozen=True)
class Plan:
    """What is measured: tokens of the prompt, tokens decoded one by one, timed passes a round, rounds, threads."""

    prompt: int = 128
    decode: int = 32
    passes: int = 2
    rounds: int = 3
    threads: int = 1


@dataclass
class Measured:
    """Answers of `runtimes.speed` for one subject, one a round; `missing` says why there are none."""

    subject: Subject
    rounds: list[dict[str, Any]] = field(default_factory=list)
    missing: str | None = None

    def rate(self, part: str, tokens: int) -> list[float]:
        """Tokens per second of each round, of its fastest pass; empty where the model has no such part."""
        return [tokens / min(answer[part]) for answer in self.rounds if part in answer]

    def median(self, key: str) -> float:
        """Of seconds or bytes over the rounds."""
        return float(statistics.median(answer[key] for answer in self.rounds))


@dataclass(frozen=True)
class Bench:
    """All subjects; the first one that ran is what the others are compared with."""

    plan: Plan
    measured: Sequence[Measured]

    def to_json(self) -> dict[str, Any]:
        return {"plan": vars(self.plan), "artifacts": [self._one(m) for m in self.measured]}

    def summary(self, *, verbose: bool = False) -> str:  # noqa: ARG002 - there is nothing more to say
        """A table for people, and what did not run."""
        header = ["artifact", "runtime", "size", "load s", "prefill tok/s", "x", "decode tok/s", "x", "peak memory"]
        rows = [self._row(entry) for entry in self.to_json()["artifacts"] if "missing" not in entry]
        notes = [
            f"{m.subject.name} in {m.subject.runtime} did not run: {m.missing}" for m in self.measured if m.missing
        ]
        about = (
            f"{self.plan.prompt} tokens of prompt, {self.plan.decode} decoded one by one, {self.plan.threads} threads"
        )
        lines = [about, "", table(rows, header, right=frozenset(range(2, len(header))))]
        return "\n".join([*lines, *([""] if notes else []), *notes])

    def plot(self) -> str:
        """An SVG document: a bar for each rate."""
        found = [m for m in self.measured if m.rounds]
        groups = [
            (f"{m.subject.name} ({m.subject.runtime})", {part: self._middle(m, part) for part in _RATES}) for m in found
        ]
        return bars_plot(f"tokens per second, prompt of {self.plan.prompt}", groups)

    def _tokens(self, part: str) -> int:
        return self.plan.prompt if part == "prefill" else self.plan.decode

    def _middle(self, measured: Measured, part: str) -> float | None:
        rates = measured.rate(part, self._tokens(part))
        return float(statistics.median(rates)) if rates else None

    def _ratio(self, measured: Measured, part: str) -> float | None:
        """Median over rounds of the rate over that of the first subject in the same round."""
        base = next((m for m in self.measured if m.rounds), measured)
        pairs = zip(*(m.rate(part, self._tokens(part)) for m in (measured, base)), strict=False)
        ratios = [ours / theirs for ours, theirs in pairs]
        return float(statistics.median(ratios)) if ratios else None

    def _one(self, measured: Measured) -> dict[str, Any]:
        subject = measured.subject
        about = {"name": subject.name, "runtime": subject.runtime, "bytes": subject.bytes}
        if measured.missing:
            return {**about, "missing": measured.missing}
        figures: dict[str, Any] = {"version": measured.rounds[0]["version"], "load_seconds": measured.median("load")}
        for part in _RATES:
            figures[f"{part}_tokens_per_second"] = self._middle(measured, part)
            figures[f"{part}_ratio"] = self._ratio(measured, part)
        memory = {key: int(measured.median(key)) for key in ("memory", "memory_libraries")}
        return {**about, **figures, "peak_memory_bytes": memory["memory"],
                "libraries_memory_bytes": memory["memory_libraries"], "rounds": measured.rounds}  # fmt: skip

    def _row(self, entry: dict[str, Any]) -> list[str]:
        rates = []
        for part in _RATES:
            rate, ratio = entry[f"{part}_tokens_per_second"], entry[f"{part}_ratio"]
            rates += ["-" if rate is None else f"{rate:.1f}", "-" if ratio is None else f"{ratio:.2f}"]
        load, memory = f"{entry['load_seconds']:.2f}", size(entry["peak_memory_bytes"])
        return [entry["name"], entry["runtime"], size(entry["bytes"]), load, *rates, memory]


def bench(
    path: Path, plan: Plan, progress: Progress = no_progress, *, chosen: Sequence[Subject] | None = None
) -> Bench:
    """Measure every artifact below a directory (or one file) in every runtime that opens it, or those that are chosen.

    Raises:
        UsageError: there is nothing to run.
        RuntimeDied: a runtime failed on an artifact.
        EnvironmentFailure: no artifact could be run for want of its runtime.
    """
    measured = [Measured(subject) for subject in (subjects(path) if chosen is None else chosen)]
    if not measured:
        raise UsageError(f"{path} holds no artifact", hint="give a published directory, or a .gguf file")
    total = plan.rounds * len(measured)
    for step in range(total):
        one = measured[step % len(measured)]
        progress(f"bench: {one.subject.name}, {one.subject.runtime}", step, total)
        if one.missing is None:
            _round(one, plan)
    if all(m.missing for m in measured):
        raise EnvironmentFailure(f"nothing could be run: {measured[0].missing}", hint="tightship doctor says more")
    return Bench(plan, measured)


def _round(measured: Measured, plan: Plan) -> None:
    subject = measured.subject
    job = {"artifact": str(subject.directory), "main": subject.main, "runtime": subject.runtime}
    work = {"threads": plan.threads, "prompt": plan.prompt, "decode": plan.decode, "passes": plan.passes}
    try:
        measured.rounds.append(run_child("speed", {**job, **work}, {}, limits=Limits(threads=plan.threads))[0])
    except RuntimeMissing as error:
        measured.missing = str(error)


def subjects(path: Path) -> list[Subject]:
    """What can be run: each GGUF file, each directory with an ONNX graph, each with safetensors and a config.json.

    Raises:
        UsageError: the path does not exist.
    """
    if not path.exists():
        raise UsageError(f"{path} does not exist")
    root = path.absolute() if path.is_dir() else path.absolute().parent
    files = sorted(p for p in root.rglob("*") if p.is_file()) if path.is_dir() else [path.absolute()]
    found: list[Subject] = []
    for file in files:
        if file.suffix == ".gguf" and file.name not in NO_MODELS and not _FURTHER_SHARD.search(file.name):
            shards = sorted(file.parent.glob(file.name.replace("-00001-of-", "-*-of-")))
            found.append(_subject(root, file, file, "llama.cpp", sum(p.stat().st_size for p in shards)))
        elif file.suffix == ".onnx" and file.name not in (ENCODER, GENAI):  # each runs with the graph beside it
            described = any((file.parent / name).is_file() for name in ("config.json", "genai_config.json"))
            home = file.parent if described else file.parent.parent
            found.append(_subject(root, home, file, "onnxruntime", _weight(home)))
            if (home / "genai_config.json").is_file():
                found.append(_subject(root, home, file, "onnxruntime-genai", _weight(home)))
        elif file.name in ("model.safetensors", "model.safetensors.index.json"):
            found.append(_subject(root, file.parent, file, "transformers", _weight(file.parent)))
    return found


def _subject(root: Path, shown: Path, main: Path, runtime: str, count: int) -> Subject:
    directory = main.parent if shown == main else shown
    name = shown.relative_to(root).as_posix()
    return Subject(
        root.name if name == "." else name, directory, main.relative_to(directory).as_posix(), runtime, count
    )


def _weight(directory: Path) -> int:
    return total_bytes(directory, sorted_files(directory))
