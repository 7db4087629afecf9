"""Tables whose rows are looked up: quantized, portable, shared with the head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tightship.checkpoint import Checkpoint
from tightship.exporters.onnx_emit import Emitter
from tightship.exporters.onnx_storage import Style, storage
from tightship.exporters.onnx_units import Unit, Use
from tightship.formats.layouts import parse_layout
from tightship.formats.onnx_file import read_onnx
from tightship.formats.onnx_writer import write_onnx
from tightship.validators.integers import digest, pieces_of
from tightship.validators.stored_onnx import OnnxStored
from tightship.weights import Quantized

EXAMPLES = Path(__file__).parents[3] / "examples"
IDS = np.random.default_rng(0).integers(1, 1024, (2, 12))


SHARED = [("int4", "int4"), ("int4-portable", "int4"), ("int4-portable", "int4-g64-asym"), ("int8-portable", "int8")]


SHARED += [("int8-dynamic", "int8-channel")]


@pytest.mark.parametrize(("scheme", "layout"), SHARED)
def test_quantized_embedding_shared_with_the_head(ember: Checkpoint, lab: Any, scheme: str, layout: str) -> None:
    """One table, in the file once, looked up and multiplied; ONNX Runtime multiplies it by its own kernel."""
    directory, plan, _ = lab.build(ember, scheme, include=["embeddings", "head"], layout=layout)
    solved = lab.rounded(ember, lab.exporter.layout_for(ember, plan.target))
    expected = lab.expected(solved, EXAMPLES / "ember", IDS)["logits"]
    assert lab.apart(lab.run(directory, IDS)["logits"], expected) <= 1e-5
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    assert not [i.name for i in model.graph.initializer if i.name.startswith("lm_head")]
    others = 0 if scheme == "int8-dynamic" else len(ember.linears())  # which go to the integer kernel there
    joined = 2 * 2 if scheme == "int4" else 0  # queries, keys and values of a block are one product
    assert lab.optimized(directory).count("MatMulNBits") == 1 + others - joined
    table = next(t for t in plan.tensors if t.name == "model.embed_tokens.weight")
    assert table.nbytes < 1024 * 256 * (0.7 if "int4" in layout else 1.3)
    assert (directory / "model.onnx_data").stat().st_size < 1.05 * plan.file_bytes
    stored = OnnxStored(solved, directory / "model.onnx")
    weight = solved.weights[table.name]
    assert isinstance(weight, Quantized)
    np.testing.assert_array_equal(stored.value(table.name), weight.value())
    pieces = stored.integers(table.name)
    assert pieces is not None
    assert digest(pieces) == digest(pieces_of(weight.layout, weight.read()))
    assert read_onnx(directory / "model.onnx").weights < 1.05 * sum(int(np.prod(t.shape)) for t in plan.tensors)


@pytest.mark.parametrize("rows", [96, 97])
def test_a_portable_table_of_any_number_of_rows(tmp_path: Path, rows: int) -> None:
    """Pairs of codes in a byte where rows are even, a byte each where they are not; every row comes back exactly."""
    import onnx_ir as ir
    import onnxruntime as ort

    layout = parse_layout("int4-g16-asym")
    values = np.random.default_rng(0).standard_normal((rows, 32)).astype(np.float32)
    table = Quantized.of(layout, layout.quantize(values))
    ids = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["n"]))
    weight = ir.Value(name="w", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([rows, 32]))
    node = ir.node("Gather", [weight, ids], {"axis": 0})
    node.outputs[0].name, node.outputs[0].type = "y", weight.type
    graph = ir.Graph([ids], node.outputs, nodes=[node], opset_imports={"": 23}, name="main")
    emitter = Emitter(graph, Style(portable=True))
    emitter.place(Unit("t", "t", table, [Use(node, 0, turned=False)]))
    proto = ir.serde.serialize_model(ir.Model(graph, ir_version=10))
    write_onnx(proto, [*emitter.constants, *emitter.initializers], tmp_path)
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"ids": np.arange(rows)})
    np.testing.assert_array_equal(got, table.value())
    codes = next(i for i in emitter.initializers if i.name == "t.lookup.codes")
    assert codes.nbytes == rows * 32 // (2 if rows == 96 else 1)
    assert emitter.initializers[0].nbytes + emitter.initializers[1].nbytes + emitter.initializers[2].nbytes == (
        storage(table, Style(portable=True), table=True).nbytes
    )


def test_tied_embedding_is_stored_once(ember: Checkpoint, lab: Any) -> None:
    directory, plan, _ = lab.build(ember)
    vocabulary = [t for t in plan.tensors if t.shape == (1024, 256)]
    assert len(vocabulary) == 1
    shapes = [tuple(i.dims) for i in onnx.load(directory / "model.onnx", load_external_data=False).graph.initializer]
    assert shapes.count((1024, 256)) + shapes.count((256, 1024)) == 1
