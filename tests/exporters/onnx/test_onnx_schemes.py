"""What the words of a scheme make: weights, activations, operators; and what is refused before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tightship.activations import Activations, fixed
from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported, UsageError
from tightship.exporters.to_onnx import OnnxExporter
from tightship.formats.layouts import parse_layout
from tightship.target import Target, no_progress
from tightship.weights import Quantized

EXAMPLES = Path(__file__).parents[3] / "examples"
IDS = np.random.default_rng(0).integers(1, 1024, (2, 12))


@pytest.mark.parametrize(
    "scheme", ["fp32", "fp16", "int4", "int8", "int2", "int4-portable", "int8-portable", "int8-dynamic"]
)
def test_schemes_compute_what_the_stored_weights_say(ember: Checkpoint, lab: Any, scheme: str) -> None:
    directory, plan, _ = lab.build(ember, scheme)
    solved = lab.rounded(ember, lab.exporter.layout_for(ember, plan.target))
    expected = lab.expected(solved, EXAMPLES / "ember", IDS)["logits"]
    assert lab.apart(lab.run(directory, IDS)["logits"], expected) <= 1e-5
    assert lab.apart(lab.run(directory, IDS, mode="shipped", want="decode")["logits"], expected) <= 0.05
    stored = sum(t.nbytes for t in plan.tensors)
    files = sum((directory / name).stat().st_size for name in ("model.onnx", "model.onnx_data"))
    assert plan.file_bytes == stored <= files  # vectors of the norms lie in model.onnx


def test_dynamic_activations_reach_the_integer_kernel(ember: Checkpoint, lab: Any) -> None:
    """ONNX Runtime's optimiser leaves MatMulIntegerToFloat for every matrix; as stored the graph is standard."""
    directory, plan, _ = lab.build(ember, "int8-dynamic")
    stored = onnx.load(directory / "model.onnx", load_external_data=False)
    assert {node.domain for node in stored.graph.node} == {""}
    assert lab.optimized(directory).count("MatMulIntegerToFloat") == 14
    assert len([t for t in plan.tensors if t.storage == "DequantizeLinear UINT8, by channel"]) == 14


@pytest.mark.parametrize("word", ["int8-static", "int8-static-asym"])
def test_calibrated_activations(ember: Checkpoint, lab: Any, word: str) -> None:
    """Right without rounding; the ranges given are the ones that round; every matrix runs in the integer kernel."""
    inputs = {i.name.removesuffix(".weight"): fixed(word, -9.0, 6.0 + n) for n, i in enumerate(ember.linears())}
    directory, plan, _ = lab.build(ember.replace(activations=inputs), "int8-static")
    solved = lab.rounded(ember, lab.exporter.layout_for(ember, plan.target))
    expected = lab.expected(solved, EXAMPLES / "ember", IDS)["logits"]
    assert lab.apart(lab.run(directory, IDS)["logits"], expected) <= 1e-5
    assert 1e-3 < lab.apart(lab.run(directory, IDS, mode="shipped")["logits"], expected) < 0.3
    stored = onnx.load(directory / "model.onnx")
    held = {i.name: onnx.numpy_helper.to_array(i) for i in stored.graph.initializer}
    quantizers = [node.input for node in stored.graph.node if node.op_type == "QuantizeLinear"]
    assert {node.domain for node in stored.graph.node} == {""}
    for _, scale, zero in quantizers:
        given = inputs[scale.removesuffix(".input_scale")]
        assert (float(held[scale]), int(held[zero])) == (given.scale, (given.zero_point or 0) + 128)
    ran = lab.optimized(directory)
    assert ran.count("MatMulIntegerToFloat") == len(inputs)
    assert ran.count("MatMul") == 1  # the head


def test_activations_that_onnx_cannot_round_are_refused(ember: Checkpoint, lab: Any) -> None:
    name = ember.linears()[0].name.removesuffix(".weight")
    with pytest.raises(Unsupported, match="int8-dynamic-asym") as caught:
        lab.exporter.plan(ember.replace(activations={name: Activations("int8-dynamic-asym")}), Target("onnx"))
    assert caught.value.tensor == name
    with pytest.raises(Unsupported, match="one scale a row") as caught:
        lab.exporter.plan(ember.replace(activations={name: Activations("int8-dynamic")}), Target("onnx"))
    assert caught.value.tensor == f"{name}.weight"


@pytest.mark.parametrize(("scheme", "level"), [("int8", 0), ("int2", 1)])
def test_kernels_that_decode_for_every_product_are_refused(
    ember: Checkpoint, lab: Any, scheme: str, level: int
) -> None:
    target = Target("onnx", scheme, {"accuracy_level": level})
    solved = lab.rounded(ember, lab.exporter.layout_for(ember, target))
    with pytest.raises(Unsupported, match="slower than float32"):
        lab.exporter.plan(solved, target)


def test_portable_graphs_use_standard_operators_only(ember: Checkpoint, lab: Any) -> None:
    directory, _, _ = lab.build(ember, "int4-portable")
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    assert {node.domain for node in model.graph.node} == {""}
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 23)]
    onnx.checker.check_model(str(directory / "model.onnx"))


def test_unknown_words_are_refused(ember: Checkpoint, lab: Any) -> None:
    with pytest.raises(UsageError, match="no scheme"):
        lab.exporter.layout_for(ember, Target("onnx", "int5"))
    with pytest.raises(UsageError, match="no option"):
        lab.exporter.layout_for(ember, Target("onnx", "int4", {"group": 64}))
    with pytest.raises(UsageError, match="judge"):
        OnnxExporter().export(ember, lab.exporter.plan(ember, Target("onnx")), Path("nowhere"), no_progress)


def test_a_layout_without_exact_form_is_refused_in_the_plan(ember: Checkpoint, lab: Any) -> None:
    layout = parse_layout("int4-g8")
    name = ember.linears()[0].name
    mixed = ember.with_weights({name: Quantized.of(layout, layout.quantize(ember.resolve(name).value()))})
    with pytest.raises(Unsupported, match="blocks of 16") as caught:
        lab.exporter.plan(mixed, Target("onnx"))
    assert caught.value.tensor == name
