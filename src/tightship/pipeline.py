"""open, plan, passes, export, prove, publish: the one place that knows all rooms. Imports them late.

Every step is visible in `_Build.run`. Whatever fails, the staging directory is removed and nothing is at the final
path; a failed gate also leaves its report in the run's work directory.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightship import ranks
from tightship.checkpoint import Checkpoint
from tightship.durable import write_file
from tightship.errors import GateFailed
from tightship.manifest import exported_json, resolved_recipe, versions, write_manifest
from tightship.planning import Plan, PlannedTarget, check_disk, make_plan
from tightship.publish import Publication, environment_failures
from tightship.recipe import Recipe
from tightship.report import Report, TargetReport
from tightship.runlog import RunLog
from tightship.settings import Settings
from tightship.spool import Spool
from tightship.stages import State, Workshop, conditions, first_state, run_stage
from tightship.target import Exported, Progress, TargetPlan, no_progress


@dataclass(frozen=True)
class Artifact:
    """One exported target. `compressed` is what it must compute."""

    plan: TargetPlan
    compressed: Checkpoint
    directory: Path
    exported: Exported


@dataclass(frozen=True)
class Built:
    """A published build."""

    output: Path
    report: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"output": str(self.output), **self.report}

    def summary(self, *, verbose: bool = False) -> str:
        """For people."""
        return f"{summary(self.report, verbose=verbose)}\n\npublished {self.output}"


def build(recipe: Recipe, output: Path, settings: Settings, progress: Progress = no_progress) -> Built:
    """Make, prove and publish every target of a recipe. Of several processes (`ranks`) the first one does.

    Raises:
        GateFailed: a proof failed or did not run; nothing is published, the message tells where the report is.
        UsageError, Unsupported, Malformed: before any work.
        EnvironmentFailure: disk, memory, a missing runtime, another build at the same output.
    """
    ranks.join(settings.device)
    if ranks.rank() > 0:
        follow(recipe, settings)
        raise SystemExit(0)
    name = Path(output).name
    with (
        environment_failures(f"building {name}"),
        Publication(output, force=settings.force) as publication,
        RunLog(settings.work, output) as log,
    ):
        return _Build(recipe, settings, publication, log, log.progress(progress)).run()


def follow(recipe: Recipe, settings: Settings) -> None:
    """Walk the passes beside the process that builds; training passes are shared with it."""
    plan = make_plan(recipe, settings)
    run_passes(plan.hashed(no_progress), recipe, settings, no_progress)


class _Build:
    """One build under way."""

    def __init__(
        self, recipe: Recipe, settings: Settings, publication: Publication, log: RunLog, progress: Progress
    ) -> None:
        self.recipe = recipe
        self.settings = settings
        self.publication = publication
        self.log = log
        self.progress = progress
        self.spool = Spool(log.folder / "spool")
        self.stages: list[dict[str, Any]] = []

    def run(self) -> Built:
        with self.log.step("plan"):
            plan = make_plan(self.recipe, self.settings, progress=self.progress)
            check_disk(plan, self.publication.output, self.settings.work)
            plan = plan.hashed(self.progress)
        with self._threads(), self._scratch():
            with self.log.step("passes"):
                state, shop = run_passes(plan, self.recipe, self.settings, self.progress)
            self.stages += state.log
            artifacts = [self._export(target, state, shop) for target in plan.targets]
            digests = self._digests(artifacts)
            proofs = Proofs(self.spool.through(plan.source), shop, self.log.folder / "proof")
            reports = [self._prove(proofs, artifact) for artifact in artifacts]
        report = Report(self.stages, reports, environment(self.settings), self.settings.accept_unproven, plan.warnings)
        self._gate(report)
        with self.log.step("publish"):
            return self._publish(plan, artifacts, digests, report)

    def _export(self, target: PlannedTarget, state: State, shop: Workshop) -> Artifact:
        with self.log.step(f"export {target.plan.target.id}"):
            made = solved(target, state, shop)
            self.stages += made.log[len(state.log) :]
            compressed = self.spool.through(made.checkpoint)
            exporter = exporter_of(target.plan.target.container)
            plan = exporter.plan(compressed, target.plan.target)
            directory = self.publication.staging / plan.target.id
            directory.mkdir()
            exported = exporter.export(compressed, plan, directory, self.progress)
            return Artifact(plan, compressed, directory, exported)

    def _digests(self, artifacts: list[Artifact]) -> dict[str, dict[str, str]]:
        """Per-tensor digests by target id; a target with the same weights as an earlier one names that instead."""
        with self.log.step("digests"):
            return {a.plan.target.id: self.spool.digests(a.compressed) for a in artifacts}

    def _prove(self, proofs: Proofs, artifact: Artifact) -> TargetReport:
        with self.log.step(f"prove {artifact.plan.target.id}"):
            return proofs.of(artifact)

    def _gate(self, report: Report) -> None:
        failures = report.failures()
        if not failures:
            return
        data = report.to_json()
        write_report(self.log.folder, data)
        first = failures[0]
        more = f" (and {len(failures) - 1} more checks)" if len(failures) > 1 else ""
        raise GateFailed(
            f"{first.id}: {first.reason or first.verdict}{more}; nothing was published",
            tensor=first.tensor,
            hint=f"the report is in {self.log.folder / 'report.md'}"
            + (f"; --accept-unproven {first.runtime} publishes without that proof" * (first.verdict == "not_run")),
        )

    def _publish(
        self, plan: Plan, artifacts: list[Artifact], digests: dict[str, dict[str, str]], report: Report
    ) -> Built:
        content = manifest_content(plan, self.recipe, self.settings, artifacts, digests)
        content["stages"] = {stage["id"]: stage["key"] for stage in self.stages}
        data = {**report.to_json(), "manifest_sha256": write_manifest(self.publication.staging, content)}
        write_report(self.publication.staging, data)
        self.publication.publish()
        return Built(self.publication.output, data)

    @contextmanager
    def _threads(self) -> Iterator[None]:
        from tightship.formats.threads import threads

        with threads(self.settings.threads):
            yield

    @contextmanager
    def _scratch(self) -> Iterator[None]:
        """What this build keeps only for itself; what a kill left of the build before is of no use."""
        folders = (self.spool.folder, self.log.folder / "proof")
        try:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
            yield
        finally:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)


def run_passes(plan: Plan, recipe: Recipe, settings: Settings, progress: Progress) -> tuple[State, Workshop]:
    """The recipe's passes, one after the other."""
    state = first_state(plan.source)
    shop = Workshop(recipe, settings, progress, {"source": state})
    for stage in plan.stages:
        progress(f"pass {stage.step.id}", 0, 1)
        state = run_stage(state, stage, shop)
        shop.results[stage.step.id] = state
    return state, shop


