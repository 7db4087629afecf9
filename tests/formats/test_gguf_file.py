"""Our files read by the gguf package, the gguf package's files read by us, and what both agree on."""

from __future__ import annotations

import hashlib
from pathlib import Path

import gguf
import numpy as np
import pytest

from tightship.errors import Malformed, Unsupported
from tightship.formats.gguf_file import Field, read_gguf
from tightship.formats.gguf_writer import TensorToWrite, file_bytes, write_gguf
from tightship.formats.packings.ggml import pack_floats
from tightship.weights import Dense, Quantized

FIELDS = {
    "general.architecture": Field("str", "llama"),
    "llama.block_count": Field("u32", 2),
    "llama.rope.freq_base": Field("f32", 10000.0),
    "a.flag": Field("bool", True),
    "a.signed": Field("i32", -7),
    "a.wide": Field("u64", 2**63 + 1),
    "a.double": Field("f64", 0.1),
    "a.small": Field("i8", -128),
    "tokenizer.ggml.tokens": Field("[str]", ["a", "Ġb", "é", ""]),
    "tokenizer.ggml.scores": Field("[f32]", [0.0, -1.5, 3.25]),
    "tokenizer.ggml.token_type": Field("[i32]", [1, 3, 6]),
    "a.flags": Field("[bool]", [True, False]),
    "a.none": Field("[i32]", []),
}


def tensors() -> tuple[dict[str, np.ndarray], list[TensorToWrite]]:
    rng = np.random.default_rng(0)
    values = {
        "norm": rng.normal(size=5).astype(np.float32),
        "half": rng.normal(size=(3, 7)).astype(np.float16),
        "stack": rng.normal(size=(2, 3, 4)).astype(np.float32),
        "q": gguf.quantize(rng.normal(size=(6, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0),
    }
    listed = [
        TensorToWrite("norm", "F32", (5,), lambda: [values["norm"]]),
        TensorToWrite("half", "F16", (3, 7), lambda: [values["half"][:2], values["half"][2:]]),
        TensorToWrite("stack", "F32", (2, 3, 4), lambda: list(values["stack"])),
        TensorToWrite("q", "Q8_0", (6, 64), lambda: [values["q"]]),
    ]
    return values, listed


def test_gguf_reads_what_we_write(tmp_path: Path) -> None:
    values, listed = tensors()
    path = tmp_path / "x.gguf"
    write_gguf(path, FIELDS, listed)
    reader = gguf.GGUFReader(path)
    assert [t.name for t in reader.tensors] == ["norm", "half", "stack", "q"]
    for tensor in reader.tensors:
        assert tensor.data.tobytes() == values[tensor.name].tobytes()
    assert reader.tensors[2].shape.tolist() == [4, 3, 2]
    for key, field in FIELDS.items():
        found = reader.fields[key]
        expected = field.value
        if field.kind == "[str]":
            assert [bytes(found.parts[i]).decode() for i in found.data] == expected
        elif field.kind == "str":
            assert bytes(found.parts[found.data[0]]).decode() == expected
        elif field.kind.startswith("["):
            assert [found.parts[i][0] for i in found.data] == expected
        else:
            assert found.parts[found.data[0]][0] == np.array(expected, found.parts[found.data[0]].dtype)


def test_we_read_what_gguf_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 3)
    writer.add_float32("llama.x", 1.5)
    writer.add_array("tokenizer.ggml.tokens", ["x", "yy"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_bool("b", False)
    w = np.random.default_rng(1).normal(size=(4, 32)).astype(np.float32)
    writer.add_tensor("w", w)
    writer.add_tensor("q", gguf.quantize(w, gguf.GGMLQuantizationType.Q4_0), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("b", gguf.quantize(w, gguf.GGMLQuantizationType.BF16), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_gguf(path)
    assert found.metadata["general.architecture"] == "llama"
    assert found.metadata["tokenizer.ggml.tokens"] == ["x", "yy"]
    assert found.metadata["numbers"].tolist() == [1, 2, 3]
    assert found.fields["llama.block_count"] == Field("u32", 3)
    assert found.fields["b"] == Field("bool", False)
    dense, quantized, half = (found.tensors[name].weight() for name in "wqb")
    assert isinstance(dense, Dense)
    assert np.array_equal(dense.value(), w)
    assert isinstance(quantized, Quantized)
    assert quantized.layout.name == "int4-g32"
    np.testing.assert_array_equal(
        quantized.value(), gguf.dequantize(found.tensors["q"].read_rows(), gguf.GGMLQuantizationType.Q4_0)
    )
    assert (half.dtype, half.shape) == ("bf16", (4, 32))
    assert np.array_equal(found.tensors["w"].read_rows(1, 2).view(np.float32), w[1:3])


def test_size_and_digest_are_those_of_the_file(tmp_path: Path) -> None:
    _, listed = tensors()
    path = tmp_path / "x.gguf"
    seen: list[tuple[int, int]] = []
    written = write_gguf(path, FIELDS, listed, lambda _what, done, total: seen.append((done, total)))
    data = path.read_bytes()
    assert len(data) == written.size == file_bytes(FIELDS, listed)
    assert hashlib.sha256(data).hexdigest() == written.sha256
    assert seen[-1] == (len(data), len(data))


def test_round_trip_of_types(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, FIELDS, [])
    found = read_gguf(path)
    assert {k: f.kind for k, f in found.fields.items()} == {k: f.kind for k, f in FIELDS.items()}
    again = tmp_path / "y.gguf"
    write_gguf(again, found.fields, [])
    assert again.read_bytes() == path.read_bytes()


def test_a_tensor_that_yields_too_little_is_an_error(tmp_path: Path) -> None:
    short = TensorToWrite("w", "F32", (2, 2), lambda: [np.zeros(3, np.float32)])
    with pytest.raises(Malformed, match="16 bytes, 12 came"):
        write_gguf(tmp_path / "x.gguf", FIELDS, [short])


def test_an_existing_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        write_gguf(path, FIELDS, [])
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (TensorToWrite("n" * 64, "F32", (2,), list), "1 to 63 bytes"),
        (TensorToWrite("w", "Q4_0", (2, 48), list), "blocks of 32"),
        (TensorToWrite("w", "F32", (1,) * 5, list), "1 to 4 dimensions"),
    ],
)
def test_what_the_container_cannot_hold(tmp_path: Path, tensor: TensorToWrite, message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        write_gguf(tmp_path / "x.gguf", FIELDS, [tensor])


def test_numbers_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="does not fit u32"):
        write_gguf(tmp_path / "x.gguf", {"a": Field("u32", -1)}, [])


def test_bf16_bytes(tmp_path: Path) -> None:
    w = np.random.default_rng(2).normal(size=(3, 8)).astype(np.float32)
    path = tmp_path / "x.gguf"
    write_gguf(path, FIELDS, [TensorToWrite("w", "BF16", (3, 8), lambda: [pack_floats("BF16", w)])])
    theirs = gguf.GGUFReader(path).tensors[0]
    assert np.array_equal(
        gguf.dequantize(theirs.data, gguf.GGMLQuantizationType.BF16), read_gguf(path).tensors["w"].weight().value()
    )
