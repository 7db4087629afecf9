"""GPTQ files of ours through AutoRound's loader: is every tensor taken, and are the logits those of our own decoding?

    python benchmarks/rivals/reload.py [CHECKPOINT] [--environments DIR] [--out benchmarks/results]

The loader computes in float16, so logits differ by its rounding; beside the distance stands what quantization itself
cost. `g_idx` is left over in every module: AutoRound has no use for it, GPTQModel and vLLM read it.

Writes reload-NAME.json and .md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from environments import python_of

import tightship
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint

LAYOUTS = ("int4-g32", "int4-g128", "int8-g128")
WINDOWS = 4, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", default=Path("examples/ember"))
    parser.add_argument("--environments", type=Path, default=Path("rivals"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [row(options, layout, Path(folder, layout)) for layout in LAYOUTS]
    file = options.out / f"reload-{options.checkpoint.name}.json"
    file.write_text(json.dumps(rows, indent=1) + "\n")
    file.with_suffix(".md").write_text(table(rows, options.checkpoint.name))


def row(options: argparse.Namespace, layout: str, folder: Path) -> dict[str, Any]:
    """One layout, written by us and loaded by them."""
    recipe = folder.with_suffix(".yaml")
    passes = [{"use": "quantize", "with": {"layout": layout}}]
    target = {"to": "safetensors", "with": {"format": "gptq"}}
    recipe.write_text(yaml.safe_dump({"passes": passes, "targets": [target]}))
    tightship.build(str(options.checkpoint), recipe=recipe, output=folder)
    artifact = next(path.parent for path in folder.rglob("model.safetensors"))
    original, ours = (ModelView(open_checkpoint(place), threads=1) for place in (options.checkpoint, artifact))
    ids = np.random.default_rng(0).integers(5, original.checkpoint.hyper["vocab"], WINDOWS)
    job = {
        "artifact": str(artifact), "tests": str(folder / "tests.npy"), "logits": str(folder / "logits.npy"),
        "report": str(folder / "report.json"), "threads": 1,
    }  # fmt: skip
    np.save(job["tests"], ids)
    (folder / "job.json").write_text(json.dumps(job))
    script = Path(__file__).with_name("autoround.py")
    python = python_of("autoround", options.environments.resolve())
    subprocess.run([str(python), str(script), "reload", str(folder / "job.json")], check=True, capture_output=True)
    decoded, dense = (view.outputs(ids)["logits"].astype(np.float64) for view in (ours, original))
    told = json.loads(Path(job["report"]).read_text())
    other = [name for name in told["unexpected_keys"] if not name.endswith(".g_idx")]
    size = np.linalg.norm(decoded)
    return {
        "layout": layout, "missing": told["missing_keys"] + told["mismatched_keys"], "unexpected": other,
        "kernels": told["kernels"], "loader": float(np.linalg.norm(np.load(job["logits"]) - decoded) / size),
        "quantization": float(np.linalg.norm(dense - decoded) / size),
    }  # fmt: skip


def table(rows: list[dict[str, Any]], name: str) -> str:
    """The rows as Markdown."""
    note = __doc__.split("\n\n")[2].replace("\n", " ").strip()
    lines = [f"# GPTQ files of {name} through AutoRound's loader", "", note, ""]
    head = ["layout", "missing", "unexpected but g_idx", "logits off by", "quantization itself"]
    lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for r in rows:
        cells = [r["layout"], len(r["missing"]), len(r["unexpected"]), f"{r['loader']:.1e}", f"{r['quantization']:.1e}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
