"""Experts in ONNX Runtime's QMoE against our graph of one MatMulNBits a matrix: the same integers, right and how fast?

    python benchmarks/qmoe.py [--hidden 512] [--ffn 1024] [--experts 8] [--bits 4] [--repeats 15] [--out DIR]

One block of a random Mixtral (two experts a token) is written by our exporter; in a second copy everything between the
router's logits and the sum over experts is replaced by QMoE, whose stacks are made of the first file's bytes: gate and
up rows in turns (the only order that the CPU kernel takes), scales and codes as they are. Both are compared, output
against output, with optimisations off and float32 accumulation, and as shipped. Times are those of whole graphs, the
runs interleaved, one thread; ratios are ours over QMoE's, above 1 where QMoE is faster.
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
from onnx import helper, numpy_helper

from tightship.architecture import architecture_for
from tightship.checkpoint import Checkpoint, Source
from tightship.exporters.onnx_assemble import write_graph
from tightship.exporters.onnx_candidates.direct import DirectCandidate
from tightship.exporters.onnx_schemes import style_for
from tightship.formats.layouts import parse_layout
from tightship.target import Target
from tightship.weights import Dense, Quantized

BLOCK, USED = 32, 2
ROWS = (1, 16, 128)
MATRICES = {"gate": "w1", "up": "w3", "down": "w2"}


def mixtral(hidden: int, ffn: int, experts: int, bits: int) -> Checkpoint:
    """One block, every matrix of it in groups of 32."""
    config = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 256, "hidden_size": hidden,
        "intermediate_size": ffn, "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 2,
        "num_local_experts": experts, "num_experts_per_tok": USED, "max_position_embeddings": 512, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "sliding_window": None, "tie_word_embeddings": False,
    }  # fmt: skip
    rng, layout = np.random.default_rng(0), parse_layout(f"int{bits}")
    architecture = architecture_for(config)
    weights: dict[str, Any] = {}
    for name, info in architecture.lookup(config).items():
        w = rng.standard_normal(info.shape).astype(np.float32) / np.float32(np.sqrt(info.shape[-1]))
        linear = info.rule.kind == "linear"
        weights[name] = Quantized.of(layout, layout.quantize(w)) if linear else Dense.of(w)
    return Checkpoint("mixtral", config, weights, {}, architecture, Source("random", None, ()))


def ours(checkpoint: Checkpoint, folder: Path) -> onnx.ModelProto:
    shapes = {name: tuple(checkpoint.resolve(name).shape) for name in checkpoint.weights}
    skeleton = DirectCandidate().build(checkpoint.config, checkpoint.architecture, shapes)
    write_graph(skeleton, checkpoint, folder, style_for(checkpoint, Target("onnx")))
    return onnx.load(folder / "model.onnx")


def with_qmoe(model: onnx.ModelProto, experts: int, bits: int, level: int) -> onnx.ModelProto:
    """The same graph with QMoE from the router's logits to the sum; nodes that nobody reads any more are dropped."""
    found = onnx.ModelProto()
    found.CopyFrom(model)
    nodes, held = found.graph.node, {t.name: t for t in found.graph.initializer}
    products = {n.input[1]: n for n in nodes if n.op_type == "MatMulNBits" and ".experts." in n.input[1]}
    total = [n for n in nodes if n.op_type == "ScatterND"][-1]
    softmax = next(n for n in nodes if n.op_type == "Softmax")
    router = next(n for n in nodes if softmax.input[0] in n.output)
    stacks: dict[str, np.ndarray] = {}
    for word, part in MATRICES.items():
        mine = [next(n for name, n in products.items() if f"experts.{e}.{part}." in name) for e in range(experts)]
        codes = [numpy_helper.to_array(held[n.input[1]]) for n in mine]
        rows = codes[0].shape[0]
        stacks[word] = np.stack([c.reshape(rows, -1) for c in codes])
        stacks[f"{word}.scales"] = np.stack([numpy_helper.to_array(held[n.input[2]]).reshape(rows, -1) for n in mine])
    merged = {"moe.down": stacks["down"], "moe.down.scales": stacks["down.scales"]}
    for end in ("", ".scales"):
        pair = np.stack([stacks[f"gate{end}"], stacks[f"up{end}"]], axis=2)
        merged[f"moe.gate_up{end}"] = pair.reshape(experts, -1, pair.shape[-1])
    inputs = [router.input[0], router.output[0], "moe.gate_up", "moe.gate_up.scales", "", "moe.down", "moe.down.scales"]
    node = helper.make_node(
        "QMoE", inputs, [total.output[0]], domain="com.microsoft", k=USED, expert_weight_bits=bits, block_size=BLOCK,
        normalize_routing_weights=1, activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.0,
        activation_beta=0.0, accuracy_level=level,
    )  # fmt: skip
    place = list(nodes).index(total)
    nodes.remove(total)
    nodes.insert(place, node)
    found.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in merged.items())
    return _pruned(found)


def _pruned(model: onnx.ModelProto) -> onnx.ModelProto:
    graph = model.graph
    wanted = {o.name for o in graph.output}
    for node in reversed(list(graph.node)):
        if wanted.intersection(node.output):
            wanted.update(node.input)
        else:
            graph.node.remove(node)
    for tensor in [t for t in graph.initializer if t.name not in wanted]:
        graph.initializer.remove(tensor)
    return model


def at_level(model: onnx.ModelProto, level: int) -> onnx.ModelProto:
    """The graph with every MatMulNBits at an accuracy level."""
    found = onnx.ModelProto()
    found.CopyFrom(model)
    for node in found.graph.node:
        kept = [a for a in node.attribute if a.name != "accuracy_level"]
        if node.op_type == "MatMulNBits":
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


def measure(arguments: argparse.Namespace, bits: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        model = ours(mixtral(arguments.hidden, arguments.ffn, arguments.experts, bits), Path(folder))
    exact = session(at_level(model, 0), plain=True)
    found = []
    for level in (0, 4):
        theirs = with_qmoe(at_level(model, level), arguments.experts, bits, level)
        plain, mine, shipped = session(theirs, plain=True), session(at_level(model, level)), session(theirs)
        expected = logits(exact, ROWS[-1])
        figures: dict[str, Any] = {
            "bits": bits,
            "accuracy level": level,
            "QMoE off by": apart(logits(plain, ROWS[-1]), expected),
        }
        figures["ours off by"] = apart(logits(mine, ROWS[-1]), expected)
        figures |= {f"{rows} tokens": ratio(mine, shipped, rows, arguments.repeats) for rows in ROWS}
        found.append(figures)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for word, default in (("hidden", 512), ("ffn", 1024), ("experts", 8), ("repeats", 15)):
        parser.add_argument(f"--{word}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    rows = [row for bits in (4, 8) for row in measure(arguments, bits)]
    sizes = {word: getattr(arguments, word) for word in ("hidden", "ffn", "experts", "repeats")}
    sizes["load"] = round(os.getloadavg()[0])
    data = {"sizes": sizes, "block": BLOCK, "used": USED, "onnxruntime": version("onnxruntime"), "rows": rows}
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
