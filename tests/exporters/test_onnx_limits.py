"""What an ONNX export never does: hold many weights at once, put weights into the graph, emit `g_idx`."""

from __future__ import annotations

import weakref
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tightship.checkpoint import Checkpoint
from tightship.exporters.onnx_assemble import write_graph
from tightship.exporters.onnx_candidates.direct import DirectCandidate
from tightship.exporters.onnx_storage import Style
from tightship.formats import onnx_writer
from tightship.formats.layouts import parse_layout
from tightship.formats.onnx_file import read_onnx
from tightship.formats.onnx_writer import Initializer, write_onnx
from tightship.opening import open_checkpoint
from tightship.passes import pass_for
from tightship.passes.base import Run
from tightship.weights import Alias, Dense, Quantized

EMBER = Path(__file__).parents[2] / "examples" / "ember"
TEXT = "The harbour lay quiet. Two boats came in at dawn, and the men carried the nets ashore. " * 12


@pytest.fixture(scope="module")
def ember() -> Checkpoint:
    return open_checkpoint(EMBER)


def write(checkpoint: Checkpoint, folder: Path) -> onnx.ModelProto:
    shapes = {name: tuple(checkpoint.resolve(name).shape) for name in checkpoint.weights}
    graph = DirectCandidate().build(checkpoint.config, checkpoint.architecture, shapes)
    write_graph(graph, checkpoint, folder, Style())
    return onnx.load(folder / "model.onnx", load_external_data=False)


def watched(checkpoint: Checkpoint) -> tuple[Checkpoint, list[int]]:
    """The same weights, each read anew; and what was alive of earlier ones whenever one was read, in bytes."""
    alive: dict[int, int] = {}
    seen: list[int] = []

    def tracked(name: str) -> np.ndarray:
        array = np.array(checkpoint.resolve(name).value())
        seen.append(sum(alive.values()))
        alive[id(array)] = array.nbytes
        weakref.finalize(array, alive.pop, id(array))
        return array

    names = [name for name, weight in checkpoint.weights.items() if not isinstance(weight, Alias)]
    shapes = {name: tuple(checkpoint.resolve(name).shape) for name in names}
    return checkpoint.with_weights({n: Dense(shapes[n], "f32", partial(tracked, n)) for n in names}), seen


def test_weights_are_streamed(ember: Checkpoint, tmp_path: Path) -> None:
    """While one weight is read no more than the last one is still held, however many there are."""
    checkpoint, seen = watched(ember)
    largest = max(int(np.prod(ember.resolve(name).shape)) * 4 for name in ember.weights)
    write(checkpoint, tmp_path)
    assert len(seen) == 20
    assert max(seen) <= largest


def test_the_graph_holds_no_weights(ember: Checkpoint, tmp_path: Path) -> None:
    model = write(ember, tmp_path)
    inside = [i for i in model.graph.initializer if i.data_location != TensorProto.EXTERNAL]
    assert max(len(i.raw_data) for i in inside) <= 1024
    assert (tmp_path / "model.onnx").stat().st_size < 40_000  # about 10 kB a block


def test_data_beyond_two_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of more than 2 GiB before another: the second is read from where it lies. The first is a hole."""
    import onnxruntime as ort

    size = (1 << 31) + 4096
    tail = np.arange(300, dtype=np.float32)
    stream_out = onnx_writer._stream

    def hole(item: Initializer, stream: BinaryIO) -> None:
        if item.name == "huge":
            stream.seek(item.nbytes, 1)
        else:
            stream_out(item, stream)

    monkeypatch.setattr(onnx_writer, "_stream", hole)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 300]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "tail"], ["y"])], "g", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    huge = Initializer("huge", TensorProto.UINT8, (size,), size, lambda: np.empty(0, np.uint8))
    write_onnx(model, [huge, Initializer.of("tail", tail)], tmp_path)
    assert (tmp_path / "model.onnx").stat().st_size < 1000
    assert read_onnx(tmp_path / "model.onnx").initializers["tail"].offset >= size
    loaded = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    del loaded.graph.initializer[0]  # nobody reads it
    (tmp_path / "model.onnx").write_bytes(loaded.SerializeToString())
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"x": np.zeros((1, 300), np.float32)})[0][0], tail)


def test_columns_in_another_order_need_no_g_idx(ember: Checkpoint, tmp_path: Path) -> None:
    """ONNX Runtime ignores zero points beside `g_idx`; ours have groups of neighbours, after activation order too."""
    spec = pass_for("quantize", {"layout": "int4-asym", "solver": "gptq", "actorder": True}, "p", Path)
    solved = spec.apply(ember, Run(texts=(TEXT,), tokens=256, sequence=64))
    weights = [solved.weights[i.name] for i in ember.linears()]
    assert all(isinstance(w, Quantized) and w.layout == parse_layout("int4-asym") for w in weights)
    nodes = [node for node in write(solved, tmp_path).graph.node if node.op_type == "MatMulNBits"]
    assert len(nodes) == 14
    assert {len(node.input) for node in nodes} == {4}  # input, codes, scales, zero points
