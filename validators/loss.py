"""How far an artifact is from the original, and whether the recipe's budgets allow it.

Perplexity is judged on text that somebody else wrote: on its own text a model is unfairly good. KL divergence and
top-1 agreement compare distributions position by position and hold on any text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tightship.report import Check, judge, not_run
from tightship.validators.gates import Gates
from tightship.validators.metrics import HiddenMetrics, LogitMeter, LogitMetrics, compare_hidden
from tightship.validators.text import TextWindows
from tightship.validators.tolerances import tolerances

NO_BUDGET = "no budget set"
_LOGIT_MEASURES = (
    *("kl_mean", "kl_p99", "kl_p999", "kl_max", "top1", "perplexity_ratio"),
    *("max_error", "mean_error", "rel_l2"),
)
_HIDDEN_MEASURES = ("cosine", "max_error", "rel_l2")
_EXTRA = {
    "kl_mean": ("kl_error", "kl_median", "positions", "kl_by_position"),
    "top1": ("top1_error", "near_ties"),
    "perplexity_ratio": ("perplexity_ratio_error", "perplexity_reference", "perplexity_candidate"),
    "cosine": ("cosine_min", "sentence_cosine_min", "positions"),
}

Outputs = Mapping[str, np.ndarray]


def loss_metrics(reference: Outputs, artifact: Outputs, windows: TextWindows) -> LogitMetrics | HiddenMetrics | None:
    """Compare the outputs that both have: logits if possible, hidden states else; None if there is nothing in common.

    Args:
        reference, artifact: `logits` (n, length, vocabulary), or (n, labels) of a classifier, and/or
            `last_hidden_state` (n, length, hidden), float32.

    Raises:
        ValueError: outputs of one name have different shapes.
    """
    if "logits" in reference and "logits" in artifact:
        meter = LogitMeter()
        if reference["logits"].ndim == 2:
            meter.add(reference["logits"], artifact["logits"])
            return meter.result()
        if reference["logits"].shape != artifact["logits"].shape:
            raise ValueError(f"logits are {artifact['logits'].shape}, the original's {reference['logits'].shape}")
        for row, kept in enumerate(windows.scored):
            meter.add(reference["logits"][row, kept], artifact["logits"][row, kept], windows.targets[row, kept])
        return meter.result()
    if "last_hidden_state" in reference and "last_hidden_state" in artifact:
        return compare_hidden(reference["last_hidden_state"], artifact["last_hidden_state"], windows.mask)
    return None


def loss_checks(  # noqa: PLR0917 - the order is that of the other checks: two sides, the text, the budgets, the place
    reference: Outputs, artifact: Outputs, windows: TextWindows, gates: Gates, target: str, runtime: str
) -> list[Check]:
    """Checks of kind `loss` for one artifact in one runtime.

    Every measure that these outputs allow is in the list: judged where the recipe sets a budget, else reported. Without
    any budget the default gate of `tolerances.toml` is judged, with "no budget set" as its source. NaN or Inf anywhere
    fails. A budget that these outputs cannot judge gives no check here; see `unjudged`.

    Args:
        reference, artifact: see `loss_metrics`.
    """
    place: dict[str, Any] = {"target": target, "runtime": runtime, "kind": "loss"}
    try:
        metrics = loss_metrics(reference, artifact, windows)
    except ValueError as error:
        return [judge(**place, metric="shape", value=None, reason=str(error))]
    if metrics is None:
        return [
            not_run(**place, metric="outputs", reason=f"{runtime} gives {sorted(artifact)}, not {sorted(reference)}")
        ]
    figures = metrics.figures()
    logits = isinstance(metrics, LogitMetrics)
    if isinstance(metrics, LogitMetrics):
        figures["kl_by_position"] = mean_by_position(metrics.kl, windows.scored)
    measures = [name for name in (_LOGIT_MEASURES if logits else _HIDDEN_MEASURES) if _judgeable(name, windows)]
    finite = judge(**place, metric="non_finite", value=metrics.non_finite, op="<=", threshold=0)
    return [finite, *(_check(name, figures, gates, windows, place) for name in measures)]


def mean_by_position(values: np.ndarray, scored: np.ndarray) -> list[float]:
    """Mean over windows at each position that was scored in any, five significant digits.

    Args:
        values: one number a scored position, window after window.
        scored: (n, length) bool. Where the values are not of these positions (a classifier) there is no such mean.
    """
    if len(values) != int(scored.sum()):
        return []
    places = np.nonzero(scored)[1]
    sums, counts = np.bincount(places, values), np.bincount(places)
    return [float(f"{total / count:.5g}") for total, count in zip(sums, counts, strict=True) if count]


def _judgeable(name: str, windows: TextWindows) -> bool:
    return name != "perplexity_ratio" or (windows.has_real_text and bool((windows.targets >= 0).any()))


def _check(
    name: str, figures: Mapping[str, Any], gates: Gates, windows: TextWindows, place: Mapping[str, Any]
) -> Check:
    known = (key for key in _EXTRA.get(name, ()) if key in figures)
    extra = {key: figures[key] for key in known} | {"text": windows.origin}
    gate = gates.measures.get(name)
    bound: dict[str, Any] = {"op": "report"}
    if gate is not None:
        bound = {"op": gate.op, "threshold": gate.threshold, "source": "recipe"}
    elif name in tolerances().loss and not gates.has_budget:
        default = tolerances().loss[name]
        bound = {"op": default.op, "threshold": default.threshold, "source": NO_BUDGET}
    return judge(**place, metric=name, value=figures[name], **bound, extra=extra)


def unjudged(checks: Iterable[Check], gates: Gates, windows: TextWindows, target: str) -> list[Check]:
    """A `not_run` check for each budget of the recipe that none of a target's checks judged, task included."""
    judged = {check.metric for check in checks if check.kind == "loss" and check.threshold_source == "recipe"}
    found = []
    for name in (*gates.measures, *([gates.task.metric] if gates.task else [])):
        if name in judged:
            continue
        reason = f"no runtime of this target gave what {name} needs"
        if name == "perplexity_ratio" and not windows.has_real_text:
            reason = f"perplexity needs text that the model did not write, and this is {windows.note}: give --text FILE"
        found.append(not_run(target=target, runtime="none", kind="loss", metric=name, reason=reason))
    return found
