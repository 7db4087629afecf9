"""What a build found out: checks, stages, targets. `report.json` of docs/contract.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

SCHEMA_VERSION = 1

Kind = Literal["structure", "values", "tokenizer", "graph", "runtime", "loss"]
Verdict = Literal["pass", "fail", "not_run"]


@dataclass(frozen=True)
class Check:
    """One proof step.

    Attributes:
        id: unique within the report, such as `gguf/llama.cpp/graph/rel_l2`.
        target: target id (`gguf`, `onnx-int4`).
        runtime: `onnxruntime`, `llama.cpp`, `transformers`, `onnxruntime-genai`, `reader`.
        kind: which question. values, graph, structure and tokenizer are fidelity; loss is loss; runtime is the
            runtime's own arithmetic (a report, unless a threshold is set).
        metric, value, op, threshold: verdict is `value op threshold`; op is `<=`, `>=`, `==` or `report`.
        threshold_source: where the threshold comes from (`tolerances.toml`, `recipe`, `default`).
        reason: why it failed or did not run, in one sentence.
        tensor: the culprit.
        extra: further figures of the same measurement, reported and never judged.
    """

    id: str
    target: str
    runtime: str
    kind: Kind
    metric: str
    value: float | int | None
    op: str
    threshold: float | int | None
    threshold_source: str
    verdict: Verdict
    reason: str | None = None
    tensor: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        data["extra"] = {k: v for k, v in data["extra"].items() if _sayable(v)}
        return {k: v for k, v in data.items() if v is not None and v != {} and _sayable(v)}


def judge(
    *,
    target: str,
    runtime: str,
    kind: Kind,
    metric: str,
    value: float | int | None,
    op: str = "report",
    threshold: float | int | None = None,
    source: str = "default",
    tensor: str | None = None,
    reason: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Check:
    """Build a check and its verdict. A missing or non-finite value fails whatever the threshold."""
    finite = value is not None and math.isfinite(value)
    verdict: Verdict = "pass"
    if not finite:
        verdict, reason = "fail", reason or f"{metric} is not a finite number"
    elif op != "report" and not _holds(value, op, threshold):
        verdict, reason = "fail", reason or f"{metric} is {value:.6g}, needs {op} {threshold:g}"
    return Check(
        id="/".join((target, runtime, kind, metric, *([tensor] if tensor else []))),
        target=target,
        runtime=runtime,
        kind=kind,
        metric=metric,
        value=value,
        op=op,
        threshold=threshold,
        threshold_source=source,
        verdict=verdict,
        reason=reason,
        tensor=tensor,
        extra=extra or {},
    )


def not_run(*, target: str, runtime: str, kind: Kind, metric: str, reason: str) -> Check:
    """A proof that could not be had. Counts as a failure unless the user accepted that runtime unproven."""
    return Check(
        id=f"{target}/{runtime}/{kind}/{metric}",
        target=target,
        runtime=runtime,
        kind=kind,
        metric=metric,
        value=None,
        op="report",
        threshold=None,
        threshold_source="default",
        verdict="not_run",
        reason=reason,
    )


def _sayable(value: Any) -> bool:
    """JSON has no NaN and no infinity; a figure that is neither stays out, and its check says why it failed."""
    return not isinstance(value, float) or math.isfinite(value)


def _holds(value: Any, op: str, threshold: Any) -> bool:
    if op == "<=":
        return bool(value <= threshold)
    if op == ">=":
        return bool(value >= threshold)
    if op == "==":
        return bool(value == threshold)
    raise ValueError(f"unknown comparison {op!r}")


@dataclass
class TargetReport:
    """One artifact in the report."""

    id: str
    bytes: int
    bits_per_weight: float
    sparsity: float
    graph_source: str | None
    checks: list[Check]

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "bytes": self.bytes,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "sparsity": round(self.sparsity, 6),
            "graph_source": self.graph_source,
            "checks": [c.to_json() for c in self.checks],
        }


@dataclass
class Report:
    """The whole build."""

    stages: list[dict[str, Any]]
    targets: list[TargetReport]
    environment: dict[str, Any]
    accepted_unproven: Sequence[str] = ()
    warnings: Sequence[str] = ()

    def failures(self) -> list[Check]:
        """Checks that forbid publication, in order."""
        checks = (c for t in self.targets for c in t.checks)
        return [
            c
            for c in checks
            if c.verdict == "fail" or (c.verdict == "not_run" and c.runtime not in self.accepted_unproven)
        ]

    @property
    def verdict(self) -> str:
        return "fail" if self.failures() else "pass"

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "verdict": self.verdict,
            "stages": self.stages,
            "targets": [t.to_json() for t in self.targets],
            "environment": self.environment,
            "accepted_unproven": sorted(self.accepted_unproven),
            "warnings": list(self.warnings),
        }
