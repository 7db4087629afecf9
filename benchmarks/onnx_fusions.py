"""Fusions of an ONNX decoder, one by one, against the graph as it is written: is one of them faster?

    python benchmarks/onnx_fusions.py ARTIFACT [--beside ARTIFACT] [--sittings 6] [--prompts 128 512] [--scratch DIR]
                                      [--out DIR]

ARTIFACT is a published `onnx:int4` or `onnx:fp32` of a Llama without biases (those of benchmarks/onnx_end_to_end.py,
say), `--beside` another one, to be compared as it is: with standard operators only, or of another builder. The graph is
rewritten:

| form      | what differs                                                                               |
|-----------|--------------------------------------------------------------------------------------------|
| again     | nothing: how far two figures of one graph lie apart                                        |
| unpacked  | queries, keys and values are three products, rotated by operators of their own              |
| gate_up   | one product for gate and up, and a Split                                                   |
| skip      | SkipSimplifiedLayerNormalization in the place of Add and RMSNormalization                  |
| apart     | the other way around                                                                       |
| symmetric | no zero points where a quantized head says the default ones                                |
| last      | the head multiplies the last token alone                                                   |

In a sitting all forms are opened anew in one process of one thread and take turns pass by pass; GroupQueryAttention has
past and present in one buffer. Ratios are medians over sittings of the fastest passes' processor time: above 1 the form
is faster than the graph as written. Writes onnx_fusions-NAME.json and .md; with `--scratch` graphs stay, and sittings
are added to those in the results.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

DECODED, TURNS = 16, 4
Model = onnx.ModelProto


def unpacked(model: Model, config: dict[str, Any]) -> None:
    joined = {node.output[0]: list(node.input) for node in model.graph.node if node.op_type == "Concat"}
    counts = dict(zip("qk", (config["num_attention_heads"], config["num_key_value_heads"]), strict=True))
    model.graph.input.append(helper.make_tensor_value_info("position_ids", onnx.TensorProto.INT64, ["b", "s"]))
    for attention in [node for node in groups(model) if node.input[0] and not node.input[1]]:
        whole = producer(model, attention.input[0])
        given = {a.name: a.i for a in whole.attribute}
        for letter, names in zip("qkv", zip(*(joined[name] for name in whole.input[1:]), strict=True), strict=True):
            output = f"{attention.name}.{letter}"
            sizes = {"N": array(model, names[0]).shape[0]} if "N" in given else {}
            inputs = [whole.input[0], *names]
            nodes = [helper.make_node(whole.op_type, inputs, [output], domain=whole.domain, **(given | sizes))]
            if letter in counts:
                angles = [output, *attention.input[7:9], "position_ids"]
                turned = f"{output}.turned"
                nodes.append(helper.make_node("RotaryEmbedding", angles, [turned], num_heads=counts[letter]))
            for node in nodes:
                model.graph.node.insert(list(model.graph.node).index(attention), node)
            attention.input["qkv".index(letter)] = nodes[-1].output[0]
        attention.input[7:10] = ["", "", ""]
        next(a for a in attention.attribute if a.name == "do_rotary").i = 0
        model.graph.node.remove(whole)


def apart(model: Model, config: dict[str, Any]) -> None:  # noqa: ARG001 - one signature
    for node in [n for n in model.graph.node if n.op_type == "SkipSimplifiedLayerNormalization"]:
        total = node.output[3] if len(node.output) > 3 and node.output[3] else f"{node.output[0]}.sum"
        epsilon = next(a.f for a in node.attribute if a.name == "epsilon")
        place = list(model.graph.node).index(node)
        norm = helper.make_node("RMSNormalization", [total, node.input[2]], [node.output[0]], axis=-1, epsilon=epsilon)
        model.graph.node.insert(place, norm)
        model.graph.node.insert(place, helper.make_node("Add", list(node.input[:2]), [total]))
        model.graph.node.remove(node)


def skip(model: Model, config: dict[str, Any]) -> None:  # noqa: ARG001 - one signature
    for node in [n for n in model.graph.node if n.op_type == "RMSNormalization"]:
        total = next((n for n in model.graph.node if node.input[0] in n.output and n.op_type == "Add"), None)
        if total is None:
            continue
        epsilon = next(a.f for a in node.attribute if a.name == "epsilon")
        inputs, outputs = [*total.input, node.input[1]], [node.output[0], "", "", total.output[0]]
        joined = helper.make_node(
            "SkipSimplifiedLayerNormalization", inputs, outputs, domain="com.microsoft", epsilon=epsilon
        )
        model.graph.node.insert(list(model.graph.node).index(node), joined)
        for old in (node, total):
            model.graph.node.remove(old)


def gate_up(model: Model, config: dict[str, Any]) -> None:  # noqa: ARG001 - one signature
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        if node.op_type in PRODUCTS and ".mlp." in node.input[1]:
            readers.setdefault(node.input[0], []).append(node)
    for pair in [found for found in readers.values() if len(found) == len(("gate", "up"))]:
        split(model, pair)


def symmetric(model: Model, config: dict[str, Any]) -> None:  # noqa: ARG001 - one signature
    for node in [n for n in model.graph.node if n.op_type == "MatMulNBits" and len(n.input) > len("ABs")]:
        if (array(model, node.input[3]) == HALF_AND_HALF).all():
            del node.input[3]


def last(model: Model, config: dict[str, Any]) -> None:  # noqa: ARG001 - one signature
    head = producer(model, "logits")
    bounds = [add(model, f"last.{n}", np.asarray([n])) for n in (-1, np.iinfo(np.int64).max, 1)]
    put_after(model, head.input[0], helper.make_node("Slice", [head.input[0], *bounds], ["last.token"]))
    head.input[0] = "last.token"
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1


PRODUCTS = ("MatMul", "MatMulNBits")
HALF_AND_HALF = 0x88  # two codes of 8, what absent zero points of 4 bits are
FORMS: dict[str, Callable[[Model, dict[str, Any]], None]] = {
    "unpacked": unpacked, "gate_up": gate_up, "skip": skip, "apart": apart, "symmetric": symmetric,
    "last": last,
}  # fmt: skip


def groups(model: Model) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]


def producer(model: Model, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if name in node.output)


def split(model: Model, products: list[onnx.NodeProto]) -> None:
    """One product in the place of several, and a Split behind it."""
    joined, widths = join(model, products)
    sizes = add(model, f"{joined}.sizes", np.asarray(widths, np.int64))
    put_after(model, joined, helper.make_node("Split", [joined, sizes], [p.output[0] for p in products], axis=2))
    for product in products:
        model.graph.node.remove(product)


def join(model: Model, products: list[onnx.NodeProto]) -> tuple[str, list[int]]:
    """One product with the rows of all, before the first of them; its output, and how many rows each had."""
    quantized = products[0].op_type == "MatMulNBits"
    operands, widths = [], []
    for place in range(1, len(products[0].input)):
        arrays = [array(model, p.input[place]) for p in products]
        widths = [a.shape[0 if quantized else 1] for a in arrays]
        merged = np.concatenate(arrays, axis=0 if quantized else 1)
        operands.append(add(model, f"{products[0].output[0]}.joined.{place}", merged))
    attributes = {a.name: a.i for a in products[0].attribute} | ({"N": sum(widths)} if quantized else {})
    output = f"{products[0].output[0]}.joined"
    inputs = [products[0].input[0], *operands]
    whole = helper.make_node(products[0].op_type, inputs, [output], domain=products[0].domain, **attributes)
    model.graph.node.insert(list(model.graph.node).index(products[0]), whole)
    return output, widths


def put_after(model: Model, name: str, node: onnx.NodeProto) -> None:
    model.graph.node.insert(list(model.graph.node).index(producer(model, name)) + 1, node)


def array(model: Model, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(i for i in model.graph.initializer if i.name == name))


def add(model: Model, name: str, values: np.ndarray) -> str:
    model.graph.initializer.append(numpy_helper.from_array(values, name))
    return name


def make(source: Path, target: Path, rewrite: Callable[[Model, dict[str, Any]], None]) -> None:
    """The rewritten graph; no file where the rewrite finds nothing to do."""
    model = onnx.load(source / "model.onnx")
    before = model.graph.SerializeToString()
    rewrite(model, json.loads((source / "config.json").read_text()))
    target.mkdir(parents=True)
    if model.graph.SerializeToString() == before:
        return
    used = {name for node in model.graph.node for name in node.input}
    for unused in [i for i in model.graph.initializer if i.name not in used]:
        model.graph.initializer.remove(unused)
    onnx.save(model, target / "model.onnx", save_as_external_data=True, location="model.onnx_data")


class Decoder:
    """One graph, one thread. A cache that can be filled in place is."""

    def __init__(self, path: Path, head: int) -> None:
        self.head = head
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(path, load_external_data=False).graph
        self.shared = any(node.op_type == "GroupQueryAttention" for node in graph.node)
        self.past = {i.name: i.shape for i in self.session.get_inputs() if i.name.startswith("past")}
        self.inputs = {i.name for i in self.session.get_inputs()} - {*self.past}
        self.kept: dict[str, ort.OrtValue] = {}

    def start(self, length: int) -> None:
        size = length if self.shared else 0
        self.kept = {
            name: ort.OrtValue.ortvalue_from_numpy(np.zeros((1, shape[1], size, self.head), np.float32))
            for name, shape in self.past.items()
        }

    def step(self, ids: np.ndarray, total: int) -> float:
        """Processor seconds of one pass over the next tokens."""
        count = ids.shape[1]
        given = {
            "input_ids": ids,
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(total - count, total)[None],
        }
        bound = self.session.io_binding()
        for name in self.inputs:
            bound.bind_cpu_input(name, given[name])
        for name, value in self.kept.items():
            bound.bind_ortvalue_input(name, value)
            present = name.replace("past_key_values", "present")
            if self.shared:
                bound.bind_ortvalue_output(present, value)
            else:
                bound.bind_output(present, "cpu")
        bound.bind_output("logits", "cpu")
        start = time.process_time()
        self.session.run_with_iobinding(bound)
        spent = time.process_time() - start
        if not self.shared:
            self.kept = dict(zip(self.kept, bound.get_outputs()[: len(self.kept)], strict=True))
        return spent


def measured(graphs: dict[str, Path], prompt: int, head: int) -> dict[str, dict[str, float]]:
    """form -> part -> processor seconds of the fastest pass: the whole prompt, one token behind it."""
    rng = np.random.default_rng()
    opened = {name: Decoder(graphs[name], head) for name in rng.permutation([*graphs])}
    ids = np.random.default_rng(0).integers(1, 256, (1, prompt + DECODED))
    found: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in opened}
    for turn in range(TURNS + 1):  # the first warms up
        order = [list(opened.items())[i] for i in rng.permutation(len(opened))]
        for name, decoder in order:
            decoder.start(prompt + DECODED)
            spent = decoder.step(ids[:, :prompt], prompt)
            found[name]["prefill"] += [spent] if turn else []
        for at in range(prompt, prompt + DECODED):
            for name, decoder in order:
                spent = decoder.step(ids[:, at : at + 1], at + 1)
                found[name]["decode"] += [spent] if turn else []
    return {name: {part: min(figures) for part, figures in parts.items()} for name, parts in found.items()}


def write(seconds: dict[str, Any], artifact: str, out: Path) -> None:
    lines = [f"# Fusions of {artifact} against the graph as it is written", ""]
    about = "Written by `python benchmarks/onnx_fusions.py`, which says what the forms are;"
    lines += [
        f"{about} onnxruntime {version('onnxruntime')}, one thread, load {os.getloadavg()[0]:.0f} at the end.",
        "",
    ]
    lines += ["| form | prompt | prefill | decode | sittings |", "|---|---|---|---|---|"]
    for prompt, found in seconds.items():
        for form in [name for name in found if name != "written"]:
            pairs = {
                part: zip(found["written"][part], found[form][part], strict=True) for part in ("prefill", "decode")
            }
            cells = [f"{statistics.median(base / own for base, own in pairs[part]):.3f}x" for part in pairs]
            lines.append(f"| {form} | {prompt} | {' | '.join(cells)} | {len(found[form]['prefill'])} |")
    out.mkdir(parents=True, exist_ok=True)
    name = f"onnx_fusions-{artifact}"
    (out / f"{name}.json").write_text(json.dumps({"seconds": seconds}) + "\n")
    (out / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--beside", type=Path, help="an artifact to be measured as it is")
    parser.add_argument("--sittings", type=int, default=6)
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--forms", nargs="+", choices=[*FORMS], default=[*FORMS])
    parser.add_argument("--scratch", type=Path, help="where graphs stay for a later run")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    name = options.artifact.resolve().name
    config = json.loads((options.artifact / "config.json").read_text())
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    path = options.out / f"onnx_fusions-{name}.json"
    seconds = json.loads(path.read_text())["seconds"] if options.scratch and path.exists() else {}
    with tempfile.TemporaryDirectory(prefix="onnx-fusions-") as folder:
        scratch = (options.scratch or Path(folder)) / name
        graphs = dict.fromkeys(("written", "again"), options.artifact / "model.onnx")
        for form in options.forms:
            if not (scratch / form).exists():
                make(options.artifact, scratch / form, FORMS[form])
            if (scratch / form / "model.onnx").exists():
                graphs[form] = scratch / form / "model.onnx"
        if options.beside:
            graphs["beside"] = options.beside / "model.onnx"
        for prompt in options.prompts:
            held = seconds.setdefault(str(prompt), {})
            for _ in range(options.sittings):
                for form, parts in measured(graphs, prompt, head).items():
                    for part, figure in parts.items():
                        held.setdefault(form, {}).setdefault(part, []).append(figure)
    write(seconds, name, options.out)


if __name__ == "__main__":
    main()
