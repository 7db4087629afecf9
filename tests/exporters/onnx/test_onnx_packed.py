"""Queries, keys and values out of one product: what the file holds, what ONNX Runtime makes of it, what stays apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tightship.checkpoint import Checkpoint
from tightship.exporters.onnx_candidates.packed import MOST_ELEMENTS, packs
from tightship.exporters.onnx_joined import join_products
from tightship.exporters.to_onnx import OnnxExporter
from tightship.formats.layouts import parse_layout
from tightship.modelview import ModelView
from tightship.passes import pass_for
from tightship.passes.base import Run
from tightship.target import Target, no_progress
from tightship.validators.parity import judge
from tightship.validators.prove import prove_values
from tightship.validators.runtimes import onnx_runtime
from tightship.validators.stored_onnx import OnnxStored
from tightship.weights import Alias, Quantized, Weight

Tiny = Callable[[str], Checkpoint]
IDS = np.random.default_rng(0).integers(1, 90, (2, 12))
THREE = ("q_proj", "k_proj", "v_proj")


def rounded(checkpoint: Checkpoint, words: dict[str, str]) -> Checkpoint:
    """Every matrix of the blocks in the layout of its last name, int4 where there is none."""
    weights: dict[str, Weight] = {}
    for info in checkpoint.linears():
        if info.name in checkpoint.weights and info.block is not None:
            layout = parse_layout(words.get(info.name.split(".")[-2], "int4"))
            weights[info.name] = Quantized.of(layout, layout.quantize(checkpoint.resolve(info.name).value()))
    return checkpoint.with_weights(weights)


def write(checkpoint: Checkpoint, directory: Path) -> Path:
    exporter = OnnxExporter(judge=judge)
    directory.mkdir(exist_ok=True)
    exporter.export(checkpoint, exporter.plan(checkpoint, Target("onnx")), directory, no_progress)
    return directory / "model.onnx"


def kinds(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


def optimized(path: Path, scratch: Path) -> list[str]:
    """Types of the nodes that ONNX Runtime runs."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.optimized_model_filepath = str(scratch / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return kinds(scratch / "optimized.onnx")


def check_logits(checkpoint: Checkpoint, path: Path) -> None:
    """Against transformers, in one pass and through the cache, with optimisations off."""
    import torch

    view = ModelView(checkpoint)
    with view.computing():
        expected = view.module()(input_ids=torch.from_numpy(IDS), use_cache=False).logits.numpy()
    for want in ("outputs", "decode"):
        job = {"artifact": str(path.parent), "main": path.name, "mode": "graph", "want": want}
        got = onnx_runtime.run(job, {"input_ids": IDS})[1]["logits"]
        assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "opt"])
@pytest.mark.parametrize("quantized", [False, True])
def test_one_product_a_block(tiny: Tiny, tmp_path: Path, family: str, quantized: bool) -> None:
    """Without biases and with them, from three matrices and from rows of one; rotated, or with places looked up."""
    plain = tiny(family)
    solved = rounded(plain, {}) if quantized else plain
    path = write(solved, tmp_path / "onnx")
    check_logits(solved, path)
    layers = int(plain.hyper["layers"])
    found = optimized(path, tmp_path)
    mlp = {"llama": 3, "qwen2": 3, "phi3": 3, "opt": 2}[family]
    product = "MatMulNBits" if quantized else "MatMul"
    assert found.count(product) == layers * (1 + 1 + mlp) + (not quantized)
    assert "Concat" not in found
    assert "RotaryEmbedding" not in found
    proof = prove_values(solved, OnnxExporter(judge=judge).plan(solved, Target("onnx")), OnnxStored(solved, path))
    assert [check.reason for check in proof.checks if check.verdict != "pass"] == []


