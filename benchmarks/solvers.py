"""What each solver loses on a real checkpoint: quantizers at equal bits, pruning methods at equal sparsity.

    python benchmarks/solvers.py [CHECKPOINT] --calibration FILE [--text NAME=FILE ...]
        [--layouts int4-asym ...] [--sparsities 0.5 ...] [--out benchmarks/results]

Every row compresses the linears of the blocks of the same checkpoint with the same calibration windows and is compared
with the original on the same test windows: KL divergence from the original with its standard error, share of equal top
tokens, perplexity ratio. Plain rounding and importance search of q2_k to q6_k are llama.cpp's searches bit for bit, so
those rows stand for its quantizer without and with an importance matrix.

Without --calibration the model writes its own text; without --text so does the test, and perplexity is then flattered.
Writes solvers-NAME.json and solvers-NAME.md, rewritten after every row.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.formats.layouts import parse_layout
from tightship.formats.packings.ggml import ggml_type_for, row_bytes
from tightship.layout import Layout
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.passes.base import Pass, Run
from tightship.passes.prune import Prune
from tightship.passes.quantize import Quantize
from tightship.texts import generated_windows, read_documents, token_windows
from tightship.validators.metrics import LogitMeter

LAYOUTS = ["int4-asym", "int3-asym", "int2-asym", "q4_k", "q3_k", "q2_k"]
SPARSITIES = [0.5, 0.6, 0.7, 0.8]
PRUNERS: list[dict[str, Any]] = [
    {"method": "magnitude"},
    {"method": "wanda"},
    {"method": "sparsegpt"},
    {"method": "sparsegpt", "schedule": "owl"},
    {"method": "sparsegpt", "schedule": "log-kmeans", "score": "absolute", "spread": 0.06},
    {"method": "sparsegpt", "schedule": "log-kmeans", "spread": 0.06},
    {"method": "sparsegpt", "schedule": "log-kmeans", "spread": 0.1},
    {"method": "sparsegpt", "schedule": "water-fill"},
]
_CHUNK = 8


@dataclass
class Bench:
    """One checkpoint with its texts; `tests` maps a text's name to windows (n, length) int64."""

    checkpoint: Checkpoint
    run: Run
    tests: dict[str, np.ndarray]
    surveys: dict[Any, str] = field(default_factory=dict)

    def row(self, step: Pass, label: dict[str, Any]) -> dict[str, Any]:
        """Apply a pass and compare."""
        figures: dict[str, Any] = {}
        step.requires(self.checkpoint)
        with tempfile.TemporaryDirectory() as folder:
            run = Run(**{**vars(self.run), "report": figures.__setitem__, "scratch": folder})
            with self._shared_survey(step, Path(folder) / "survey.json"):
                result = step.apply(self.checkpoint, run)
            return self._row(step, result, figures, label)

    def _row(self, step: Pass, result: Checkpoint, figures: dict[str, Any], label: dict[str, Any]) -> dict[str, Any]:
        return {**label, **self._bits(step), **self._sparsity(result), **self._local(figures), **self.compare(result)}

    def compare(self, result: Checkpoint) -> dict[str, Any]:
        """Figures on every test text, a few windows at a time."""
        original, compressed = (ModelView(c, threads=self.run.threads) for c in (self.checkpoint, result))
        found = {}
        for name, windows in self.tests.items():
            meter = LogitMeter()
            for start in range(0, len(windows), _CHUNK):
                ids = windows[start : start + _CHUNK]
                following = np.concatenate([ids[:, 1:], np.full((len(ids), 1), -1)], axis=1)
                meter.add(original.outputs(ids)["logits"], compressed.outputs(ids)["logits"], following)
            all_figures = meter.result().figures()
            wanted = ("kl_mean", "kl_error", "top1", "perplexity_candidate", "perplexity_ratio")
            found[name] = {key: round(float(all_figures[key]), 6) for key in wanted}
        return {"texts": found}

    @contextmanager
    def _shared_survey(self, step: Pass, file: Path) -> Iterator[None]:
        """Schedules that want the same facts do not measure them twice."""
        key = None
        if isinstance(step, Prune):
            key = (step.method, step.sparsity, step.score or ("kl" if step.schedule != "owl" else None))
        if key in self.surveys:
            file.write_text(self.surveys[key])
        yield
        if file.exists():
            self.surveys[key] = file.read_text()

    def _bits(self, step: Pass) -> dict[str, float]:
        if not isinstance(step, Quantize):
            return {}
        layout = parse_layout(str(step.layout))
        return {"bits": round(bits(layout), 4)}

    def _sparsity(self, result: Checkpoint) -> dict[str, float]:
        matrices = [result.resolve(info.name).value() for info in result.linears()]
        return {"sparsity": sum(int((w == 0).sum()) for w in matrices) / sum(w.size for w in matrices)}

    def _local(self, figures: dict[str, Any]) -> dict[str, Any]:
        """Mean over matrices of the calibration loss against rounding's, where the solver says so."""
        ratios = [f["loss"] / f["loss_rtn"] for f in figures.values() if f.get("loss_rtn")]
        solvers = [f["solver"] for f in figures.values() if "solver" in f]
        kept = {word: solvers.count(word) for word in sorted(set(solvers))}
        return ({"loss_over_rtn": float(np.mean(ratios))} if ratios else {}) | ({"kept": kept} if kept else {})


