"""Sparse transport against zstd of the dense file: sizes, and speed of getting the dense file back.

    python benchmarks/transport.py CHECKPOINT [--sparsities 0.5 0.7 ...] [--rounds 5] [--out benchmarks/results]

Magnitude pruning of the linears of the blocks (the values do not matter for size, their number does), bf16 as in the
source. Every form is written with and without zstd -3 and -19 behind it, and compared with zstd of the dense file.
Expansion is timed against `zstd -d` of the dense file in the same round, files in the page cache, one thread; the
figure is the median over rounds of the ratio. Needs the `zstd` program.

Writes transport-NAME.json and .md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.exporters import exporter_for
from tightship.formats.transport import expand, shrink
from tightship.opening import open_checkpoint
from tightship.passes import pass_for
from tightship.passes.base import Run
from tightship.target import Target

FORMS = ["bitmask", "2:4", "csr", "coo"]


def rows_of(checkpoint: Checkpoint, options: dict[str, Any], folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Every form of one pruned model."""
    pruned = pass_for("prune", options).apply(checkpoint, Run())
    exporter, target = exporter_for("safetensors"), Target("safetensors")
    exporter.export(pruned, exporter.plan(pruned, target), folder)
    dense = folder / "model.safetensors"
    squeezed = {level: zstd(dense, level) for level in (3, 19)}
    what = options.get("pattern") or f"{options['sparsity']:.0%}"
    base = {"what": what, "dense": dense.stat().st_size}
    found: list[dict[str, Any]] = [
        {**base, "form": "zstd", **{f"zstd {n}": file.stat().st_size for n, file in squeezed.items()}}
    ]
    for form in FORMS if "pattern" in options else [f for f in FORMS if f != "2:4"]:
        small = folder / f"{form.replace(':', '')}.safetensors"
        shrink(dense, small, form)
        row = {**base, "form": form, "bytes": small.stat().st_size}
        row |= {f"zstd {n}": zstd(small, n).stat().st_size for n in (3, 19)}
        found.append(row | speed(small, squeezed[3], dense.stat().st_size, rounds))
    return found


def zstd(file: Path, level: int) -> Path:
    """The file behind zstd."""
    target = file.with_suffix(f".{level}.zst")
    subprocess.run(["zstd", "-q", "-f", f"-{level}", str(file), "-o", str(target)], check=True)
    return target


def speed(small: Path, squeezed: Path, size: int, rounds: int) -> dict[str, float]:
    """Median of (time of expand / time of zstd -d), and megabytes of dense file a second."""
    out = small.with_suffix(".out")

    def timed(work: Callable[[], object]) -> float:
        out.unlink(missing_ok=True)
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    ours, ratios = [], []
    for _ in range(rounds):
        theirs = timed(lambda: subprocess.run(["zstd", "-q", "-f", "-d", str(squeezed), "-o", str(out)], check=True))
        ours.append(timed(lambda: expand(small, out)))
        ratios.append(ours[-1] / theirs)
    return {"expand / zstd -d": float(np.median(ratios)), "MB/s": size / 1e6 / float(np.median(ours))}


def table(report: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [f"# Transport of {report['checkpoint']}", "", f"Sizes as shares of the dense file; {report['note']}", ""]
    lines += [
        "| pruned | form | alone | + zstd -3 | + zstd -19 | expand / zstd -d | MB/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        shares = [f"{row[key] / row['dense']:.3f}" if key in row else "" for key in ("bytes", "zstd 3", "zstd 19")]
        rates = [f"{row[key]:.3g}" if key in row else "" for key in ("expand / zstd -d", "MB/s")]
        lines.append("| " + " | ".join([row["what"], row["form"], *shares, *rates]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("checkpoint", nargs="?", default="examples/ember")
    parser.add_argument("--sparsities", nargs="*", type=float, default=[0.5, 0.7, 0.9])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    checkpoint = open_checkpoint(options.checkpoint)
    matrices = sum(int(np.prod(i.shape)) for i in checkpoint.linears())
    total = sum(int(np.prod(w.shape)) for w in checkpoint.weights.values() if hasattr(w, "shape"))
    note = f"{matrices / total:.0%} of the weights are in matrices that are pruned"
    report: dict[str, Any] = {"checkpoint": checkpoint.name, "note": note, "rows": []}
    for what in [*({"sparsity": s} for s in options.sparsities), {"pattern": "2:4"}]:
        with tempfile.TemporaryDirectory() as folder:
            report["rows"] += rows_of(checkpoint, what, Path(folder), options.rounds)
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"transport-{checkpoint.name}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    stem.with_suffix(".md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
