"""Experts in ONNX Runtime's QMoE against our graph of one MatMulNBits a matrix: the same integers, right and how fast?

    python benchmarks/qmoe.py [--hidden 512] [--ffn 1024] [--experts 8] [--repeats 15] [--out DIR]

One block of a random Mixtral (two experts a token, int4 in groups of 32) is written by our exporter without and with
`experts: qmoe`. Both are compared, output against output, with optimisations off and float32 accumulation, and as
shipped. Times are those of whole graphs, the runs interleaved, one thread; ratios are processor time of one MatMulNBits
a matrix over QMoE's, above 1 where QMoE is faster. Experts of 8 bits are not offered: QMoE then rounds activations at
every level, 2e-4 off where a proof asks for 1e-5.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from tightship.architecture import architecture_for
from tightship.checkpoint import Checkpoint, Source
from tightship.exporters.onnx_assemble import write_graph
from tightship.exporters.onnx_candidates.direct import DirectCandidate
from tightship.exporters.onnx_schemes import style_for
from tightship.formats.layouts import parse_layout
from tightship.target import Target
from tightship.weights import Dense, Quantized

USED = 2
ROWS = (1, 16, 128)


def mixtral(hidden: int, ffn: int, experts: int) -> Checkpoint:
    """One block, every matrix of it in groups of 32."""
    config = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 256, "hidden_size": hidden,
        "intermediate_size": ffn, "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 2,
        "num_local_experts": experts, "num_experts_per_tok": USED, "max_position_embeddings": 512, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "sliding_window": None, "tie_word_embeddings": False,
    }  # fmt: skip
    rng, layout = np.random.default_rng(0), parse_layout("int4")
    architecture = architecture_for(config)
    weights: dict[str, Any] = {}
    for name, info in architecture.lookup(config).items():
        w = rng.standard_normal(info.shape).astype(np.float32) / np.float32(np.sqrt(info.shape[-1]))
        linear = info.rule.kind == "linear"
        weights[name] = Quantized.of(layout, layout.quantize(w)) if linear else Dense.of(w)
    return Checkpoint("mixtral", config, weights, {}, architecture, Source("random", None, ()))


def written(checkpoint: Checkpoint, folder: Path, *, one_node: bool) -> onnx.ModelProto:
    shapes = {name: tuple(checkpoint.resolve(name).shape) for name in checkpoint.weights}
    skeleton = DirectCandidate(one_node=one_node).build(checkpoint.config, checkpoint.architecture, shapes)
    folder.mkdir()
    write_graph(skeleton, checkpoint, folder, style_for(checkpoint, Target("onnx")))
    return onnx.load(folder / "model.onnx")


def at_level(model: onnx.ModelProto, level: int) -> onnx.ModelProto:
    """The graph with every product at an accuracy level."""
    found = onnx.ModelProto()
    found.CopyFrom(model)
    for node in found.graph.node:
        kept = [a for a in node.attribute if a.name != "accuracy_level"]
        if node.op_type in ("MatMulNBits", "QMoE"):
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute("accuracy_level", level)])
    return found


def session(model: onnx.ModelProto, *, plain: bool = False) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if plain:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def logits(opened: ort.InferenceSession, rows: int) -> np.ndarray:
    ids = np.random.default_rng(1).integers(0, 256, (1, rows))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(rows)[None]}
    past = {i.name: (i.shape[1], i.shape[3]) for i in opened.get_inputs() if i.name.startswith("past")}
    feeds |= {name: np.zeros((1, heads, 0, size), np.float32) for name, (heads, size) in past.items()}
    return opened.run(["logits"], feeds)[0]


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def ratio(first: ort.InferenceSession, second: ort.InferenceSession, rows: int, repeats: int) -> float:
    """Median time of the first over that of the second, runs in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 2):
        for opened, kept in zip((first, second), times, strict=True):
            start = time.process_time()
            logits(opened, rows)
            kept.append(time.process_time() - start)
    return float(np.median(times[0][2:]) / np.median(times[1][2:]))


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    checkpoint = mixtral(arguments.hidden, arguments.ffn, arguments.experts)
    with tempfile.TemporaryDirectory() as folder:
        model, one_node = (written(checkpoint, Path(folder) / str(way), one_node=way) for way in (False, True))
    exact = session(at_level(model, 0), plain=True)
    expected = logits(exact, ROWS[-1])
    found = []
    for level in (0, 4):
        plain = session(at_level(one_node, level), plain=True)
        mine, shipped = (session(at_level(m, level)) for m in (model, one_node))
        figures: dict[str, Any] = {
            "accuracy level": level,
            "QMoE off by": apart(logits(plain, ROWS[-1]), expected),
            "ours off by": apart(logits(mine, ROWS[-1]), expected),
        }
        figures |= {f"{rows} tokens": ratio(mine, shipped, rows, arguments.repeats) for rows in ROWS}
        found.append(figures)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for word, default in (("hidden", 512), ("ffn", 1024), ("experts", 8), ("repeats", 15)):
        parser.add_argument(f"--{word}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    rows = measure(arguments)
    sizes = {word: getattr(arguments, word) for word in ("hidden", "ffn", "experts", "repeats")}
    sizes["load"] = round(os.getloadavg()[0])
    data = {"sizes": sizes, "used": USED, "onnxruntime": version("onnxruntime"), "rows": rows}
    (arguments.out / "qmoe.json").write_text(json.dumps(data, indent=2) + "\n")
    (arguments.out / "qmoe.md").write_text(page(sizes, rows))
    print(page(sizes, rows))


def page(sizes: dict[str, int], rows: list[dict[str, Any]]) -> str:
    words = list(rows[0])
    cells = [
        [f"{v:.1e}" if "off" in k else f"{v:.2f}" if isinstance(v, float) else str(v) for k, v in r.items()]
        for r in rows
    ]
    table = [words, ["---"] * len(words), *cells]
    return (
        "# QMoE against one MatMulNBits a matrix\n\nWritten by `python benchmarks/qmoe.py`; onnxruntime "
        f"{version('onnxruntime')}, one thread, load {sizes['load']} on the machine; one block of width "
        f"{sizes['hidden']}, {sizes['experts']} experts of {sizes['ffn']}, {USED} a token. Distances are relative "
        "(L2) to our graph with float32 accumulation; ratios are processor time of our graph over QMoE's, above 1 "
        "where QMoE is faster.\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in table)
    )


if __name__ == "__main__":
    main()
