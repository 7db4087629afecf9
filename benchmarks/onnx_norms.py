"""SkipSimplifiedLayerNormalization of ONNX Runtime against Add and RMSNormalization: which is faster on the CPU?

    python benchmarks/onnx_norms.py [--repeats 60] [--out DIR]

A chain of 60 sums, each normalized (the norms of 30 blocks), in either form, one thread, the runs in turns. Ratios are
processor time of the fused form over that of the two operators, fastest runs: above 1 the two operators are faster.
Writes onnx_norms.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

NORMS = 60
WIDTHS, TOKENS = (576, 2048, 4096), (1, 16, 128, 512)
SKIP = "SkipSimplifiedLayerNormalization"


def chain(width: int, *, fused: bool) -> ort.InferenceSession:
    nodes, x = [], "x"
    for i in range(NORMS):
        total, normed = f"sum{i}", f"norm{i}"
        if fused:
            names = [normed, "", "", total]
            nodes.append(helper.make_node(SKIP, [x, "y", "w"], names, domain="com.microsoft", epsilon=1e-5))
        else:
            nodes.append(helper.make_node("Add", [x, "y"], [total]))
            nodes.append(helper.make_node("RMSNormalization", [total, "w"], [normed], axis=-1, epsilon=1e-5))
        x = total if i % 2 else normed
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", "s", width]) for n in ("x", "y", x)]
    weight = numpy_helper.from_array(np.ones(width, np.float32), "w")
    graph = helper.make_graph(nodes, "chain", values[:2], values[2:], [weight])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def ratio(forms: list[ort.InferenceSession], width: int, tokens: int, repeats: int) -> float:
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal((1, tokens, width)).astype(np.float32) for name in "xy"}
    fastest = [float("inf")] * len(forms)
    for _ in range(repeats):
        for place, session in enumerate(forms):
            start = time.process_time()
            session.run(None, feeds)
            fastest[place] = min(fastest[place], time.process_time() - start)
    return round(fastest[0] / fastest[1], 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    found: dict[int, list[float]] = {}
    for width in WIDTHS:
        forms = [chain(width, fused=fused) for fused in (True, False)]
        found[width] = [ratio(forms, width, tokens, options.repeats) for tokens in TOKENS]
    lines = [f"# {SKIP} against Add and RMSNormalization", ""]
    lines += [f"Written by `python benchmarks/onnx_norms.py`; onnxruntime {version('onnxruntime')}, one thread, load "]
    lines[-1] += f"{os.getloadavg()[0]:.0f}. Time of the fused form over that of the two: above 1 the two are faster."
    lines += ["", f"| width | {' | '.join(f'{n} tokens' for n in TOKENS)} |", "|---" * (len(TOKENS) + 1) + "|"]
    lines += [f"| {width} | {' | '.join(map(str, ratios))} |" for width, ratios in found.items()]
    (options.out / "onnx_norms.md").write_text("\n".join(lines) + "\n")
    data = {"tokens": TOKENS, "ratios": found, "onnxruntime": version("onnxruntime")}
    (options.out / "onnx_norms.json").write_text(json.dumps(data, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
