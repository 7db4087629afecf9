"""Files made by hand, each breaking one rule of docs/formats/gguf.md. Each is a typed error, and none costs much."""

from __future__ import annotations

import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tightship.errors import Malformed, UsageError
from tightship.formats.gguf_file import read_gguf

U8, U32, F32, BOOL, STR, ARR = 0, 4, 6, 7, 8, 9
TYPE_F32, TYPE_Q4_0, TYPE_WITHDRAWN = 0, 2, 4


def string(text: str | bytes) -> bytes:
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def field(key: str | bytes, kind: int, body: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + body


def array(key: str, kind: int, count: int, body: bytes = b"") -> bytes:
    return field(key, ARR, struct.pack("<IQ", kind, count) + body)


def info(name: str | bytes, extents: tuple[int, ...] = (4,), kind: int = TYPE_F32, offset: int = 0) -> bytes:
    dims = struct.pack("<I", len(extents)) + b"".join(struct.pack("<Q", e) for e in extents)
    return string(name) + dims + struct.pack("<IQ", kind, offset)


ARCH = field("general.architecture", STR, string("llama"))


def build(
    fields: list[bytes] | None = None,
    infos: list[bytes] | None = None,
    data: bytes = bytes(32),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """A file that is right unless told otherwise: one architecture key, one tensor of four float32."""
    fields = [ARCH] if fields is None else fields
    infos = [info("a")] if infos is None else infos
    n_tensors, n_fields = counts or (len(infos), len(fields))
    head = magic + struct.pack("<IQQ", version, n_tensors, n_fields) + b"".join(fields) + b"".join(infos)
    return head + bytes(-len(head) % alignment) + data


HOSTILE: dict[str, tuple[bytes, str]] = {
    # header
    "empty": (b"", "magic needs 4 bytes"),
    "magic": (build(magic=b"GGML"), "starts with b'GGUF'"),
    "lfs-pointer": (b"version https://git-lfs.github.com/spec/v1\n", "starts with"),
    "version-1": (build(version=1), "version must be 2 or 3, found 1"),
    "version-4": (build(version=4), "version must be 2 or 3, found 4"),
    "big-endian": (build(version=3 << 24), "big-endian"),
    "cut-in-header": (build()[:20], "metadata count needs 8 bytes"),
    "tensor-count": (build(counts=(2**40, 1)), "cannot fit"),
    "field-count": (build(counts=(1, 2**40)), "cannot fit"),
    "counts-overflow": (build(counts=(2**64 - 1, 2**64 - 1)), "cannot fit"),
    # metadata
    "key-empty": (build([ARCH, field("", U32, bytes(4))]), "1 to 65535 bytes, found 0"),
    "key-long": (build([ARCH, field("k" * 65536, U32, bytes(4))]), "1 to 65535 bytes, found 65536"),
    "key-length-2^63": (build([ARCH, struct.pack("<Q", 2**63) + bytes(64)]), "1 to 65535"),
    "key-not-utf8": (build([ARCH, field(b"\xff\xfe", U32, bytes(4))]), "not UTF-8"),
    "key-twice": (build([ARCH, ARCH]), "appears twice"),
    "value-type": (build([ARCH, field("k", 13, bytes(8))]), "unknown value type 13"),
    "value-cut": (build([ARCH, field("k", U32, b"")], [], b"", counts=(0, 2), alignment=1), "needs 4 bytes"),
    "bool-2": (build([ARCH, field("k", BOOL, b"\x02")]), "0 or 1, found 2"),
    "bool-array-3": (build([ARCH, array("k", BOOL, 2, b"\x01\x03")]), "0 or 1, found 3"),
    "string-length": (build([ARCH, field("k", STR, struct.pack("<Q", 2**40))]), "needs 1099511627776 bytes"),
    "string-not-utf8": (build([ARCH, field("k", STR, string(b"\xc3\x28"))]), "not UTF-8"),
    "array-count-u8": (build([ARCH, array("k", U8, 2**40)]), "needs 1099511627776 bytes"),
    "array-count-f32-overflow": (build([ARCH, array("k", F32, 2**62)]), "needs 18446744073709551616 bytes"),
    "array-count-strings": (build([ARCH, array("k", STR, 2**40)]), "claims 1099511627776 strings"),
    "array-element-type": (build([ARCH, array("k", 99, 1, bytes(8))]), "element type 99"),
    "array-nested": (build([ARCH, array("k", ARR, 1, struct.pack("<IQ", U8, 1) + b"x")]), "array inside an array"),
    "array-nested-deep": (build([ARCH, array("k", ARR, 1, struct.pack("<IQ", ARR, 1) * 5000)]), "array inside"),
    "alignment-0": (build([ARCH, field("general.alignment", U32, bytes(4))]), "power of two"),
    "alignment-12": (build([ARCH, field("general.alignment", U32, struct.pack("<I", 12))]), "power of two"),
    "alignment-2^31": (build([ARCH, field("general.alignment", U32, struct.pack("<I", 2**31))]), "power of two"),
    "alignment-type": (build([ARCH, field("general.alignment", F32, struct.pack("<f", 32))]), "power of two"),
    "architecture-missing": (build([field("k", U32, bytes(4))]), "general.architecture"),
    "architecture-type": (build([field("general.architecture", U32, bytes(4))]), "general.architecture"),
    "architecture-empty": (build([field("general.architecture", STR, string(""))]), "general.architecture"),
    # tensor infos
    "name-empty": (build(infos=[info("")]), "1 to 63 bytes, found 0"),
    "name-64": (build(infos=[info("n" * 64)]), "1 to 63 bytes, found 64"),
    "name-nul": (build(infos=[info("a\0b")]), "NUL"),
    "name-not-utf8": (build(infos=[info(b"\xa0\xa1")]), "not UTF-8"),
    "name-twice": (build(infos=[info("a"), info("a", offset=32)], data=bytes(64)), "two tensors have this name"),
    "dims-0": (build(infos=[info("a", ()) + bytes(8)]), "1 to 4 dimensions, found 0"),
    "dims-5": (build(infos=[info("a", (1, 1, 1, 1, 1))]), "1 to 4 dimensions, found 5"),
    "dims-2^31": (build(infos=[string("a") + struct.pack("<I", 2**31) + bytes(64)]), "1 to 4 dimensions"),
    "extent-0": (build(infos=[info("a", (0, 4))]), "extents must be positive"),
    "extent-2^63": (build(infos=[info("a", (2**63,))]), "bytes, the file has"),
    "extents-wrap": (build(infos=[info("a", (2**32, 2**32, 2**32, 2**32))]), "bytes, the file has"),
    "extents-wrap-to-small": (build(infos=[info("a", (2**62 + 1, 4))]), "bytes, the file has"),
    "type-unknown": (build(infos=[info("a", kind=1000)]), "unknown or was withdrawn"),
    "type-withdrawn": (build(infos=[info("a", kind=TYPE_WITHDRAWN)]), "unknown or was withdrawn"),
    "row-not-in-blocks": (build(infos=[info("a", (16, 2), TYPE_Q4_0)]), "blocks of 32"),
    "infos-cut": (build(infos=[info("a")[:-4]], data=b"", alignment=1), "offset of a"),
    # data
    "offset-misaligned": (build(infos=[info("a", offset=4)]), "not a multiple of 32"),
    "offset-2^63": (build(infos=[info("a", offset=2**63)]), "leaves a gap"),
    "offset-beyond": (build(infos=[info("a", offset=64)]), "leaves a gap"),
    "overlap": (build(infos=[info("a"), info("b", offset=0)], data=bytes(64)), "overlaps"),
    "order-swapped": (build(infos=[info("a", offset=32), info("b", offset=0)], data=bytes(64)), "leaves a gap"),
    "gap": (build(infos=[info("a"), info("b", offset=64)], data=bytes(96)), "leaves a gap"),
    "data-cut": (build(infos=[info("a", (16,))], data=bytes(48)), "the file at"),
    "data-missing": (build(data=b""), "the file at"),
    "trailing-bytes": (build(data=bytes(32) + b"PK\x03\x04"), "belong to nothing"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_one_rule_broken(tmp_path: Path, name: str) -> None:
    data, message = HOSTILE[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(Malformed, match=message) as caught:
        read_gguf(path)
    assert caught.value.exit_code == 5


def test_there_are_enough_of_them() -> None:
    assert len(HOSTILE) >= 33


def test_the_unbroken_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(build(data=struct.pack("<4f", 1, 2, 3, 4) + bytes(16)))
    assert read_gguf(path).tensors["a"].weight().value().tolist() == [1, 2, 3, 4]


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    whole = build([ARCH, array("t", STR, 2, string("ab") + string("c"))], [info("a"), info("b", offset=32)], bytes(48))
    path = tmp_path / "x.gguf"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(Malformed):
            read_gguf(path)


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_gguf(tmp_path / "none.gguf")


def test_a_file_that_shrinks_after_opening_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(build())
    tensor = read_gguf(path).tensors["a"]
    path.write_bytes(build()[:-24])
    with pytest.raises(Malformed, match="shorter"):
        tensor.read_rows()


def test_the_reader_reads_the_header_and_nothing_else(tmp_path: Path) -> None:
    head = len(build(data=b""))
    path = tmp_path / "x.gguf"
    path.write_bytes(build(infos=[info("a", (1 << 20,))], data=bytes(4 << 20)))
    assert read_gguf(path).bytes_read <= head


CHILD = """
import resource, sys
from tightship.errors import Malformed
from tightship.formats.gguf_file import read_gguf
import gguf, numpy
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
try:
    read_gguf(sys.argv[1])
except Malformed as error:
    sys.exit(error.exit_code)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", ["array-count-u8", "array-count-strings", "extents-wrap", "counts-overflow"])
def test_claims_cost_no_memory(tmp_path: Path, name: str) -> None:
    assert resource.RLIMIT_AS is not None
    path = tmp_path / "x.gguf"
    path.write_bytes(HOSTILE[name][0])
    done = subprocess.run([sys.executable, "-P", "-c", CHILD, str(path)], timeout=60, check=False, capture_output=True)
    assert done.returncode == 5, done.stderr.decode()
