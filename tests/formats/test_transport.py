"""Sparse transport: the same bytes come back, scipy and torch agree on the forms, and lies are refused."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tightship.errors import Malformed, UsageError
from tightship.formats.safetensors_file import SafetensorsWriter, Spec, read_header
from tightship.formats.sparse_forms import FORMS, pack, unpack
from tightship.formats.transport import expand, shrink


def matrix(share: float, shape: tuple[int, int] = (37, 44), seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.integers(1, 1 << 16, shape, dtype=np.uint16)
    return np.where(rng.random(shape) < share, np.uint16(0), values)


def two_of_four(shape: tuple[int, int] = (37, 44)) -> np.ndarray:
    found = matrix(0.2, shape)  # some groups have one element or none
    order = np.random.default_rng(1).permuted(np.tile(np.arange(4), (found.size // 4, 1)), axis=1)
    found.reshape(-1, 4)[order < 2] = 0
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(37, 44), (1, 4), (3, 0), (0, 8)])
def test_forms_come_back(form: str, shape: tuple[int, int]) -> None:
    values = two_of_four(shape) if shape[1] % 4 == 0 and shape != (3, 0) else matrix(0.7, shape)
    arrays = pack(form, values)
    assert arrays is not None
    np.testing.assert_array_equal(unpack(form, arrays, shape, np.dtype(np.uint16)), values)


def test_forms_are_those_of_torch() -> None:
    values = matrix(0.7).astype(np.int64)
    with pytest.warns(UserWarning, match="beta"):
        theirs = torch.from_numpy(values).to_sparse_csr()
    ours = pack("csr", values)
    assert ours is not None
    np.testing.assert_array_equal(ours["values"], theirs.values())
    np.testing.assert_array_equal(ours["columns"], theirs.col_indices())
    np.testing.assert_array_equal(ours["ends"], theirs.crow_indices()[1:])
    rows, columns = torch.from_numpy(values).to_sparse_coo().coalesce().indices().numpy()
    ours = pack("coo", values)
    assert ours is not None
    np.testing.assert_array_equal(ours["at"], rows * 44 + columns)


def test_two_of_four_by_hand() -> None:
    arrays = pack("2:4", np.array([[0, 5, 0, 7, 0, 0, 9, 0, 1, 2, 0, 0]], np.uint16))
    assert arrays is not None
    # places 1 and 3; 0 (filled up) and 2; 0 and 1
    assert arrays["values"].tolist() == [[5, 7, 0, 9, 1, 2]]
    assert arrays["places"].tolist() == [[0b1101 | 0b1000 << 4, 0b0100]]
    assert pack("2:4", np.array([[1, 1, 1, 0]], np.uint16)) is None


@pytest.mark.parametrize("form", ["auto", *FORMS])
def test_files_of_others_come_back_byte_for_byte(form: str, tmp_path: Path) -> None:
    pruned = torch.randn(64, 128).bfloat16()
    pruned[torch.rand(64, 128) < 0.7] = 0
    pruned[0, 0] = -0.0
    tensors = {"a.weight": pruned, "b.weight": torch.randn(3, 5), "half": torch.zeros(4, 8, dtype=torch.float16)}
    tensors |= {"scalar": torch.tensor(1.5), "codes": torch.arange(7, dtype=torch.uint8), "empty": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / "m.safetensors", {"format": "pt"})
    found = shrink(tmp_path / "m.safetensors", tmp_path / "s.safetensors", form)
    expand(tmp_path / "s.safetensors", tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()
    assert sum(found.forms.values()) == len(tensors)
    if form == "auto":
        assert set(found.forms) >= {"dense", "bitmask"}


def test_bytes_are_those_of_the_table(tmp_path: Path) -> None:
    values = two_of_four((64, 128)).view(ml_dtypes.bfloat16)
    with SafetensorsWriter(tmp_path / "m.safetensors", {"w": Spec(*_spec(values))}) as writer:
        writer.write("w", values)
    count = int(np.count_nonzero(values.view(np.uint16)))
    sizes = {"bitmask": 2 * count + 64 * 16, "2:4": 64 * 128 * 9 // 8, "csr": 4 * count + 8 * 64, "coo": 6 * count}
    for form, size in sizes.items():
        shrink(tmp_path / "m.safetensors", tmp_path / f"{form[0]}{form[-1]}.safetensors", form)
        header = read_header(tmp_path / f"{form[0]}{form[-1]}.safetensors")
        assert sum(e.end - e.begin for e in header.entries.values()) == size


def _spec(array: np.ndarray) -> tuple[object, tuple[int, ...]]:
    from tightship.dtypes import of_array

    return of_array(array), array.shape


def rewritten(path: Path, target: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> Path:
    header = read_header(path)
    held = {name: header.read(name) for name in header.entries} | arrays
    specs = {name: Spec(*_spec(array)) for name, array in held.items()}
    with SafetensorsWriter(target, specs, {**header.metadata, **metadata}) as writer:
        for name in writer.order:
            writer.write(name, held[name])
    return target


@pytest.mark.parametrize(
    ("form", "arrays", "metadata", "words"),
    [
        ("coo", {"w:at": np.array([5, 4], np.uint32)}, {}, "ascend"),
        ("coo", {"w:at": np.array([4, 99], np.uint32)}, {}, "beyond"),
        ("csr", {"w:columns": np.array([2, 9], np.uint16)}, {}, "beyond"),
        ("csr", {"w:ends": np.array([9, 2], np.uint64)}, {}, "ascend"),
        ("bitmask", {"w:mask": np.array([[255], [255]], np.uint8)}, {}, "values"),
        ("2:4", {"w:places": np.array([[0], [0]], np.uint8)}, {}, "order"),
        ("coo", {"w:values": np.array([1, 2], np.uint32)}, {}, "other bytes"),
        ("coo", {"w:values": np.array([1, 2], np.float32)}, {}, "should be uint32"),
        ("coo", {}, {"tightship.sha256": "0" * 64}, "other bytes"),
        ("coo", {}, {"tightship.forms": '{"w": "zip"}'}, "unknown"),
        ("coo", {}, {"tightship.sparse": "2"}, "not in sparse form"),
    ],
)
def test_lies_are_refused_and_leave_nothing(
    form: str, arrays: dict[str, np.ndarray], metadata: dict[str, str], words: str, tmp_path: Path
) -> None:
    save_file({"w": torch.tensor([[0.0, 0, 3, 0], [4, 0, 0, 0]])}, tmp_path / "m.safetensors")
    shrink(tmp_path / "m.safetensors", tmp_path / "s.safetensors", form)
    bad = rewritten(tmp_path / "s.safetensors", tmp_path / "bad.safetensors", arrays, metadata)
    with pytest.raises(Malformed, match=words):
        expand(bad, tmp_path / "out.safetensors")
    assert not list(tmp_path.glob("*out.safetensors*"))


def test_a_bomb_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2, 4)}, tmp_path / "m.safetensors")
    shrink(tmp_path / "m.safetensors", tmp_path / "s.safetensors", "coo")
    size = 1 << 50
    entry = {"w": {"dtype": "F32", "shape": [size // 4, 1], "data_offsets": [0, size]}}
    bad = rewritten(
        tmp_path / "s.safetensors", tmp_path / "bad.safetensors", {}, {"tightship.header": json.dumps(entry)}
    )
    with pytest.raises(Malformed, match="expands to"):
        expand(bad, tmp_path / "out.safetensors")


def test_nothing_is_overwritten_and_forms_have_names(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2, 4)}, tmp_path / "m.safetensors")
    shrink(tmp_path / "m.safetensors", tmp_path / "s.safetensors")
    with pytest.raises(UsageError, match="exists"):
        expand(tmp_path / "s.safetensors", tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match="zip"):
        shrink(tmp_path / "m.safetensors", tmp_path / "t.safetensors", "zip")
    with pytest.raises(Malformed, match="already"):
        shrink(tmp_path / "s.safetensors", tmp_path / "t.safetensors")
