"""What a build would do, from recipe and shapes alone; the run walks the same plan.

Reads no weight data, but for a sample of it that `preflight` warns by.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tightship.checkpoint import Checkpoint
from tightship.errors import EnvironmentFailure, UsageError
from tightship.preflight import warnings
from tightship.recipe import Calibration, Recipe
from tightship.settings import Settings
from tightship.stages import Stage, for_container, make_stages, merge_stage, outline, scheme_stage
from tightship.target import Progress, TargetPlan, no_progress
from tightship.weights import Alias, Quantized

# Imports of torch, transformers and ONNX Runtime, measured at 0.6 to 0.8 GiB together.
_LIBRARIES = 1 << 30


@dataclass(frozen=True)
class PlannedTarget:
    """One artifact: whether factors are merged, what its scheme solves (None: nothing), what the container writes."""

    merge: Stage | None
    solve: Stage | None
    outline: Checkpoint
    plan: TargetPlan


@dataclass(frozen=True)
class Plan:
    """A build, known without data.

    Attributes:
        source: the checkpoint as opened; its files are not hashed yet.
        stages: the recipe's passes.
        targets: one an artifact.
        output_bytes: of all artifacts' weight files together.
        scratch_bytes: disk in the work directory: stored stages, solved integers, the proof's graphs.
        memory_bytes: upper estimate; `export` without, `proof` with the reference runs.
        notes: remarks for the user, complaints about order that were let through among them.
        warnings: what speaks against taking weights from this model, or filling its zeros; the report repeats them.
    """

    recipe: Recipe
    source: Checkpoint
    stages: tuple[Stage, ...]
    targets: tuple[PlannedTarget, ...]
    output_bytes: int
    scratch_bytes: int
    memory_bytes: dict[str, int]
    notes: tuple[str, ...] = field(default=())
    warnings: tuple[str, ...] = field(default=())

    def hashed(self, progress: Progress) -> Plan:
        """With the digests of the source's files: what a run starts from."""
        return replace(self, source=self.source.replace(source=self.source.source.hashed(progress)))

    def to_json(self) -> dict[str, Any]:
        return {
            "source": {"identity": self.source.source.identity, "architecture": self.source.architecture.family},
            "stages": [
                {"id": s.step.id, **s.work.to_json(), "needs": s.work.needs, "stored": not s.streamed}
                for s in self.stages
            ],
            "targets": [_target_json(t) for t in self.targets],
            "output_bytes": self.output_bytes,
            "scratch_bytes": self.scratch_bytes,
            "memory_bytes": self.memory_bytes,
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }

    def summary(self, *, verbose: bool = False) -> str:
        """For people: one row a stage and a target; `verbose` adds one a tensor."""
        from tightship.console import size, table

        lines = [f"source  {self.source.source.identity} ({self.source.architecture.family})"]
        lines += [
            f"pass    {s.step.id}: {'streamed' if s.streamed else 'stored'}, needs {s.work.needs}" for s in self.stages
        ]
        rows = [
            [t.plan.target.id, size(t.plan.file_bytes), f"{t.plan.bits_per_weight:.2f}", str(len(t.plan.tensors))]
            for t in self.targets
        ]
        lines += ["", table(rows, ["target", "weights", "bits/weight", "tensors"], right=frozenset({1, 2, 3}))]
        for target in self.targets if verbose else ():
            rows = [[t.name, t.layout, t.storage, size(t.nbytes), t.reason] for t in target.plan.tensors]
            lines += ["", target.plan.target.id, table(rows, ["tensor", "layout", "stored as", "size", "because"])]
        lines += [
            "",
            f"disk    {size(self.output_bytes)} of artifacts, up to {size(self.scratch_bytes)} in the work directory",
            f"memory  up to {size(self.memory_bytes['export'])} to export, {size(self.memory_bytes['proof'])} to prove",
        ]
        lines += [f"warning {warning}" for warning in self.warnings]
        return "\n".join([*lines, *(f"note    {note}" for note in self.notes)])


def _target_json(target: PlannedTarget) -> dict[str, Any]:
    plan = target.plan
    return {
        "id": plan.target.id,
        "bytes": plan.file_bytes,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "notes": list(plan.notes),
        "tensors": [
            {
                "name": t.name,
                "stored_as": t.stored_as,
                "shape": list(t.shape),
                "layout": t.layout,
                "storage": t.storage,
                "bytes": t.nbytes,
                "reason": t.reason,
            }
            for t in plan.tensors
        ],
    }


