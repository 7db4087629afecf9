"""Scales that move from one weight into another without changing what the model computes, by the family's data.

Whatever makes an activation x gives x / s when its output channels are divided by s; whatever is fed x then multiplies
its input channels by s. Two kinds of places:

- a norm (gain and bias, divided; `1 + w` norms as such) and every matrix that is fed its output, routers included;
- two matrices with nothing but products between them, or a ReLU, which a positive scale passes through: values and
  attention output, up and down of a gated network or of OPT's. With grouped queries, several columns of the second
  share a channel of the first.

The stream of float weights stays exact up to float32 rounding: results are float32, whatever the source's type was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tightship.architecture import TensorInfo
from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported
from tightship.expressions import holds, literal
from tightship.weights import Alias, Dense


@dataclass(frozen=True)
class Fold:
    """One place where a scale can move.

    Attributes:
        block: block number.
        norm: whether a norm makes the activation.
        producer: on-disk name of the norm's gain or of the first matrix; a norm without a gain has no name.
        bias: on-disk name of the producer's bias, where it has one.
        rows: (channels,) int64, elements or rows of the producer that make the activation.
        consumers: on-disk names of the matrices that are fed it.
        channel: (in,) int64, the activation's channel that each column of a consumer is fed.
    """

    block: int
    norm: bool
    producer: str | None
    bias: str | None
    rows: np.ndarray = field(compare=False)
    consumers: tuple[str, ...]
    channel: np.ndarray = field(compare=False)

    @property
    def name(self) -> str:
        """The first consumer: every matrix has one place at most before it."""
        return self.consumers[0]


def folds_of(checkpoint: Checkpoint) -> list[Fold]:
    """Every place of a checkpoint's blocks, block by block."""
    by_role: dict[tuple[int, str], list[TensorInfo]] = {}
    for info in checkpoint.infos().values():
        if info.block is not None and info.name in checkpoint.weights:
            by_role.setdefault((info.block, info.rule.role), []).append(info)
    rules = [rule for rule in checkpoint.architecture.folds if holds(rule.get("when", {}), checkpoint.config)]
    layers = range(int(checkpoint.hyper["layers"]))
    return [fold for i in layers for rule in rules for fold in _of_rule(checkpoint, by_role, i, rule)]


def _of_rule(
    checkpoint: Checkpoint, by_role: Mapping[tuple[int, str], list[TensorInfo]], block: int, rule: Mapping[str, Any]
) -> Iterator[Fold]:
    def matrices(role: str) -> list[TensorInfo]:
        return [i for i in by_role.get((block, role), ()) if i.rule.kind in ("linear", "router")]

    if rule["norm"] is not None:
        consumers = tuple(i.name for role in rule["linears"] for i in matrices(role))
        made = {i.rule.kind: i.name for i in by_role.get((block, rule["norm"]), ())}
        if consumers:
            whole = np.arange(checkpoint.infos()[consumers[0]].shape[1])
            yield Fold(block, True, made.get("norm"), made.get("bias"), whole, consumers, whole)
        return
    first, second = rule["linears"]
    fed = {info.expert: info for info in matrices(second)}
    for maker in matrices(first):
        if maker.expert not in fed:
            continue
        rows = _rows(checkpoint, maker, rule.get("rows"))
        channel = _channels(checkpoint, len(rows), fed[maker.expert].shape[1])
        biases = [i.name for i in by_role[block, first] if i.rule.kind == "bias" and i.expert == maker.expert]
        yield Fold(block, False, maker.name, next(iter(biases), None), rows, (fed[maker.expert].name,), channel)


def _rows(checkpoint: Checkpoint, maker: TensorInfo, rule: Any) -> np.ndarray:
    every = np.arange(maker.shape[0])
    if rule is None:
        return every
    first, count, period = (int(literal(word, checkpoint.hyper)) for word in rule)
    return every[(every % period >= first) & (every % period < first + count)]


def _channels(checkpoint: Checkpoint, channels: int, columns: int) -> np.ndarray:
    """Which channel feeds each column: the same, or that of the key-value head that a query head shares."""
    if channels == columns:
        return np.arange(columns)
    size = int(checkpoint.hyper["head_dim"])
    heads = np.arange(columns) // size // (columns // channels)
    return heads * size + np.arange(columns) % size


@dataclass
class Factors:
    """What every weight is multiplied by: its rows (or elements) and its columns, on-disk name -> float64."""

    rows: dict[str, np.ndarray] = field(default_factory=dict)
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    def move(self, checkpoint: Checkpoint, fold: Fold, scale: np.ndarray) -> None:
        """Divide what `fold`'s producer makes by `scale` (channels,) and multiply the columns that are fed it."""
        for name in (fold.producer, fold.bias):
            if name is not None:
                known = self.rows.setdefault(name, np.ones(checkpoint.resolve(name).shape[0]))
                known[fold.rows] /= scale
        for name in fold.consumers:
            known = self.columns.setdefault(name, np.ones(len(fold.channel)))
            known *= scale[fold.channel]

    def applied(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint with every factor in its weight, float32, computed when read.

        Raises:
            Unsupported: see `plain`.
        """
        infos, changed = checkpoint.infos(), {}
        for name, weight in plain(checkpoint, self.rows.keys() | self.columns.keys()).items():
            one = 1.0 if adds_one(infos[name]) else 0.0
            changed[name] = _scaled(weight, self.rows.get(name), self.columns.get(name), one)
        return checkpoint.with_weights(changed)


def adds_one(info: TensorInfo) -> bool:
    """Whether what counts is 1 + w: Gemma's norms, which GGUF stores with the 1 added."""
    return info.rule.transform == "plus_one"


def _scaled(weight: Dense, rows: np.ndarray | None, columns: np.ndarray | None, one: float) -> Dense:
    def read() -> np.ndarray:
        value = weight.value().astype(np.float64) + one
        if rows is not None:
            value *= rows.reshape(-1, *[1] * (value.ndim - 1))
        if columns is not None:
            value *= columns
        return (value - one).astype(np.float32)

    return Dense(weight.shape, "f32", read)


def plain(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, Dense]:
    """The weights of those names, sorted, once it is known that they are plain arrays that nobody else shares.

    Raises:
        Unsupported: one is shared, quantized or factored; named.
    """
    owners = {weight.owner for weight in checkpoint.weights.values() if isinstance(weight, Alias)}
    found = {}
    for name in sorted(names):
        weight = checkpoint.weights[name]
        if isinstance(weight, Alias) or name in owners:
            raise Unsupported("shares its data, so what is folded into it would change its twin too", tensor=name)
        if not isinstance(weight, Dense):
            kind = type(weight).__name__.lower()
            raise Unsupported(f"only plain arrays can be folded into, found one that is {kind}", tensor=name)
        found[name] = weight
    return found
