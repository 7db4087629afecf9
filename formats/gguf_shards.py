"""A GGUF model in several files: NAME-00001-of-0000N.gguf and its siblings.

| key in every shard    | type | meaning                                |
|-----------------------|------|----------------------------------------|
| split.no              | u16  | number of this shard, from 0           |
| split.count           | u16  | shards of the model                    |
| split.tensors.count   | i32  | tensors of the whole model             |

All other metadata are in the first shard. A tensor lies in one shard, whole; shards keep the order of tensors.
Definition: `llama_split_path` and tools/gguf-split of llama.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tightship.errors import Malformed, Unsupported
from tightship.formats.gguf_file import DEFAULT_ALIGNMENT, Field, GgufFile, GgufTensor, padded, read_gguf
from tightship.formats.gguf_writer import TensorToWrite, WrittenGguf, file_bytes, write_gguf
from tightship.target import Progress, no_progress

MAX_SHARDS = 65535
_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class GgufModel:
    """One file or all shards of a model; tensors in order."""

    paths: tuple[Path, ...]
    fields: Mapping[str, Field]
    tensors: Mapping[str, GgufTensor]

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """Values without their types."""
        return {key: field.value for key, field in self.fields.items()}


def shard_name(stem: str, number: int, count: int) -> str:
    """File name of shard `number` (from 0) of `count`."""
    return f"{stem}-{number + 1:05}-of-{count:05}.gguf"


def file_names(main: str) -> tuple[str, ...]:
    """All files of the model whose first or only file is called `main`; what lies beside them is not of the model."""
    match = _NAME.fullmatch(main)
    if match is None:
        return (main,)
    count = int(match["count"])
    return tuple(shard_name(match["stem"], number, count) for number in range(count))


def read_shards(path: str | Path) -> GgufModel:
    """Read a file, and its siblings where it is a shard; any shard of a model will do.

    Raises:
        UsageError: a file is missing.
        Malformed: a file breaks the container's rules, or the shards do not belong together.
    """
    path = Path(path)
    file = read_gguf(path)
    count = int(file.metadata.get("split.count", 1))
    if count <= 1:
        return GgufModel((path,), file.fields, file.tensors)
    match = _NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise Malformed(
            f"{path.name} is one of {count} shards, and its name does not say so",
            hint=f"shards are named like {shard_name('NAME', 0, count)}; restore the original names",
        )
    paths = tuple(path.with_name(shard_name(match["stem"], number, count)) for number in range(count))
    shards = [read_gguf(p) for p in paths]
    return GgufModel(paths, shards[0].fields, _joined(shards, count))


def _joined(shards: Sequence[GgufFile], count: int) -> dict[str, GgufTensor]:
    tensors: dict[str, GgufTensor] = {}
    for number, shard in enumerate(shards):
        found = (shard.metadata.get("split.no"), shard.metadata.get("split.count"))
        if found != (number, count):
            raise Malformed(
                f"{shard.path.name} says it is shard {found[0]} of {found[1]}; expected {number} of {count}"
            )
        twice = tensors.keys() & shard.tensors.keys()
        if twice:
            raise Malformed(f"{shard.path.name} repeats a tensor of an earlier shard", tensor=min(twice))
        tensors |= shard.tensors
    total = shards[0].metadata.get("split.tensors.count")
    if total != len(tensors):
        raise Malformed(f"the shards hold {len(tensors)} tensors, split.tensors.count says {total}")
    return tensors


def cut(tensors: Sequence[TensorToWrite], limit: int) -> list[list[TensorToWrite]]:
    """Runs of tensors with at most `limit` bytes of data each; a larger tensor has a run of its own."""
    runs: list[list[TensorToWrite]] = [[]]
    size = 0
    for tensor in tensors:
        nbytes = padded(tensor.nbytes, DEFAULT_ALIGNMENT)
        if runs[-1] and size + nbytes > limit:
            runs.append([])
            size = 0
        runs[-1].append(tensor)
        size += nbytes
    return runs


def shard_fields(fields: Mapping[str, Field], number: int, count: int, total: int) -> dict[str, Field]:
    """Metadata of one shard."""
    split = {
        "split.no": Field("u16", number),
        "split.count": Field("u16", count),
        "split.tensors.count": Field("i32", total),
    }
    return (dict(fields) if number == 0 else {}) | split


def shards_bytes(fields: Mapping[str, Field], tensors: Sequence[TensorToWrite], limit: int) -> int:
    """Bytes of all files that `write_shards` would write."""
    runs = cut(tensors, limit)
    return sum(file_bytes(shard_fields(fields, i, len(runs), len(tensors)), run) for i, run in enumerate(runs))


def write_shards(
    directory: Path,
    stem: str,
    fields: Mapping[str, Field],
    tensors: Sequence[TensorToWrite],
    *,
    limit: int,
    progress: Progress = no_progress,
) -> dict[str, WrittenGguf]:
    """Write all shards; file name -> what was written, in order.

    Raises:
        Unsupported: more shards than the format counts; else as `write_gguf`.
    """
    runs = cut(tensors, limit)
    if len(runs) > MAX_SHARDS:
        raise Unsupported(f"{len(runs)} shards; GGUF counts to {MAX_SHARDS}", hint="choose a larger shard_bytes")
    written = {}
    for number, run in enumerate(runs):
        name = shard_name(stem, number, len(runs))
        own = shard_fields(fields, number, len(runs), len(tensors))
        written[name] = write_gguf(directory / name, own, run, progress)
    return written
