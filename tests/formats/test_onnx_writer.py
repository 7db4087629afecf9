"""The writer's files, read by the onnx package, ONNX Runtime and our own strict reader."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tightship.errors import Malformed
from tightship.formats.onnx_file import read_onnx
from tightship.formats.onnx_writer import Initializer, Part, data_layout, write_onnx, write_parts


def model() -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 300]) for name in ("x", "y")]
    node = helper.make_node("Add", ["x", "large"], ["y"], doc_string="made by hand")
    node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value="File somewhere.py, line 1")
    graph = helper.make_graph([node], "a/path", values[:1], values[1:], doc_string="docs")
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], producer_name="someone")
    made.metadata_props.add(key="when", value="today")
    return made


def initializers() -> list[Initializer]:
    rng = np.random.default_rng(0)
    return [
        Initializer.of("large", rng.standard_normal((300,)).astype(np.float32)),
        Initializer.of("huge", rng.standard_normal((600, 600)).astype(np.float32)),
        Initializer.of("narrow", rng.standard_normal((1000,)).astype(ml_dtypes.bfloat16)),
        Initializer.of("shape", np.array([1, -1], np.int64)),
        Initializer("packed", TensorProto.INT4, (3001,), 1501, lambda: np.full(1501, 0x21, np.uint8)),
    ]


def test_every_reader_gets_the_arrays_back(tmp_path: Path) -> None:
    import onnxruntime as ort

    items = initializers()
    assert write_onnx(model(), items, tmp_path) == ["model.onnx", "model.onnx_data"]
    ours = read_onnx(tmp_path / "model.onnx")
    theirs = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(tmp_path / "model.onnx").graph.initializer}
    for item in items[:4]:
        np.testing.assert_array_equal(ours.initializers[item.name].read(), item.read())
        np.testing.assert_array_equal(theirs[item.name], item.read())
    np.testing.assert_array_equal(ours.initializers["packed"].read().astype(int), theirs["packed"].astype(int))
    assert ours.initializers["packed"].read()[:2].astype(int).tolist() == [1, 2]
    assert ours.initializers["shape"].location is None
    assert ours.files == ("model.onnx_data",)
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    got = session.run(None, {"x": np.zeros((1, 300), np.float32)})[0][0]
    np.testing.assert_array_equal(got, items[0].read())


def test_what_two_graphs_read_is_stored_once(tmp_path: Path) -> None:
    """Weights of one name are one; constants of one name are each graph's own."""
    large, huge, *_ = initializers()
    rng = np.random.default_rng(1)
    own = {name: Initializer.of("own", rng.standard_normal(400).astype(np.float32)) for name in ("a.onnx", "b.onnx")}
    parts = {name: Part(model(), [item], [large, huge][: 1 + (name == "b.onnx")]) for name, item in own.items()}
    assert write_parts(parts, tmp_path, "data") == ["a.onnx", "b.onnx", "data"]
    places = {
        (name, i.name): next(int(e.value) for e in i.external_data if e.key == "offset")
        for name in own
        for i in onnx.load(tmp_path / name, load_external_data=False).graph.initializer
    }
    assert places["a.onnx", "large"] == places["b.onnx", "large"]
    assert len(set(places.values())) == 4
    for name, item in own.items():
        found = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(tmp_path / name).graph.initializer}
        np.testing.assert_array_equal(found["own"], item.read())
        np.testing.assert_array_equal(found["large"], large.read())
    other = Initializer.of("large", np.zeros((2, 300), np.float32))
    with pytest.raises(Malformed, match=r"\(300,\) and as \(2, 300\)"):
        write_parts({"c.onnx": Part(model(), [], [large]), "d.onnx": Part(model(), [], [other])}, tmp_path, "e")


def test_alignment() -> None:
    """64 bytes for small ones, 64 KiB from 1 MiB on; what stays in the graph takes no room."""
    offsets, end = data_layout([2000, 10, 1025, 1 << 20, 5000])
    assert offsets == [0, None, 2048, 1 << 16, (1 << 16) + (1 << 20)]
    assert end == (1 << 16) + (1 << 20) + 5000


def test_nothing_of_the_machine_and_the_same_bytes_twice(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_onnx(model(), initializers(), tmp_path / name)
    for file in ("model.onnx", "model.onnx_data"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    written = onnx.load(tmp_path / "a" / "model.onnx", load_external_data=False)
    assert written.ir_version == 10
    node = written.graph.node[0]
    said = (
        written.producer_name,
        written.graph.doc_string,
        node.doc_string,
        *written.metadata_props,
        *node.metadata_props,
    )
    assert not any(said)
    assert b"somewhere" not in written.SerializeToString()


def test_tensors_are_read_one_at_a_time(tmp_path: Path) -> None:
    """When a tensor is asked for, the one before it is on its way to the disk and free to go."""
    import weakref

    alive: list[weakref.ref] = []

    def lazy(index: int) -> Initializer:
        def read() -> np.ndarray:
            assert all(ref() is None for ref in alive)
            array = np.full((1 << 18,), index, np.float32)
            alive.append(weakref.ref(array))
            return array

        return Initializer(f"t{index}", TensorProto.FLOAT, (1 << 18,), 1 << 20, read)

    write_onnx(model(), [lazy(i) for i in range(5)], tmp_path)
    assert len(alive) == 5


def test_data_of_another_size_are_an_error(tmp_path: Path) -> None:
    wrong = Initializer("w", TensorProto.FLOAT, (600,), 2400, lambda: np.zeros(599, np.float32))
    with pytest.raises(Malformed, match="2396 bytes") as caught:
        write_onnx(model(), [wrong], tmp_path)
    assert caught.value.tensor == "w"


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        write_onnx(model(), [], tmp_path)
    assert (tmp_path / "model.onnx").read_bytes() == b"old"
