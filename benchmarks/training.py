"""What low rank, recovery and distillation come to on a real checkpoint: held-out perplexity, row by row.

    python benchmarks/training.py PART [CHECKPOINT] --calibration FILE --text FILE [--tokens N] [--out DIR]

PART is `low-rank`, `recovery` or `distill`. All rows of a part start from the same checkpoint, train on the same text
with the same number of tokens and are measured on the same windows of a text that no row was trained on.

- low-rank: SVD, ASVD and SVD-LLM, with 20 % and 40 % of the parameters of each matrix of the blocks removed.
- recovery: how much of the perplexity that pruning cost each method returns: (pruned - recovered) / (pruned - dense).
- distill: a student of every other layer without a teacher, the learning rate tuned for it on a held-out part of the
  training text; then, at that rate, with its teacher, three seeds each; then with features, and through an assistant.

Writes training-PART-NAME.json and .md, rewritten after every row.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.passes import pass_for
from tightship.passes.base import Run
from tightship.texts import read_documents, token_windows

Step = tuple[str, dict[str, Any]]
SPARSE: dict[str, Step] = {
    "70 % magnitude": ("prune", {"method": "magnitude", "sparsity": 0.7}),
    "70 % sparsegpt": ("prune", {"method": "sparsegpt", "sparsity": 0.7}),
    "25 % of the FFN channels": ("prune-structured", {"ffn": 0.25}),
}
RATES = [1e-3, 3e-3]
SEEDS = [0, 1, 2]
RECOVERIES = [
    {"method": "full", "rate": 5e-4},
    {"method": "lora", "rate": 2e-3, "rank": 16},
    {"method": "norms", "rate": 5e-3},
    {"method": "blockwise", "rate": 5e-4},
]


@dataclass
class Bench:
    """One checkpoint, its training text and the windows it is measured on."""

    checkpoint: Checkpoint
    run: Run
    test: tuple[np.ndarray, ...]
    tokens: int
    results: dict[str, Checkpoint] = field(default_factory=dict)

    def apply(self, checkpoint: Checkpoint, step: Step, **inputs: Any) -> Checkpoint:
        """One pass of a recipe, checked as the pipeline does."""
        use, options = step
        work = pass_for(use, options)
        work.requires(checkpoint)
        after = work.apply(checkpoint, replace(self.run, inputs=inputs))
        work.ensures(checkpoint, after)
        return after

    def perplexity(self, checkpoint: Checkpoint) -> float:
        """exp of the mean cross-entropy of the next token."""
        view, total, count = ModelView(checkpoint, threads=self.run.threads), 0.0, 0
        for window in self.test:
            logits = view.outputs(window[None])["logits"][0, :-1].astype(np.float64)
            logits -= logits.max(axis=1, keepdims=True)
            chosen = logits[np.arange(len(logits)), window[1:]]
            total += float((np.log(np.exp(logits).sum(axis=1)) - chosen).sum())
            count += len(logits)
        return float(np.exp(total / count))

    def low_rank(self) -> Iterator[dict[str, Any]]:
        yield {"what": "dense", "how": "", "perplexity": self.perplexity(self.checkpoint)}
        for keep in (0.8, 0.6):
            for method in ("svd", "asvd", "svd-llm"):
                result = self.apply(self.checkpoint, ("low-rank", {"method": method, "keep": keep, "dtype": "f32"}))
                yield {"what": f"-{1 - keep:.0%}", "how": method, "perplexity": self.perplexity(result)}

    def recovery(self) -> Iterator[dict[str, Any]]:
        dense = self.perplexity(self.checkpoint)
        yield {"what": "dense", "how": "", "perplexity": dense}
        for what, step in SPARSE.items():
            pruned = self.apply(self.checkpoint, step)
            lost = self.perplexity(pruned)
            yield {"what": what, "how": "pruned", "perplexity": lost, **zeros(pruned)}
            for options in RECOVERIES:
                inputs = {"teacher": self.checkpoint} if options["method"] == "blockwise" else {}
                began = time.monotonic()
                result = self.apply(pruned, ("recover", {**options, "tokens": self.tokens}), **inputs)
                found = self.perplexity(result)
                yield {
                    "what": what,
                    "how": f"{options['method']}, rate {options['rate']}",
                    "perplexity": found,
                    "returned": (lost - found) / (lost - dense),
                    **zeros(result),
                    "seconds": round(time.monotonic() - began),
                }

    def distill(self) -> Iterator[dict[str, Any]]:
        yield {"what": "teacher", "how": "", "perplexity": self.perplexity(self.checkpoint)}
        alone: dict[str, Any] = {"alpha": 0.0, "student": {"every": 2}, "written": self.tokens // 4}
        rates = {}
        for rate in RATES:
            _, figures = self._student({**alone, "rate": rate})
            rates[rate] = figures["held_out_after"]
            yield {"what": "tuning", "how": f"no teacher, rate {rate}", "held_out": rates[rate]}
        best = {**alone, "rate": min(rates, key=lambda rate: rates[rate])}
        taught = {**best, "alpha": 0.5, "temperature": 2.0}
        layers = int(self.checkpoint.hyper["layers"])
        middle = (layers + (layers + 1) // 2) // 2
        half = self.tokens // 2
        ways = {
            "no teacher": [best],
            "teacher": [taught],
            "teacher and hidden states": [{**taught, "features": {"hidden": 1.0}}],
            f"assistant of {middle} layers": [
                {**taught, "student": {"layers": even(middle, layers)}, "tokens": half, "written": 0},
                {**taught, "student": {"layers": even((layers + 1) // 2, middle)}, "tokens": half},
            ],
        }
        for how, chain in ways.items():
            for seed in SEEDS if how in ("no teacher", "teacher") else SEEDS[:1]:
                began = time.monotonic()
                student = self.checkpoint
                for options in chain:
                    student, figures = self._student(options, student, seed)
                yield {
                    "what": f"seed {seed}",
                    "how": f"{how}, rate {best['rate']}",
                    "perplexity": self.perplexity(student),
                    "parameters": figures["parameters"],
                    "seconds": round(time.monotonic() - began),
                }

    def _student(
        self, options: dict[str, Any], teacher: Checkpoint | None = None, seed: int = 0
    ) -> tuple[Checkpoint, dict[str, Any]]:
        """A student trained as the options say, and what the pass reported."""
        found: dict[str, Any] = {}
        work = pass_for("distill", {"tokens": self.tokens, **options})
        run = replace(self.run, seed=seed, report=found.__setitem__)
        return work.apply(teacher or self.checkpoint, run), found["student"]


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
    parser.add_argument("part", choices=["low-rank", "recovery", "distill"])
    parser.add_argument("checkpoint", nargs="?", default="examples/ember")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=65536, help="tokens each row trains on")
    parser.add_argument("--test-tokens", type=int, default=8192)
    parser.add_argument("--sequence", type=int, default=256, help="tokens of a test window")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def main() -> None:
    options = arguments()
    checkpoint = open_checkpoint(options.checkpoint)
    run = Run(threads=options.threads, texts=read_documents(options.calibration), tokens=16384, sequence=256)
    test = token_windows(
        checkpoint, read_documents(options.text), tokens=options.test_tokens, sequence=options.sequence
    )
    bench = Bench(checkpoint, run, test, options.tokens)
    settings = {
        "trained on": f"{options.calibration.name}, {options.tokens} tokens a row",
        "measured on": f"{options.text.name}, {sum(map(len, test))} tokens in windows of {options.sequence}",
    }
    report: dict[str, Any] = {"part": options.part, "checkpoint": checkpoint.name, "settings": settings, "rows": []}
    options.out.mkdir(parents=True, exist_ok=True)
    for row in getattr(bench, options.part.replace("-", "_"))():
        report["rows"].append(row)
        print(json.dumps(row), flush=True)
        name = f"training-{options.part}-{checkpoint.name}"
        (options.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.out / f"{name}.md").write_text(table(report))


if __name__ == "__main__":
    main()
