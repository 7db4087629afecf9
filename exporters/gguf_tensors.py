"""Tensors of a checkpoint as llama.cpp wants them: renamed, permuted by rows, stacked, in the file's order.

Everything is done on codes and floats alike: a permutation of rows moves whole rows of a `Quantized`, and never rounds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tightship.architecture import TensorInfo
from tightship.checkpoint import Checkpoint
from tightship.errors import Malformed, Unsupported
from tightship.exporters.gguf_mixes import Matrix, quantizable
from tightship.formats.packings.ggml import FLOAT_TYPES, ggml_type_for, pack_floats, pack_ggml, row_bytes
from tightship.formats.threads import in_order
from tightship.layout import Layout
from tightship.weights import Alias, Dense, Quantized, Stored, Sum

CHUNK_WEIGHTS = 1 << 20
_FLOAT_TYPE = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
_BLOCK_NUMBER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class FileTensor:
    """One tensor of the file. `sources` are the on-disk tensors that it holds, several where experts are stacked."""

    name: str
    sources: tuple[TensorInfo, ...]
    weights: tuple[Dense | Quantized, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """NumPy's order; a stack has the experts in front."""
        single = tuple(self.weights[0].shape)
        return (len(self.weights), *single) if self.stacked else single

    @property
    def stacked(self) -> bool:
        return bool(self.sources) and self.sources[0].expert is not None

    @property
    def matrix(self) -> Matrix:
        return Matrix(self.name, self.shape)


def file_tensors(checkpoint: Checkpoint) -> list[FileTensor]:
    """Every tensor of the checkpoint that has a place in GGUF, in the order of llama-quantize.

    Raises:
        Unsupported: a weight made of factors, or a transform that we do not know.
    """
    grouped: dict[str, list[tuple[TensorInfo, Dense | Quantized]]] = {}
    for name, info in checkpoint.infos().items():
        if name not in checkpoint.weights or info.rule.gguf is None or _is_tied_head(checkpoint, info):
            continue
        weight = turned(plain(name, checkpoint.resolve(name)), info, checkpoint.hyper)
        grouped.setdefault(info.rule.gguf.format(i=info.block, e=info.expert), []).append((info, weight))
    tensors = [
        FileTensor(name, tuple(i for i, _ in parts), tuple(w for _, w in parts)) for name, parts in grouped.items()
    ]
    return sorted(tensors, key=lambda t: file_order(t.name))


def file_order(name: str) -> tuple[int, str]:
    """llama.cpp's order: what belongs to no block first, then by block and name."""
    match = _BLOCK_NUMBER.match(name)
    return (int(match[1]) if match else -1, name)


def plain(name: str, weight: Stored) -> Dense | Quantized:
    """What the model's file holds of a weight: of a sum its base, the rest being an adapter (`gguf_lora`).

    Raises:
        Unsupported: factors.
    """
    if isinstance(weight, Sum):
        return weight.base
    if isinstance(weight, Dense | Quantized):
        return weight
    raise Unsupported(
        f"GGUF has no tensor made of factors (found rank {weight.rank})",
        tensor=name,
        hint="with: {merge: true} for this target; or ONNX or safetensors, which hold factors",
    )


def _is_tied_head(checkpoint: Checkpoint, info: TensorInfo) -> bool:
    """A head that is the embedding again is left out where the loader ties by itself."""
    weight = checkpoint.weights[info.name]
    gguf = checkpoint.architecture.gguf or {}
    return info.rule.kind == "head" and isinstance(weight, Alias) and gguf.get("head", "optional") != "required"


# --- transforms -------------------------------------------------------------------------------------------------


def _in_double(function: np.ufunc, x: np.ndarray) -> np.ndarray:
    """float32, rounded from float64: a float32 exponential differs from CPU to CPU."""
    return function(x.astype(np.float64)).astype(np.float32)


Formula = Callable[[np.ndarray, Mapping[str, Any]], np.ndarray]
# Transforms of values: there and back.
FORMULAS: dict[str, tuple[Formula, Formula]] = {
    "plus_one": (lambda x, _: x + np.float32(1), lambda x, _: x - np.float32(1)),
    "minus_exp": (lambda x, _: -_in_double(np.exp, x), lambda x, _: _in_double(np.log, -x)),
    "flat_kernel": (lambda x, _: x[:, 0], lambda x, _: x[:, None]),
    "over_root_hidden": (
        lambda x, hyper: x * np.float32(hyper["hidden"] ** -0.5),
        lambda x, hyper: x * np.float32(hyper["hidden"] ** 0.5),
    ),
}


def computed(weight: Dense, formula: Formula, hyper: Mapping[str, Any]) -> Dense:
    """float32 values that a formula makes of the weight's when they are asked for."""
    with np.errstate(all="ignore"):  # for its shape alone: 0 may have no logarithm
        shape = formula(np.zeros(weight.shape, np.float32), hyper).shape
    return Dense(shape, "f32", lambda: formula(weight.value(), hyper))


def turned(weight: Dense | Quantized, info: TensorInfo, hyper: Mapping[str, Any]) -> Dense | Quantized:
    """The weight after its family's transform.

    Raises:
        Unsupported: a transform that we do not know, or one that codes cannot follow.
    """
    word = info.rule.transform
    if word is None:
        return weight
    if word in FORMULAS:
        if isinstance(weight, Quantized):
            raise Unsupported(f"the transform {word} cannot be done on codes", tensor=info.name)
        return computed(weight, FORMULAS[word][0], hyper)
    order = row_order(word, weight.shape[0], hyper)
    if isinstance(weight, Quantized):
        return weight.take_rows(order)
    return Dense(weight.shape, weight.dtype, lambda: weight.read()[order])


