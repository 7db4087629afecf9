"""How fast the GGML types are quantized: ours against libggml, one thread each, in the same run.

    python benchmarks/ggml_kernels.py [--rows 512] [--cols 4096] [--repeat 5] [--out benchmarks/results]

Ours is the whole way from float32 weights to the bytes of the file (search, codes, packing), compiled before the clock
starts; libggml's is `ggml_quantize_chunk` of the xllamacpp wheel, built for baseline x86-64 as every llama.cpp release
builds that file. The two alternate; the least CPU time of the repeats counts. The bytes of both are compared too.
Writes `ggml_kernels.json` and `ggml_kernels.md`; with NUMBA_CPU_NAME set (`haswell`, together with
NUMBA_CPU_FEATURES=+avx2,+fma, is a CPU without AVX-512) the files carry that name too.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import llvmlite.binding
import numba
import numpy as np

from tightship.formats import libggml
from tightship.formats.layouts import parse_layout
from tightship.formats.packings.ggml import pack_ggml

SIMPLE = ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "tq1_0", "tq2_0", "mxfp4", "nvfp4"]
SEARCHED = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs"]


def seconds(run: Callable[[], object]) -> float:
    start = time.thread_time()
    run()
    return time.thread_time() - start


def measure(word: str, w: np.ndarray, importance: np.ndarray | None, repeat: int) -> dict[str, object]:
    """Millions of weights a second of both, and whether the bytes agree."""
    layout, name = parse_layout(word), word.upper()

    def ours() -> np.ndarray:
        return pack_ggml(name, layout.quantize(w, importance), layout)

    def theirs() -> np.ndarray:
        return libggml.quantize_chunk(name, w, importance)

    same = bool(np.array_equal(ours(), theirs()))
    times = [(seconds(ours), seconds(theirs)) for _ in range(repeat)]
    mine, other = (w.size / min(column) / 1e6 for column in zip(*times, strict=True))
    return {
        "type": word,
        "importance": importance is not None,
        "ours": round(mine, 1),
        "libggml": round(other, 1),
        "ratio": round(mine / other, 2),
        "same_bytes": same,
    }


def geometric_mean(cells: list[dict]) -> float:
    return round(math.exp(sum(math.log(cell["ratio"]) for cell in cells) / len(cells)), 2)


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def markdown(result: dict) -> str:
    lines = [
        "# GGML quantization, millions of weights a second, one thread",
        "",
        f"{result['weights']} Gaussian weights, {result['processor']}, compiled for {result['compiled_for']}, "
        f"numba {result['numba']}, xllamacpp {result['xllamacpp']}. Written by `benchmarks/ggml_kernels.py`.",
        "",
        "| type | importance | tightship | libggml | ratio | same bytes |",
        "|---|---|---:|---:|---:|---|",
    ]
    lines += [
        f"| {c['type']} | {'yes' if c['importance'] else 'no'} | {c['ours']} | {c['libggml']} | {c['ratio']} | "
        f"{'yes' if c['same_bytes'] else '**no**'} |"
        for c in result["cells"]
    ]
    lines += ["", f"Geometric mean over {', '.join(SEARCHED)}: **{result['geometric_mean_searched']}**."]
    lines += [f"Geometric mean over {', '.join(SIMPLE)}: **{result['geometric_mean_simple']}**."]
    lines += ["", "Losing cells: " + (", ".join(result["losing"]) or "none") + ".", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((options.rows, options.cols)) * 0.02).astype(np.float32)
    importance = rng.gamma(1, 1, options.cols).astype(np.float32)
    cells = []
    for word in SEARCHED + SIMPLE:
        for given in (None, importance):
            cells.append(measure(word, w, given, options.repeat))
            print(cells[-1], flush=True)
    result = {
        "weights": w.size,
        "processor": processor(),
        "compiled_for": numba.config.CPU_NAME or llvmlite.binding.get_host_cpu_name(),
        "numba": version("numba"),
        "xllamacpp": version("xllamacpp"),
        "cells": cells,
        "geometric_mean_searched": geometric_mean([c for c in cells if c["type"] in SEARCHED]),
        "geometric_mean_simple": geometric_mean([c for c in cells if c["type"] in SIMPLE]),
        "losing": [f"{c['type']}{' with importance' if c['importance'] else ''}" for c in cells if c["ratio"] < 1],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    name = "ggml_kernels" + (f"-{numba.config.CPU_NAME}" if numba.config.CPU_NAME else "")
    (options.out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / f"{name}.md").write_text(markdown(result))


if __name__ == "__main__":
    main()
