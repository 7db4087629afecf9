"""Cutting a checkpoint into shards: `model-00001-of-0000N.safetensors` and the index that names them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tightship.formats.safetensors_file import Spec, file_size


@dataclass(frozen=True)
class Shard:
    """One file and what is in it."""

    name: str
    specs: Mapping[str, Spec]

    def file_bytes(self, metadata: Mapping[str, str]) -> int:
        """Size of the file, header included."""
        return file_size(self.specs, metadata)


def cut(groups: Sequence[Mapping[str, Spec]], limit: int, stem: str = "model") -> list[Shard]:
    """Shards of at most `limit` bytes of tensors, filled in the given order; the tensors of a group stay together.

    A group above the limit has a shard of its own. One shard is called STEM.safetensors.
    """
    filled: list[dict[str, Spec]] = [{}]
    room = limit
    for group in groups:
        size = sum(spec.nbytes for spec in group.values())
        if size > room and filled[-1]:
            filled.append({})
            room = limit
        filled[-1].update(group)
        room -= size
    if len(filled) == 1:
        return [Shard(f"{stem}.safetensors", filled[0])]
    count = len(filled)
    return [Shard(f"{stem}-{i:05d}-of-{count:05d}.safetensors", specs) for i, specs in enumerate(filled, 1)]


def index_bytes(shards: Sequence[Shard]) -> bytes:
    """`model.safetensors.index.json`: total bytes of all tensors, and the file of each."""
    total = sum(spec.nbytes for shard in shards for spec in shard.specs.values())
    where = {tensor: shard.name for shard in shards for tensor in shard.specs}
    data = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
