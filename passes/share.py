"""Sharing: fewer different numbers, fewer different tensors.

1. `codebook: K`: every matrix of the blocks keeps K different values, found by k-means (`codebook-K` as a layout).
2. `layers: n`: the blocks fall into n runs of neighbours, and the blocks of a run share all their tensors, as ALBERT's
   do (arXiv:1909.11942). They start as the mean of the run, or with `start: first` as its first block. `recover` and
   `distill` train them as one.
3. `embeddings: true`: an untied head becomes the embedding's; both start as their mean.

Shared tensors are stored once in ONNX. GGUF and safetensors have no such thing across blocks (their offsets must not
overlap), so there every block gets its copy; tied heads are left out where the loader ties by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.dtypes import dtype
from tightship.errors import Unsupported, UsageError
from tightship.formats.layouts.codebook import LARGEST, Codebook
from tightship.passes.base import Pass, Run
from tightship.passes.quantize import Matrix
from tightship.passes.quantize.rtn import lazily
from tightship.weights import Alias, Dense, Weight


@dataclass(frozen=True, kw_only=True)
class Share(Pass):
    """See the module."""

    name: ClassVar[str] = "share"
    per_tensor: ClassVar[bool] = True

    codebook: int | None = None
    layers: int | None = None
    start: Literal["mean", "first"] = "mean"
    embeddings: bool = False

    def __post_init__(self) -> None:
        if self.codebook is None and self.layers is None and not self.embeddings:
            raise UsageError("share: say what: `codebook`, `layers` or `embeddings`")
        if self.codebook is not None and not 2 <= self.codebook <= LARGEST:
            raise UsageError(f"share: a codebook has 2 to {LARGEST} values, found {self.codebook}")

    @property
    def makes(self) -> frozenset[str]:  # type: ignore[override]
        grid = {"grid"} if self.codebook is not None else set()
        return frozenset(grid | ({"ties"} if self.layers is not None or self.embeddings else set()))

    @property
    def destroys(self) -> frozenset[str]:  # type: ignore[override]
        """A mean of blocks has neither their zeros nor their grids."""
        return frozenset({"mask", "grid"}) if self.layers is not None and self.start == "mean" else frozenset()

    def requires(self, checkpoint: Checkpoint) -> None:
        total = int(checkpoint.hyper["layers"])
        if self.layers is not None and not 1 <= self.layers <= total:
            raise UsageError(f"share: {total} blocks cannot fall into {self.layers} runs")
        for info in checkpoint.linears() if self.layers is not None or self.codebook is not None else ():
            if not isinstance(checkpoint.resolve(info.name), Dense):
                raise Unsupported(
                    "only dense matrices can be shared", tensor=info.name, hint="share before low-rank and quantize"
                )

    def apply(self, checkpoint: Checkpoint, run: Run) -> Checkpoint:  # noqa: ARG002
        return self.outline(checkpoint)

    def outline(self, checkpoint: Checkpoint) -> Checkpoint:
        """The result; data are read and averaged when they are asked for."""
        if self.embeddings:
            checkpoint = _tied(checkpoint)
        if self.layers is not None:
            checkpoint = _runs(checkpoint, self.layers, self.start)
        if self.codebook is None:
            return checkpoint
        layout = Codebook(size=self.codebook)
        coded: dict[str, Weight] = {}
        for info in checkpoint.linears():
            weight = checkpoint.weights[info.name]
            if isinstance(weight, Dense):
                coded[info.name] = lazily(info.name, Matrix(weight, layout), None)
        return checkpoint.with_weights(coded)


def _runs(checkpoint: Checkpoint, count: int, start: str) -> Checkpoint:
    """Blocks 0 .. n-1 in `count` runs; the first of a run owns what the others borrow.

    Raises:
        Unsupported: the blocks of a run do not have the same tensors.
    """
    total = int(checkpoint.hyper["layers"])
    infos = checkpoint.infos()
    changed: dict[str, Weight] = {}
    for name, info in infos.items():
        if info.block is None or name not in checkpoint.weights:
            continue
        members = [n for n in range(total) if n * count // total == info.block * count // total]
        names = [info.rule.disk.format(i=n, e=info.expert) for n in members]
        if any(other not in checkpoint.weights or infos[other].shape != info.shape for other in names):
            raise Unsupported("the blocks that would share it do not all have it in this shape", tensor=name)
        if info.block != members[0]:
            changed[name] = Alias(names[0])
        elif start == "mean" and len(names) > 1:
            changed[name] = _mean(checkpoint, names)
    return checkpoint.with_weights(changed)


def _mean(checkpoint: Checkpoint, names: Sequence[str]) -> Dense:
    first = checkpoint.resolve(names[0])
    target = dtype(first.dtype).numpy

    def read() -> np.ndarray:
        total = np.zeros(first.shape)
        for name in names:
            total += checkpoint.resolve(name).value()
        return (total / len(names)).astype(np.float32).astype(target)

    return Dense(tuple(first.shape), first.dtype, read)


def _tied(checkpoint: Checkpoint) -> Checkpoint:
    """Head and embedding as one tensor, and config.json says so.

    Raises:
        Unsupported: the family ties nothing, or the two are one already.
    """
    changed: dict[str, Weight] = {}
    for borrower, owner in checkpoint.architecture.ties:
        head = checkpoint.weights.get(borrower)
        if owner in checkpoint.weights and head is not None and not isinstance(head, Alias):
            changed |= {owner: _mean(checkpoint, [owner, borrower]), borrower: Alias(owner)}
    if not changed:
        raise Unsupported("share: this model has no head of its own that could be the embedding's")
    return checkpoint.with_weights(changed).replace(config={**checkpoint.config, "tie_word_embeddings": True})
