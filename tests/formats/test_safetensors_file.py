"""The safetensors container against the reference library and literal bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tightship.dtypes import dtype, of_array
from tightship.errors import Malformed
from tightship.formats.safetensors_file import SafetensorsWriter, Spec, read_header


def write(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> str:
    specs = {name: Spec(of_array(a), a.shape) for name, a in arrays.items()}
    with SafetensorsWriter(path, specs, metadata) as writer:
        for name in writer.order:
            writer.write(name, arrays[name])
    return writer.sha256


def sample() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "b.weight": rng.standard_normal((3, 5)).astype(ml_dtypes.bfloat16),
        "a.weight": rng.standard_normal((2, 2, 2)).astype(np.float32),
        "a.shape": np.array([2, 2], np.int64),
        "codes": np.arange(7, dtype=np.uint8),
        "scalar": np.array(1.5, np.float16),
        "empty": np.zeros((0, 4), np.float32),
        "flags": np.array([True, False]),
    }


def test_literal_bytes(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    write(path, {"w": np.array([[1.0, -2.0]], np.float32)}, {"format": "pt"})
    header = b'{"__metadata__":{"format":"pt"},"w":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}'
    header += b" " * (-len(header) % 8)
    expected = len(header).to_bytes(8, "little") + header + bytes.fromhex("0000803f000000c0")
    assert path.read_bytes() == expected


def test_reference_library_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    arrays = sample()
    digest = write(path, arrays, {"z": "1", "format": "pt"})
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(arrays)
        assert file.metadata() == {"z": "1", "format": "pt"}
        for name, array in arrays.items():
            found = file.get_tensor(name)
            assert tuple(found.shape) == array.shape
            assert found.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == array.tobytes()


def test_we_read_what_the_reference_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    tensors = {
        "bf": torch.randn(4, 6).bfloat16(),
        "half": torch.randn(3).half(),
        "f8": torch.randn(5).to(torch.float8_e4m3fn),
        "i64": torch.arange(3),
        "flag": torch.tensor([True, False]),
        "zero": torch.zeros(0, 2),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert set(header.entries) == set(tensors)
    for name, tensor in tensors.items():
        weight = header.dense(name)
        assert weight.shape == tuple(tensor.shape)
        assert weight.read().tobytes() == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert header.dense("bf").dtype == "bf16"


def test_every_tensor_is_aligned_to_its_elements(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write(path, sample())
    for entry in read_header(path).entries.values():
        assert entry.begin % entry.dtype.itemsize == 0


def test_order_of_the_caller_does_not_change_the_bytes(tmp_path: Path) -> None:
    arrays = sample()
    backwards = dict(reversed(arrays.items()))
    first = write(tmp_path / "a", arrays, {"a": "1", "b": "2"})
    assert first == write(tmp_path / "b", backwards, {"b": "2", "a": "1"})


def test_the_writer_refuses_surprises(tmp_path: Path) -> None:
    specs = {"a": Spec(dtype("f32"), (2,)), "b": Spec(dtype("f32"), (2,))}
    with pytest.raises(ValueError, match="is due"), SafetensorsWriter(tmp_path / "x", specs) as writer:
        writer.write("b", np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="is due"), SafetensorsWriter(tmp_path / "y", specs) as writer:
        writer.write("a", np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="not written"), SafetensorsWriter(tmp_path / "z", specs) as writer:
        writer.write("a", np.zeros(2, np.float32))


@pytest.mark.parametrize("length", [60, 288, 80])
def test_a_length_that_looks_like_text_is_no_impostor(tmp_path: Path, length: int) -> None:
    """The first bytes are `<`, a space, `P`: first bytes of web pages and archives, and lawful header lengths."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, separators=(",", ":")).encode()
    header = header.ljust(max(length, len(header)))
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\x07")
    assert read_header(path).read("w").tolist() == [7]


def test_runs_of_rows_are_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    write(path, sample())
    header = read_header(path)
    read: list[int] = []
    fromfile = np.fromfile

    def counted(*args: object, count: int, **kwargs: object) -> np.ndarray:
        read.append(count)
        return fromfile(*args, count=count, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(np, "fromfile", counted)
    for name in ("b.weight", "a.weight", "codes"):
        dense = header.dense(name)
        runs = [dense.rows()(first, min(first + 2, dense.shape[0])) for first in range(0, dense.shape[0], 2)]
        assert np.array_equal(np.concatenate(runs), sample()[name])
        assert read == [run.nbytes for run in runs]
        read.clear()
    path.write_bytes(path.read_bytes()[:-1])
    last = max(header.entries, key=lambda name: header.entries[name].end)
    with pytest.raises(Malformed, match="cut short"):
        header.dense(last).rows()(header.dense(last).shape[0] - 1, header.dense(last).shape[0])
