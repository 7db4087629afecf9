"""Test perplexity of a checkpoint pruned by every method and schedule, and with int4 on top.

    python benchmarks/sparsity.py CHECKPOINT --calibration FILE --test FILE [--subsets 3] [--out benchmarks/results]

The calibration text is cut into as many parts as there are subsets, and one more: the tuning slice, which chooses among
the schedules; the test text decides nothing. Options of the schedules are their defaults. Every pruned model is then
rounded to int4 (group 32, to nearest); the joint sweep prunes and rounds at once. Confidence intervals are 95 %
bootstrap intervals over test windows of the mean difference to uniform SparseGPT, paired by window and averaged over
the subsets before resampling.

With `--scopes`: Wanda and SparseGPT as they are, and with one threshold for all matrices (scope `global`).

Writes sparsity-NAME.json and .md (with `--scopes`: sparsity-scopes-NAME), rewritten after every row; rows that are
there already are not computed again, so that `--minutes`, after which no new row is begun, cuts a long table into short
runs.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.passes import pass_for
from tightship.passes.base import Pass, Run
from tightship.texts import read_documents, token_windows

LEVELS = ["50 %", "60 %", "70 %", "80 %", "2:4"]
SCHEDULES: dict[str, dict[str, Any]] = {
    "uniform": {},
    "owl": {"schedule": "owl"},
    "log-kmeans, absolute": {"schedule": "log-kmeans", "score": "absolute", "spread": 0.06},
    "log-kmeans": {"schedule": "log-kmeans"},
    "water-fill": {"schedule": "water-fill"},
    "search": {"schedule": "search"},
}
PUBLISHED = {  # WikiText-2 perplexity of the scheduler and of SparseGPT at 70 % and more, arXiv:2409.20094
    "OPT-125M": (113.39, 232.20),
    "OPT-6.7B": (19.73, 20.55),
    "OPT-30B": (12.98, 13.32),
    "OPT-66B": (11.65, 12.44),
    "BLOOM-176B": (11.02, 11.30),
}
Row = dict[str, Any]


@dataclass
class Bench:
    """One checkpoint, its texts cut into parts, and the rows so far."""

    checkpoint: Checkpoint
    run: Run
    parts: list[str]
    windows: dict[str, np.ndarray]
    trials: int
    save: Any
    report: dict[str, Any]
    deadline: float = math.inf
    surveys: dict[Any, str] = field(default_factory=dict)

    def row(self, subset: int, level: str, how: str, make: Any) -> Row:
        """A row, computed unless it is there."""
        key = {"subset": subset, "level": level, "how": how}
        for row in self.report["rows"]:
            if {k: row[k] for k in key} == key:
                return row
        started = time.monotonic()
        if started > self.deadline:
            raise SystemExit("time is up; the next run continues here")
        row = {**key, **self.measure(make()), "seconds": round(time.monotonic() - started, 1)}
        self.report["rows"].append(row)
        self.save(self.report)
        print(json.dumps({k: v for k, v in row.items() if k != "nll"}), flush=True)
        return row

    def measure(self, result: Checkpoint) -> Row:
        """Counted sparsity, perplexity on test and tuning slice, and the test loss of every window."""
        matrices = [result.resolve(info.name).value() for info in result.linears()]
        zeros = sum(int((w == 0).sum()) for w in matrices)
        nll = {name: window_losses(result, windows, self.run.threads) for name, windows in self.windows.items()}
        return {
            "sparsity": round(zeros / sum(w.size for w in matrices), 6),
            "perplexity": round(float(np.exp(nll["test"].mean())), 3),
            "tuning": round(float(np.exp(nll["tuning"].mean())), 3),
            "nll": [round(float(v), 5) for v in nll["test"]],
        }

    def prune(self, subset: int, use: str, options: dict[str, Any]) -> Checkpoint:
        """Apply a pruning pass; schedules that want the same survey share it."""
        survey = (subset, options.get("sparsity"), "kl" if options.get("score") is None else options["score"])
        survey = (*survey, options.get("schedule") == "owl")
        step = pass_for(use, options)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "survey.json"
            if survey in self.surveys:
                file.write_text(self.surveys[survey])
            result = step.apply(self.checkpoint, replace(self.run, texts=(self.parts[subset],), scratch=folder))
            if file.exists():
                self.surveys[survey] = file.read_text()
            # Stored matrices lie in the folder that is about to go.
            return pinned(result)

    def options(self, level: str, schedule: str) -> dict[str, Any]:
        """Of SparseGPT with a schedule."""
        chosen = {"method": "sparsegpt", **amount(level), **SCHEDULES[schedule]}
        return {**chosen, "trials": self.trials} if schedule == "search" else chosen


def amount(level: str) -> dict[str, Any]:
    """`70 %` or `2:4` as options."""
    return {"pattern": level} if ":" in level else {"sparsity": float(level.removesuffix(" %")) / 100}


def pinned(checkpoint: Checkpoint) -> Checkpoint:
    """The same with its matrices in memory."""
    from tightship.weights import Dense, Quantized

    held: dict[str, Any] = {}
    for info in checkpoint.linears():
        weight = checkpoint.resolve(info.name)
        arrays = weight.read()  # type: ignore[union-attr]
        held[info.name] = Quantized.of(weight.layout, arrays) if isinstance(weight, Quantized) else Dense.of(arrays)
    return checkpoint.with_weights(held)


def window_losses(checkpoint: Checkpoint, windows: np.ndarray, threads: int) -> np.ndarray:
    """Mean next-token loss (nats) of every window (n, length); (n,) float64."""
    view = ModelView(checkpoint, threads=threads)
    found = []
    for start in range(0, len(windows), 8):
        ids = windows[start : start + 8]
        logits = view.outputs(ids)["logits"][:, :-1].astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        found.append(-np.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0].mean(axis=1))
    return np.concatenate(found)


def fill(bench: Bench, subsets: int, levels: list[str]) -> None:
    """Every row. The first subset sees all levels before the others begin, and they begin with the steepest."""
    quantize = pass_for("quantize", {"layout": "int4"})
    bench.row(-1, "dense", "dense", lambda: bench.checkpoint)
    bench.row(-1, "dense", "dense, int4", lambda: quantize.apply(bench.checkpoint, bench.run))
    places = [(0, level) for level in levels]
    places += [(subset, level) for level in reversed(levels) for subset in range(1, subsets)]
    for subset, level in places:
        for how, use, options in methods(bench, level):
            if how == "magnitude" and subset:
                continue  # needs no text
            made = functools.cache(functools.partial(bench.prune, subset, use, options))
            bench.row(subset, level, how, made)
            if use == "prune":
                bench.row(subset, level, f"{how}, int4", functools.partial(_rounded, quantize, made, bench.run))


def fill_scopes(bench: Bench, subsets: int, levels: list[str]) -> None:
    """What a weight is compared with: the method's own scope, or all weights of the model."""
    bench.row(-1, "dense", "dense", lambda: bench.checkpoint)
    for subset, level in ((s, level) for s in range(subsets) for level in levels if ":" not in level):
        for method in ("wanda", "sparsegpt"):
            options = {"method": method, **amount(level)}
            bench.row(subset, level, method, functools.partial(bench.prune, subset, "prune", options))
            options["scope"] = "global"
            bench.row(subset, level, f"{method}, global", functools.partial(bench.prune, subset, "prune", options))


