"""`manifest.json`: what lies in a published directory and what it was made of. Byte-stable: no time, host or path.

The report holds measured figures, so it cannot be listed with a digest here; instead `report.json` carries the digest
of the manifest it belongs to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tightship import __version__
from tightship.durable import sha256_file
from tightship.errors import GateFailed, Malformed, UsageError
from tightship.publish import MANIFEST
from tightship.recipe import SELF, Recipe, target_json
from tightship.report import SCHEMA_VERSION
from tightship.stages import Stage
from tightship.target import Exported, Progress, no_progress, sorted_files
from tightship.untrusted import strict_json

REPORTS = ("report.json", "report.md", "report.svg", "report-layers.svg")
_LIBRARIES = (
    "gguf",
    "ml_dtypes",
    "mobius-onnx",
    "numba",
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "torch",
    "transformers",
)


def versions() -> dict[str, str]:
    """Versions of the tool and of the libraries that artifacts depend on."""
    found = {"tightship": __version__}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


# Options of a target that name a file.
_FILES = frozenset({"adapter", "chat_template", "imatrix"})


def resolved_recipe(recipe: Recipe, stages: Sequence[Stage], solves: Mapping[str, Stage | None]) -> dict[str, Any]:
    """The recipe with every default spelt out and files by name and digest instead of path."""
    passes = [{"id": s.step.id, "inputs": _inputs(recipe, s), **s.work.to_json()} for s in stages]
    targets = []
    for target in recipe.targets:
        solve = solves.get(target.id)
        files = {key: _file(recipe, str(target.options[key])) for key in _FILES & target.options.keys()}
        entry = target_json(target)
        if files:
            entry["with"] |= files
        targets.append({**entry, **({"solver": solve.work.to_json()["with"]["solver"]} if solve else {})})
    calibration = None
    if recipe.calibration is not None:
        calibration = {
            **recipe.calibration.to_json(),
            "text": _file(recipe, recipe.calibration.text),
        }
    gates = dict(recipe.gates)
    if "task" in gates:
        gates["task"] = {**gates["task"], "data": _file(recipe, gates["task"]["data"])}
    return {
        "seed": recipe.seed,
        "calibration": calibration,
        "passes": passes,
        "targets": targets,
        "gates": gates,
    }


def write_manifest(directory: Path, content: Mapping[str, Any]) -> str:
    """Add every file below `directory` with size and digest, write `manifest.json`; its sha256."""
    files = [
        {"path": name, "size": (directory / name).stat().st_size, "sha256": sha256_file(directory / name)}
        for name in sorted_files(directory)
    ]
    body = {"schema_version": SCHEMA_VERSION, **content, "files": files}
    path = directory / MANIFEST
    path.write_text(json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    return sha256_file(path)


def exported_json(exported: Exported) -> dict[str, Any]:
    """What `verify --against` needs to know of an export."""
    return {"main": exported.main, "graph_source": exported.graph_source}


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a published directory.

    Raises:
        UsageError: not a published directory.
        Malformed: the manifest is not one of ours.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise UsageError(f"{directory} holds no {MANIFEST}; it is not a published directory")
    data = strict_json(path.read_bytes(), MANIFEST)
    if not isinstance(data, dict) or not isinstance(data.get("files"), list):
        raise Malformed(f"{MANIFEST} lists no files")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise Malformed(f"{MANIFEST} has schema version {data.get('schema_version')!r}; known: {SCHEMA_VERSION}")
    for entry in data["files"]:
        keys = set(entry) if isinstance(entry, dict) else set()
        if keys != {"path", "size", "sha256"} or Path(str(entry["path"])).is_absolute() or ".." in entry["path"]:
            raise Malformed(f"{MANIFEST} has a file entry that is not ours: {str(entry)[:120]}")
    return data


def rehash(directory: Path, progress: Progress = no_progress) -> dict[str, Any]:
    """Compare every file with the manifest; the manifest.

    Raises:
        GateFailed: a file is missing, surplus or changed; the first eight are named.
    """
    data = read_manifest(directory)
    listed = {entry["path"]: entry for entry in data["files"]}
    present = set(sorted_files(directory)) - {MANIFEST, *REPORTS}
    wrong = [f"{name} is missing" for name in sorted(set(listed) - present)]
    wrong += [f"{name} is not in the manifest" for name in sorted(present - set(listed))]
    for done, name in enumerate(sorted(present & set(listed))):
        progress("hash files", done, len(listed))
        path = directory / name
        if path.is_symlink() or path.stat().st_size != listed[name]["size"]:
            wrong.append(f"{name} has another size")
        elif sha256_file(path) != listed[name]["sha256"]:
            wrong.append(f"{name} was changed")
    report = directory / REPORTS[0]
    if not report.is_file():
        wrong.append(f"{REPORTS[0]} is missing")
    elif strict_json(report.read_bytes(), REPORTS[0]).get("manifest_sha256") != sha256_file(directory / MANIFEST):
        wrong.append(f"{REPORTS[0]} belongs to another {MANIFEST}")
    if wrong:
        shown = "; ".join(wrong[:8]) + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        raise GateFailed(
            f"{directory.name} is not what was published: {shown}", hint="build it again, or copy it again"
        )
    return data


def _inputs(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    return {name: _file(recipe, word) for name, word in stage.step.inputs.items()}


def _file(recipe: Recipe, word: str) -> Any:
    """A file as its name and digest; other words (`source`, `self`, an id, a directory) by their last part."""
    path = Path(recipe.path(word))
    if word == SELF or not path.is_file():
        return path.name
    return {"name": path.name, "sha256": sha256_file(path)}
