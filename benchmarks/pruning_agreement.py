"""Do our SparseGPT and Wanda agree with llm-compressor's on the same Hessians?

    python benchmarks/pruning_agreement.py CHECKPOINT --calibration FILE --rival PYTHON [--sparsity 0.7]

PYTHON is the interpreter of an environment with llmcompressor. Every matrix of the blocks is pruned by both,
unstructured and 2:4, on the moments of the unpruned model. Compared are masks (share of weights on which both agree
whether they are zero), weights (relative L2 of the difference) and losses tr(D S D^T). llm-compressor computes in
float32; its SparseGPT zeroes one weight more than asked for in each run of 128 columns, its Wanda rounds the count of a
row down. We compute in float64 and hit the count. Also: the sum of squared errors of our sweep against the true
quadratic loss on the undamped moments.

Writes pruning_agreement-NAME.json and .md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tightship.opening import open_checkpoint
from tightship.passes.base import Run
from tightship.passes.calibration import Moments, calibration_windows
from tightship.passes.hessian import loss
from tightship.passes.prune import Prune
from tightship.passes.prune_search import all_moments
from tightship.passes.sparsegpt import Sweep, prune_with_feedback
from tightship.texts import read_documents

_SCRIPT = Path(__file__).parent / "rivals" / "llmc_pruning.py"


def ours(method: str, w: np.ndarray, moments: Moments, sparsity: float) -> np.ndarray:
    """Our pruned matrix; `method` may end in ` 2:4`."""
    name, _, pattern = method.partition(" ")
    spec = Prune(method=name, pattern=pattern) if pattern else Prune(method=name, sparsity=sparsity)
    found: np.ndarray = spec.solver.pruned(spec, w, moments, round(sparsity * w.size), "cpu")  # type: ignore[attr-defined]
    return found


def compared(w: np.ndarray, mine: np.ndarray, theirs: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Agreement on one matrix."""
    return {
        "mask": float(((mine == 0) == (theirs == 0)).mean()),
        "weights": float(np.linalg.norm(mine - theirs) / np.linalg.norm(mine)),
        "loss": loss(mine - w, second) / loss(theirs - w, second),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("checkpoint", nargs="?", default="examples/ember")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--rival", required=True, help="python of an environment with llmcompressor")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    checkpoint = open_checkpoint(options.checkpoint)
    run = Run(threads=1, texts=read_documents(options.calibration), tokens=options.tokens, sequence=256)
    names = {info.name for info in checkpoint.linears()}
    moments = all_moments(checkpoint, run, names, calibration_windows(checkpoint, run))
    weights = {name: checkpoint.resolve(name).value() for name in names}
    with tempfile.TemporaryDirectory() as folder:
        given, back = Path(folder) / "in.npz", Path(folder) / "out.npz"
        np.savez(given, **{f"w:{n}": w for n, w in weights.items()}, **{f"s:{n}": moments[n].second for n in names})
        subprocess.run([options.rival, str(_SCRIPT), str(given), str(back), str(options.sparsity)], check=True)
        rival = dict(np.load(back))
    rows: dict[str, dict[str, list[float]]] = {}
    for key, theirs in rival.items():
        method, _, name = key.partition(":model") if ":model" in key else key.rpartition(":")
        name = f"model{name}" if ":model" in key else name
        found = compared(weights[name], ours(method, weights[name], moments[name], options.sparsity), theirs,
                         moments[name].second)  # fmt: skip
        for figure, value in found.items():
            rows.setdefault(method, {}).setdefault(figure, []).append(value)
    accounts = []
    for name, w in weights.items():
        kept, total = prune_with_feedback(w, moments[name].second, round(options.sparsity * w.size), Sweep(damp=1e-3))
        accounts.append(total / loss(kept - w, moments[name].second))
    report: dict[str, Any] = {
        "checkpoint": checkpoint.name, "matrices": len(names), "sparsity": options.sparsity,
        "worst": {m: {"mask": min(r["mask"]), "weights": max(r["weights"]), "loss": [min(r["loss"]), max(r["loss"])]}
                  for m, r in rows.items()},
        "median": {m: {figure: float(np.median(values)) for figure, values in r.items()} for m, r in rows.items()},
        "sum of squared errors / true loss": [min(accounts), float(np.median(accounts)), max(accounts)],
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"pruning_agreement-{checkpoint.name}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    stem.with_suffix(".md").write_text(table(report))
    print(table(report))


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [f"# Our pruning and llm-compressor's on {report['checkpoint']}", ""]
    lines += [f"{report['matrices']} matrices, {report['sparsity']:.0%} and 2:4, the same moments. Median (worst).", ""]
    lines += ["| method | masks agree | weights differ (relative L2) | our loss / theirs |", "|---|---|---|---|"]
    for method, median in report["median"].items():
        worst = report["worst"][method]
        low, high = worst["loss"]
        lines.append(
            f"| {method} | {median['mask']:.4%} ({worst['mask']:.4%}) | {median['weights']:.1e} "
            f"({worst['weights']:.1e}) | {median['loss']:.4f} ({low:.4f} to {high:.4f}) |"
        )
    low, middle, high = report["sum of squared errors / true loss"]
    lines += ["", "Sum of squared errors of our sweep over the true loss, damping 0.001 against undamped moments: "]
    lines[-1] += f"median {middle:.4f} ({low:.4f} to {high:.4f})."
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
