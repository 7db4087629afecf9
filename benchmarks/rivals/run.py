"""Quality at equal bytes, each artifact in its own runtime, against the quantizers that users have.

    python benchmarks/rivals/run.py CHECKPOINT --calibration FILE --test FILE --other FILE [--environments DIR]
        [--only WORD] [--subsets first ...] [--minutes N] [--fork] [--out DIR]

Every row is one artifact: KL divergence of the float32 original from it on the same windows of 512 tokens, mean over
windows; its ratio to the peer's, with a 95 % interval from a bootstrap of pairs of windows in blocks of 3. Rows of
calibrated makers are made from up to three disjoint slices of the calibration text (`first`, `second`, `third`: the
beginning of each third of its lines). `bytes` counts what the cell is about: for GGUF the file, elsewhere codes, scales
and zero points of the blocks' matrices. Time (of the processor, all threads) and memory are those of the maker's
process, imports included.

GGUF is computed by llama.cpp as shipped, ONNX by ONNX Runtime (accuracy level 0 for all), safetensors by transformers
with compressed-tensors, AutoRound's by its own loader, the last two in float32. A `floor` is the same file with the
blocks in Q8_0: what embeddings and llama.cpp's rounding of activations cost by themselves. Results are written after
every row; a row that is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from cells import SUBSETS, all_cells
from environments import PACKAGES, python_of
from makers import MAKERS
from measure import artifact_bytes, kl_by_window, table

from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.texts import codec_of, token_windows
from tightship.validators.runtimes.child import Limits, run_child

HERE = Path(__file__).parent
SEQUENCE = 512
RUNTIMES = {"gguf": "llama_cpp", "onnx": "onnx_runtime", "safetensors": "transformers_client"}
MODES = {"gguf": "shipped", "onnx": "shipped", "safetensors": "graph"}


class Bench:
    """One checkpoint with its texts, below a scratch folder."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.options = options
        self.scratch = scratch
        self.checkpoint = open_checkpoint(options.checkpoint)
        self.tests = self._spread(options.test.read_text(encoding="utf-8"), options.test_windows)
        np.save(scratch / "tests.npy", self.tests)
        view = ModelView(self.checkpoint, threads=options.threads)
        self.original = view.outputs(self.tests)["logits"]
        self._prepared: dict[tuple[str, str], Path] = {}

    def _spread(self, text: str, count: int) -> np.ndarray:
        """(count, SEQUENCE): windows from all over a text."""
        whole = token_windows(self.checkpoint, [text], tokens=1 << 40, sequence=SEQUENCE)
        full = [window for window in whole if len(window) == SEQUENCE]
        return np.stack([full[i] for i in np.linspace(0, len(full) - 1, count).astype(int)])

    def slice(self, name: str) -> Path:
        """A calibration slice as a file: its lines, from the start of the slice on."""
        made = self.scratch / f"{name}.txt"
        if not made.exists():
            source = self.options.other if name == "other" else self.options.calibration
            lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
            first = 0 if name == "other" else SUBSETS.index(name) * len(lines) // len(SUBSETS)
            made.write_text("".join(lines[first : first + len(lines) // len(SUBSETS)]), encoding="utf-8")
        return made

    def _beginning(self, slice_name: str) -> Path:
        """The lines of a slice that hold the tokens everybody calibrates on: training would read on."""
        made = self.scratch / f"{slice_name}-beginning.txt"
        lines = self.slice(slice_name).read_text(encoding="utf-8").splitlines(keepends=True)
        counts = [len(codec_of(self.checkpoint).encode(line)) for line in lines]
        made.write_text(
            "".join(lines[: int(np.searchsorted(np.cumsum(counts), self.options.tokens))]), encoding="utf-8"
        )
        return made

    def row(self, cell: dict[str, Any], name: str, maker: dict[str, Any], subset: str) -> dict[str, Any]:
        """Make one artifact and compare it with the original."""
        out = self.scratch / "artifact"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        slice_name = "other" if maker.get("other") else subset
        text = self._beginning(slice_name) if maker.get("trained") else self.slice(slice_name)
        job = {
            "container": cell["container"], **maker, "source": str(self.options.checkpoint.resolve()), "out": str(out),
            "threads": self.options.threads, "sequence": SEQUENCE, "tokens": self.options.tokens,
            "text": str(text), "windows": str(self._windows(slice_name)),
            "tests": str(self.scratch / "tests.npy"), "logits": str(self.scratch / "logits.npy"), "artifact": str(out),
        }  # fmt: skip
        job |= self._inputs(job, slice_name)
        seconds, peak = self._timed(job)
        kl = kl_by_window(self.original, self._logits(job))
        return {
            "cell": cell["cell"], "maker": name, "subset": subset, "kl": [float(f"{v:.6g}") for v in kl],
            "bytes": artifact_bytes(job["container"], out), "seconds": seconds, "peak_mib": peak,
        }  # fmt: skip

    def _windows(self, slice_name: str) -> Path:
        made = self.scratch / f"{slice_name}.npy"
        if not made.exists():
            text = self.slice(slice_name).read_text(encoding="utf-8")
            found = token_windows(self.checkpoint, [text], tokens=self.options.tokens, sequence=SEQUENCE)
            np.save(made, np.stack(found))
        return made

    def _inputs(self, job: dict[str, Any], slice_name: str) -> dict[str, str]:
        """What llama.cpp's and ONNX Runtime's quantizers start from: our float export, our importance matrix."""
        if job["maker"] == "llama-quantize":
            measured = self._prepare("gguf", "imatrix", slice_name) / "imatrix.gguf"
            return {"float": str(next(self._prepare("gguf", "bf16", "").glob("*.gguf"))), "imatrix": str(measured)}
        return {"float": str(self._prepare("onnx", "fp32", "") / "model.onnx")} if job["maker"] == "ort" else {}

    def _prepare(self, container: str, scheme: str, slice_name: str) -> Path:
        out = self.scratch / f"{container}-{scheme}-{slice_name}"
        if not out.exists():
            out.mkdir()
            passes = [{"use": "imatrix"}] if scheme == "imatrix" else []
            job = {
                "maker": "ours", "container": container, "scheme": "bf16" if passes else scheme, "passes": passes,
                "source": str(self.options.checkpoint.resolve()), "out": str(out), "threads": self.options.threads,
                "text": str(self.slice(slice_name or "first")), "tokens": self.options.tokens, "sequence": SEQUENCE,
            }  # fmt: skip
            self._timed(job)
        return out

    def _timed(self, job: dict[str, Any]) -> tuple[float | None, int | None]:
        """Processor seconds and peak memory (MiB, resident) of the maker's process; neither of a forked one."""
        if self.options.fork and job["maker"] in MAKERS:
            process = multiprocessing.get_context("fork").Process(target=MAKERS[job["maker"]], args=(job,))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{job['maker']} failed with {process.exitcode}")
            return None, None
        file = self.scratch / "job.json"
        file.write_text(json.dumps(job))
        with (self.scratch / "log").open("w") as log:
            started = subprocess.Popen(self._command(job, file), env=self._environment(), stdout=log, stderr=log)
            _, status, usage = os.wait4(started.pid, 0)
        started.returncode = os.waitstatus_to_exitcode(status)
        if started.returncode:
            tail = (self.scratch / "log").read_text()[-2000:]
            raise SystemExit(f"{job['maker']} failed with {started.returncode}: {tail}")
        return round(usage.ru_utime + usage.ru_stime, 1), usage.ru_maxrss // 1024

    def _command(self, job: dict[str, Any], file: Path) -> list[str]:
        if job["maker"] == "llm-compressor":
            return [str(self._python("llm-compressor")), str(HERE / "llm_compressor.py"), str(file)]
        if job["maker"] == "autoround":
            return [str(self._python("autoround")), str(HERE / "autoround.py"), "quantize", str(file)]
        return [sys.executable, str(HERE / "makers.py"), job["maker"], str(file)]

    def _python(self, rival: str) -> Path:
        return python_of(rival, self.options.environments.resolve())

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "OMP_NUM_THREADS": str(self.options.threads), "HF_HUB_OFFLINE": "1"}

    def _logits(self, job: dict[str, Any]) -> np.ndarray:
        if job["maker"] == "autoround":
            file = self.scratch / "job.json"
            command = [str(self._python("autoround")), str(HERE / "autoround.py"), "logits", str(file)]
            subprocess.run(command, check=True, env=self._environment(), capture_output=True)
            return np.load(job["logits"])
        container, out = job["container"], Path(job["out"])
        main = next(out.glob("*.gguf")).name if container == "gguf" else "model.onnx"
        asked = {"artifact": str(out), "main": main, "mode": MODES[container], "threads": self.options.threads}
        _, arrays = run_child(
            RUNTIMES[container], asked, {"input_ids": self.tests}, limits=Limits(threads=self.options.threads)
        )
        return arrays["logits"]


def jobs(options: argparse.Namespace) -> list[tuple[str, dict[str, Any], str]]:
    """(subset, cell, maker) in the order of work: every cell of a slice before the next slice."""
    found = []
    for subset in options.subsets:
        for cell in all_cells():
            for name, maker in cell["makers"].items():
                once = maker.get("data_free") or name.startswith(("control", "autoround"))
                repeated = once and subset != SUBSETS[0]
                wanted = not options.only or any(word in f"{cell['cell']}: {name};" for word in options.only)
                if wanted and not repeated:
                    found.append((subset, cell, name))
    return found


def _place(row: dict[str, Any]) -> tuple[int, ...]:
    """Where a row stands in the table: cells and makers as in `cells.py`, so that a cell's peer comes first."""
    cells = {cell["cell"]: list(cell["makers"]) for cell in all_cells()}
    return list(cells).index(row["cell"]), cells[row["cell"]].index(row["maker"]), SUBSETS.index(row["subset"])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("checkpoint", type=Path)
    for text in ("calibration", "test", "other"):
        parser.add_argument(f"--{text}", type=Path, required=True)
    parser.add_argument("--environments", type=Path, default=Path("rivals"), help="where rivals are installed")
    parser.add_argument("--tokens", type=int, default=8192, help="calibration tokens")
    parser.add_argument("--test-windows", type=int, default=18)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--subsets", nargs="*", default=list(SUBSETS))
    parser.add_argument("--fork", action="store_true", help="our imports only once; time and memory are not told")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no row after so long")
    parser.add_argument("--only", nargs="*", default=[], help="rows whose `cell: maker;` holds one of these words")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def main() -> None:
    options = arguments()
    file = options.out / f"rivals-{options.checkpoint.name}.json"
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"rows": []}
    report["settings"] = {
        "checkpoint": options.checkpoint.name, "calibration tokens": options.tokens, "threads": options.threads,
        "test": f"{options.test_windows} windows of {SEQUENCE} tokens of {options.test.name}",
        "versions": {n: version(n) for n in ("torch", "transformers", "onnxruntime", "onnxruntime-genai", "cyllama")},
        "rivals": {name: packages[0] for name, packages in PACKAGES.items()},
    }  # fmt: skip
    known = {(row["cell"], row["maker"], row["subset"]) for row in report["rows"]}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        for subset, cell, name in jobs(options):
            if (cell["cell"], name, subset) in known:
                continue
            if time.monotonic() - began > 60 * options.minutes:
                break
            row = bench.row(cell, name, cell["makers"][name], subset)
            report["rows"] = sorted([*report["rows"], row], key=_place)
            print(cell["cell"], name, subset, np.mean(row["kl"]), row["bytes"], row["seconds"], flush=True)
            file.write_text(json.dumps(report, indent=1) + "\n")
            file.with_suffix(".md").write_text(table(report, __doc__))


if __name__ == "__main__":
    main()