def solved(target: PlannedTarget, state: State, shop: Workshop) -> State:
    """What one target stores: the passes' checkpoint, factors merged if asked for, quantized as its scheme wants."""
    for stage in filter(None, (target.merge, target.solve)):
        state = run_stage(state, stage, shop)
    return state


def exporter_of(container: str) -> Any:
    """The exporter, with what it needs injected: exporters offer graphs, validators judge them."""
    from tightship.exporters import exporter_for

    if container != "onnx":
        return exporter_for(container)
    from tightship.validators.parity import judge

    return exporter_for(container, judge=judge)


class Proofs:
    """Proofs of one build's artifacts against one original; what they share is computed once.

    Args:
        original: the source as opened.
        scratch: directory for what proofs write; removed by the caller.
    """

    def __init__(self, original: Checkpoint, shop: Workshop, scratch: Path) -> None:
        self.original = original
        self.shop = shop
        self.scratch = scratch
        self._provers: dict[int, Any] = {}
        self._references: Any = None

    def of(self, artifact: Artifact) -> TargetReport:
        """Every check of one artifact."""
        from tightship.validators.prove import Prover
        from tightship.validators.references import References

        settings = self._settings()
        if self._references is None:
            self._references = References(self.original, settings)
        prover = self._provers.setdefault(
            id(artifact.compressed), Prover(self.original, artifact.compressed, settings, self._references)
        )
        report: TargetReport = prover.prove(artifact.plan, artifact.directory, artifact.exported)
        return report

    def _settings(self) -> Any:
        from tightship.validators.gates import parse_gates
        from tightship.validators.references import LENGTH, ProofSettings

        recipe, settings = self.shop.recipe, self.shop.settings
        self.scratch.mkdir(parents=True, exist_ok=True)
        fixed = [dict(target.options.get("shapes", {})).get("sequence_length") for target in recipe.targets]
        return ProofSettings(
            length=min([LENGTH, *(length for length in fixed if length)]),
            text=settings.text,
            gates=parse_gates(recipe.gates, recipe.path),
            seed=recipe.seed,
            threads=settings.threads,
            memory=settings.max_memory,
            scratch=self.scratch,
            progress=self.shop.progress,
        )


def manifest_content(
    plan: Plan, recipe: Recipe, settings: Settings, artifacts: list[Artifact], digests: dict[str, dict[str, str]]
) -> dict[str, Any]:
    """Everything in `manifest.json` but the files."""
    solves = {t.plan.target.id: t.solve for t in plan.targets}
    sensitive = any(s.work.needs != "nothing" for s in [*plan.stages, *(s for s in solves.values() if s)])
    weights: dict[str, dict[str, str]] = {}
    targets = []
    for artifact in artifacts:
        mine = artifact.plan.target.id
        owner = next((other for other in weights if weights[other] == digests[mine]), mine)
        weights.setdefault(owner, digests[mine])
        targets.append({"id": mine, "weights": owner, **exported_json(artifact.exported)})
    return {
        "source": plan.source.source.to_json(),
        "recipe": resolved_recipe(recipe, plan.stages, solves),
        "versions": versions(),
        "conditions": conditions(settings) if sensitive else None,
        "targets": targets,
        "weights": weights,
        "accepted_unproven": sorted(settings.accept_unproven),
    }


def environment(settings: Settings) -> dict[str, Any]:
    """Where the build ran, for `report.json`."""
    return {
        "versions": versions(),
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "threads": settings.threads,
        "device": settings.device,
    }


def write_report(folder: Path, data: dict[str, Any]) -> None:
    """`report.json`, `report.md`, and the pictures in it."""
    from tightship.validators.render import pictures, render

    write_file(folder / "report.json", json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    write_file(folder / "report.md", render(data))
    for name, svg in pictures(data).items():
        write_file(folder / name, svg)


def summary(report: dict[str, Any], *, verbose: bool = False) -> str:
    """For people: a line a target and a failure; `verbose` adds every check."""
    from tightship.console import table
    from tightship.validators.render import summary as lines_of

    lines = list(lines_of(report))
    for target in report["targets"] if verbose else ():
        checks = [[c["id"], _figure(c.get("value")), c["verdict"], c.get("reason", "")] for c in target["checks"]]
        lines += ["", table(checks, ["check", "value", "verdict", "reason"], right=frozenset({1}))]
    return "\n".join(lines)


def _figure(value: Any) -> str:
    return "" if value is None else f"{value:.6g}"