def _rounded(quantize: Pass, made: Callable[[], Checkpoint], run: Run) -> Checkpoint:
    return quantize.apply(made(), run)


def methods(bench: Bench, level: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(name, pass, options) of every row at a level."""
    for method in ("magnitude", "wanda"):
        yield method, "prune", {"method": method, **amount(level)}
    for schedule in SCHEDULES if ":" not in level else ("uniform",):
        how = "sparsegpt" if schedule == "uniform" else f"sparsegpt, {schedule}"
        yield how, "prune", bench.options(level, schedule)
    yield "joint int4 sweep", "prune-quantize", {**bench.options(level, "uniform"), "layout": "int4"}


def table(report: dict[str, Any]) -> str:
    """The rows as Markdown: mean over subsets, spread over subsets, and the interval against uniform SparseGPT."""
    rows = report["rows"]
    lines = [f"# Sparsity on {report['checkpoint']}", "", *(f"- {k}: {v}" for k, v in report["settings"].items())]
    lines += [
        "",
        "Test perplexity, mean over calibration subsets (least to most); a cell without a range was measured on one.",
        "In brackets: 95 % interval of the difference in log perplexity to uniform SparseGPT (below: and int4).",
        "",
    ]
    for kind, title in (("", "Pruned"), (", int4", "Pruned, then int4 on top")):
        names = [h for h in dict.fromkeys(r["how"] for r in rows) if ("int4" in h) == bool(kind)]
        if not names:
            continue
        lines += [f"## {title}", "", "| | " + " | ".join(LEVELS) + " |", "|---|" + "---|" * len(LEVELS)]
        for how in names:
            cells = [_cell(rows, level, how, f"sparsegpt{kind}") for level in LEVELS]
            if how.startswith("dense"):
                cells[0] = f"{rows[[r['how'] for r in rows].index(how)]['perplexity']:.2f} (nothing pruned)"
            lines.append(f"| {how} | " + " | ".join(cells) + " |")
        lines.append("")
    if "scopes" in report["settings"]:
        return "\n".join(lines)
    lines += ["## Set beside the published figures", ""]
    lines += [_beside(rows, level) for level in ("70 %", "80 %")]
    lines += [f"- {name}, WikiText-2, 70 % and more: {a / b:.3f} ({a} / {b})" for name, (a, b) in PUBLISHED.items()]
    return "\n".join(lines) + "\n"


def _cell(rows: list[Row], level: str, how: str, base: str) -> str:
    found = [r for r in rows if r["level"] == level and r["how"] == how]
    if not found:
        return ""
    values = [r["perplexity"] for r in found]
    text = f"{np.mean(values):.2f}" + (f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else "")
    interval = against(rows, level, how, base)
    return text if interval is None else f"{text} [{interval[0]:+.3f}, {interval[1]:+.3f}]"


def against(rows: list[Row], level: str, how: str, base: str) -> tuple[float, float] | None:
    """95 % bootstrap interval of the mean loss difference, windows resampled; None where there is nothing to pair."""
    difference = differences(rows, level, how, base)
    if how == base or not len(difference):
        return None
    picks = np.random.default_rng(0).integers(0, len(difference), (10000, len(difference)))
    low, high = np.quantile(difference[picks].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def differences(rows: list[Row], level: str, how: str, base: str) -> np.ndarray:
    """Loss of `how` less loss of `base`, (windows,), mean over the subsets that have both."""
    mine, theirs = ({r["subset"]: r["nll"] for r in rows if (r["level"], r["how"]) == (level, h)} for h in (how, base))
    common = sorted(mine.keys() & theirs.keys())
    return np.mean([np.subtract(mine[s], theirs[s]) for s in common], axis=0) if common else np.empty(0)


def _beside(rows: list[Row], level: str) -> str:
    """Ratio of the schedule that is best on the tuning slice to uniform SparseGPT, on the test text."""
    here = [r for r in rows if r["level"] == level and r["how"].startswith("sparsegpt") and "int4" not in r["how"]]
    means = {h: np.mean([r["tuning"] for r in here if r["how"] == h]) for h in {r["how"] for r in here} - {"sparsegpt"}}
    if not means:
        return f"- {level}: not measured"
    best = min(means, key=lambda how: means[how])
    ratio = np.exp(np.mean(differences(rows, level, best, "sparsegpt")))
    low, high = against(rows, level, best, "sparsegpt") or (math.nan, math.nan)
    return (
        f"- here, {level}: {ratio:.3f} ({best}, chosen on the tuning slice; 95 % interval {np.exp(low):.3f} to "
        f"{np.exp(high):.3f})"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--subsets", type=int, default=3)
    parser.add_argument("--levels", nargs="*", default=LEVELS)
    parser.add_argument("--scopes", action="store_true", help="compare scopes instead")
    parser.add_argument("--tokens", type=int, default=4096, help="calibration tokens of a subset")
    parser.add_argument("--test-tokens", type=int, default=6144)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--trials", type=int, default=40, help="of the search")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no new row after so many")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def main() -> None:
    options = arguments()
    checkpoint = open_checkpoint(options.checkpoint)
    text = "\n".join(read_documents(options.calibration))
    size = -(-len(text) // (options.subsets + 1))
    parts = [text[start : start + size] for start in range(0, len(text), size)]
    windows = {
        "test": token_windows(
            checkpoint, read_documents(options.test), tokens=options.test_tokens, sequence=options.sequence
        ),
        "tuning": token_windows(checkpoint, parts[-1:], tokens=options.test_tokens // 2, sequence=options.sequence),
    }
    whole = {name: np.stack([w for w in found if len(w) == options.sequence]) for name, found in windows.items()}
    stem = options.out / f"sparsity-{'scopes-' if options.scopes else ''}{checkpoint.name}"
    settings = {
        "calibration": f"{options.calibration.name}, {options.subsets} parts, {options.tokens} tokens of each",
        "test": f"{options.test.name}, {whole['test'].size} tokens in windows of {options.sequence}",
        "tuning slice": f"the last part, {whole['tuning'].size} tokens",
        "search": f"{options.trials} trials",
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
    }
    if options.scopes:
        settings["scopes"] = "wanda's rows and sparsegpt's runs of columns, against all matrices together (global)"
    report: dict[str, Any] = {"checkpoint": checkpoint.name, "settings": settings, "rows": []}
    known = stem.with_suffix(".json")
    if known.exists() and json.loads(known.read_text())["settings"] == settings:
        report = json.loads(known.read_text())

    def save(report: dict[str, Any]) -> None:
        known.write_text(json.dumps(report) + "\n")
        stem.with_suffix(".md").write_text(table(report))

    options.out.mkdir(parents=True, exist_ok=True)
    run = Run(threads=options.threads, tokens=options.tokens, sequence=options.sequence)
    deadline = time.monotonic() + 60 * options.minutes
    bench = Bench(checkpoint, run, parts, whole, options.trials, save, report, deadline)
    (fill_scopes if options.scopes else fill)(bench, options.subsets, options.levels)


if __name__ == "__main__":
    main()
