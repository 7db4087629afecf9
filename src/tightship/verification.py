"""`verify`: is a published directory what was published, and does its proof still hold?"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightship.errors import GateFailed, UsageError
from tightship.inspection import inspect
from tightship.manifest import rehash
from tightship.pipeline import Artifact, Proofs, environment, run_passes, solved, summary
from tightship.planning import make_plan
from tightship.recipe import SELF, Recipe
from tightship.report import Report
from tightship.settings import Settings
from tightship.spool import Spool
from tightship.target import Exported, Progress, no_progress, sorted_files


@dataclass(frozen=True)
class Verified:
    """A directory that holds. `report` is the repeated proof, or None where only files were hashed."""

    directory: Path
    files: int
    report: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        return {"directory": str(self.directory), "verdict": "pass", "files": self.files, "report": self.report}

    def summary(self, *, verbose: bool = False) -> str:
        """For people."""
        hashed = f"{self.files} files are those that were published"
        return f"{summary(self.report, verbose=verbose)}\n\n{hashed}" if self.report else hashed


def verify(
    directory: Path,
    against: str | None,
    settings: Settings,
    *,
    calibration: str | None = None,
    progress: Progress = no_progress,
) -> Verified:
    """Hash every file, read every header; with `against`, make the weights again, compare digests, prove again.

    Raises:
        GateFailed: anything differs, or a proof fails.
        Malformed: a file is the one that the manifest names, and still breaks the rules of its container.
        UsageError: not a published directory, or one whose recipe needs a text that is not given.
    """
    manifest = rehash(directory, progress)
    inspect(directory)
    report = None
    if against is not None:
        recipe = recipe_of(manifest, against, calibration)
        report = _again(directory, manifest, recipe, settings, progress)
    return Verified(directory, len(manifest["files"]), report)


def _again(
    directory: Path, manifest: Mapping[str, Any], recipe: Recipe, settings: Settings, progress: Progress
) -> dict[str, Any]:
    settings = dataclasses.replace(settings, accept_unproven=tuple(manifest["accepted_unproven"]))
    plan = make_plan(recipe, dataclasses.replace(settings, allow_order=True), progress=progress).hashed(progress)
    if plan.source.source.to_json()["files"] != manifest["source"]["files"]:
        raise GateFailed(
            f"{directory.name} was made of other files than those of {recipe.source}",
            hint=f"its manifest names {manifest['source']['identity']} and the digest of every file",
        )
    state, shop = run_passes(plan, recipe, settings, progress)
    reports = []
    with tempfile.TemporaryDirectory(prefix="tightship-verify-") as scratch:
        spool = Spool(Path(scratch) / "spool")
        proofs = Proofs(spool.through(plan.source), shop, Path(scratch) / "proof")
        for target, written in zip(plan.targets, manifest["targets"], strict=True):
            compressed = spool.through(solved(target, state, shop).checkpoint)
            _compare(spool.digests(compressed), manifest["weights"][written["weights"]], written["id"])
            folder = directory / written["id"]
            exported = Exported(tuple(sorted_files(folder)), written["main"], written["graph_source"])
            reports.append(proofs.of(Artifact(target.plan, compressed, folder, exported)))
    report = Report(list(state.log), reports, environment(settings), settings.accept_unproven)
    failures = report.failures()
    if failures:
        raise GateFailed(f"{failures[0].id}: {failures[0].reason or failures[0].verdict}", tensor=failures[0].tensor)
    return report.to_json()


def recipe_of(manifest: Mapping[str, Any], source: str, calibration: str | None) -> Recipe:
    """The recipe that a manifest records, with paths given anew.

    Raises:
        UsageError: it needs a file that the manifest can only name.
    """
    recorded = manifest["recipe"]
    passes = []
    for entry in recorded["passes"]:
        files = [word for word in entry["inputs"].values() if isinstance(word, dict)]
        if entry["with"].get("imatrix"):
            files.append({"name": "with an importance matrix"})
        if files:
            raise UsageError(f"pass {entry['id']} was given the file {files[0]['name']}, which verify cannot know")
        passes.append({key: entry[key] for key in ("use", "id", "inputs", "with")})
    data: dict[str, Any] = {"source": source, "seed": recorded["seed"], "passes": passes}
    data["targets"] = [_target(entry) for entry in recorded["targets"]]
    if recorded["calibration"] is not None:
        text = recorded["calibration"]["text"]
        if text != SELF and calibration is None:
            raise UsageError(f"calibration used {text['name']}", hint="give the same text: --calibration FILE")
        data["calibration"] = {**recorded["calibration"], "text": calibration or SELF}
    gates = {key: value for key, value in recorded["gates"].items() if key != "task"}
    return Recipe.from_json({**data, "gates": gates}, name="the manifest's recipe")


def _target(entry: Mapping[str, Any]) -> dict[str, Any]:
    files = [word["name"] for word in entry.get("with", {}).values() if isinstance(word, dict) and "sha256" in word]
    if files:
        raise UsageError(f"target {entry['to']} was given the file {files[0]}, which verify cannot know")
    options = {**entry.get("with", {}), **({"solver": entry["solver"]} if "solver" in entry else {})}
    return {key: value for key, value in entry.items() if key in ("to", "scheme")} | {"with": options}


def _compare(found: Mapping[str, str], recorded: Mapping[str, str], target: str) -> None:
    different = sorted(name for name in {*found, *recorded} if found.get(name) != recorded.get(name))
    if different:
        raise GateFailed(
            f"{target}: {len(different)} of {len(recorded)} tensors come out different from the source, "
            f"the first is {different[0]}",
            tensor=different[0],
            hint="another version of the tool, of torch or another processor may have made them; see the manifest",
        )
