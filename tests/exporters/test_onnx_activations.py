"""Activations rounded in the graph: the integers ONNX Runtime multiplies against the same sums in NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from tightship.activations import Activations, fixed
from tightship.exporters.onnx_emit import Emitter
from tightship.exporters.onnx_storage import Style
from tightship.exporters.onnx_units import Unit, Use
from tightship.formats.layouts import parse_layout
from tightship.formats.onnx_writer import write_onnx
from tightship.weights import Quantized

ROWS, COLS = 48, 64


def run(weight: Quantized, x: np.ndarray, folder: Path, said: dict[str, Activations], style: Style) -> np.ndarray:
    """x (tokens, COLS) through a graph of one matrix, as shipped."""
    kind = ir.TensorType(ir.DataType.FLOAT)
    given = ir.Value(name="x", type=kind, shape=ir.Shape(["batch", "tokens", COLS]))
    matrix = ir.Value(name="w", type=kind, shape=ir.Shape([COLS, ROWS]))
    node = ir.node("MatMul", [given, matrix])
    node.outputs[0].name, node.outputs[0].type = "y", kind
    graph = ir.Graph([given], node.outputs, nodes=[node], opset_imports={"": 23}, name="main")
    emitter = Emitter(graph, style, said)
    emitter.place(Unit("layer.weight", "layer.weight", weight, [Use(node, 1, turned=True)]))
    proto = ir.serde.serialize_model(ir.Model(graph, ir_version=10))
    write_onnx(proto, [*emitter.constants, *emitter.initializers], folder)
    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x[None]})[0][0])


@pytest.fixture
def weight() -> Quantized:
    """Every code at an end of its range: sums of neighbours that a 16-bit register does not hold."""
    rng = np.random.default_rng(0)
    layout = parse_layout("int8-channel")
    return Quantized.of(layout, layout.quantize(rng.choice([-1.0, 1.0], (ROWS, COLS)).astype(np.float32)))


def tokens() -> np.ndarray:
    """Rows of very different size, all near the ends of their own range, and one of zeros."""
    rng = np.random.default_rng(1)
    x = np.sign(rng.standard_normal((7, COLS))) * rng.uniform(0.8, 1, (7, COLS))
    return (x * np.array([[1e3], [1], [1e-3], [30], [0], [1e-6], [7]])).astype(np.float32)


@pytest.mark.parametrize("said", ["scheme", "checkpoint"])
def test_each_token_has_its_own_scale(weight: Quantized, tmp_path: Path, said: str) -> None:
    """scale = largest / 127 (docs of compressed-tensors' int8 token scheme), codes to nearest even, exact sums."""
    x = tokens()
    style = Style(portable=True, dynamic=True) if said == "scheme" else Style(rounded=True)
    found = {} if said == "scheme" else {"layer": Activations("int8-dynamic")}
    got = run(weight, x, tmp_path, found, style)
    scale = np.abs(x).max(axis=1, keepdims=True).astype(np.float64) / 127
    codes = np.rint(np.divide(x, scale, out=np.zeros(x.shape), where=scale > 0)).astype(np.int64)
    arrays = weight.read()
    expected = codes @ arrays["codes"].astype(np.int64).T * scale * arrays["scale"][:, 0].astype(np.float64)
    assert not got[4].any()
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=0)


def test_no_token_at_all(weight: Quantized, tmp_path: Path) -> None:
    """An expert that nobody chose."""
    assert run(weight, tokens()[:0], tmp_path, {}, Style(portable=True, dynamic=True)).shape == (0, ROWS)


@pytest.mark.parametrize("word", ["int8-static", "int8-static-asym"])
def test_calibrated_ranges_multiply_exactly(weight: Quantized, tmp_path: Path, word: str) -> None:
    said = fixed(word, -1.0, 1.2)
    assert said.scale is not None
    x = tokens()[1:2]
    got = run(weight, x, tmp_path, {"layer": said}, Style(rounded=True))
    zero = said.zero_point or 0
    codes = np.clip(np.rint(x.astype(np.float64) / said.scale) + zero, -128, 127).astype(np.int64) - zero
    arrays = weight.read()
    expected = codes @ arrays["codes"].astype(np.int64).T * said.scale * arrays["scale"][:, 0].astype(np.float64)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=0)
