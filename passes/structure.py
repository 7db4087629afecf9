"""Cut a model smaller: keep some units of a width and take the matching rows and columns out of every tensor.

Which tensors a width runs through follows from the shapes in the architecture file. An axis `2*ffn` is two runs of
`ffn`, `heads*head_dim` is heads of `head_dim` each, sums stand one behind the other; so the places of a unit on an
axis are known, and fused matrices need nothing of their own.

Whoever cuts makes the units that go *silent* first: the columns that read them are zero. What they put out is then
multiplied with zero, and cutting them leaves the model's outputs as they were.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported
from tightship.expressions import literal
from tightship.per_layer import KEY
from tightship.weights import Alias, Dense, Weight

Kept = Mapping[str, np.ndarray]
"""Width (a hyper-parameter such as `ffn`, `heads`) -> ascending numbers of the units that stay."""


def places(expression: str, hyper: Mapping[str, Any], kept: Kept) -> np.ndarray:
    """Which of the places along an axis stay, (n,) int64 ascending."""
    found, start = [], 0
    for term in expression.split("+"):
        names = _factors(term)
        sizes = [int(literal(name, hyper)) for name in names]
        grid = np.arange(start, start + math.prod(sizes)).reshape(sizes)
        for axis, name in enumerate(names):
            if name in kept:
                grid = np.take(grid, kept[name], axis=axis)
        found.append(grid.reshape(-1))
        start += math.prod(sizes)
    return np.concatenate(found)


def runs_through(expression: str, width: str) -> bool:
    """Whether units of a width lie along an axis."""
    return any(width in _factors(term) for term in expression.split("+"))


def _factors(term: str) -> list[str]:
    """`heads*head_dim` -> its names; a quotient (`hidden/heads`) is one size that no unit is cut out of."""
    return [term] if "/" in term else re.split(r"\s*\*\s*", term.strip())


def cut(checkpoint: Checkpoint, kept: Mapping[tuple[int, int | None], Kept], config: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint with only the kept units.

    Args:
        kept: (block, expert) -> what stays there; tensors of a block outside its experts look under (block, None).
        config: config.json with the new sizes (`resized`, `resized_layers`).

    Raises:
        Unsupported: a tensor that is not dense.
    """
    hyper, changed = checkpoint.hyper, dict[str, Weight]()
    for name, info in checkpoint.infos().items():
        weight = checkpoint.weights.get(name)
        here = kept.get((info.block, info.expert)) if info.block is not None else None
        if weight is None or here is None or isinstance(weight, Alias):
            continue
        if any(runs_through(axis, width) for axis in info.rule.shape for width in here):
            if not isinstance(weight, Dense):
                raise Unsupported("only dense tensors can be cut", tensor=name, hint="prune before quantizing")
            changed[name] = taken(weight, [places(axis, hyper, here) for axis in info.rule.shape])
    return checkpoint.with_weights(changed).replace(config=config)


def taken(weight: Dense, index: Sequence[np.ndarray]) -> Dense:
    """The places of each axis that `index` names."""
    shape = tuple(len(places) for places in index)
    return Dense(shape, weight.dtype, lambda: np.ascontiguousarray(weight.read()[np.ix_(*index)]))


def resized(checkpoint: Checkpoint, sizes: Mapping[str, int]) -> dict[str, Any]:
    """config.json with other sizes, and the head size, which may follow from them, written out.

    Raises:
        Unsupported: the family's config.json has no key for a size.
    """
    config, hyper = dict(checkpoint.config), checkpoint.hyper
    fixed = {"head_dim": hyper["head_dim"]} if {"heads", "hidden"} & sizes.keys() and hyper.get("head_dim") else {}
    for width, size in {**fixed, **sizes}.items():
        for key in _said(checkpoint, width):
            config[key] = size
    return config


def resized_layers(checkpoint: Checkpoint, sizes: Mapping[int, Mapping[str, int]]) -> dict[str, Any]:
    """config.json in which blocks have sizes of their own: block -> hyper-parameter -> value.

    Raises:
        Unsupported: the family's config.json has no key for a size.
    """
    layers = {
        str(block): {key: size for width, size in own.items() for key in _said(checkpoint, width)}
        for block, own in sizes.items()
    }
    hyper = checkpoint.hyper
    heads = hyper.get("head_dim") and any("heads" in own for own in sizes.values())
    fixed = {"head_dim": hyper["head_dim"]} if heads else {}
    return {**resized(checkpoint, fixed), KEY: layers}


def _said(checkpoint: Checkpoint, width: str) -> list[str]:
    """The keys under which config.json says a width, or the one under which it would."""
    keys = checkpoint.architecture.keys(width)
    if not keys:
        raise Unsupported(f"config.json of a {checkpoint.architecture.family} model has no key for {width}")
    return [key for key in keys if checkpoint.config.get(key) is not None] or keys[:1]