def test_the_matrices_keep_initializers_of_their_own(tiny: Tiny, tmp_path: Path) -> None:
    """Their values by ONNX Runtime are rows of the product; a byte changed in one is seen in that one alone."""
    solved = rounded(tiny("opt"), {})
    path = write(solved, tmp_path / "onnx")
    stored = OnnxStored(solved, path)
    names = [f"model.decoder.layers.1.self_attn.{word}.weight" for word in THREE]
    for name in names:
        np.testing.assert_array_equal(stored.value(name), solved.resolve(name).value())
    codes = next(i for i in onnx.load(path, load_external_data=False).graph.initializer if i.name == f"{names[1]}.B")
    place = int({entry.key: entry.value for entry in codes.external_data}["offset"])
    data = bytearray(path.with_name("model.onnx_data").read_bytes())
    data[place] ^= 1
    path.with_name("model.onnx_data").write_bytes(data)
    plan = OnnxExporter(judge=judge).plan(solved, Target("onnx"))
    checks = prove_values(solved, plan, OnnxStored(solved, path)).checks
    assert {check.tensor for check in checks if check.verdict != "pass"} == {names[1]}


@pytest.mark.parametrize("words", [{"k_proj": "int8"}, {"v_proj": "int4-asym"}, {"q_proj": "int4-g16"}])
def test_layouts_that_differ_stay_apart(tiny: Tiny, tmp_path: Path, words: dict[str, str]) -> None:
    solved = rounded(tiny("llama"), words)
    path = write(solved, tmp_path / "onnx")
    check_logits(solved, path)
    found = optimized(path, tmp_path)
    layers = int(solved.hyper["layers"])
    assert found.count("Concat") == layers
    assert found.count("MatMulNBits") == layers * 7


def test_low_rank_stays_apart(tiny: Tiny, tmp_path: Path) -> None:
    thin = pass_for("low-rank", {"rank": 8, "method": "svd"}).apply(tiny("llama"), Run())
    check_logits(thin, write(thin, tmp_path / "onnx"))


def test_blocks_that_share_weights_share_what_is_joined(tiny: Tiny, tmp_path: Path) -> None:
    solved = rounded(tiny("llama"), {})
    names = [name for name in solved.weights if ".layers.1." in name]
    shared = solved.replace(
        weights={**solved.weights, **{name: Alias(name.replace(".layers.1.", ".layers.0.")) for name in names}}
    )
    path = write(shared, tmp_path / "onnx")
    check_logits(shared, path)
    assert kinds(path).count("Concat") == 2  # codes and scales
    key = "model.layers.0.self_attn.k_proj.weight"
    np.testing.assert_array_equal(OnnxStored(shared, path).value(key), shared.resolve(key).value())


def test_a_text_longer_than_the_tables_is_an_error(tiny: Tiny, tmp_path: Path) -> None:
    plain = tiny("llama")
    path = write(plain, tmp_path / "onnx")
    long = np.ones((1, int(plain.hyper["context"]) + 1), np.int64)
    job = {"artifact": str(path.parent), "main": path.name, "mode": "graph"}
    onnx_runtime.run(job, {"input_ids": long[:, 1:]})
    with pytest.raises(Exception, match="cos_cache"):
        onnx_runtime.run(job, {"input_ids": long})


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"max_position_embeddings": MOST_ELEMENTS * 2 // 16}, True),
        ({"max_position_embeddings": MOST_ELEMENTS * 2 // 16 + 1}, False),
        ({"head_dim": 24}, False),
    ],
)
def test_where_it_stays_away(tiny: Tiny, change: dict[str, Any], fits: bool) -> None:
    llama = tiny("llama")
    assert packs(llama.replace(config={**llama.config, **change})) == fits


def test_other_concats_are_left_alone() -> None:
    """Of one product twice, of products of two inputs, of products with other readers."""
    x, other = (ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT)) for name in "xo")
    stored = [ir.Value(name=f"w{i}", const_value=ir.tensor(np.eye(2, dtype=np.float32), name=f"w{i}")) for i in (0, 1)]
    a, b, c = (ir.node("MatMul", [left, right]) for left, right in ((x, stored[0]), (x, stored[1]), (other, stored[1])))
    outs = [node.outputs[0] for node in (a, b, c)]
    joins = [ir.node("Concat", [outs[0], outs[0]], {"axis": -1}), ir.node("Concat", [outs[1], outs[2]], {"axis": -1})]
    joins.append(ir.node("Concat", [outs[0], outs[1]], {"axis": -1}))
    results = [node.outputs[0] for node in joins]
    graph = ir.Graph([x, other], results, nodes=[a, b, c, *joins], initializers=stored, opset_imports={"": 23})
    assert join_products(graph) == 0
    assert [node.op_type for node in graph] == ["MatMul"] * 3 + ["Concat"] * 3
