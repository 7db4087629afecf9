"""`report.md` and the lines of the console, from the JSON of a report. Verdict first, then why, then the figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tightship.validators.layer_figures import layer_grids
from tightship.validators.layer_figures import picture as layers_picture
from tightship.validators.plots import positions_plot

Json = Mapping[str, Any]

_WORDS = {"pass": "pass", "fail": "**FAIL**", "not_run": "**not run**"}
_QUESTIONS = {
    "structure": "Is everything there, and nothing else?",
    "values": "Do the files hold the compressed checkpoint's numbers, decoded by others?",
    "tokenizer": "Is text cut into the same ids?",
    "graph": "Does the artifact compute what the compressed checkpoint computes (exact arithmetic asked for)?",
    "runtime": "How far does the runtime's own arithmetic take it from there?",
    "loss": "How far is the artifact from the original?",
}
_BAR = 24
KL_PICTURE, LAYERS_PICTURE = "report.svg", "report-layers.svg"


def render(report: Json) -> str:
    """Markdown of a report, ending in a newline."""
    parts = [_headline(report), *_failures(report), *_warnings(report), _targets(report), *_integers(report)]
    if _kl_by_position(report):
        parts.append(f"![KL divergence by position]({KL_PICTURE})")
    for grid in layer_grids(report):
        head, rows = grid.table()
        note = "Sparsity of each matrix, and what it lost on the calibration inputs as a share of its outputs' energy."
        parts += [f"## Pruned by {grid.title}", note, _table(head, rows, right=set(range(1, len(head))))]
    if layer_grids(report):
        parts.append(f"![Sparsity and loss of each matrix]({LAYERS_PICTURE})")
    for target in report["targets"]:
        parts += _target(target)
    parts += [*_stages(report), *_environment(report)]
    return "\n\n".join(parts) + "\n"


def summary(report: Json) -> list[str]:
    """A few lines for people at a terminal: one a target, one a failure."""
    lines = []
    for target in report["targets"]:
        failed = [c for c in target["checks"] if c["verdict"] != "pass"]
        state = "proven" if not failed else f"{len(failed)} of {len(target['checks'])} checks did not pass"
        figures = _figures_of(target)
        size = f"{_size(target['bytes'])}, {target['bits_per_weight']:.2f} bits a weight"
        said = ", ".join(f"{k} {v}" for k, v in figures.items() if v)
        lines.append("; ".join(filter(None, (f"{target['id']}: {state}", size, said))))
        lines += [f"  {check['id']}: {check.get('reason', check['verdict'])}" for check in failed]
    return lines


def _headline(report: Json) -> str:
    counts = _counts([c for t in report["targets"] for c in t["checks"]])
    verdict = "passed" if report["verdict"] == "pass" else "FAILED: nothing was published"
    said = ", ".join(f"{n} {word}" for word, n in counts.items() if n)
    accepted = report.get("accepted_unproven") or []
    note = f" Accepted without proof: {', '.join(accepted)}." if accepted else ""
    return f"# The proof {verdict}\n\n{len(report['targets'])} artifacts, {said}.{note}"


def _warnings(report: Json) -> list[str]:
    """What the plan found to speak against taking weights from this model."""
    lines = [f"- {_cell(text)}" for text in report.get("warnings", ())]
    return ["## Before you rely on it", "\n".join(lines)] if lines else []


def _failures(report: Json) -> list[str]:
    checks = [c for t in report["targets"] for c in t["checks"] if c["verdict"] != "pass"]
    if not checks:
        return []
    lines = []
    for check in checks:
        tensor = f" (tensor `{check['tensor']}`)" if check.get("tensor") else ""
        lines.append(f"- {_WORDS[check['verdict']]} `{check['id']}`{tensor}: {_cell(check.get('reason', ''))}")
    return ["## What did not pass", "\n".join(lines)]


def _targets(report: Json) -> str:
    largest = max((t["bytes"] for t in report["targets"]), default=1)
    rows = []
    for target in report["targets"]:
        bad = [c for c in target["checks"] if c["verdict"] != "pass"]
        bar = "█" * max(1, round(_BAR * target["bytes"] / max(largest, 1)))
        figures = _figures_of(target)
        rows.append(
            [
                f"`{target['id']}`",
                "pass" if not bad else f"**{len(bad)} not passed**",
                _size(target["bytes"]),
                bar,
                f"{target['bits_per_weight']:.3f}",
                f"{100 * target['sparsity']:.1f} %",
                *figures.values(),
            ]
        )
    head = ["target", "verdict", "size", "", "bits/weight", "zeros", *_COLUMNS]
    note = (
        "Container, weights and runtime are relative errors of the outputs (L2): of the artifact against the "
        "compressed checkpoint with exact arithmetic, of the compressed checkpoint against the original, and of the "
        "runtime as shipped against the compressed checkpoint. KL (nats a token) and top-1 are the artifact as "
        "shipped against the original."
    )
    return "\n\n".join(["## Artifacts", _table(head, rows, right=set(range(2, len(head))) - {3}), note])


_COLUMNS = ("container", "weights", "runtime", "KL", "top-1")


def _figures_of(target: Json) -> dict[str, str]:
    """The three error budgets and the loss of an artifact, in words for a cell; empty where not measured."""
    checks = target["checks"]
    own = [c for c in checks if c["kind"] == "runtime" and c["metric"] == "rel_l2"]
    graph = [c["value"] for c in checks if c["kind"] == "graph" and c["metric"] == "rel_l2"]
    weights = [
        c["value"] for c in checks if c["kind"] == "loss" and c["runtime"] == "torch" and c["metric"] == "rel_l2"
    ]
    loss = {c["metric"]: c["value"] for c in checks if c["kind"] == "loss" and c["runtime"] != "torch" and "value" in c}
    top1, cosine = loss.get("top1"), loss.get("cosine")
    agreement = f"{100 * top1:.1f} %" if top1 is not None else f"cosine {cosine:.4f}" if cosine is not None else ""
    values = (
        _number(max(graph, default=None, key=_badness)),
        _number(weights[0] if weights else None),
        _number(own[0]["value"] if own else None),
        _number(loss.get("kl_mean")),
        agreement,
    )
    return dict(zip(_COLUMNS, values, strict=True))


def pictures(report: Json) -> dict[str, str]:
    """File name -> SVG of every picture that the report's Markdown shows."""
    drawn = {KL_PICTURE: _kl_picture(report), LAYERS_PICTURE: layers_picture(report)}
    return {name: svg for name, svg in drawn.items() if svg is not None}


