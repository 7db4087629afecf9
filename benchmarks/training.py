"""What low rank, recovery and distillation come to on a real checkpoint: held-out perplexity, row by row.

    python benchmarks/training.py PART [CHECKPOINT] --calibration FILE --text FILE [--tokens N] [--work DIR] [--out DIR]

PART is `low-rank`, `recovery`, `distill` or `logprobs`. All rows of a part start from the same checkpoint, train on the
same text (the first nine tenths of FILE; the last is the tuning slice) and are measured on the same windows of a text
that no row was trained on. Learning rates are chosen by what is lost on the tuning slice, never on the test.

- low-rank: SVD, ASVD and SVD-LLM, with 20 % and 40 % of the parameters of each matrix of the blocks removed; SVD-LLM
  also with as many removed of all matrices together, ranks shared out by loss.
- recovery: how much of the perplexity that pruning cost each method returns: (pruned - recovered) / (pruned - dense).
  `teacher`: `distill` with alpha 1 and the dense model as its teacher, under the mask or in the smaller shape;
  `teacher and its text`: of the tokens trained on, half are from text that the dense model wrote;
  `teacher and its states`: the hidden states of its blocks count as well.
- logprobs: how near the loss from stored log-probabilities comes to the live teacher's.
- distill: a student of every other layer without a teacher, the learning rate tuned for it on a held-out part of the
  training text; then, at that rate, with its teacher, three seeds each; then with features, and through an assistant.

Writes training-PART-NAME.json and .md after every row, and goes on where it was stopped: rows that are there are not
computed again, and training goes on from its last snapshot in `--work`. `--only TEXT` leaves out other rows.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tightship.checkpoint import Checkpoint
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.passes import pass_for
from tightship.passes.base import Run
from tightship.passes.student import make_student
from tightship.passes.teaching import soft_loss, stored_loss
from tightship.texts import read_documents, token_windows

Step = tuple[str, dict[str, Any]]
Made = tuple[Checkpoint, dict[str, Any]]
SPARSE: dict[str, Step] = {
    "70 % magnitude": ("prune", {"method": "magnitude", "sparsity": 0.7}),
    "70 % sparsegpt": ("prune", {"method": "sparsegpt", "sparsity": 0.7}),
    "25 % of the FFN channels": ("prune-structured", {"ffn": 0.25}),
}
LOW_RANKS: dict[str, dict[str, Any]] = {
    "svd": {"method": "svd"},
    "asvd": {"method": "asvd"},
    "svd-llm": {"method": "svd-llm"},
    "svd-llm, ranks by loss": {"method": "svd-llm", "by": "loss"},
}
RATES = [3e-4, 1e-3, 3e-3]
SEEDS = [0, 1, 2]
LIVE = {"batch": 4, "snapshot": 16, "held_out": 0.01}
RECOVERIES: list[tuple[str, dict[str, Any]]] = [
    ("teacher", {"rate": 1e-4, **LIVE}),
    ("teacher and its text", {"rate": 1e-4, **LIVE}),
    ("teacher and its states", {"rate": 1e-4, "features": {"hidden": 1.0}, **LIVE}),
    ("teacher", {"rate": 2e-4, **LIVE}),
    ("teacher", {"rate": 5e-4, **LIVE}),
    ("full", {"rate": 5e-4}),
    ("lora", {"rate": 2e-3, "rank": 16}),
    ("norms", {"rate": 5e-3}),
    ("blockwise", {"rate": 5e-4, "batch": 4}),
]
TAUGHT = {"teacher": 0, "teacher and its text": 1, "teacher and its states": 0}  # lengths of the training it writes
KEPT = [64, 128, 256]
Row = dict[str, Any]


@dataclass
class Rows:
    """The rows of one report. What is there already is not computed again."""

    report: dict[str, Any]
    path: Path
    only: str

    def add(self, what: str, how: str, make: Callable[[], Row], *, base: bool = False) -> Row:
        """The row of this name, made if it is not there and is wanted (`base`: always); empty if it is not wanted."""
        found = next((r for r in self.report["rows"] if (r["what"], r["how"]) == (what, how)), None)
        if found is None and (base or self.only in f"{what}, {how}"):
            found = {"what": what, "how": how, **make()}
            self.report["rows"].append(found)
            print(json.dumps(found), flush=True)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.with_suffix(".json").write_text(json.dumps(self.report, indent=1) + "\n")
            self.path.with_suffix(".md").write_text(table(self.report))
        return found or {}


@dataclass
class Bench:
    """One checkpoint, its training text and the windows it is measured on."""

    checkpoint: Checkpoint
    run: Run
    test: tuple[np.ndarray, ...]
    tuning: tuple[np.ndarray, ...]
    tokens: int
    rows: Rows
    work: Path | None

    def apply(self, checkpoint: Checkpoint, step: Step, label: str, seed: int = 0, **inputs: Any) -> Made:
        """One pass of a recipe, checked as the pipeline does; and what it reported. A kill leaves its snapshots."""
        use, options = step
        work, found = pass_for(use, options), {}
        scratch = None
        if self.work is not None:
            scratch = self.work / hashlib.sha256(json.dumps([label, step, seed]).encode()).hexdigest()[:16]
            scratch.mkdir(parents=True, exist_ok=True)
        run = replace(self.run, seed=seed, inputs=inputs, scratch=scratch, report=found.__setitem__)
        work.requires(checkpoint)
        after = work.apply(checkpoint, run)
        work.ensures(checkpoint, after)
        return after, found

    def measured(self, checkpoint: Checkpoint) -> Row:
        """Perplexity on the test and on the tuning slice."""
        found = {"perplexity": self.test, "tuning": self.tuning}
        return {key: perplexity(checkpoint, windows, self.run.threads) for key, windows in found.items()}

    def low_rank(self) -> None:
        self.rows.add("dense", "", lambda: self.measured(self.checkpoint))
        for keep in (0.8, 0.6):
            for how, method in LOW_RANKS.items():
                step: Step = ("low-rank", {**method, "keep": keep, "dtype": "f32"})
                make = functools.partial(self.apply, self.checkpoint, step, "low-rank")
                self.rows.add(f"-{1 - keep:.0%}", how, lambda make=make: self.measured(make()[0]))

    def recovery(self) -> None:
        dense = self.rows.add("dense", "", lambda: self.measured(self.checkpoint), base=True)
        for what, step in SPARSE.items():
            names = [f"{method}, rate {options['rate']}, {self.tokens} tokens" for method, options in RECOVERIES]
            if not any(self.rows.only in f"{what}, {name}" for name in names):
                continue
            pruned = functools.cache(lambda step=step: self.apply(self.checkpoint, step, "prune")[0])
            lost = self.rows.add(
                what, "pruned", lambda pruned=pruned: {**self.measured(pruned()), **zeros(pruned())}, base=True
            )
            for name, recovery in zip(names, RECOVERIES, strict=True):
                make = functools.partial(self._recovered, pruned, what, recovery, (dense, lost))
                self.rows.add(what, name, make)

    def _recovered(
        self, pruned: Callable[[], Checkpoint], what: str, recovery: tuple[str, Row], limits: tuple[Row, Row]
    ) -> Row:
        """A row of a recovery; `limits` are those of the dense and of the pruned model."""
        method, said = recovery[0], {**recovery[1], "tokens": self.tokens}
        step: Step = ("recover", {**said, "method": method})
        if method in TAUGHT:
            step = ("distill", {"alpha": 1.0, "temperature": 1.0, "written": TAUGHT[method] * self.tokens, **said})
        inputs = {"teacher": self.checkpoint} if method in (*TAUGHT, "blockwise") else {}
        result, _ = self.apply(pruned(), step, what, **inputs)
        found = self.measured(result)
        dense, lost = (row["perplexity"] for row in limits)
        return {**found, "returned": (lost - found["perplexity"]) / (lost - dense), **zeros(result)}

    def distill(self) -> None:
        self.rows.add("teacher", "", lambda: self.measured(self.checkpoint), base=True)
        alone: Row = {"alpha": 0.0, "student": {"every": 2}, "written": self.tokens // 4}
        lost = {}
        for rate in RATES:
            make = functools.partial(self._student, [{**alone, "rate": rate}], 0)
            lost[rate] = self.rows.add("seed 0", f"no teacher, rate {rate}", make).get("tuning", np.inf)
        best = {**alone, "rate": min(lost, key=lambda rate: lost[rate])}
        for how, chain in self._ways(best).items():
            for seed in SEEDS if how in ("no teacher", "teacher") else SEEDS[:1]:
                make = functools.partial(self._student, chain, seed)
                self.rows.add(f"seed {seed}", f"{how}, rate {best['rate']}", make)

    def _ways(self, best: Row) -> dict[str, list[Row]]:
        """Options of the passes that make each kind of student."""
        taught = {**best, "alpha": 0.5, "temperature": 2.0}
        layers = int(self.checkpoint.hyper["layers"])
        middle, half = (layers + (layers + 1) // 2) // 2, self.tokens // 2
        return {
            "no teacher": [best],
            "teacher": [taught],
            "teacher and hidden states": [{**taught, "features": {"hidden": 1.0}}],
            f"assistant of {middle} layers": [
                {**taught, "student": {"layers": even(middle, layers)}, "tokens": half, "written": 0},
                {**taught, "student": {"layers": even((layers + 1) // 2, middle)}, "tokens": half},
            ],
        }

    def _student(self, chain: list[Row], seed: int) -> Row:
        """A student trained by one pass after the other, each from the last one's result."""
        began, student, found = time.monotonic(), self.checkpoint, {}
        for options in chain:
            student, found = self.apply(student, ("distill", {"tokens": self.tokens, **options}), "distill", seed)
        parameters = found["student"]["parameters"]
        return {**self.measured(student), "parameters": parameters, "seconds": round(time.monotonic() - began)}

    def logprobs(self) -> None:
        student = make_student({"every": 2}, self.checkpoint, 0)
        views = [ModelView(c, threads=self.run.threads) for c in (student, self.checkpoint)]
        ours, theirs = (np.concatenate([v.outputs(w[None])["logits"][0] for w in self.test]) for v in views)
        for temperature in (1.0, 2.0):
            live = float(soft_loss(torch.from_numpy(ours), torch.from_numpy(theirs), temperature))
            likeliest = torch.log_softmax(torch.from_numpy(theirs) / temperature, dim=-1)
            for kept in KEPT:
                top = likeliest.topk(kept, dim=-1)
                stored = float(stored_loss(torch.from_numpy(ours), top.indices, top.values, temperature))
                share = float(top.values.exp().sum(dim=-1).mean())
                row = {"live": live, "stored": stored, "of the live loss": stored / live, "probability kept": share}
                self.rows.add(f"T = {temperature:g}", f"{kept} tokens kept", lambda row=row: row)


