"""An ONNX file with sparse initializers for shipping, and back to the same bytes.

| what is shipped | content                                                                                            |
|-----------------|----------------------------------------------------------------------------------------------------|
| NAME.onnx       | the graph; initializers that shrink are SparseTensorProto: values and INT64 flat places, ascending |
| NAME.onnx_data  | values, places, and the other tensors as they were                                                 |

Float tensors of n elements, z of them with a bit set (-0.0 is kept), b bytes each, become sparse where z (b + 8) < n b:
below a third of float32, a fifth of float16. So 2:4, or half of a model's weights, never shrink.

| metadata_props       | value                                                                          |
|----------------------|--------------------------------------------------------------------------------|
| tightship.sparse     | what this is: smaller to ship, no faster and no smaller once loaded            |
| tightship.original   | JSON: order of initializers, [offset, length] of external ones, data file, its size |
| tightship.sha256     | JSON: digests of graph and data file                                           |

ONNX Runtime opens such a file and makes the tensors dense; the onnx package's checker does not, since the places lie
outside the graph. Definition: SparseTensorProto of ONNX, ExternalData.md.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from tightship.dtypes import BY_ONNX
from tightship.durable import flush_file, sha256_file
from tightship.errors import Malformed, Unsupported
from tightship.formats.onnx_file import contained, read_onnx
from tightship.formats.onnx_writer import SMALL_ALIGNMENT, point_to
from tightship.formats.transport import BITS, MARK, MOST_ZEROS, Shipped, refuse_existing
from tightship.progress import Progress, no_progress
from tightship.untrusted import strict_json

if TYPE_CHECKING:
    import onnx

_LABEL = "for transport: dense, and no faster, once it is loaded; `tightship expand` gives the original back"
_FLOATS = (1, 10, 16)  # FLOAT, FLOAT16, BFLOAT16
_INT64 = 7
_CHUNK = 1 << 24


def shrink_onnx(source: Path, target: Path, progress: Progress = no_progress) -> Shipped:
    """Write `source` (and its data file) with sparse initializers where they are smaller.

    Raises:
        Malformed: `source` is not a sound ONNX file.
        Unsupported: its bytes could not be made again from what would be shipped, or it has several data files.
        UsageError: `target` exists.
    """
    import onnx

    location = _only_data_file(source)
    graph = source.read_bytes()
    model = onnx.ModelProto.FromString(graph)
    if model.SerializeToString(deterministic=True) != graph or _gaps_hold_something(model, source.parent):
        raise Unsupported(f"{source.name} was written in another way than ours: it could not be restored byte for byte")
    refuse_existing(target)
    size = (source.parent / location).stat().st_size
    original = {
        "order": [t.name for t in model.graph.initializer],
        "external": {t.name: list(_place(t)) for t in model.graph.initializer if t.external_data},
        "data": location,
        "size": size,
    }
    digests = {"graph": hashlib.sha256(graph).hexdigest(), "data": sha256_file(source.parent / location)}
    tensors = list(model.graph.initializer)
    del model.graph.initializer[:]
    data = target.with_name(f"{target.name}_data")
    counts = {"dense": 0, "sparse": 0}
    with (source.parent / location).open("rb") as stream, data.open("xb") as out:
        shipment = _Shipment(model.graph, stream, out, data.name)
        for done, tensor in enumerate(tensors):
            progress("write sparse initializers", done, len(tensors))
            counts["sparse" if shipment.add(tensor) else "dense"] += 1
    for key, value in ((MARK, _LABEL), ("tightship.original", original), ("tightship.sha256", digests)):
        model.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value, sort_keys=True))
    target.write_bytes(model.SerializeToString(deterministic=True))
    return Shipped(
        len(graph) + size, target.stat().st_size + data.stat().st_size, {k: n for k, n in counts.items() if n}
    )


def expand_onnx(source: Path, target: Path, progress: Progress = no_progress) -> Shipped:
    """Write the graph and the data file that `source` was made of, byte for byte; digests are checked first.

    The data file gets its old name, which the graph knows, in the folder of `target`.

    Raises:
        Malformed: `source` is not in sparse form, is damaged, or does not give what its digests say.
        UsageError: `target` or the data file exists.
    """
    import onnx

    model = onnx.ModelProto.FromString(source.read_bytes())
    said = {p.key: p.value for p in model.metadata_props}
    if MARK not in said:
        raise Malformed(f"{source.name} is not in sparse form", hint="tightship shrink makes such files")
    original, digests = (_json(said, key, source.name) for key in ("original", "sha256"))
    data = target.with_name(Path(str(original["data"])).name)
    for path in (target, data):
        refuse_existing(path)
    shipped = source.stat().st_size + source.with_name(f"{source.name}_data").stat().st_size
    if int(original["size"]) > MOST_ZEROS * shipped:
        raise Malformed(f"{source.name} has {shipped} bytes and says it expands to {original['size']}")
    counts = {"dense": len(model.graph.initializer), "sparse": len(model.graph.sparse_initializer)}
    partial = data.with_name(f".{data.name}.partial")
    try:
        with partial.open("wb") as out:
            out.truncate(int(original["size"]))
            _restore(model.graph, original, source, out, progress)
        for key in (MARK, "tightship.original", "tightship.sha256"):
            model.metadata_props.remove(next(p for p in model.metadata_props if p.key == key))
        graph = model.SerializeToString(deterministic=True)
        if {"graph": hashlib.sha256(graph).hexdigest(), "data": sha256_file(partial)} != digests:
            raise Malformed(f"{source.name} expands to other bytes than it was made of", hint="fetch it again")
        flush_file(partial)
        partial.replace(data)
        target.write_bytes(graph)
    finally:
        partial.unlink(missing_ok=True)
    return Shipped(shipped, len(graph) + data.stat().st_size, {k: n for k, n in counts.items() if n})


# Shipping


def _only_data_file(source: Path) -> str:
    """The data file of a sound graph that keeps its large tensors outside."""
    files = read_onnx(source).files
    if len(files) != 1:
        raise Unsupported(f"{source.name} has {len(files)} data files; one can be shrunk")
    return files[0]


@dataclass
class _Shipment:
    """The graph and the data file `name` that are being written; `moved`: where dense ranges of `stream` have gone."""

    graph: onnx.GraphProto
    stream: BinaryIO
    out: BinaryIO
    name: str
    moved: dict[int, int] = field(default_factory=dict)

    def add(self, tensor: onnx.TensorProto) -> bool:
        """Put a tensor in in its smaller form; whether that is the sparse one."""
        if tensor.external_data and self._sparse(tensor):
            return True
        kept = self.graph.initializer.add()
        kept.CopyFrom(tensor)
        if tensor.external_data:
            start, length = _place(tensor)
            if start not in self.moved:
                self.stream.seek(start)
                self.moved[start] = _append(self.out, _pieces(self.stream, length))
            point_to(kept, self.name, self.moved[start], length)
        return False

    def _sparse(self, tensor: onnx.TensorProto) -> bool:
        start, length = _place(tensor)
        if tensor.data_type not in _FLOATS or start in self.moved:
            return False
        size = BY_ONNX[tensor.data_type].itemsize
        self.stream.seek(start)
        bits = np.frombuffer(self.stream.read(length), BITS[size])
        places = np.flatnonzero(bits).astype("<i8")
        if places.size * (size + places.itemsize) >= length:
            return False
        sparse = self.graph.sparse_initializer.add(dims=tensor.dims)
        for part, kind, array, word in (
            (sparse.values, tensor.data_type, bits[places], tensor.name),
            (sparse.indices, _INT64, places, f"{tensor.name}.places"),
        ):
            part.name, part.data_type = word, kind
            part.dims.append(places.size)
            point_to(part, self.name, _append(self.out, [array.tobytes()]), array.nbytes)
        return True


def _append(out: BinaryIO, pieces: Iterable[bytes]) -> int:
    """Write pieces at the next aligned place; returns it."""
    start = -(-out.tell() // SMALL_ALIGNMENT) * SMALL_ALIGNMENT
    out.write(bytes(start - out.tell()))
    for piece in pieces:
        out.write(piece)
    return start


def _pieces(stream: BinaryIO, length: int) -> Iterator[bytes]:
    for start in range(0, length, _CHUNK):
        yield stream.read(min(_CHUNK, length - start))


def _place(tensor: onnx.TensorProto) -> tuple[int, int]:
    entries = {e.key: e.value for e in tensor.external_data}
    numbers = [entries.get("offset", "0"), entries.get("length", "")]
    if not all(word.isdecimal() for word in numbers):
        raise Malformed("external data need an offset and a length in plain digits", tensor=tensor.name)
    return int(numbers[0]), int(numbers[1])


def _gaps_hold_something(model: onnx.ModelProto, folder: Path) -> bool:
    """Whether bytes that no tensor names are other than zero, or a tensor leaves out where it lies."""
    external = [t for t in model.graph.initializer if t.external_data]
    if not all({"location", "offset", "length"} == {e.key for e in t.external_data} for t in external):
        return True
    path = folder / next(e.value for e in external[0].external_data if e.key == "location")
    end = 0
    with path.open("rb") as stream:
        for start, length in sorted({_place(t) for t in external}):
            stream.seek(end)
            if stream.read(max(start - end, 0)).strip(b"\0"):
                return True
            end = max(end, start + length)
        return end != path.stat().st_size


# Restoring


def _restore(
    graph: onnx.GraphProto, original: Mapping[str, Any], source: Path, out: BinaryIO, progress: Progress
) -> None:
    """The tensors of `graph` as they were, in their old order, and their data into `out`."""
    dense = {t.name: t for t in graph.initializer}
    sparse = {s.values.name: s for s in graph.sparse_initializer}
    restored = []
    for done, name in enumerate(original["order"]):
        progress("expand", done, len(original["order"]))
        if name not in dense and name not in sparse:
            raise Malformed(f"{source.name} lacks a tensor", tensor=str(name), hint="fetch it again")
        place = original["external"].get(name)
        tensor = dense[name] if name in dense else _dense(sparse[name])
        if place is not None:
            start, length = (int(number) for number in place)
            data = _data(dense[name], source) if name in dense else _expanded(sparse[name], source, length)
            if len(data) != length or not 0 <= start <= int(original["size"]) - length:
                raise Malformed(f"{source.name}: {len(data)} bytes for a place of {length}", tensor=str(name))
            out.seek(start)
            out.write(data)
            point_to(tensor, str(original["data"]), start, length)
        restored.append(tensor)
    del graph.initializer[:]
    del graph.sparse_initializer[:]
    graph.initializer.extend(restored)


def _dense(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    import onnx

    return onnx.TensorProto(name=sparse.values.name, data_type=sparse.values.data_type, dims=sparse.dims)


def _expanded(sparse: onnx.SparseTensorProto, source: Path, length: int) -> bytes:
    """The dense bytes, which are to be so many."""
    kind = sparse.values.data_type
    if kind not in _FLOATS or sparse.indices.data_type != _INT64:
        raise Malformed(f"{source.name}: a sparse tensor of types {kind} and {sparse.indices.data_type}")
    values = np.frombuffer(_data(sparse.values, source), BITS[BY_ONNX[kind].itemsize])
    places = np.frombuffer(_data(sparse.indices, source), "<i8")
    count = math.prod(sparse.dims)
    sound = places.size == values.size and (places[1:] > places[:-1]).all() and count * values.itemsize == length
    if not sound or (places.size and not 0 <= places[0] <= places[-1] < count):
        raise Malformed(f"{source.name}: places outside the tensor, or out of order", tensor=sparse.values.name)
    dense = np.zeros(count, values.dtype)
    dense[places] = values
    return dense.tobytes()


def _data(tensor: onnx.TensorProto, source: Path) -> bytes:
    location = next((e.value for e in tensor.external_data if e.key == "location"), "")
    start, length = _place(tensor)
    with contained(source.parent, location, tensor.name).open("rb") as stream:
        stream.seek(start)
        return stream.read(length)


def _json(said: Mapping[str, str], key: str, name: str) -> Any:
    if f"tightship.{key}" not in said:
        raise Malformed(f"{name} lacks tightship.{key} in its metadata", hint="fetch it again")
    return strict_json(said[f"tightship.{key}"].encode(), f"{key} of {name}")
