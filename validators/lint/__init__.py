"""`tightship lint`: what a runtime would refuse, or accept and compute wrongly, before anybody has loaded the artifact.

Runtimes that need a GPU or a server cannot prove our files here. Their loaders were read instead, and each thing they
demand or silently ignore is a rule with its source. An effect is

| effect | meaning                                              | exit code |
|--------|------------------------------------------------------|-----------|
| loud   | the loader refuses the file                          | 1         |
| quiet  | it loads, and something else is computed             | 1         |
| note   | it depends on hardware, version or how it is called  | 0         |

Adding a rule: a function with `@rule` in one of the modules of this room.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tightship.errors import UsageError
from tightship.suggest import did_you_mean
from tightship.validators.lint.artifact import Artifact
from tightship.validators.lint.rules import RULES, Finding

_MODULES = ("config", "compressed_tensors", "words", "gguf", "onnx")
CONTAINERS = {
    "vllm": ("safetensors",),
    "sglang": ("safetensors",),
    "tgi": ("safetensors",),
    "transformers": ("safetensors",),
    "trt": ("safetensors", "onnx"),
    "llama.cpp": ("gguf",),
    "ollama": ("gguf", "safetensors"),
    "genai": ("onnx",),
}


def lint(directory: Path, runtimes: Iterable[str]) -> dict[str, Any]:
    """Every finding about an artifact, or about all artifacts of a published directory that a runtime could load.

    Returns:
        `{"checked": [directory names], "rules": count, "findings": [...]}`.

    Raises:
        UsageError: an unknown runtime; a directory with nothing that the runtime loads.
        Malformed: a file breaks a rule of its own container.
    """
    for module in _MODULES:
        importlib.import_module(f"tightship.validators.lint.{module}")
    artifacts = _artifacts(directory)
    findings: list[Finding] = []
    checked: set[str] = set()
    count = 0
    for runtime in runtimes:
        if runtime not in CONTAINERS:
            raise UsageError(
                f"there are no rules for {runtime!r}{did_you_mean(runtime, CONTAINERS)}",
                hint=f"known: {', '.join(CONTAINERS)}",
            )
        loadable = [a for a in artifacts if a.container in CONTAINERS[runtime]]
        if not loadable:
            raise UsageError(f"{directory.name} holds nothing that {runtime} loads")
        for artifact in loadable:
            mine = [r for r in RULES if runtime in r.runtimes and r.container == artifact.container]
            checked.add(artifact.name)
            count += len(mine)
            findings += [found for rule in mine for found in rule.findings(artifact, runtime)]
    return {"checked": sorted(checked), "rules": count, "findings": [asdict(finding) for finding in findings]}


def _artifacts(directory: Path) -> list[Artifact]:
    if not directory.is_dir():
        raise UsageError(
            f"{directory} is not a directory", hint="give the directory of an artifact, or a published one"
        )
    folders = [directory, *sorted(p for p in directory.iterdir() if p.is_dir())]
    found = [artifact for folder in folders if (artifact := Artifact.of(folder)) is not None]
    if not found:
        raise UsageError(f"{directory.name} holds no model files")
    return found
