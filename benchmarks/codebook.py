"""Codebooks of 16 values against int8, int4 and float32 in ONNX Runtime: bytes of the file, and speed.

    python benchmarks/codebook.py [CHECKPOINT] [--rounds 5] [--threads 1] [--out DIR]

All matrices of the blocks are stored in one form each; embeddings and norms stay as they are. Artifacts are loaded and
timed in turn (`tightship bench`), and compared within each round; ratios above 1 are faster than float32.

Writes codebook-NAME.json and .md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from tightship.exporters import exporter_for
from tightship.opening import open_checkpoint
from tightship.passes import pass_for
from tightship.passes.base import Run
from tightship.target import Target
from tightship.validators.bench import Plan, bench, subjects
from tightship.validators.parity import judge

FORMS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "float32": None,
    "codebook-16": ("share", {"codebook": 16}),
    "codebook-4": ("share", {"codebook": 4}),
    "int8": ("quantize", {"layout": "int8"}),
    "int4": ("quantize", {"layout": "int4"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("checkpoint", nargs="?", default="examples/ember")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    checkpoint = open_checkpoint(options.checkpoint)
    linears = {info.name for info in checkpoint.linears()}
    exporter, sizes = exporter_for("onnx", judge=judge), {}
    with tempfile.TemporaryDirectory() as folder:
        for name, step in FORMS.items():
            use, said = step or ("quantize", {"layouts": dict.fromkeys(linears, "f32")})
            made = pass_for(use, said).apply(checkpoint, Run(threads=options.threads))
            plan = exporter.plan(made, Target("onnx"))
            sizes[name] = sum(tensor.nbytes for tensor in plan.tensors if tensor.name in linears)
            (Path(folder) / name).mkdir()
            exporter.export(made, plan, Path(folder) / name, lambda *_: None)
        found = [s for s in subjects(Path(folder)) if s.runtime == "onnxruntime"]
        chosen = [s for name in FORMS for s in found if s.directory.name == name]
        plan_of_rounds = Plan(prompt=64, decode=32, rounds=options.rounds, threads=options.threads)
        measured = bench(Path(folder), plan_of_rounds, chosen=chosen).to_json()["artifacts"]
    rows = [row(name, sizes, entry) for name, entry in zip(FORMS, measured, strict=True)]
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"codebook-{checkpoint.name}"
    report = {"checkpoint": checkpoint.name, "version": measured[0]["version"], "rounds": options.rounds, "rows": rows}
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(report))
    print(table(report))


def row(name: str, sizes: dict[str, int], entry: dict[str, Any]) -> dict[str, Any]:
    """One form: bytes of its matrices, of int8 = 1, and speeds of float32 = 1."""
    keys = ("prefill_ratio", "decode_ratio", "decode_tokens_per_second", "load_seconds", "peak_memory_bytes")
    return {"form": name, "bytes": sizes[name], "of int8": sizes[name] / sizes["int8"], **{k: entry[k] for k in keys}}


def table(report: dict[str, Any]) -> str:
    """The rows as Markdown."""
    heads = list(report["rows"][0])
    lines = [
        f"# Codebooks on {report['checkpoint']}",
        "",
        f"- ONNX Runtime {report['version']}, {report['rounds']} rounds",
    ]
    lines += ["", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for one in report["rows"]:
        cells = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in one.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