def row_order(word: str, rows: int, hyper: Mapping[str, Any]) -> np.ndarray:
    """Which row of the checkpoint stands in each row of the file, (rows,) int64.

    `rope_permute_q`, `rope_permute_k`: from rotated halves (i, i + d/2) to neighbours (2i, 2i + 1) of a "norm" RoPE.
    `qkv_by_group`: from groups (query heads; their key head; their value head) to all q, all k, all v.

    Raises:
        Unsupported: no such transform.
        Malformed: the rows are no whole heads.
    """
    places = np.arange(rows)
    width = int(hyper["head_dim"])
    if word in ("rope_permute_q", "rope_permute_k"):
        return places.reshape(-1, 2, width // 2).swapaxes(1, 2).reshape(-1)
    if word == "qkv_by_group":
        groups = int(hyper["kv_heads"])
        if rows % (groups * width):
            raise Malformed(f"{rows} rows are not {groups} groups of heads of {width}")
        grouped = places.reshape(groups, -1, width)
        return np.concatenate([grouped[:, :-2].reshape(-1), grouped[:, -2].reshape(-1), grouped[:, -1].reshape(-1)])
    raise Unsupported(f"the transform {word!r} of the architecture file is not known to the GGUF exporter")


# --- storage ----------------------------------------------------------------------------------------------------


def stored_type(tensor: FileTensor, wanted: Layout | str | None) -> tuple[str, str]:
    """The GGML type of a tensor and the word of its layout.

    `wanted` is what a scheme asks of it: a layout, a float word, or None for what it has.

    Raises:
        Unsupported: the type cannot say the weight exactly; the message names the nearest layouts.
    """
    first = tensor.weights[0]
    if isinstance(first, Quantized):
        return _quantized_type(tensor, first.layout), first.layout.name
    if isinstance(wanted, Layout):
        return _quantized_type(tensor, wanted), wanted.name
    if len(first.shape) == 1 or not quantizable(tensor.matrix):
        return "F32", "f32"
    word = wanted or first.dtype
    if word not in _FLOAT_TYPE:
        raise Unsupported(f"GGUF has no element type {word}; nearest: f32, bf16, f16", tensor=tensor.sources[0].name)
    return _FLOAT_TYPE[word], word


def _quantized_type(tensor: FileTensor, layout: Layout) -> str:
    name = tensor.sources[0].name
    type_name = ggml_type_for(layout)
    mixed = {w.layout.name for w in tensor.weights if isinstance(w, Quantized)} - {layout.name}
    if mixed:
        raise Unsupported(f"the stack {tensor.name} mixes layouts {layout.name} and {', '.join(mixed)}", tensor=name)
    if type_name is None:
        raise Unsupported(
            f"GGUF has no type that says {layout.name} exactly; nearest: int4, int8, int4-asym, q4_k", tensor=name
        )
    row_bytes(type_name, tensor.shape[-1])
    return type_name


def chunks(tensor: FileTensor, type_name: str) -> Iterator[np.ndarray]:
    """The tensor's bytes, a few rows at a time.

    Raises:
        Malformed: NaN or infinity.
        Unsupported: a value that the type cannot hold.
    """
    for weight, source in zip(tensor.weights, tensor.sources or (None,), strict=True):
        name = source.name if source else tensor.name
        packed = _packer(weight, type_name) if isinstance(weight, Quantized) else _caster(weight, type_name, name)
        yield from in_order(packed, _slices(weight.shape))


def _packer(weight: Quantized, type_name: str) -> Callable[[slice], np.ndarray]:
    """Bytes of some rows of a matrix on its grid, which is read (and perhaps solved) now."""
    arrays = weight.read()
    return lambda rows: pack_ggml(type_name, {key: array[rows] for key, array in arrays.items()}, weight.layout)


def _caster(weight: Dense, type_name: str, name: str) -> Callable[[slice], np.ndarray]:
    """Bytes of some entries of the first axis of an array of floats."""
    read = weight.rows()

    def packed(rows: slice) -> np.ndarray:
        values = read(rows.start, rows.stop)
        return _float_bytes(type_name, values.reshape(len(values), -1), name)

    return packed


def _float_bytes(type_name: str, values: np.ndarray, name: str) -> np.ndarray:
    if type_name not in FLOAT_TYPES:
        raise Unsupported(f"the plan says {type_name}, and the weight is not quantized", tensor=name)
    wide = values.astype(np.float32, copy=False)
    if not np.isfinite(wide).all():
        raise Malformed("holds NaN or infinity", tensor=name, hint="the checkpoint is damaged; take another copy")
    try:
        return pack_floats(type_name, values if values.dtype == FLOAT_TYPES[type_name] else wide)
    except Unsupported as error:
        error.tensor = name
        raise


def _slices(shape: Sequence[int]) -> list[slice]:
    """Runs of entries of the first axis, of about CHUNK_WEIGHTS each."""
    step = max(1, CHUNK_WEIGHTS // max(math.prod(shape[1:]), 1))
    return [slice(first, min(first + step, shape[0])) for first in range(0, shape[0], step)]
