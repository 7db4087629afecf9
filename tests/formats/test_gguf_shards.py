"""Models in several files: written, read back, and what does not belong together."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from tightship.errors import Malformed, Unsupported, UsageError
from tightship.formats.gguf_file import Field, read_gguf
from tightship.formats.gguf_shards import MAX_SHARDS, cut, read_shards, shard_fields, shards_bytes, write_shards
from tightship.formats.gguf_writer import TensorToWrite, write_gguf

FIELDS = {"general.architecture": Field("str", "llama"), "llama.block_count": Field("u32", 1)}
VALUES = {name: np.full((4, 8), i, np.float32) for i, name in enumerate("abcde")}
TENSORS = [TensorToWrite(name, "F32", (4, 8), lambda v=value: [v]) for name, value in VALUES.items()]


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Three files of two, two and one tensors of 128 bytes."""
    return [tmp_path / name for name in write_shards(tmp_path, "m", FIELDS, TENSORS, limit=256)]


def test_all_tensors_come_back_from_any_shard(shards: list[Path]) -> None:
    assert [p.name for p in shards] == [f"m-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    for path in shards:
        model = read_shards(path)
        assert list(model.tensors) == list("abcde")
        assert all(np.array_equal(model.tensors[n].weight().value(), v) for n, v in VALUES.items())
        assert model.metadata["llama.block_count"] == 1
        assert model.paths == tuple(shards)


def test_metadata_are_those_of_gguf_split(shards: list[Path]) -> None:
    readers = [gguf.GGUFReader(path) for path in shards]
    for number, reader in enumerate(readers):
        found = {key: reader.fields[key].contents() for key in reader.fields if key.startswith("split.")}
        assert found == {"split.no": number, "split.count": 3, "split.tensors.count": 5}
    kinds = [reader.fields["split.no"].types[0].name for reader in readers]
    assert kinds == ["UINT16"] * 3
    assert "general.architecture" not in readers[1].fields


def test_size_is_known_before(shards: list[Path]) -> None:
    assert shards_bytes(FIELDS, TENSORS, 256) == sum(p.stat().st_size for p in shards)


def test_a_single_file_is_a_model_too(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", FIELDS, TENSORS)
    assert list(read_shards(tmp_path / "x.gguf").tensors) == list("abcde")


def test_a_tensor_above_the_limit_has_its_own_shard() -> None:
    assert [[t.name for t in run] for run in cut(TENSORS, 1)] == [["a"], ["b"], ["c"], ["d"], ["e"]]


def test_a_missing_shard(shards: list[Path]) -> None:
    shards[1].unlink()
    with pytest.raises(UsageError, match="m-00002-of-00003"):
        read_shards(shards[0])


def rewrite(path: Path, **changes: int) -> None:
    file = read_gguf(path)
    data = {name: tensor.read_rows() for name, tensor in file.tensors.items()}
    tensors = [TensorToWrite(t.name, t.type_name, t.shape, lambda t=t: [data[t.name]]) for t in file.tensors.values()]
    kinds = {"no": "u16", "count": "u16", "tensors.count": "i32"}
    fields = dict(file.fields) | {f"split.{k}": Field(kinds[k], v) for k, v in changes.items()}
    path.unlink()
    write_gguf(path, fields, tensors)


@pytest.mark.parametrize(
    ("shard", "changes", "message"),
    [
        (1, {"no": 2}, "says it is shard 2"),
        (2, {"count": 4}, "of 4; expected 2 of 3"),
        (0, {"tensors.count": 6}, "hold 5 tensors"),
        (0, {"count": 5}, "does not say so"),
    ],
)
def test_shards_that_contradict_each_other(
    shards: list[Path], shard: int, changes: dict[str, int], message: str
) -> None:
    rewrite(shards[shard], **changes)
    with pytest.raises(Malformed, match=message):
        read_shards(shards[0])


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    for number in (0, 1):
        write_gguf(tmp_path / f"m-0000{number + 1}-of-00002.gguf", shard_fields(FIELDS, number, 2, 2), TENSORS[:1])
    with pytest.raises(Malformed, match="repeats a tensor") as caught:
        read_shards(tmp_path / "m-00001-of-00002.gguf")
    assert caught.value.tensor == "a"


def test_too_many_shards(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="counts to 65535"):
        write_shards(tmp_path, "m", FIELDS, TENSORS[:1] * (MAX_SHARDS + 1), limit=1)
