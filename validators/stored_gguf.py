"""GGUF tensors by gguf's own reader and decoders, turned back into the checkpoint's terms.

What GGUF does to a tensor is undone here by definitions of its own:

| word           | in the file                                                                                   |
|----------------|-----------------------------------------------------------------------------------------------|
| rope_permute_q | rows of each head interleaved: stored row 2j + i is row i * d/2 + j, d the head dimension      |
| rope_permute_k | the same with the key heads                                                                    |
| qkv_by_group   | groups of query heads with their key and value head taken apart: all q, all k, all v           |
| plus_one       | one added (Gemma's norms)                                                                      |
| minus_exp      | -exp(w) (Mamba's A, whose logarithm the checkpoint holds)                                      |
| flat_kernel    | (channels, 1, taps) without the middle axis                                                    |
| over_root_hidden | divided by the root of the width (T5's last norm, for its tied head)                         |
| experts        | one stack (experts, out, in) for all experts of a block                                        |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize

from tightship.checkpoint import Checkpoint
from tightship.errors import Malformed
from tightship.formats.packings.ggml import FLOAT_TYPES, unpack_ggml
from tightship.target import TargetPlan
from tightship.validators.integers import Piece, pieces_of

# Parts of a sum: the base is the model's tensor, the residual a LoRA adapter's pair.
_SUFFIXES = {".base": "", ".residual.right": ".lora_a", ".residual.left": ".lora_b"}
_Function = Callable[[np.ndarray, int], np.ndarray]
_FUNCTIONS: Mapping[str | None, tuple[_Function, _Function]] = {
    "plus_one": (lambda x, _: x + np.float32(1), lambda x, _: x - np.float32(1)),
    "minus_exp": (
        lambda x, _: -np.exp(x, dtype=np.float64).astype(np.float32),
        lambda x, _: np.log(-x, dtype=np.float64).astype(np.float32),
    ),
    "flat_kernel": (lambda x, _: x.squeeze(1), lambda x, _: np.expand_dims(x, 1)),
    "over_root_hidden": (
        lambda x, hidden: x * np.float32(hidden**-0.5),
        lambda x, hidden: x / np.float32(hidden**-0.5),
    ),
}


class GgufStored:
    """See `stored.Stored`. `files` are the shards of one model, and the adapter with its corrections."""

    def __init__(self, checkpoint: Checkpoint, plan: TargetPlan, files: Sequence[Path]) -> None:
        self.checkpoint = checkpoint
        self.infos = checkpoint.infos()
        self.stored_as = {tensor.name: tensor.stored_as for tensor in plan.tensors}
        self._hidden = int(checkpoint.hyper["hidden"])
        self._readers = [GGUFReader(path) for path in files]
        self.tensors = {tensor.name: tensor for reader in self._readers for tensor in reader.tensors}

    def listing(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        return {name: (t.tensor_type.name, tuple(int(n) for n in t.shape[::-1])) for name, t in self.tensors.items()}

    def value(self, name: str, part: str = "") -> np.ndarray:
        tensor = self._tensor(name, part)
        found = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        found = found[self._expert(name)]
        rows = None if part == ".residual.right" else self._rows(name, found.shape)
        return found if rows is None else found[rows]

    def changed(self, name: str, values: np.ndarray) -> np.ndarray:
        word = self._transform(name)
        return values if word not in _FUNCTIONS else _FUNCTIONS[word][0](values.astype(np.float32), self._hidden)

    def restored(self, name: str, values: np.ndarray) -> np.ndarray:
        word = self._transform(name)
        return values if word not in _FUNCTIONS else _FUNCTIONS[word][1](values, self._hidden)

    def integers(self, name: str, part: str = "") -> Iterator[Piece] | None:
        tensor = self._tensor(name, part)
        kind = tensor.tensor_type.name
        if kind in FLOAT_TYPES or (kind.startswith("I") and not kind.startswith("IQ")):
            return None
        data = np.asarray(tensor.data)[self._expert(name)]
        layout, arrays = unpack_ggml(kind, np.ascontiguousarray(data), int(tensor.shape[0]))
        rows = self._rows(name, (len(data), int(tensor.shape[0])))
        return pieces_of(layout, arrays if rows is None else {key: array[rows] for key, array in arrays.items()})

    def _tensor(self, name: str, part: str) -> Any:
        stored = f"{self.stored_as.get(name)}{_SUFFIXES.get(part, part)}"
        tensor = self.tensors.get(stored)
        if tensor is None:
            raise Malformed(f"the GGUF file has no tensor {stored}", tensor=name)
        return tensor

    def _transform(self, name: str) -> str | None:
        info = self.infos.get(name)
        return info.rule.transform if info else None

    def _expert(self, name: str) -> Any:
        info = self.infos.get(name)
        return Ellipsis if info is None or info.expert is None else info.expert

    def _rows(self, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """Stored row of each row of the checkpoint, or None where the order is kept."""
        transform = self._transform(name)
        if transform is None or transform in _FUNCTIONS:
            return None
        hyper = self.checkpoint.hyper_of(self.infos[name].block)
        if transform == "qkv_by_group":
            return _fused_rows(shape[0], int(hyper["heads"]), int(hyper["kv_heads"]))
        if transform not in ("rope_permute_q", "rope_permute_k"):
            raise Malformed(f"the proof does not know the transform {transform!r}", tensor=name)
        heads = int(hyper["heads" if transform == "rope_permute_q" else "kv_heads"])
        size = shape[0] // heads
        row = np.arange(shape[0])
        head, inside = row // size, row % size
        half, pair = inside // (size // 2), inside % (size // 2)
        return head * size + 2 * pair + half


def _fused_rows(rows: int, heads: int, groups: int) -> np.ndarray:
    """Stored row of each row of a fused matrix whose groups are (query heads, key head, value head)."""
    shared = heads // groups
    size = rows // (heads + 2 * groups)
    head, inside = np.divmod(np.arange(rows), size)
    group, place = np.divmod(head, shared + 2)
    query = group * shared + place
    key, value = heads + group, heads + groups + group
    return np.select([place < shared, place == shared], [query, key], value) * size + inside
