"""The weight files of a Hugging Face directory: one file or shards with an index, safetensors before `.bin`.

| file                              | index                              | read by                |
|-----------------------------------|------------------------------------|------------------------|
| model.safetensors                 | model.safetensors.index.json       | safetensors_file.py    |
| factored.safetensors              | factored.safetensors.index.json    | safetensors_file.py    |
| pytorch_model.bin                 | pytorch_model.bin.index.json       | torch_bin.py           |
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightship.errors import Malformed, Unsupported, UsageError
from tightship.formats.safetensors_file import read_header
from tightship.formats.torch_bin import read_bin
from tightship.low_rank_files import FACTORED
from tightship.untrusted import strict_json
from tightship.weights import Dense

MAX_INDEX = 100_000_000
Resolve = Callable[[str], Path]


@dataclass(frozen=True)
class WeightFiles:
    """Lazy tensors by on-disk name, and the names of the files that hold them (the index included)."""

    tensors: Mapping[str, Dense]
    files: tuple[str, ...]


def _read_safetensors(path: Path) -> dict[str, Dense]:
    header = read_header(path)
    return {name: header.dense(name) for name in header.entries}


_KINDS = (
    ("model.safetensors", _read_safetensors),
    (FACTORED, _read_safetensors),
    ("pytorch_model.bin", read_bin),
)


def read_weights(names: set[str], resolve: Resolve) -> WeightFiles:
    """Open the weights among the files of a directory.

    `names` are the directory's plain file names; `resolve` gives the checked real path of one.

    Raises:
        UsageError: there are no weight files.
        Unsupported: only weights of a framework that we do not read.
        Malformed: a single file beside an index, shards missing, surplus or in disagreement with the index, or a file
            that breaks its format's rules.
    """
    for single, read in _KINDS:
        index = f"{single}.index.json"
        if single in names and index in names:
            raise Malformed(f"both {single} and {index} are here; they may differ", hint="delete the one not meant")
        if index in names:
            return _sharded(single, index, names, resolve, read)
        if single in names:
            return WeightFiles(read(resolve(single)), (single,))
    foreign = sorted(n for n in names if n.endswith((".h5", ".msgpack", ".ckpt", ".pth", ".pt", ".onnx", ".gguf")))
    if foreign:
        raise Unsupported(
            f"the directory has no model.safetensors or pytorch_model.bin, only {', '.join(foreign[:4])}",
            hint="save the model with transformers, or give a .gguf file itself as the source",
        )
    raise UsageError("the directory has no weights (model.safetensors, its index, or pytorch_model.bin)")


def _sharded(
    single: str, index: str, names: set[str], resolve: Resolve, read: Callable[[Path], dict[str, Dense]]
) -> WeightFiles:
    where = _weight_map(resolve(index), index)
    shards = sorted(set(where.values()))
    absent = [s for s in shards if s not in names]
    if absent:
        raise Malformed(f"{index} names {len(absent)} shards that are not here: {', '.join(absent[:4])}")
    stem, ending = single.rsplit(".", 1)
    stale = sorted(set(fnmatch.filter(names, f"{stem}-*-of-*.{ending}")) - set(shards))
    if stale:
        raise Malformed(
            f"shards that {index} does not name: {', '.join(stale[:4])}",
            hint="delete what another save left",
        )
    tensors: dict[str, Dense] = {}
    for shard in shards:
        found = read(resolve(shard))
        wanted = {name for name, file in where.items() if file == shard}
        _agree(shard, index, wanted, set(found))
        tensors |= found
    return WeightFiles(tensors, (index, *shards))


def _weight_map(path: Path, index: str) -> dict[str, str]:
    if path.stat().st_size > MAX_INDEX:
        raise Malformed(f"{index} has {path.stat().st_size} bytes; the limit is {MAX_INDEX}")
    data: Any = strict_json(path.read_bytes(), index)
    where = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(where, dict) or not where:
        raise Malformed(f"{index} has no weight_map")
    for name, file in where.items():
        if not isinstance(file, str) or file in {"", ".", ".."} or "/" in file or "\\" in file or "\0" in file:
            raise Malformed(f"{index} names the file {file!r:.80}; only plain file names are followed", tensor=name)
    return where


def _agree(shard: str, index: str, wanted: set[str], found: set[str]) -> None:
    missing, surplus = sorted(wanted - found), sorted(found - wanted)
    if missing:
        raise Malformed(f"{index} says {shard} holds this tensor, and it does not", tensor=missing[0])
    if surplus:
        raise Malformed(f"{shard} holds this tensor, and {index} does not know it there", tensor=surplus[0])
