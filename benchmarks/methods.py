"""What each way of quantizing is worth on a real checkpoint, beside plain GPTQ: also where it loses.

    python benchmarks/methods.py [CHECKPOINT] --calibration FILE --test FILE
        [--layouts int3-g128 ...] [--only WORD ...] [--minutes N] [--out benchmarks/results]

Every row quantizes the linears of the blocks of the same checkpoint in the same layout with the same calibration text,
and is compared with the original on the same windows of 512 tokens: mean KL divergence, and its ratio to plain GPTQ's
with a 95 % interval from a bootstrap of pairs of windows in blocks of 3. `loss` is the mean over matrices of the
calibration loss against rounding's. Seconds are the processor's. `compensate` stores more bytes than the others.

Rows are written as they are made; one that is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "rivals"))
from measure import kl_by_window, ratio

from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.passes import pass_for
from tightship.passes.base import Run
from tightship.texts import token_windows

SEQUENCE = 512
GPTQ = {"solver": "gptq"}
Steps = list[tuple[str, dict[str, Any]]]


def methods(layout: str) -> dict[str, Steps]:
    """Every way, plain GPTQ first: everybody else is measured against it."""
    gptq = ("quantize", {**GPTQ, "layout": layout})
    return {
        "gptq": [gptq],
        "rtn": [("quantize", {"solver": "rtn", "layout": layout})],
        "importance": [("quantize", {"solver": "importance", "layout": layout})],
        "gptq, sweeps: 0": [("quantize", {**GPTQ, "layout": layout, "sweeps": 0})],
        "gptq, propagate: 0.5": [("quantize", {**GPTQ, "layout": layout, "propagate": 0.5})],
        "gptq, compensate: 8": [("quantize", {**GPTQ, "layout": layout, "compensate": 8})],
        "smooth awq, rtn": [("smooth", {"layout": layout}), ("quantize", {"solver": "rtn", "layout": layout})],
        "smooth awq, gptq": [("smooth", {"layout": layout}), gptq],
        "smooth smoothquant, gptq": [("smooth", {"method": "smoothquant"}), gptq],
        "rotate hadamard, gptq": [("rotate", {"kind": "hadamard"}), gptq],
        "qat": [("qat", {"layout": layout, "tokens": 65536})],
        "qat of gptq, propagate: 0.5": [
            ("qat", {**GPTQ, "layout": layout, "propagate": 0.5, "tokens": 65536, "rate": 5e-4})
        ],
    }


class Bench:
    """One checkpoint, its calibration text and test windows."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.checkpoint = open_checkpoint(options.checkpoint)
        lines = options.calibration.read_text(encoding="utf-8").splitlines(keepends=True)
        text = "".join(lines[: len(lines) // 3])
        self.run = Run(threads=options.threads, texts=(text,), tokens=options.tokens, sequence=SEQUENCE)
        test = options.test.read_text(encoding="utf-8")
        every = token_windows(self.checkpoint, [test], tokens=1 << 40, sequence=SEQUENCE)
        whole = [window for window in every if len(window) == SEQUENCE]
        self.tests = np.stack([whole[i] for i in np.linspace(0, len(whole) - 1, options.test_windows).astype(int)])
        self.original = self.logits(self.checkpoint)

    def logits(self, checkpoint: Any) -> np.ndarray:
        return ModelView(checkpoint, threads=self.run.threads).outputs(self.tests)["logits"]

    def row(self, steps: Steps) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        checkpoint, began = self.checkpoint, time.process_time()
        for use, options in steps:
            checkpoint = pass_for(use, options).apply(checkpoint, replace(self.run, report=figures.__setitem__))
        seconds = time.process_time() - began
        losses = [f["loss"] / f["loss_rtn"] for f in figures.values() if f.get("loss_rtn")]
        kl = kl_by_window(self.original, self.logits(checkpoint))
        return {
            "kl": [float(f"{v:.6g}") for v in kl],
            "loss": round(float(np.mean(losses)), 4) if losses else None,
            "seconds": round(seconds, 1),
        }


def table(report: dict[str, Any]) -> str:
    """The rows as Markdown, layout by layout."""
    about = " ".join(__doc__.split("\n\n")[2].split())
    lines = ["# Ways of quantizing", "", about, "", *(f"- {key}: {value}" for key, value in report["settings"].items())]
    lines += ["", "| layout | way | KL | ratio to gptq | 95 % | loss | CPU s |", "|---|---|---|---|---|---|---|"]
    for row in report["rows"]:
        plain = next(r for r in report["rows"] if (r["layout"], r["way"]) == (row["layout"], "gptq"))
        found, low, high = ratio(np.array(row["kl"]), np.array(plain["kl"]))
        words = [row["layout"], row["way"], f"{np.mean(row['kl']):.3g}", f"{found:.3f}", f"{low:.3f} to {high:.3f}"]
        lines.append("| " + " | ".join([*words, str(row["loss"] or ""), f"{row['seconds']:.0f}"]) + " |")
    return "\n".join(lines) + "\n"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", default=Path("examples/ember"))
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192, help="calibration tokens")
    parser.add_argument("--test-windows", type=int, default=18)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layouts", nargs="*", default=["int3-g128", "int2-g32", "int4-g128"])
    parser.add_argument("--only", nargs="*", default=[], help="ways whose name holds one of these words, beside gptq")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no row after so long")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"methods-{options.checkpoint.name}.json"
    report: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"rows": []}
    report["settings"] = {
        "checkpoint": options.checkpoint.name, "calibration tokens": options.tokens,
        "test": f"{options.test_windows} windows of {SEQUENCE} tokens of {options.test.name}",
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }  # fmt: skip
    bench, began = Bench(options), time.monotonic()
    known = {(row["layout"], row["way"]) for row in report["rows"]}
    for layout in options.layouts:
        for way, steps in methods(layout).items():
            wanted = not options.only or way == "gptq" or any(word in way for word in options.only)
            if (layout, way) in known or not wanted or time.monotonic() - began > 60 * options.minutes:
                continue
            report["rows"].append({"layout": layout, "way": way, **bench.row(steps)})
            print(layout, way, np.mean(report["rows"][-1]["kl"]), flush=True)
            file.write_text(json.dumps(report, indent=1) + "\n")
            file.with_suffix(".md").write_text(table(report))


if __name__ == "__main__":
    main()
