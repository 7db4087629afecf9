"""Budgets for the loss, as the recipe's `gates` says them.

gates: {kl_mean: 0.05, top1: 0.9, task: {metric: f1, data: file.jsonl, min: 0.8}}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightship.errors import UsageError
from tightship.suggest import did_you_mean

TASK_METRICS = ("accuracy", "f1", "roc_auc", "bleu")


@dataclass(frozen=True)
class Measure:
    """What a gate may say: the side it bounds, the range of sensible budgets, and what the number means."""

    op: str
    low: float
    high: float
    meaning: str


MEASURES: Mapping[str, Measure] = {
    "kl_mean": Measure("<=", 0, math.inf, "nats per token, mean of KL(original || artifact)"),
    "kl_p99": Measure("<=", 0, math.inf, "nats, 99th percentile"),
    "kl_p999": Measure("<=", 0, math.inf, "nats, 99.9th percentile"),
    "kl_max": Measure("<=", 0, math.inf, "nats, the worst token"),
    "top1": Measure(">=", 0, 1, "share of tokens with the same first choice"),
    "perplexity_ratio": Measure("<=", 0, math.inf, "artifact's perplexity over the original's, on real text"),
    "max_error": Measure("<=", 0, math.inf, "largest absolute difference of an output"),
    "rel_l2": Measure("<=", 0, math.inf, "Euclidean norm of the difference over that of the original's outputs"),
    "cosine": Measure(">=", -1, 1, "mean cosine of hidden states, for encoders"),
}


@dataclass(frozen=True)
class Gate:
    """`value op threshold` has to hold for the measure of this name."""

    name: str
    op: str
    threshold: float


@dataclass(frozen=True)
class TaskGate:
    """A task metric (one of TASK_METRICS) on examples in a JSON lines file, at least `minimum`."""

    metric: str
    data: Path
    minimum: float


@dataclass(frozen=True)
class Gates:
    """All budgets of a recipe. Empty: no budget set, and the default gate of `tolerances.toml` holds."""

    measures: Mapping[str, Gate]
    task: TaskGate | None = None

    @property
    def has_budget(self) -> bool:
        """The recipe says what loss is acceptable."""
        return bool(self.measures) or self.task is not None


def parse_gates(data: Mapping[str, Any], resolve: Callable[[str], str] = str) -> Gates:
    """Check the recipe's `gates`.

    Args:
        data: the mapping as parsed from YAML.
        resolve: where a path of the recipe leads (relative paths start at the recipe's directory).

    Raises:
        UsageError: an unknown gate or task metric (the nearest are suggested), or a budget out of range.
    """
    measures = {}
    for name, budget in data.items():
        if name == "task":
            continue
        if name not in MEASURES:
            known = [*MEASURES, "task"]
            raise UsageError(f"gate {name!r} is unknown{did_you_mean(name, known)}", hint=f"known: {', '.join(known)}")
        measure = MEASURES[name]
        threshold = _number(name, budget)
        if not measure.low <= threshold <= measure.high:
            between = f"between {measure.low:g} and {measure.high:g}" if measure.high < math.inf else "zero or more"
            raise UsageError(f"gate {name} is {budget!r}; it is {measure.meaning}, so {between}")
        measures[name] = Gate(name, measure.op, threshold)
    return Gates(measures, _task(data["task"], resolve) if "task" in data else None)


def _task(data: Any, resolve: Callable[[str], str]) -> TaskGate:
    keys = ("metric", "data", "min")
    if not isinstance(data, Mapping) or not all(key in data for key in keys):
        raise UsageError(f"gate task is {data!r}; it needs metric, data and min")
    for key in data:
        if key not in keys:
            raise UsageError(f"gate task has an unknown key {key!r}{did_you_mean(str(key), keys)}")
    metric = str(data["metric"])
    if metric not in TASK_METRICS:
        raise UsageError(
            f"task metric {metric!r} is unknown{did_you_mean(metric, TASK_METRICS)}",
            hint=f"known: {', '.join(TASK_METRICS)}",
        )
    path = Path(resolve(str(data["data"])))
    if not path.is_file():
        raise UsageError(f"the task's data file {data['data']!r} does not exist")
    return TaskGate(metric, path, _number("task min", data["min"]))


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"gate {name} is {value!r}; it needs a finite number")
    return float(value)
