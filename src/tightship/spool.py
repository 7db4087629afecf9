"""Solve once, read often: results of streamed passes are kept on disk for one build, and hashed as they go by.

A weight is solved when its first reader asks for it; what every later reader (other targets, the proof) gets are the
same bytes, read back. Weights that are cheap to read again, such as the source's own, are only hashed.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.layout import Arrays
from tightship.stage_codec import read_arrays, write_arrays
from tightship.weights import Alias, Dense, Factored, Quantized, Sum, Weight


class Spool:
    """Files below `folder`, one a solved matrix. `digests` of a checkpoint are complete once all was read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0
        self._known: dict[int, tuple[Weight, Weight, dict[str, str]]] = {}
        self._through: dict[int, tuple[Checkpoint, Checkpoint]] = {}

    def through(self, checkpoint: Checkpoint) -> Checkpoint:
        """The same checkpoint, read through this spool; the same object for the same object.

        Weights that two checkpoints share are spooled once.
        """
        if id(checkpoint) not in self._through:
            self.folder.mkdir(parents=True, exist_ok=True)
            weights = {name: self._weight(weight) for name, weight in checkpoint.weights.items()}
            self._through[id(checkpoint)] = (checkpoint, checkpoint.replace(weights=weights))
        return self._through[id(checkpoint)][1]

    def digests(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Digest of each weight of a checkpoint that came from `through`: sha256 of what it says, container apart.

        It covers layout, shape and the bytes of the logical arrays; a borrowed tensor says whose it is. Weights that
        nobody has read yet are read now.
        """
        made = {id(entry[1]): entry[2] for entry in self._known.values()}
        found: dict[str, str] = {}
        for name, weight in checkpoint.weights.items():
            if isinstance(weight, Alias):
                found[name] = _digest({"alias": weight.owner}, {})
                continue
            parts = made[id(weight)]
            for part in _leaves(weight):
                if part[0] not in parts:
                    part[1].read()
            found[name] = next(iter(parts.values())) if len(parts) == 1 else _digest(dict(sorted(parts.items())), {})
        return found

    def _weight(self, weight: Weight) -> Weight:
        if isinstance(weight, Alias):
            return weight
        if id(weight) not in self._known:
            parts: dict[str, str] = {}
            self._known[id(weight)] = (weight, self._wrap(weight, "", parts), parts)
        return self._known[id(weight)][1]

    def _wrap(self, weight: Any, path: str, parts: dict[str, str]) -> Any:
        if isinstance(weight, Factored):
            return Factored(
                self._wrap(weight.left, f"{path}left.", parts), self._wrap(weight.right, f"{path}right.", parts)
            )
        if isinstance(weight, Sum):
            base = self._wrap(weight.base, f"{path}base.", parts)
            return Sum(base, self._wrap(weight.residual, f"{path}residual.", parts))
        if isinstance(weight, Dense):
            return Dense(weight.shape, weight.dtype, _hashed(weight, path, parts))
        self._count += 1
        return Quantized(
            weight.layout, weight.shape, _kept(weight, self.folder / f"{self._count}.safetensors", path, parts)
        )


def _hashed(weight: Dense, path: str, parts: dict[str, str]) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        array = weight.read()
        if path not in parts:
            parts[path] = _digest({"dtype": weight.dtype, "shape": weight.shape}, {"data": array})
        return array

    return read


def _kept(weight: Quantized, file: Path, path: str, parts: dict[str, str]) -> Callable[[], Arrays]:
    lock = threading.Lock()

    def read() -> Arrays:
        with lock:
            if path in parts:
                return read_arrays(file, list(weight.layout.array_specs(weight.shape)))
            arrays = weight.read()
            write_arrays(file, arrays)
            parts[path] = _digest({"layout": weight.layout.to_json(), "shape": weight.shape}, arrays)
            return arrays

    return read


def _leaves(weight: Any, path: str = "") -> list[tuple[str, Dense | Quantized]]:
    if isinstance(weight, Factored):
        return _leaves(weight.left, f"{path}left.") + _leaves(weight.right, f"{path}right.")
    if isinstance(weight, Sum):
        return _leaves(weight.base, f"{path}base.") + _leaves(weight.residual, f"{path}residual.")
    return [(path, weight)]


def _digest(what: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(what, sort_keys=True, separators=(",", ":")).encode())
    for key in sorted(arrays):
        digest.update(key.encode())
        digest.update(np.ascontiguousarray(arrays[key]).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
