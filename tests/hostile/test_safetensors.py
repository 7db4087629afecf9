"""One hostile file per rule of docs/formats/safetensors.md: a typed error, exit code 5, and no data read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tightship.errors import Malformed, Unsupported
from tightship.formats.safetensors_file import MAX_HEADER, read_header


def entry(begin: int = 0, end: int = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


def framed(header: Any, data: bytes = bytes(8), length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


TWICE = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}'
DEEP = b'{"w":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too short"),
    "seven bytes": (bytes(7), "too short"),
    "header length 0": (framed(b"", bytes(16)), "too short"),
    "header longer than the limit": (framed({}, bytes(100), MAX_HEADER + 1), "limit"),
    "header length 2^64 - 1": (b"\xff" * 8 + b"{}", "limit"),
    "header longer than the file": (framed({"w": entry()}, b"", 5000), "truncated|has only"),
    "data cut short": (framed({"w": entry()}, bytes(7)), "ends at byte"),
    "data missing": (framed({"w": entry()}, b""), "ends at byte"),
    "first byte is a space": (framed(b' {"w":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}'), "begins with"),
    "header is a list": (framed(b"[1, 2, 3, 4, 5]"), "begins with"),
    "header is not JSON": (framed(b'{"w": oops}'), "not valid JSON"),
    "header is not UTF-8": (framed(b'{"\xff": 1}'), "not valid JSON"),
    "header nested 200000 deep": (framed(DEEP), "not valid JSON"),
    "number of 5000 digits": (framed(b'{"w":' + b"9" * 5000 + b"}"), "not valid JSON"),
    "NaN in the header": (framed(b'{"w": NaN}'), "not a JSON number"),
    "duplicate tensor": (framed(TWICE), "twice"),
    "duplicate field": (framed(b'{"w":{"dtype":"F32","dtype":"U8","shape":[8],"data_offsets":[0,8]}}'), "twice"),
    "metadata not strings": (framed({"__metadata__": {"a": 1}, "w": entry()}), "__metadata__"),
    "metadata a list": (framed({"__metadata__": [], "w": entry()}), "__metadata__"),
    "entry not an object": (framed({"w": 3}), "exactly dtype"),
    "entry without shape": (framed({"w": {"dtype": "F32", "data_offsets": [0, 8]}}), "exactly dtype"),
    "entry with a surplus key": (framed({"w": {**entry(), "strides": [1]}}), "exactly dtype"),
    "unknown dtype": (framed({"w": entry(dtype="F33")}), "unknown"),
    "dtype a list": (framed({"w": entry(dtype=["F32"])}), "unknown"),
    "negative size": (framed({"w": entry(shape=(-2,))}), "shape"),
    "size a float": (framed({"w": entry(shape=(2.0,))}), "shape"),
    "size a boolean": (framed({"w": entry(shape=(True, 2))}), "shape"),
    "size 2^63": (framed({"w": entry(shape=(1 << 63,))}), "shape"),
    "sizes whose product overflows 64 bits": (framed({"w": entry(shape=(1 << 33, 1 << 33))}), "takes"),
    "rank 33": (framed({"w": entry(0, 4, (1,) * 33)}, bytes(4)), "shape"),
    "shape null": (framed({"w": entry(shape=None)}), "shape"),
    "offsets reversed": (framed({"w": entry(8, 0)}), "data_offsets"),
    "offset negative": (framed({"w": entry(-8, 0)}), "data_offsets"),
    "three offsets": (framed({"w": {**entry(), "data_offsets": [0, 4, 8]}}), "data_offsets"),
    "span and shape differ": (framed({"w": entry(0, 8, (3,))}), "takes 12"),
    "begins out of range": (framed({"w": entry(1 << 62, (1 << 62) + 8)}), "ends at byte"),
    "overlap": (framed({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "overlaps"),
    "two names for one extent": (framed({"a": entry(0, 8), "b": entry(0, 8)}), "overlaps"),
    "hole in the middle": (framed({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)), "hole"),
    "hole at the start": (framed({"a": entry(4, 12)}, bytes(12)), "hole"),
    "trailing bytes": (framed({"w": entry()}, bytes(9)), "behind its last tensor"),
    "empty name": (framed({"": entry()}), "name"),
    "name with a NUL": (framed({"a\0b": entry()}), "name"),
    "name a lone surrogate": (framed(b'{"\\ud800":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}'), "name"),
    "name of 2000 letters": (framed({"a" * 2000: entry()}), "name"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n", "LFS pointer"),
    "HTML page": (b"<!DOCTYPE html>\n<html><body>Access denied</body></html>" + bytes(80), "HTML"),
    "zip archive": (b"PK\x03\x04" + bytes(100), "zip archive"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(100), "GGUF"),
}


@pytest.mark.parametrize("case", FILES)
def test_refused(case: str, tmp_path: Path) -> None:
    data, message = FILES[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(Malformed, match=message) as caught:
        read_header(path)
    assert caught.value.exit_code == 5


def test_the_frame_itself_is_sound(tmp_path: Path) -> None:
    """The cases above are refused for their one fault: without it the same frame is read."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(framed({"__metadata__": {"format": "pt"}, "a": entry(0, 8), "b": entry(8, 16)}, bytes(16)))
    assert read_header(path).read("b").tolist() == [0.0, 0.0]


def test_lawful_but_not_mapped_is_exit_3(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(framed({"w": entry(0, 8, (1,), "C64")}))
    with pytest.raises(Unsupported, match="C64"):
        read_header(path)


def test_a_file_cut_short_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(framed({"w": entry()}))
    weight = read_header(path).dense("w")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Malformed, match="cut short"):
        weight.read()
