"""Products in the graph: every form of a weight gives the layout's own values, in the kernel that was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tightship.activations import Activations
from tightship.checkpoint import Checkpoint
from tightship.exporters.onnx_assemble import write_graph
from tightship.exporters.onnx_candidates.direct import DirectCandidate
from tightship.exporters.onnx_candidates.mobius_graphs import MobiusCandidate
from tightship.exporters.onnx_candidates.skeleton import Candidate
from tightship.exporters.onnx_storage import Style
from tightship.formats.layouts import parse_layout
from tightship.formats.layouts.float8 import Float8
from tightship.validators.integers import digest, pieces_of
from tightship.validators.stored_onnx import OnnxStored
from tightship.weights import Dense, Factored, Quantized, Sum, Weight

EXAMPLES = Path(__file__).parents[3] / "examples"
IDS = np.random.default_rng(0).integers(1, 1024, (2, 12))


@pytest.mark.parametrize("word", ["int4", "int8-g64-asym", "int3-g16", "int6", "int4-channel"])
def test_the_kernel_multiplies_with_the_layouts_values(ember: Checkpoint, lab: Any, word: str) -> None:
    """Each MatMulNBits of the file, cut out and applied to the identity, gives the layout's values, bit by bit."""
    layout = parse_layout(word)
    quantized = {i.name: Quantized.of(layout, layout.quantize(ember.resolve(i.name).value())) for i in ember.linears()}
    directory, _, _ = lab.build(ember.with_weights(quantized))
    seen = 0
    for name, operands, attributes in lab.nodes(directory, "MatMulNBits"):
        got = on_identity(operands, attributes)
        arrays = quantized[name].read()
        np.testing.assert_array_equal(got, layout.values(arrays).astype(np.float32).T)
        seen += 1
    assert seen == len(quantized)


def on_identity(operands: dict[str, onnx.TensorProto], attributes: dict[str, int]) -> np.ndarray:
    import onnxruntime as ort

    width = attributes["K"]
    settings = {**attributes, "accuracy_level": 0}
    node = helper.make_node("MatMulNBits", ["A", *operands], ["Y"], domain="com.microsoft", **settings)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("A", TensorProto.FLOAT, [width, width])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)],
        list(operands.values()),
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"A": np.eye(width, dtype=np.float32)})[0])


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("word", ["q4_1", "int4"])
def test_low_rank_and_free_minima(ember: Checkpoint, lab: Any, word: str, portable: bool) -> None:
    """Factors, a quantized base with a residual, and layouts with a minimum keep their values."""
    layout = parse_layout(word)
    rng = np.random.default_rng(1)
    names = [i.name for i in ember.linears()]
    changed: dict[str, Weight] = {}
    for index, name in enumerate(names):
        value = ember.resolve(name).value()
        rows, cols = value.shape
        left = Dense.of((rng.standard_normal((rows, 8)) * 0.05).astype(np.float32))
        right = Dense.of((rng.standard_normal((8, cols)) * 0.05).astype(np.float32))
        base = Quantized.of(layout, layout.quantize(value))
        changed[name] = (base, Sum(base, Factored(left, right)), Factored(left, right))[index % 3]
    mixed = ember.with_weights(changed)
    directory, _, _ = lab.build(mixed, profile="portable" if portable else "ort")
    lab.check_logits(mixed, EXAMPLES / "ember", directory, IDS)


TABLES = ["fp8-e4m3", "fp8-e4m3-channel", "fp8-e4m3-block", "mxfp8", "mxfp4", "nvfp4", "nvfp4-scaled", "iq4_nl"]


@pytest.mark.parametrize("word", [*TABLES, "iq4_xs", "fp8-e4m3-g96"])
def test_floats_of_few_bits_are_decoded_once(ember: Checkpoint, lab: Any, word: str) -> None:
    """Every value as the layout has it; the file is small; what runs is a plain MatMul on folded weights."""
    layout = Float8(tile_rows=1, group_size=96) if word == "fp8-e4m3-g96" else parse_layout(word)
    quantized = {i.name: Quantized.of(layout, layout.quantize(ember.resolve(i.name).value())) for i in ember.linears()}
    mixed = ember.with_weights(quantized).replace(
        activations={"model.layers.0.mlp.up_proj": Activations("fp8-dynamic")}
    )
    directory, plan, _ = lab.build(mixed)
    expected = lab.expected(mixed, EXAMPLES / "ember", IDS)["logits"]
    assert lab.apart(lab.run(directory, IDS, mode="shipped")["logits"], expected) <= 1e-5
    assert any("fp8-dynamic activations stay float32" in note for note in plan.notes)
    assert any("14 matrices are small in the file alone" in note for note in plan.notes)
    held = sum(t.nbytes for t in plan.tensors if t.name in quantized)
    assert held * 8 < (5.1 if "4" in word[:5] else 8.7) * sum(int(np.prod(w.shape)) for w in quantized.values())
    ran = lab.optimized(directory)
    assert "DequantizeLinear" not in ran
    assert ran.count("MatMul") == 15 > ran.count("Cast")
    assert ran.count("Gather") == 1  # of the embedding: those of tables and scales are folded
    stored = OnnxStored(mixed, directory / "model.onnx")
    for name, weight in quantized.items():
        np.testing.assert_array_equal(stored.value(name), weight.value())
        pieces = stored.integers(name)
        assert pieces is not None
        assert digest(pieces) == digest(pieces_of(layout, weight.read()))


@pytest.mark.parametrize("candidate", [MobiusCandidate(), DirectCandidate()])
@pytest.mark.parametrize("word", ["q4_k", "q5_k", "q6_k", "q2_k", "q3_k", "tq2_0"])
def test_k_quants_keep_their_integers(
    ember: Checkpoint, lab: Any, tmp_path: Path, word: str, candidate: Candidate
) -> None:
    """What a GGUF file says in super-blocks, said by MatMulNBits and block sums."""
    layout = parse_layout(word)
    quantized = {i.name: Quantized.of(layout, layout.quantize(ember.resolve(i.name).value())) for i in ember.linears()}
    mixed = ember.with_weights(quantized)
    shapes = {name: tuple(ember.resolve(name).shape) for name in ember.weights}
    write_graph(candidate.build(mixed.config, mixed.architecture, shapes), mixed, tmp_path, Style())
    expected = lab.expected(mixed, EXAMPLES / "ember", IDS)["logits"]
    assert lab.apart(lab.run(tmp_path, IDS, want="decode")["logits"], expected) <= 1e-5