def _kl_picture(report: Json) -> str | None:
    """KL divergence by position, a line an artifact; None where no artifact has logits."""
    series = _kl_by_position(report)
    title = "KL divergence of the artifact as shipped from the original"
    return positions_plot(title, series) if series else None


def _kl_by_position(report: Json) -> list[tuple[str, np.ndarray]]:
    series = []
    for target in report["targets"]:
        for check in target["checks"]:
            places = check.get("extra", {}).get("kl_by_position")
            if places and check["runtime"] != "torch":
                series.append((f"{target['id']} in {check['runtime']}", np.asarray(places)))
    return series


def _badness(value: float | None) -> float:
    return math.inf if value is None or math.isnan(value) else value


def _integers(report: Json) -> list[str]:
    """Which artifacts hold the same integers and scales."""
    groups: dict[str, list[str]] = {}
    for target in report["targets"]:
        for check in target["checks"]:
            if check["metric"] == "integers" and check["verdict"] == "pass":
                groups.setdefault(check["extra"]["sha256"], []).append(target["id"])
    lines = [
        f"- {', '.join(f'`{i}`' for i in ids)} hold the same integers and scales (sha256 `{digest[:16]}`)."
        for digest, ids in groups.items()
        if len(ids) > 1
    ]
    return ["\n".join(lines)] if lines else []


def _target(target: Json) -> list[str]:
    counts = _counts(target["checks"])
    said = ", ".join(f"{n} {word}" for word, n in counts.items() if n)
    lines = [
        f"## `{target['id']}`",
        f"{said}." + (f" Graph: {target['graph_source']}." if target["graph_source"] else "") + _text(target),
    ]
    for kind, question in _QUESTIONS.items():
        checks = [c for c in target["checks"] if c["kind"] == kind]
        if checks:
            rows = [
                [c["runtime"], _metric(c), _number(c.get("value")), _needs(c), _WORDS[c["verdict"]]] for c in checks
            ]
            table = _table(["runtime", "metric", "value", "needs", "verdict"], rows, right={2})
            lines += [f"**{kind}**: {question}", table]
    return lines


def _text(target: Json) -> str:
    """What outputs were compared on."""
    notes = (c["extra"]["text"] for c in target["checks"] if c["runtime"] == "torch" and "text" in c.get("extra", {}))
    note = next(notes, None)
    return f" Outputs were compared on {note}." if note else ""


def _metric(check: Json) -> str:
    tensor = f" of `{check['tensor']}`" if check.get("tensor") else ""
    return f"{check['metric']}{tensor}"


def _verdict(check: Json) -> str:
    return "-" if check["op"] == "report" and check["verdict"] == "pass" else _WORDS[check["verdict"]]


def _needs(check: Json) -> str:
    if check["op"] == "report":
        return "(reported)"
    return f"{check['op']} {check.get('threshold'):g} ({check['threshold_source']})"


def _stages(report: Json) -> list[str]:
    if not report.get("stages"):
        return []
    lines = [
        f"- `{s['id']}`: {s['use']}, {s['state']}; figures of {len(s['figures'])} tensors" for s in report["stages"]
    ]
    return ["## Passes", "\n".join(lines)]


def _environment(report: Json) -> list[str]:
    lines = [f"- {key}: {_inline(value)}" for key, value in sorted(report.get("environment", {}).items())]
    return ["## Environment", "\n".join(lines)] if lines else []


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_inline(v)}" for k, v in value.items() if k != "id")
    if isinstance(value, list | tuple):
        return ", ".join(_inline(v) for v in value)
    return _cell(str(value))


def _counts(checks: Sequence[Json]) -> dict[str, int]:
    words = {"pass": "checks passed", "fail": "failed", "not_run": "not run"}
    return {word: sum(c["verdict"] == verdict for c in checks) for verdict, word in words.items()}


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and abs(value) < 1e9):
        return str(int(value))
    return f"{value:.3g}" if abs(value) < 0.01 else f"{value:.4f}"


def _size(count: int) -> str:
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{count} B" if unit == "B" else f"{value:.2f} {unit}"


def _cell(text: str) -> str:
    """One line without the marks that would end a table cell."""
    return " ".join(text.split()).replace("|", "\\|")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], right: set[int]) -> str:
    cells = [[_cell(text) for text in row] for row in (head, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        padded = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (w + 1) + ":" if i in right else "-" * (w + 2) for i, w in enumerate(widths))
    return "\n".join([line(cells[0]), f"|{rule}|", *map(line, cells[1:])])
