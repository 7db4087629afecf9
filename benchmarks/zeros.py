"""What runtimes make of zeros: file, memory and speed of a pruned model against the dense one, artifact by artifact.

    python benchmarks/zeros.py CHECKPOINT [--rounds 3] [--minutes 2] [--threads 1] [--out benchmarks/results]

Magnitude pruning of the linears of the blocks: which weights are zero does not matter here, how many does. Every model
is exported to GGUF, ONNX (and that with sparse initializers) and safetensors, in the source's type, and run in
llama.cpp, ONNX Runtime and transformers, taking turns with the dense one; a figure is the median over rounds of the
ratio within a round; the dense model a second time is the control. Memory is the peak of the process less that of its
libraries. File sizes are also given behind `zstd -3`, which is what a download or a compressing file system sees. Needs
the `zstd` program.

Writes zeros-NAME.json and .md. Artifacts that are there already are not measured again, so that `--minutes`, after
which no new runtime is begun, cuts the table into short runs.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from tightship.checkpoint import Checkpoint
from tightship.exporters import exporter_for
from tightship.formats.onnx_transport import shrink_onnx
from tightship.opening import open_checkpoint
from tightship.passes import pass_for
from tightship.passes.base import Run
from tightship.target import Target
from tightship.validators.bench import Plan, bench, subjects
from tightship.validators.parity import judge

PRUNED: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "2:4": {"pattern": "2:4"},
    "70 %": {"sparsity": 0.7},
    "90 %": {"sparsity": 0.9},
    "dense again": None,
}
ARTIFACTS = {"gguf": "llama.cpp", "onnx": "onnxruntime", "onnx, sparse": "onnxruntime", "safetensors": "transformers"}


def artifact(checkpoint: Checkpoint, what: str, folder: Path) -> Path:
    """One artifact in `folder`; its weight file."""
    container = what.partition(",")[0]
    exporter = exporter_for(container, judge=judge) if container == "onnx" else exporter_for(container)
    folder.mkdir(parents=True)
    exported = exporter.export(checkpoint, exporter.plan(checkpoint, Target(container)), folder)
    main = folder / exported.main
    if what == "onnx, sparse":
        sparse = folder / "sparse.onnx"
        shrink_onnx(main, sparse)
        for file in (main, folder / "model.onnx_data", folder / "genai_config.json"):
            file.unlink(missing_ok=True)
        return sparse
    return main


def weight_bytes(folder: Path) -> dict[str, int]:
    """Bytes of the weight files, and behind zstd -3."""
    files = [f for f in folder.iterdir() if f.suffix in (".gguf", ".onnx", ".onnx_data", ".safetensors")]
    squeezed = [subprocess.run(["zstd", "-3", "-c", str(f)], capture_output=True, check=True).stdout for f in files]
    return {"file": sum(f.stat().st_size for f in files), "zstd": sum(map(len, squeezed))}


def measured(checkpoint: Checkpoint, what: str, plan: Plan) -> list[dict[str, Any]]:
    """A row for every pruned model as one kind of artifact."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, sizes = Path(scratch), {}
        for name, options in PRUNED.items():
            model = pass_for("prune", options).apply(checkpoint, Run()) if options else checkpoint
            place = folder / f"{len(sizes)}"
            artifact(model, "onnx" if what == "onnx, sparse" and options is None else what, place)
            sizes[name] = weight_bytes(place)
        chosen = [s for s in subjects(folder) if s.runtime == ARTIFACTS[what]]
        entries = bench(folder, plan, chosen=chosen).to_json()["artifacts"]
    rows = []
    for name, entry in zip(PRUNED, entries, strict=True):
        entry.pop("rounds", None)
        rows.append({"artifact": what, "pruned": name, **sizes[name], **entry})
    return rows


def table(report: dict[str, Any]) -> str:
    lines = [
        f"# Zeros of {report['checkpoint']} in runtimes",
        "",
        "Ratios to the dense model in the same artifact.",
        "",
    ]
    head = ["artifact", "runtime", "pruned", "file", "file behind zstd", "memory", "prefill", "decode"]
    lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in report["rows"]:
        base = next(r for r in report["rows"] if (r["artifact"], r["pruned"]) == (row["artifact"], "dense"))
        memory, whole = (r["peak_memory_bytes"] - r["libraries_memory_bytes"] for r in (row, base))
        ratios = [row["file"] / base["file"], row["zstd"] / base["zstd"], memory / whole]
        cells = [f"{ratio:.2f}" for ratio in (*ratios, row["prefill_ratio"], row["decode_ratio"])]
        lines.append("| " + " | ".join([row["artifact"], row["runtime"], row["pruned"], *cells]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    began, checkpoint = time.monotonic(), open_checkpoint(options.checkpoint)
    plan = Plan(prompt=256, decode=128, rounds=options.rounds, threads=options.threads)
    stem = options.out / f"zeros-{checkpoint.name}"
    report: dict[str, Any] = {"checkpoint": checkpoint.name, "plan": vars(plan), "rows": []}
    known = stem.with_suffix(".json")
    if known.exists() and json.loads(known.read_text())["plan"] == report["plan"]:
        report = json.loads(known.read_text())
    options.out.mkdir(parents=True, exist_ok=True)
    for what in ARTIFACTS:
        if any(row["artifact"] == what for row in report["rows"]):
            continue
        if time.monotonic() - began > 60 * options.minutes:
            break
        report["rows"] += measured(checkpoint, what, plan)
        known.write_text(json.dumps(report, indent=1) + "\n")
        stem.with_suffix(".md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
