"""A model at rest: config, small files, lazy weights under their on-disk names. Immutable; passes make new ones."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tightship.activations import Activations
from tightship.architecture import Architecture, TensorInfo
from tightship.digests import digest_files
from tightship.errors import Malformed
from tightship.per_layer import layer_config
from tightship.progress import Progress, no_progress
from tightship.weights import Alias, Stored, Weight


@dataclass(frozen=True)
class Source:
    """Where a checkpoint came from, without paths or times.

    Attributes:
        identity: directory name, hub id or file name.
        revision: commit of a hub id, or None.
        files: (relative name, size, sha256) of every file that was read, sorted by name; empty until `hashed`.
        paths: relative name -> where the file is; never written anywhere.
    """

    identity: str
    revision: str | None
    files: tuple[tuple[str, int, str], ...]
    paths: Mapping[str, Path] = field(default_factory=dict, compare=False, repr=False)

    def hashed(self, progress: Progress = no_progress) -> Source:
        """With the digest of every file; reads them all."""
        return self if self.files else dataclasses.replace(self, files=digest_files(self.paths, progress))

    def to_json(self) -> dict[str, Any]:
        files = [{"path": path, "size": size, "sha256": digest} for path, size, digest in self.files]
        return {"identity": self.identity, "revision": self.revision, "files": files}


@dataclass(frozen=True)
class Checkpoint:
    """A model at rest.

    Attributes:
        name: last part of the source's name; names artifacts.
        config: config.json as parsed; edited key by key, never re-serialised through a class.
        weights: on-disk name -> Weight, sorted by name.
        files: tokenizer and other small files, relative name -> bytes.
        architecture: the family's data.
        source: identity and digests of what was opened.
        activations: module -> Activations of its inputs; `MODULE.k_scale` and `.v_scale` of an attention's cache.
        adapters: name -> bytes of LoRA residual files.
        history: one JSON object per pass applied so far.
    """

    name: str
    config: Mapping[str, Any]
    weights: Mapping[str, Weight]
    files: Mapping[str, bytes]
    architecture: Architecture
    source: Source
    activations: Mapping[str, Activations] = field(default_factory=dict)
    adapters: Mapping[str, bytes] = field(default_factory=dict)
    history: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", MappingProxyType(dict(sorted(self.weights.items()))))

    @property
    def hyper(self) -> dict[str, Any]:
        """Canonical hyper-parameters (`layers`, `hidden`, `heads`, ...)."""
        return self.architecture.hyper(self.config)

    def hyper_of(self, block: int | None) -> dict[str, Any]:
        """The same as they hold for one block; None means outside the blocks."""
        return self.hyper if block is None else self.architecture.hyper(layer_config(self.config, block))

    def widths(self, name: str) -> list[int]:
        """A hyper-parameter (`ffn`, `kv_heads`) of every block."""
        return [int(self.hyper_of(block)[name]) for block in range(int(self.hyper["layers"]))]

    def infos(self) -> dict[str, TensorInfo]:
        """The family's table row for each on-disk name this config allows."""
        return self.architecture.lookup(self.config)

    def resolve(self, name: str) -> Stored:
        """The stored weight behind a name, aliases followed.

        Raises:
            Malformed: the name is missing, or aliases run in a circle.
        """
        seen = [name]
        while True:
            weight = self.weights.get(seen[-1])
            if weight is None:
                raise Malformed("the checkpoint has no such tensor", tensor=seen[-1])
            if not isinstance(weight, Alias):
                return weight
            if weight.owner in seen:
                raise Malformed(f"aliases run in a circle: {' -> '.join([*seen, weight.owner])}", tensor=name)
            seen.append(weight.owner)

    @property
    def float32_bytes(self) -> int:
        """Bytes of all weights as float32, borrowed ones counted once."""
        stored = (weight for weight in self.weights.values() if not isinstance(weight, Alias))
        return sum(4 * math.prod(weight.shape) for weight in stored)

    def linears(self) -> list[TensorInfo]:
        """The matrices that compression passes work on: linears of the blocks that are present, in table order."""
        return [i for i in self.infos().values() if i.rule.kind == "linear" and i.name in self.weights]

    def replace(self, **changes: Any) -> Checkpoint:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def with_weights(self, changed: Mapping[str, Weight], dropped: Iterable[str] = ()) -> Checkpoint:
        """A copy in which some weights are replaced or added and others are gone."""
        gone = set(dropped)
        kept = {k: v for k, v in self.weights.items() if k not in gone}
        return self.replace(weights={**kept, **changed})


def check_tensors(checkpoint: Checkpoint) -> None:
    """Compare names and shapes with the family's table.

    Raises:
        Malformed: tensors missing, surplus, or of another shape; all of them are listed (first eight by name).
    """
    infos = checkpoint.infos()
    missing = [n for n, i in infos.items() if not i.rule.optional and n not in checkpoint.weights]
    surplus = [n for n in checkpoint.weights if n not in infos and not checkpoint.architecture.ignores(n)]
    for title, names in (("missing", missing), ("not known", surplus)):
        if names:
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            raise Malformed(
                f"{len(names)} tensors of a {checkpoint.architecture.family} model are {title}: {shown}",
                tensor=names[0],
                hint="the weights and config.json do not belong together, or a shard is missing",
            )
    for name, info in infos.items():
        if name in checkpoint.weights and not isinstance(checkpoint.weights[name], Alias):
            found = tuple(checkpoint.resolve(name).shape)
            if found != info.shape:
                raise Malformed(f"shape {found} where config.json says {info.shape}", tensor=name)


def digest_json(value: Any) -> str:
    """sha256 of a JSON value in canonical form (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
