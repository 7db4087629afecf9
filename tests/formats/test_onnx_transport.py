"""Sparse initializers: ONNX Runtime computes the same, the original comes back byte for byte, lies are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from tightship import api
from tightship.errors import Malformed, Unsupported, UsageError
from tightship.formats.onnx_file import read_onnx
from tightship.formats.onnx_writer import Initializer, write_onnx

SIZE = 96


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """Two matrices with a tenth and with half of their elements, the second under two names; one -0.0 among them."""
    rng = np.random.default_rng(0)
    thin, half = (rng.standard_normal((SIZE, SIZE)).astype(np.float32) for _ in range(2))
    thin[rng.random(thin.shape) > 0.1], half[rng.random(half.shape) > 0.5] = 0, 0
    thin[0, :2] = -0.0
    items = [Initializer.of("thin", thin), Initializer.of("half", half), Initializer.of("b", np.ones(SIZE, np.float32))]
    items.append(Initializer("again", TensorProto.FLOAT, half.shape, half.nbytes, lambda: half, same_as="half"))
    nodes = [helper.make_node("MatMul", ["x", "thin"], ["a"]), helper.make_node("MatMul", ["a", "half"], ["c"])]
    nodes += [helper.make_node("MatMul", ["c", "again"], ["d"]), helper.make_node("Add", ["d", "b"], ["y"])]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", SIZE]) for name in "xy"]
    model = helper.make_model(
        helper.make_graph(nodes, "g", values[:1], values[1:]), opset_imports=[helper.make_opsetid("", 23)]
    )
    write_onnx(model, items, tmp_path)
    return tmp_path / "model.onnx"


def output(path: Path) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": np.eye(SIZE, dtype=np.float32)})[0])


def test_onnx_runtime_computes_the_same_and_every_byte_comes_back(original: Path, tmp_path: Path) -> None:
    sparse = tmp_path / "model.sparse.onnx"
    shipped = api.shrink(original, sparse)
    assert shipped.forms == {"dense": 3, "sparse": 1}
    held = onnx.load(sparse, load_external_data=False).graph.sparse_initializer
    assert [s.values.name for s in held] == ["thin"]
    count = int((np.asarray(read_onnx(original).initializers["thin"].read()).view(np.uint32) != 0).sum())
    saved = SIZE * SIZE * 4 - count * 12
    assert 0 < saved - (shipped.source_bytes - shipped.bytes) < 2000  # metadata and alignment
    np.testing.assert_array_equal(output(sparse), output(original))
    (tmp_path / "back").mkdir()
    api.expand(sparse, tmp_path / "back" / "model.onnx")
    for name in ("model.onnx", "model.onnx_data"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / name).read_bytes()
    with pytest.raises(Unsupported, match="sparse initializers") as caught:
        read_onnx(sparse)
    assert "tightship expand" in str(caught.value.hint)


def damaged_places(model: onnx.ModelProto, data: bytearray) -> None:
    held = model.graph.sparse_initializer[0].indices
    offset = next(int(e.value) for e in held.external_data if e.key == "offset")
    data[offset + 8 * held.dims[0] - 8 : offset + 8 * held.dims[0]] = (SIZE * SIZE).to_bytes(8, "little")


def damaged_value(model: onnx.ModelProto, data: bytearray) -> None:
    held = model.graph.sparse_initializer[0].values
    data[next(int(e.value) for e in held.external_data if e.key == "offset")] ^= 1


def outside(model: onnx.ModelProto, data: bytearray) -> None:  # noqa: ARG001
    next(e for e in model.graph.sparse_initializer[0].values.external_data if e.key == "location").value = "../x"


def enormous(model: onnx.ModelProto, data: bytearray) -> None:  # noqa: ARG001
    entry = next(p for p in model.metadata_props if p.key == "tightship.original")
    entry.value = json.dumps({**json.loads(entry.value), "size": 1 << 50})


def giant(model: onnx.ModelProto, data: bytearray) -> None:  # noqa: ARG001
    model.graph.sparse_initializer[0].dims[0] = 1 << 40


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damaged_places, "out of order"),
        (damaged_value, "other bytes"),
        (outside, "outside the model's directory"),
        (enormous, "expands to"),
        (giant, "outside the tensor"),
    ],
)
def test_lies_are_refused(
    original: Path, tmp_path: Path, damage: Callable[[onnx.ModelProto, bytearray], None], words: str
) -> None:
    sparse = tmp_path / "s.onnx"
    api.shrink(original, sparse)
    model, data = onnx.load(sparse, load_external_data=False), bytearray((tmp_path / "s.onnx_data").read_bytes())
    damage(model, data)
    sparse.write_bytes(model.SerializeToString(deterministic=True))
    (tmp_path / "s.onnx_data").write_bytes(data)
    (tmp_path / "back").mkdir()
    with pytest.raises(Malformed, match=words):
        api.expand(sparse, tmp_path / "back" / "model.onnx")
    assert not list((tmp_path / "back").iterdir())


def test_what_cannot_be_shrunk_or_expanded(original: Path, tmp_path: Path) -> None:
    with pytest.raises(Malformed, match="not in sparse form"):
        api.expand(original, tmp_path / "x.onnx")
    with pytest.raises(UsageError, match="exists"):
        api.shrink(original, original)
    whole = onnx.load(original)
    (tmp_path / "other").mkdir()
    onnx.save(whole, tmp_path / "other" / "model.onnx")
    with pytest.raises(Unsupported, match="0 data files"):
        api.shrink(tmp_path / "other" / "model.onnx", tmp_path / "y.onnx")