def bits(layout: Layout) -> float:
    """Stored bits of a weight in GGUF where the layout has a type there, else codes and parameters as they are."""
    word = ggml_type_for(layout)
    if word is not None:
        return row_bytes(word, 256) * 8 / 256
    fields = layout.to_json()
    group = fields["group_size"] or 256
    return fields["bits"] + (16 + (0 if fields["symmetric"] else fields["bits"])) / group


def jobs(layouts: Sequence[str], sparsities: Sequence[float]) -> Iterator[tuple[Pass, dict[str, Any]]]:
    """Every row's pass and label."""
    for layout in layouts:
        for solver in ("rtn", "importance", "gptq"):
            yield Quantize(solver=solver, layout=layout), {"part": "quantize", "what": layout, "how": solver}
    for sparsity in sparsities:
        for options in PRUNERS:
            how = ", ".join(str(value) for value in options.values())
            yield Prune(sparsity=sparsity, **options), {"part": "prune", "what": f"{sparsity:.0%}", "how": how}
    if sparsities:
        for method in ("magnitude", "wanda", "sparsegpt"):
            yield Prune(method=method, pattern="2:4"), {"part": "prune", "what": "2:4", "how": method}


def table(report: dict[str, Any]) -> str:
    """The rows as Markdown, one table a part."""
    texts = list(report["tests"])
    head = ["what", "how", "bits", "loss / rtn", *(f"{t}: {c}" for t in texts for c in ("KL", "top-1", "ppl ratio"))]
    lines = [f"# Solvers on {report['checkpoint']}", "", __doc__.split("\n\n")[2].replace("\n", " "), ""]
    lines += [f"- {key}: {value}" for key, value in report["settings"].items()]
    for part in ("quantize", "prune"):
        lines += ["", f"## {part}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for row in (r for r in report["rows"] if r["part"] == part):
            cells = [row["what"], row["how"], f"{row['bits']:.3g}" if "bits" in row else ""]
            cells.append(f"{row['loss_over_rtn']:.3f}" if "loss_over_rtn" in row else "")
            for found in row["texts"].values():
                kl = f"{found['kl_mean']:.5f} ± {found['kl_error']:.5f}"
                cells += [kl, f"{found['top1']:.3f}", f"{found['perplexity_ratio']:.4f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("checkpoint", nargs="?", default="examples/ember")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--tokens", type=int, default=32768, help="calibration tokens")
    parser.add_argument("--test-tokens", type=int, default=16384, help="tokens of each test text")
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--layouts", nargs="*", default=LAYOUTS)
    parser.add_argument("--sparsities", nargs="*", type=float, default=SPARSITIES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def tests(options: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Whole windows of every test text."""
    size = {"tokens": options.test_tokens, "sequence": options.sequence}
    if not options.text:
        made = generated_windows(ModelView(checkpoint, threads=options.threads), seed=1, **size)
        return {"self": np.stack(made)}
    found = {}
    for entry in options.text:
        name, _, file = entry.partition("=")
        windows = token_windows(checkpoint, read_documents(file), **size)
        found[name] = np.stack([w for w in windows if len(w) == options.sequence])
    return found


def main() -> None:
    options = arguments()
    checkpoint = open_checkpoint(options.checkpoint)
    texts = read_documents(options.calibration) if options.calibration else ()
    run = Run(threads=options.threads, texts=texts, tokens=options.tokens, sequence=options.sequence)
    bench = Bench(checkpoint, run, tests(options, checkpoint))
    settings = {
        "calibration": f"{options.calibration.name if options.calibration else 'self'}, {options.tokens} tokens",
        "sequence": options.sequence,
        "test tokens": {name: int(windows.size) for name, windows in bench.tests.items()},
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
    }
    report: dict[str, Any] = {
        "checkpoint": checkpoint.name, "settings": settings, "tests": list(bench.tests), "rows": []
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    for step, label in jobs(options.layouts, options.sparsities):
        row = bench.row(step, label)
        report["rows"].append(row)
        print(json.dumps(row), flush=True)
        name = f"solvers-{checkpoint.name}"
        (options.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.out / f"{name}.md").write_text(table(report))


if __name__ == "__main__":
    main()