def perplexity(checkpoint: Checkpoint, windows: Sequence[np.ndarray], threads: int) -> float:
    """exp of the mean cross-entropy of the next token."""
    view, total, count = ModelView(checkpoint, threads=threads), 0.0, 0
    for window in windows:
        logits = view.outputs(window[None])["logits"][0, :-1].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        chosen = logits[np.arange(len(logits)), window[1:]]
        total += float((np.log(np.exp(logits).sum(axis=1)) - chosen).sum())
        count += len(logits)
    return float(np.exp(total / count))


def even(count: int, layers: int) -> list[int]:
    """So many of the layers, evenly spread, the first among them."""
    return [number * layers // count for number in range(count)]


def zeros(checkpoint: Checkpoint) -> dict[str, int]:
    """Zeros in the matrices of the blocks."""
    return {"zeros": sum(int((checkpoint.resolve(i.name).value() == 0).sum()) for i in checkpoint.linears())}


def table(report: dict[str, Any]) -> str:
    """The rows as Markdown."""
    heads = list(dict.fromkeys(key for row in report["rows"] for key in row))
    lines = [f"# {report['part']} on {report['checkpoint']}", ""]
    lines += [f"- {key}: {value}" for key, value in report["settings"].items()]
    lines += ["", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in report["rows"]:
        cells = [row.get(head, "") for head in heads]
        lines.append("| " + " | ".join(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells) + " |")
    return "\n".join(lines) + "\n"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("part", choices=["low-rank", "recovery", "distill", "logprobs"])
    parser.add_argument("checkpoint", nargs="?", default="examples/ember")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=65536, help="tokens each row trains on")
    parser.add_argument("--test-tokens", type=int, default=8192)
    parser.add_argument("--sequence", type=int, default=256, help="tokens of a test window")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="part of the names of the rows to make")
    parser.add_argument("--work", type=Path, help="snapshots, so that a row that was killed goes on")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def main() -> None:
    options = arguments()
    checkpoint = open_checkpoint(options.checkpoint)
    text = "\n".join(read_documents(options.calibration))
    cut = len(text) * 9 // 10
    run = Run(threads=options.threads, texts=(text[:cut],), tokens=16384, sequence=256)
    windows = functools.partial(token_windows, checkpoint, tokens=options.test_tokens, sequence=options.sequence)
    test, tuning = windows(read_documents(options.text)), windows((text[cut:],))
    settings = {
        "trained on": f"the first nine tenths of {options.calibration.name}",
        "tuning": f"the rest of {options.calibration.name}, {sum(map(len, tuning))} tokens",
        "measured on": f"{options.text.name}, {sum(map(len, test))} tokens in windows of {options.sequence}",
    }
    if options.part == "low-rank":
        settings["trained on"] += f", {run.tokens} tokens"
    if options.part == "distill":
        settings["tokens"] = f"{options.tokens} a student, a fifth of them written by the teacher"
    path = options.out / f"training-{options.part}-{checkpoint.name}"
    report: dict[str, Any] = {"part": options.part, "checkpoint": checkpoint.name, "settings": settings, "rows": []}
    if path.with_suffix(".json").is_file():
        report["rows"] = json.loads(path.with_suffix(".json").read_text())["rows"]
    bench = Bench(checkpoint, run, test, tuning, options.tokens, Rows(report, path, options.only), options.work)
    getattr(bench, options.part.replace("-", "_"))()


if __name__ == "__main__":
    main()