def make_plan(recipe: Recipe, settings: Settings, *, progress: Progress = no_progress) -> Plan:
    """Open the source and walk every pass and target without data.

    Raises:
        UsageError: the recipe, the order of passes, a path.
        Unsupported: what a pass or a container cannot do, naming the tensor.
        Malformed: the source breaks its format's rules.
        EnvironmentFailure: the largest tensor does not fit twice into the memory that the proof is given.
    """
    from tightship.exporters import exporter_for
    from tightship.opening import open_checkpoint
    from tightship.validators.gates import parse_gates
    from tightship.validators.references import ProofSettings, must_be_mapped

    if recipe.source is None:
        raise UsageError("no source is given", hint="name a directory, a hub id or a .gguf file")
    if not recipe.targets:
        raise UsageError("no target is given", hint="--to gguf, --to onnx or --to safetensors")
    parse_gates(recipe.gates, recipe.path)
    stages, complaints = make_stages(recipe, allow_order=settings.allow_order)
    source = open_checkpoint(recipe.path(recipe.source), hashed=False, progress=progress)
    checkpoint = source
    stored = 0
    for stage in stages:
        before, checkpoint = checkpoint, outline(checkpoint, stage)
        stored += 0 if stage.streamed else _changed_bytes(before, checkpoint)
    targets = []
    for target in recipe.targets:
        exporter, merge = exporter_for(target.container), merge_stage(target)
        merged = outline(checkpoint, merge) if merge else checkpoint
        solve = scheme_stage(merged, target, exporter, recipe)
        after = outline(merged, solve) if solve else merged
        targets.append(PlannedTarget(merge, solve, after, exporter.plan(after, for_container(target, recipe))))
    solves = [t.solve for t in targets if t.solve]
    notes = [*(f"allowed: {complaint}" for complaint in complaints), *_notes(targets)]
    notes += _unsaid_calibration(recipe, [*stages, *solves])
    proof = ProofSettings(memory=settings.max_memory)
    mapped = 2 * source.float32_bytes if must_be_mapped(source, proof) else 0  # the original and the compressed model
    scratch = stored + _spooled_bytes([checkpoint, *(t.outline for t in targets)]) + source.float32_bytes + mapped
    return Plan(
        recipe=recipe,
        source=source,
        stages=tuple(stages),
        targets=tuple(targets),
        output_bytes=sum(t.plan.file_bytes for t in targets),
        scratch_bytes=scratch,
        memory_bytes=_memory(source, proof.limits.memory_bytes if mapped else None),
        notes=tuple(notes),
        warnings=warnings(
            source,
            {word for stage in stages for word in stage.work.makes},
            {t.plan.target.id: t.outline for t in targets},
        ),
    )


def check_disk(plan: Plan, output: Path, work: Path) -> None:
    """Demand room for the artifacts and for the scratch files before anything is written.

    Raises:
        EnvironmentFailure: too little; the message says how much is needed and how much is free.
    """
    output_device, work_device = _existing(output), _existing(work)
    same = output_device.stat().st_dev == work_device.stat().st_dev
    needs = [(output_device, plan.output_bytes + (plan.scratch_bytes if same else 0))]
    if not same:
        needs.append((work_device, plan.scratch_bytes))
    for folder, needed in needs:
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise EnvironmentFailure(
                f"the disk of {folder.name or folder} has {free} bytes free, this build needs {needed}",
                hint="free some space (`tightship store gc` helps), or put the work directory elsewhere with --work",
            )


def _existing(path: Path) -> Path:
    here = path.absolute()
    while not here.exists():
        here = here.parent
    return here


def _notes(targets: list[PlannedTarget]) -> list[str]:
    return [f"{target.plan.target.id}: {note}" for target in targets for note in target.plan.notes]


def _unsaid_calibration(recipe: Recipe, stages: list[Stage]) -> list[str]:
    """What calibrates where the recipe does not say."""
    if recipe.calibration or not any(stage.work.needs == "calibration" for stage in stages):
        return []
    return [f"calibration: {Calibration().tokens} tokens that the model writes itself; --calibration FILE is quicker"]


def _memory(checkpoint: Checkpoint, given: int | None) -> dict[str, int]:
    """Export: the largest tensor twice in float32. Proof: the original and the compressed model side by side.

    A proof over mapped files stays in what is `given` (bytes).
    """
    largest = max((4 * math.prod(w.shape) for w in checkpoint.weights.values() if not isinstance(w, Alias)), default=0)
    return {"export": _LIBRARIES + 2 * largest, "proof": given or _LIBRARIES + 2 * checkpoint.float32_bytes}


def _changed_bytes(before: Checkpoint, after: Checkpoint) -> int:
    """Upper bound of what a stored stage writes: changed weights, or all linears where the outline does not say."""
    changed = [w for n, w in after.weights.items() if not isinstance(w, Alias) and w is not before.weights.get(n)]
    if not changed:
        changed = [after.resolve(info.name) for info in after.linears()]
    return sum(weight.nbytes for weight in changed)


def _spooled_bytes(checkpoints: list[Checkpoint]) -> int:
    """Bytes of solved matrices, each counted once."""
    solved = {id(w): w.nbytes for c in checkpoints for w in c.weights.values() if isinstance(w, Quantized)}
    return sum(solved.values())
