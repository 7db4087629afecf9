"""A safetensors file in a sparse form for shipping, and back to the same bytes.

What is shipped is a safetensors file too. For each tensor NAME of the original it holds the arrays of one form of
`sparse_forms`, called NAME:ARRAY, in the form that takes the fewest bytes, or in the one that was asked for where it
fits. Its metadata:

| key                | value                                                          |
|--------------------|----------------------------------------------------------------|
| tightship.sparse   | `1`                                                            |
| tightship.forms    | JSON object: tensor name -> form                               |
| tightship.header   | the original's header, as it stands in the file, padding too   |
| tightship.sha256   | digest of the whole original                                   |

Smaller on disk and on the wire only: runtimes want the dense file, and compute as fast and with as much memory as
without zeros.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tightship.dtypes import of_array
from tightship.durable import flush_file, sha256_file
from tightship.errors import Malformed, UsageError
from tightship.formats.safetensors_file import Entry, Header, SafetensorsWriter, Spec, header_entries, read_header
from tightship.formats.sparse_forms import FORMS, pack, unpack
from tightship.progress import Progress, no_progress
from tightship.untrusted import strict_json

MARK = "tightship.sparse"
MOST_ZEROS = 1000  # an expanded file is at most so many times larger; a mask alone allows 64
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class Shipped:
    """What became of a file: bytes before and after, and how many tensors took each form."""

    source_bytes: int
    bytes: int
    forms: Mapping[str, int]


def shrink(source: Path, target: Path, form: str = "auto", progress: Progress = no_progress) -> Shipped:
    """Write `source` in sparse form. The original is read twice, a tensor at a time.

    Raises:
        Malformed: `source` is not a sound safetensors file, or is in sparse form already.
        UsageError: no such form, or `target` exists.
    """
    if form not in ("auto", *FORMS):
        raise UsageError(f"there is no sparse form {form!r}; there are {', '.join(('auto', *FORMS))}")
    header = read_header(source)
    if MARK in header.metadata:
        raise Malformed(f"{source.name} is in sparse form already", hint="tightship expand makes it dense")
    forms, specs = dict[str, str](), dict[str, Spec]()
    for done, name in enumerate(header.entries):
        progress("choose sparse forms", done, len(header.entries))
        forms[name], arrays = _best(_bits(header, name), form)
        specs |= {f"{name}:{key}": Spec(of_array(array), array.shape) for key, array in arrays.items()}
    with source.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length).decode()
    metadata = {
        MARK: "1",
        "tightship.forms": json.dumps(forms, sort_keys=True, ensure_ascii=False),
        "tightship.header": text,
        "tightship.sha256": sha256_file(source),
    }
    refuse_existing(target)
    with SafetensorsWriter(target, specs, metadata) as writer:
        held: tuple[str, Mapping[str, np.ndarray]] = ("", {})
        for done, full in enumerate(writer.order):
            progress("write sparse form", done, len(writer.order))
            name, _, key = full.rpartition(":")
            if held[0] != name:
                held = (name, pack(forms[name], _bits(header, name)) or {})
            writer.write(full, held[1][key])
    counts = {word: list(forms.values()).count(word) for word in FORMS if word in forms.values()}
    return Shipped(source.stat().st_size, target.stat().st_size, counts)


def expand(source: Path, target: Path, progress: Progress = no_progress) -> Shipped:
    """Write the original that `source` was made of, byte for byte; its digest is checked before it is there.

    Raises:
        Malformed: `source` is not in sparse form, is damaged, or does not give what its digest says.
        UsageError: `target` exists.
    """
    header = read_header(source)
    if header.metadata.get(MARK) != "1":
        raise Malformed(f"{source.name} is not in sparse form", hint="tightship shrink makes such files")
    text = _said(header, "header").encode()
    entries = sorted(header_entries(text, source.name).values(), key=lambda e: (e.begin, e.end))
    forms = strict_json(_said(header, "forms").encode(), f"forms of {source.name}")
    _check_size(source, entries)
    refuse_existing(target)
    held = _by_tensor(header)
    partial = target.with_name(f".{target.name}.partial")
    digest = hashlib.sha256()
    try:
        with partial.open("wb") as file:
            for piece in (len(text).to_bytes(8, "little"), text):
                digest.update(piece)
                file.write(piece)
            for done, entry in enumerate(entries):
                progress("expand", done, len(entries))
                data = _expanded(header, entry, forms, held.get(entry.name, ())).data
                digest.update(data)
                file.write(data)
        if digest.hexdigest() != _said(header, "sha256"):
            raise Malformed(f"{source.name} expands to other bytes than it was made of", hint="fetch it again")
        flush_file(partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    counts = {word: list(forms.values()).count(word) for word in FORMS if word in forms.values()}
    return Shipped(source.stat().st_size, target.stat().st_size, counts)


def _best(matrix: np.ndarray, form: str) -> tuple[str, Mapping[str, np.ndarray]]:
    """The form asked for where it fits, or the smallest; of equal ones the first of `FORMS`."""
    tried = FORMS if form == "auto" else (form, "dense")
    found = {word: pack(word, matrix) for word in tried}
    fits = {word: arrays for word, arrays in found.items() if arrays is not None}
    best = (
        min(fits, key=lambda word: sum(a.nbytes for a in fits[word].values())) if form == "auto" else next(iter(fits))
    )
    return best, fits[best]


def _bits(header: Header, name: str) -> np.ndarray:
    """The tensor's bits as a matrix of unsigned integers; scalars and vectors are one row."""
    array = header.read(name)
    return array.reshape(_matrix_shape(array.shape)).view(BITS[array.dtype.itemsize])


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)


def _by_tensor(header: Header) -> dict[str, list[str]]:
    """Names of a sparse file's arrays by the tensor that they make up."""
    found: dict[str, list[str]] = {}
    for name in header.entries:
        found.setdefault(name.rpartition(":")[0], []).append(name)
    return found


def _expanded(header: Header, entry: Entry, forms: Mapping[str, str], names: Sequence[str]) -> np.ndarray:
    arrays = {name.rpartition(":")[2]: header.read(name) for name in names}
    dtype = np.dtype(BITS[entry.dtype.itemsize])
    try:
        return np.ascontiguousarray(unpack(str(forms.get(entry.name)), arrays, _matrix_shape(entry.shape), dtype))
    except Malformed as error:
        raise Malformed(f"{header.path.name}: {error.message}", tensor=entry.name) from error


def _said(header: Header, key: str) -> str:
    found = header.metadata.get(f"tightship.{key}")
    if found is None:
        raise Malformed(f"{header.path.name} lacks tightship.{key} in its metadata", hint="fetch it again")
    return found


def _check_size(source: Path, entries: list[Entry]) -> None:
    total = sum(entry.end - entry.begin for entry in entries)
    size = source.stat().st_size
    if total > MOST_ZEROS * size:
        raise Malformed(f"{source.name} has {size} bytes and says it expands to {total}")


def refuse_existing(target: Path) -> None:
    """Nothing is overwritten."""
    if target.exists():
        raise UsageError(f"{target.name} exists already", hint="give another name")
