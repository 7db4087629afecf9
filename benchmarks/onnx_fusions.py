"""Fusions that our ONNX decoders do not use, against the graph as it is written: is one of them faster?

    python benchmarks/onnx_fusions.py ARTIFACT [--rounds 3] [--prompts 128 512] [--scratch DIR] [--out DIR]

ARTIFACT is a published `onnx:int4` of a Llama without biases (that of benchmarks/onnx_end_to_end.py, say). Its graph is
rewritten, and each form runs in onnxruntime-genai, one thread, taking turns:

| form    | what differs                                                                               |
|---------|--------------------------------------------------------------------------------------------|
| packed  | one MatMulNBits for queries, keys and values, and a Split                                  |
| rotated | the same, and GroupQueryAttention takes them as one and rotates by itself (`do_rotary`)    |
| apart   | Add and RMSNormalization in the place of SkipSimplifiedLayerNormalization                  |

Ratios are medians over rounds of processor time: above 1 the form is faster than the graph as written. Writes
onnx_fusions.json and .md; rounds are added to those in the results when `--scratch` is given.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tightship.validators.bench import Plan, bench, subjects

Model = onnx.ModelProto


def packed(model: Model, config: dict[str, Any]) -> None:  # noqa: ARG001 - one signature
    for attention in groups(model):
        products = [producer(model, name) for name in rotated_inputs(model, attention)]
        joined, widths = join(model, products)
        sizes = add(model, f"{joined}.sizes", np.asarray(widths, np.int64))
        split = helper.make_node("Split", [joined, sizes], [p.output[0] for p in products], axis=2)
        put_after(model, joined, split)
        for product in products:
            model.graph.node.remove(product)


def rotated(model: Model, config: dict[str, Any]) -> None:
    cos, sin = (add(model, f"angles.{f.__name__}", f(angles(config)).astype(np.float32)) for f in (np.cos, np.sin))
    for attention in groups(model):
        turns = [producer(model, name) for name in attention.input[:2]]
        products = [producer(model, name) for name in rotated_inputs(model, attention)]
        joined, _ = join(model, products)
        attention.input[:3] = [joined, "", ""]
        attention.input[7:9] = [cos, sin]
        next(a for a in attention.attribute if a.name == "do_rotary").i = 1
        for node in (*products, *turns):
            model.graph.node.remove(node)
    without_positions(model)


def apart(model: Model, config: dict[str, Any]) -> None:  # noqa: ARG001 - one signature
    for node in [n for n in model.graph.node if n.op_type == "SkipSimplifiedLayerNormalization"]:
        total = node.output[3] if len(node.output) > 3 and node.output[3] else f"{node.output[0]}.sum"
        epsilon = next(a.f for a in node.attribute if a.name == "epsilon")
        place = list(model.graph.node).index(node)
        norm = helper.make_node("RMSNormalization", [total, node.input[2]], [node.output[0]], axis=-1, epsilon=epsilon)
        model.graph.node.insert(place, norm)
        model.graph.node.insert(place, helper.make_node("Add", list(node.input[:2]), [total]))
        model.graph.node.remove(node)


FORMS: dict[str, Callable[[Model, dict[str, Any]], None]] = {"packed": packed, "rotated": rotated, "apart": apart}


def groups(model: Model) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]


def producer(model: Model, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if name in node.output)


def rotated_inputs(model: Model, attention: onnx.NodeProto) -> list[str]:
    """Outputs of the three products, looking through the rotations of queries and keys."""
    query, key = (producer(model, name).input[0] for name in attention.input[:2])
    return [query, key, attention.input[2]]


def join(model: Model, products: list[onnx.NodeProto]) -> tuple[str, list[int]]:
    """One MatMulNBits with the rows of all, before the first of them; its output, and how many rows each had."""
    operands = []
    for place in range(1, len(products[0].input)):
        arrays = [array(model, p.input[place]) for p in products]
        operands.append(add(model, f"{products[0].output[0]}.joined.{place}", np.concatenate(arrays)))
    widths = [next(a.i for a in p.attribute if a.name == "N") for p in products]
    attributes = {a.name: a.i for a in products[0].attribute} | {"N": sum(widths)}
    output = f"{products[0].output[0]}.joined"
    inputs = [products[0].input[0], *operands]
    whole = helper.make_node("MatMulNBits", inputs, [output], domain="com.microsoft", **attributes)
    model.graph.node.insert(list(model.graph.node).index(products[0]), whole)
    return output, widths


def put_after(model: Model, name: str, node: onnx.NodeProto) -> None:
    model.graph.node.insert(list(model.graph.node).index(producer(model, name)) + 1, node)


def array(model: Model, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(i for i in model.graph.initializer if i.name == name))


def add(model: Model, name: str, values: np.ndarray) -> str:
    model.graph.initializer.append(numpy_helper.from_array(values, name))
    return name


def angles(config: dict[str, Any]) -> np.ndarray:
    """(positions, half a head) of the plain rotation."""
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    said = config.get("rope_parameters") or {}
    frequencies = float(said.get("rope_theta", 10000.0)) ** (-np.arange(0, head, 2) / head)
    return np.outer(np.arange(config["max_position_embeddings"]), frequencies)


def without_positions(model: Model) -> None:
    """Drop `position_ids` and what was computed from it alone."""
    read = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
    while dead := [n for n in model.graph.node if not read.intersection(n.output)]:
        for node in dead:
            model.graph.node.remove(node)
        read = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
    for value in [i for i in model.graph.input if i.name not in read]:
        model.graph.input.remove(value)


def make(source: Path, target: Path, rewrite: Callable[[Model, dict[str, Any]], None]) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("model.onnx*"))
    model = onnx.load(source / "model.onnx")
    rewrite(model, json.loads((source / "config.json").read_text()))
    used = {name for node in model.graph.node for name in node.input}
    for unused in [i for i in model.graph.initializer if i.name not in used]:
        model.graph.initializer.remove(unused)
    onnx.save(model, target / "model.onnx", save_as_external_data=True, location="model.onnx_data")
    settings = json.loads((target / "genai_config.json").read_text())
    if "position_ids" not in {i.name for i in model.graph.input}:
        del settings["model"]["decoder"]["inputs"]["position_ids"]
    (target / "genai_config.json").write_text(json.dumps(settings))


def measured(folder: Path, prompt: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """form -> part -> processor seconds of each round, the fastest pass."""
    plan = Plan(prompt=prompt, decode=32, rounds=rounds)
    chosen = [s for s in subjects(folder) if s.runtime == "onnxruntime-genai"]
    result = bench(folder, plan, chosen=chosen)
    return {
        m.subject.name: {part: [min(r[f"{part}_cpu"]) for r in m.rounds] for part in ("prefill", "decode")}
        for m in result.measured
    }


def write(seconds: dict[str, Any], out: Path) -> None:
    lines = ["# Fusions of an int4 decoder against the graph as it is written", ""]
    lines += ["| form | prompt | prefill | decode | rounds |", "|---|---|---|---|---|"]
    for prompt, found in seconds.items():
        for form in FORMS:
            pairs = {
                part: zip(found["written"][part], found[form][part], strict=True) for part in ("prefill", "decode")
            }
            cells = [f"{statistics.median(base / own for base, own in pairs[part]):.3f}x" for part in pairs]
            lines.append(f"| {form} | {prompt} | {' | '.join(cells)} | {len(found[form]['decode'])} |")
    out.mkdir(parents=True, exist_ok=True)
    (out / "onnx_fusions.json").write_text(json.dumps({"seconds": seconds}, indent=1) + "\n")
    (out / "onnx_fusions.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--scratch", type=Path, help="where graphs stay for a later run")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    path = options.out / "onnx_fusions.json"
    seconds = json.loads(path.read_text())["seconds"] if options.scratch and path.exists() else {}
    with tempfile.TemporaryDirectory(prefix="onnx-fusions-") as folder:
        scratch = options.scratch or Path(folder)
        for form, rewrite in {"written": lambda model, config: None, **FORMS}.items():  # noqa: ARG005
            if not (scratch / form).exists():
                make(options.artifact, scratch / form, rewrite)
        for prompt in options.prompts:
            held = seconds.setdefault(str(prompt), {})
            for form, parts in measured(scratch, prompt, options.rounds).items():
                for part, figures in parts.items():
                    held.setdefault(form, {}).setdefault(part, []).extend(figures)
        write(seconds, options.out)


if __name__ == "__main__":
    main()
