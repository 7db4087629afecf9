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
from tightship.formats.layouts import parse_layout
from tightship.passes import pass_for
from tightship.passes.base import Run
from tightship.validators.prove import prove_values
from tightship.validators.stored_onnx import OnnxStored
from tightship.weights import Alias

Tiny = Callable[[str], Checkpoint]
Directory = Callable[[str], Path]
IDS = np.random.default_rng(0).integers(1, 90, (2, 12))
THREE = ("q_proj", "k_proj", "v_proj")


def rounded(lab: Any, checkpoint: Checkpoint, **words: str) -> Checkpoint:
    """Every matrix of the blocks in the layout of its last name, int4 where there is none."""
    inside = [info for info in checkpoint.linears() if info.name in checkpoint.weights and info.block is not None]
    return lab.rounded(
        checkpoint, {info.name: parse_layout(words.get(info.name.split(".")[-2], "int4")) for info in inside}
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "opt"])
@pytest.mark.parametrize("quantized", [False, True])
def test_one_product_a_block(tiny: Tiny, tiny_directory: Directory, lab: Any, family: str, quantized: bool) -> None:
    """Without biases and with them, from three matrices and from rows of one; rotated, or with places looked up."""
    plain = tiny(family)
    solved = rounded(lab, plain) if quantized else plain
    directory, plan, _ = lab.build(solved)
    lab.check_logits(solved, tiny_directory(family), directory, IDS)
    layers = int(plain.hyper["layers"])
    found = lab.optimized(directory)
    mlp = {"llama": 3, "qwen2": 3, "phi3": 3, "opt": 2}[family]
    product = "MatMulNBits" if quantized else "MatMul"
    assert found.count(product) == layers * (1 + 1 + mlp) + (not quantized)
    assert "Concat" not in found
    assert "RotaryEmbedding" not in found
    proof = prove_values(solved, plan, OnnxStored(solved, directory / "model.onnx"))
    assert [check.reason for check in proof.checks if check.verdict != "pass"] == []


def test_the_matrices_keep_initializers_of_their_own(tiny: Tiny, lab: Any) -> None:
    """Their values by ONNX Runtime are rows of the product; a byte changed in one is seen in that one alone."""
    solved = rounded(lab, tiny("opt"))
    directory, plan, _ = lab.build(solved)
    path, data = directory / "model.onnx", directory / "model.onnx_data"
    stored = OnnxStored(solved, path)
    names = [f"model.decoder.layers.1.self_attn.{word}.weight" for word in THREE]
    for name in names:
        np.testing.assert_array_equal(stored.value(name), solved.resolve(name).value())
    codes = next(i for i in onnx.load(path, load_external_data=False).graph.initializer if i.name == f"{names[1]}.B")
    place = int({entry.key: entry.value for entry in codes.external_data}["offset"])
    changed = bytearray(data.read_bytes())
    changed[place] ^= 1
    data.write_bytes(changed)
    checks = prove_values(solved, plan, OnnxStored(solved, path)).checks
    assert {check.tensor for check in checks if check.verdict != "pass"} == {names[1]}


@pytest.mark.parametrize("operand", ["B", "scales", "zero_points"])
def test_the_proof_sees_operands_in_another_order(tiny: Tiny, lab: Any, operand: str) -> None:
    solved = rounded(lab, tiny("opt"), **dict.fromkeys(THREE, "int4-asym"))
    directory, plan, _ = lab.build(solved)
    path = directory / "model.onnx"
    names = [f"model.decoder.layers.1.self_attn.{word}.weight" for word in THREE]
    model = onnx.load(path, load_external_data=False)
    own = [f"{name}.{operand}" for name in names]
    join = next(node for node in model.graph.node if node.op_type == "Concat" and list(node.input) == own)
    join.input[:] = [own[1], own[0], own[2]]
    onnx.save(model, path)
    checks = prove_values(solved, plan, OnnxStored(solved, path)).checks
    found = {check.tensor: check.reason for check in checks if check.verdict != "pass" and check.tensor}
    assert found.keys() == {*names}
    assert all("list different matrices" in str(reason) for reason in found.values())


@pytest.mark.parametrize("words", [{"k_proj": "int8"}, {"v_proj": "int4-asym"}, {"q_proj": "int4-g16"}])
def test_layouts_that_differ_stay_apart(tiny: Tiny, tiny_directory: Directory, lab: Any, words: dict[str, str]) -> None:
    solved = rounded(lab, tiny("llama"), **words)
    directory, _, _ = lab.build(solved)
    lab.check_logits(solved, tiny_directory("llama"), directory, IDS)
    found = lab.optimized(directory)
    layers = int(solved.hyper["layers"])
    assert found.count("Concat") == layers
    assert found.count("MatMulNBits") == layers * 7


def test_low_rank_stays_apart(tiny: Tiny, tiny_directory: Directory, lab: Any) -> None:
    thin = pass_for("low-rank", {"rank": 8, "method": "svd"}).apply(tiny("llama"), Run())
    directory, _, _ = lab.build(thin)
    lab.check_logits(thin, tiny_directory("llama"), directory, IDS)


def test_blocks_that_share_weights_share_what_is_joined(tiny: Tiny, tiny_directory: Directory, lab: Any) -> None:
    solved = rounded(lab, tiny("llama"))
    names = [name for name in solved.weights if ".layers.1." in name]
    shared = solved.replace(
        weights={**solved.weights, **{name: Alias(name.replace(".layers.1.", ".layers.0.")) for name in names}}
    )
    directory, _, _ = lab.build(shared)
    lab.check_logits(shared, tiny_directory("llama"), directory, IDS)
    path = directory / "model.onnx"
    graph = onnx.load(path, load_external_data=False).graph
    assert [node.op_type for node in graph.node].count("Concat") == 2  # codes and scales
    key = "model.layers.0.self_attn.k_proj.weight"
    np.testing.assert_array_equal(OnnxStored(shared, path).value(key), shared.resolve(key).value())


def test_a_text_longer_than_the_tables_is_an_error(tiny: Tiny, lab: Any) -> None:
    plain = tiny("llama")
    directory, _, _ = lab.build(plain)
    long = np.ones((1, int(plain.hyper["context"]) + 1), np.int64)
    lab.run(directory, long[:, 1:])
    with pytest.raises(Exception, match="cos_cache"):
        lab.run(directory, long)


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
