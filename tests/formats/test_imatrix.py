"""Importance matrices against gguf's own reader, the bytes of the older format by hand, and damaged files."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from tightship.errors import Malformed, UsageError
from tightship.formats.imatrix import Entry, Imatrix, imatrix_bytes, legacy_bytes, read_imatrix

DENSE = Entry(np.array([[8, 2, 0]], np.float32), np.array([4], np.float32))
EXPERTS = Entry(np.array([[3, 6], [0, 0], [5, 10]], np.float32), np.array([3, 0, 5], np.float32))
NAMES = {"blk.0.attn_q.weight": DENSE, "blk.0.ffn_up_exps.weight": EXPERTS}
# blk.0.attn_q.weight: 2 calls of 2 tokens; means 2, .5, 0 times 2
LEGACY = (
    struct.pack("<i", 1)
    + struct.pack("<i", 19)
    + b"blk.0.attn_q.weight"
    + struct.pack("<ii3f", 2, 3, 4, 1, 0)
    + struct.pack("<ii", 2, 4)
    + b"text"
)


def imatrix() -> Imatrix:
    return Imatrix(NAMES, ("text",), chunks=2, chunk_size=2)


def test_gguf_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    path.write_bytes(imatrix_bytes(imatrix()))
    reader = gguf.GGUFReader(path)
    assert {key: reader.get_field(key).contents() for key in ("general.type", "imatrix.datasets")} == {
        "general.type": "imatrix",
        "imatrix.datasets": ["text"],
    }
    assert [reader.get_field(f"imatrix.chunk_{word}").contents() for word in ("count", "size")] == [2, 2]
    tensors = {t.name: t for t in reader.tensors}
    assert {name: list(map(int, t.shape)) for name, t in tensors.items()} == {
        "blk.0.attn_q.weight.in_sum2": [3, 1],
        "blk.0.attn_q.weight.counts": [1, 1],
        "blk.0.ffn_up_exps.weight.in_sum2": [2, 3],
        "blk.0.ffn_up_exps.weight.counts": [1, 3],
    }
    np.testing.assert_array_equal(tensors["blk.0.ffn_up_exps.weight.in_sum2"].data, EXPERTS.sums)
    np.testing.assert_array_equal(tensors["blk.0.ffn_up_exps.weight.counts"].data.ravel(), [3, 0, 5])


def test_reading_what_gguf_writes(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].pop("general.architecture", None)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["a", "b"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    writer.add_tensor("blk.0.ffn_up_exps.weight.in_sum2", EXPERTS.sums)
    writer.add_tensor("blk.0.ffn_up_exps.weight.counts", EXPERTS.counts[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_imatrix(path)
    assert (found.datasets, found.chunks, found.chunk_size) == (("a", "b"), 7, 512)
    # an expert that no token reached weighs all channels the same
    np.testing.assert_array_equal(found.entries["blk.0.ffn_up_exps.weight"].importance, [[1, 2], [1, 1], [1, 2]])


def test_older_format_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(LEGACY)
    found = read_imatrix(path)
    assert (found.datasets, found.chunks) == (("text",), 2)
    np.testing.assert_array_equal(found.entries["blk.0.attn_q.weight"].importance, [[2, 0.5, 0]])
    assert legacy_bytes(Imatrix({"blk.0.attn_q.weight": DENSE}, ("text",), 2, 2)) == LEGACY


def test_older_format_keeps_means_of_experts_but_not_counts(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(legacy_bytes(imatrix()))
    found = read_imatrix(path).entries["blk.0.ffn_up_exps.weight"]
    np.testing.assert_array_equal(found.importance.reshape(3, 2), EXPERTS.importance)


def test_damaged_files_are_refused_wherever_they_end(tmp_path: Path) -> None:
    path = tmp_path / "damaged"
    in_gguf = imatrix_bytes(imatrix())
    ends = {LEGACY: {*range(len(LEGACY))} - {len(LEGACY) - 12}}  # the older format may end after its entries
    ends[in_gguf] = {*range(0, len(in_gguf) - 32, 7)}  # GGUF may leave out the padding at the end
    for whole, places in ends.items():
        for end in places:
            path.write_bytes(whole[:end])
            with pytest.raises(Malformed):
                read_imatrix(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_numbers_that_are_no_sums_of_squares(tmp_path: Path, value: float) -> None:
    sums = np.array([[1, value]], np.float32)
    path = tmp_path / "bad"
    for data in (imatrix_bytes, legacy_bytes):
        path.write_bytes(data(Imatrix({"a": Entry(sums, np.ones(1, np.float32))}, ("t",), 1, 1)))
        with pytest.raises(Malformed, match="no sums of squares"):
            read_imatrix(path)


def test_lengths_are_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "bad.dat"
    for data in (
        struct.pack("<i", -1),
        struct.pack("<i", 1 << 30),
        struct.pack("<ii", 1, 1 << 29),
        struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 1 << 27),
        LEGACY + b"x",
        struct.pack("<i", 2) + LEGACY[4:-12] * 2,
    ):
        path.write_bytes(data)
        with pytest.raises(Malformed):
            read_imatrix(path)


def test_other_gguf_files_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("a", np.ones((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(Malformed, match="no importance matrix"):
        read_imatrix(path)
    with pytest.raises(UsageError, match="no such file"):
        read_imatrix(tmp_path / "none")
