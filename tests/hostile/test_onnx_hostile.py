"""One hostile ONNX file per rule of formats/onnx_file.py: a typed error, exit code 5, and no data read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tightship.cli import main
from tightship.errors import Malformed, Unsupported, UsageError
from tightship.formats.onnx_file import MAX_DEPTH, read_onnx
from tightship.manifest import write_manifest

DATA = np.arange(4, dtype=np.float32).tobytes()
Edit = Callable[[onnx.ModelProto], None]


def external(location: str | None = "d.bin", offset: str | None = "0", length: str | None = "16", **more: str) -> Edit:
    """Give the weight external data with these entries."""

    def edit(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, "offset": offset, "length": length, **more}.items():
            if value is not None:
                entry = tensor.external_data.add()
                entry.key, entry.value = key, value

    return edit


def dims(*sizes: int) -> Edit:
    return lambda model: model.graph.initializer[0].dims.__setitem__(slice(None), sizes)


def with_tensor(**fields: object) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        for key, value in fields.items():
            if isinstance(value, list):
                getattr(model.graph.initializer[0], key).extend(value)
            else:
                setattr(model.graph.initializer[0], key, value)

    return edit


def twice_external(model: onnx.ModelProto) -> None:
    external()(model)
    entry = model.graph.initializer[0].external_data.add()
    entry.key, entry.value = "offset", "0"


def beside_raw(model: onnx.ModelProto) -> None:
    external()(model)
    model.graph.initializer[0].raw_data = DATA


def named_but_inline(model: onnx.ModelProto) -> None:
    external()(model)
    model.graph.initializer[0].data_location = TensorProto.DEFAULT


def same_name(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(model.graph.initializer[0])


def circle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "z"
    model.graph.node.append(helper.make_node("Neg", ["y"], ["z"]))


def backwards(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("Neg", ["y"], ["z"]))


def made_twice(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Neg", ["x"], ["y"]))


def overwrites_an_input(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Neg", ["y"], ["x"]))


def output_from_nowhere(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "nothing"


def recursion(model: onnx.ModelProto) -> None:
    for name, called in (("F", "G"), ("G", "F")):
        body = [helper.make_node(called, ["a"], ["b"], domain="own")]
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
        model.functions.append(helper.make_function("own", name, ["a"], ["b"], body, opsets))


def deep(model: onnx.ModelProto) -> None:
    graph = helper.make_graph([], "leaf", [], [helper.make_tensor_value_info("x", 1, [4])])
    for level in range(MAX_DEPTH + 2):
        node = helper.make_node("If", ["c"], [f"o{level}"], then_branch=graph, else_branch=graph)
        output = helper.make_tensor_value_info(f"o{level}", 1, [4])
        graph = helper.make_graph([node], f"level{level}", [], [output])
        if level > 3:  # both branches alike doubles the size each time; the depth is what counts
            del graph.node[0].attribute[1]
    model.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    model.graph.node.append(helper.make_node("If", ["c"], ["w2"], then_branch=graph))


def constant_outside(model: onnx.ModelProto) -> None:
    holder = onnx.ModelProto()
    holder.CopyFrom(model)
    external("../d.bin")(holder)
    model.graph.node.append(helper.make_node("Constant", [], ["k"], value=holder.graph.initializer[0]))


def no_graph(model: onnx.ModelProto) -> None:
    model.ClearField("graph")


def no_opset(model: onnx.ModelProto) -> None:
    del model.opset_import[:]


HOSTILE: dict[str, tuple[Edit, str]] = {
    "parent directory": (external("../d.bin"), "outside"),
    "parent directory in the middle": (external("sub/../../d.bin"), "outside"),
    "absolute path": (external("/etc/passwd"), "outside"),
    "backslashes": (external("..\\d.bin"), "outside"),
    "drive letter": (external("C:d.bin"), "outside"),
    "NUL in the path": (external("d.bin\0"), "outside"),
    "empty path": (external(""), "outside"),
    "the directory itself": (external("."), "outside|not a regular"),
    "symbolic link": (external("link.bin"), "link"),
    "link to a directory on the way": (external("linked/d.bin"), "link"),
    "hard link": (external("hard.bin"), "hard links"),
    "a directory": (external("sub"), "not a regular"),
    "a missing file": (external("none.bin"), "missing"),
    "a fifo": (external("fifo"), "not a regular"),
    "offset past the end": (external(offset="17"), "end at byte 33"),
    "offset beyond 64 bits": (external(offset="9" * 19), "end at byte"),
    "offset of a thousand digits": (external(offset="1" * 1000), "plain number"),
    "offset negative": (external(offset="-4"), "plain number"),
    "offset with a sign": (external(offset="+0"), "plain number"),
    "offset with a blank": (external(offset=" 0"), "plain number"),
    "offset in hexadecimal": (external(offset="0x0"), "plain number"),
    "offset in other digits": (external(offset="٠"), "plain number"),
    "length too long": (external(length="32"), "32 bytes where"),
    "length too short": (external(length="12"), "12 bytes where"),
    "length negative": (external(length="-16"), "plain number"),
    "no length and more data": (external("more.bin", length=None), "17 bytes where"),
    "no location": (external(None), "need a location"),
    "unknown key": (external(basepath="sub"), "unknown or occurs twice"),
    "key twice": (twice_external, "unknown or occurs twice"),
    "external and inline": (beside_raw, "beside it"),
    "external data named, said to be inline": (named_but_inline, "holds its data itself"),
    "giant shape": (dims(1 << 40, 1 << 40), "too large"),
    "shape that overflows 64 bits": (dims(1 << 62, 4), "too large"),
    "shape larger than the data": (dims(1 << 30), "where"),
    "shape smaller than the data": (dims(3), "where"),
    "negative axis": (dims(-4), "negative"),
    "rank 40": (dims(*[1] * 40), "more than 32 axes"),
    "unknown element type": (with_tensor(data_type=99), "unknown"),
    "undefined element type": (with_tensor(data_type=0), "unknown"),
    "typed and raw data": (with_tensor(float_data=[1.0]), "where"),
    "no data at all": (with_tensor(raw_data=b""), "where"),
    "two initializers of one name": (same_name, "two initializers"),
    "a circle": (circle, "circle"),
    "nodes out of order": (backwards, "before anything makes it"),
    "a value made twice": (made_twice, "made twice"),
    "an input made again": (overwrites_an_input, "made twice"),
    "an output that nothing makes": (output_from_nowhere, "nothing makes"),
    "functions in a circle": (recursion, "calls itself"),
    "graphs nested too deep": (deep, "nested"),
    "a constant inside a node that points outside": (constant_outside, "outside"),
    "no graph": (no_graph, "no graph"),
    "no opset": (no_opset, "no opset"),
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Edit | bytes], Path]:
    """Edit a small valid model, or take bytes, and write them beside some data files."""
    (tmp_path.parent / "d.bin").write_bytes(DATA)
    for name, data in {"d.bin": DATA, "more.bin": DATA + b"x", "first.bin": DATA}.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "d.bin").write_bytes(DATA)
    (tmp_path / "link.bin").symlink_to("d.bin")
    (tmp_path / "linked").symlink_to("sub")
    os.link(tmp_path / "first.bin", tmp_path / "hard.bin")
    os.mkfifo(tmp_path / "fifo")

    def make(edit: Edit | bytes) -> Path:
        path = tmp_path / "model.onnx"
        path.write_bytes(edit if isinstance(edit, bytes) else edited(edit))
        return path

    return make


def edited(edit: Edit) -> bytes:
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4], DATA, raw=True)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", values[:1], values[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    edit(model)
    return model.SerializeToString()


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_files_are_malformed(write: Callable[[Edit], Path], name: str) -> None:
    edit, message = HOSTILE[name]
    with pytest.raises(Malformed, match=message) as caught:
        read_onnx(write(edit))
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes"),
        (b"\xff" * 100, "not an ONNX model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "LFS"),
        (b"<!DOCTYPE html>", "HTML"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
    ],
)
def test_other_files_are_malformed(write: Callable[[bytes], Path], data: bytes, message: str) -> None:
    with pytest.raises(Malformed, match=message):
        read_onnx(write(data))


def test_every_truncation_is_malformed(write: Callable[[bytes], Path]) -> None:
    whole = edited(dims(4))
    for size in range(len(whole)):
        path = write(whole[:size])
        with pytest.raises(Malformed):
            read_onnx(path)


@pytest.mark.parametrize("edit", [external(), external("sub/d.bin"), external(offset=None), external(length=None)])
def test_what_is_accepted_opens_in_both_libraries(write: Callable[[Edit], Path], edit: Edit) -> None:
    import onnxruntime as ort

    path = write(edit)
    tensor = read_onnx(path).initializers["w"]
    np.testing.assert_array_equal(tensor.read(), np.arange(4, dtype=np.float32))
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(onnx.load(path).graph.initializer[0]), tensor.read())
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"x": np.zeros(4, np.float32)})[0], tensor.read())


def test_data_cut_after_opening_are_malformed(write: Callable[[Edit], Path]) -> None:
    path = write(external())
    tensor = read_onnx(path).initializers["w"]
    (path.parent / "d.bin").write_bytes(DATA[:-1])
    with pytest.raises(Malformed, match="could be read"):
        tensor.read()


@pytest.mark.parametrize("kind", ["uint4", "int4", "float16", "bfloat16", "int64", "bool", "double"])
def test_elements_are_those_of_the_onnx_package(tmp_path: Path, kind: str) -> None:
    number = getattr(TensorProto, {"double": "DOUBLE"}.get(kind, kind.upper()))
    element = helper.tensor_dtype_to_np_dtype(number)
    values = np.array([[1, 0, 7], [3, 2, 5], [1, 1, 6]]).astype(element)
    for raw in (True, False):
        tensor = onnx.numpy_helper.from_array(values, "w")
        if not raw:
            tensor = helper.make_tensor("w", number, values.shape, values.reshape(-1).tolist())
        graph = helper.make_graph([], "g", [], [], [tensor])
        path = tmp_path / "model.onnx"
        path.write_bytes(helper.make_model(graph, ir_version=10).SerializeToString())
        read = read_onnx(path).initializers["w"].read()
        np.testing.assert_array_equal(read.astype(np.float64), onnx.numpy_helper.to_array(tensor).astype(np.float64))


def test_strings_and_sparse_tensors_are_unsupported(write: Callable[[Edit], Path]) -> None:
    with pytest.raises(Unsupported):
        read_onnx(write(with_tensor(data_type=TensorProto.STRING)))


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        read_onnx(tmp_path / "none.onnx")


COMMANDS = (
    *("parent directory", "absolute path", "offset past the end", "offset negative", "symbolic link", "a circle"),
    *("functions in a circle", "giant shape"),
)


@pytest.mark.parametrize("command", ["inspect", "verify"])
@pytest.mark.parametrize("name", COMMANDS)
def test_commands_end_with_a_typed_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, command: str
) -> None:
    """Also where whoever wrote the file wrote a manifest that names it."""
    (tmp_path / "d.bin").write_bytes(DATA)
    folder = tmp_path / "out" / "onnx"
    folder.mkdir(parents=True)
    (folder / "d.bin").write_bytes(DATA)
    (folder / "model.onnx").write_bytes(edited(HOSTILE[name][0]))
    if command == "verify":
        digest = write_manifest(tmp_path / "out", {})
        (tmp_path / "out" / "report.json").write_text(json.dumps({"manifest_sha256": digest}))
    if name == "symbolic link":
        (folder / "link.bin").symlink_to("d.bin")
    code = main([command, str(tmp_path / "out"), "--json"])
    error = json.loads(capsys.readouterr().out)["error"]
    surplus = command == "verify" and name == "symbolic link"  # a file that the manifest does not list
    assert (code, error["code"]) == ((1, "gate_failed") if surplus else (5, "malformed"))
