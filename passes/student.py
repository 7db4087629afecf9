"""Students: a checkpoint to be taught, cut from another one.

| option `student`    | what it is                                                        | its weights   |
|---------------------|-------------------------------------------------------------------|---------------|
| nothing             | the checkpoint itself: pruned, shared, factored by earlier passes | its own       |
| `{every: k}`        | blocks 0, k, 2k, ... (DistilBERT, arXiv:1910.01108)               | the teacher's |
| `{layers: [0, 3]}`  | these blocks                                                      | the teacher's |
| `{sizes: {KEY: n}}` | the same config with other numbers: narrower, shallower           | see below     |
| a file              | that config.json, of any family                                   | see below     |

Where a config is given, a tensor takes over the teacher's data if a tensor of the same role and kind has the same shape
there, block i of n that of the teacher's block floor(i * N / n); every other matrix is drawn from N(0,
`initializer_range`), norms start at 1 and biases at 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tightship.architecture import TensorInfo, architecture_for
from tightship.checkpoint import Checkpoint
from tightship.dtypes import dtype
from tightship.errors import Malformed, UsageError
from tightship.passes.drop_layers import drop
from tightship.passes.options import build
from tightship.weights import Alias, Dense, Weight

Wanted = str | Mapping[str, Any] | None
Identity = tuple[str, str, int | None, int | None, bool]


@dataclass(frozen=True, kw_only=True)
class Student:
    """One way to say it; exactly one field is given."""

    every: int | None = None
    layers: tuple[int, ...] | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        said = [self.every is not None, self.layers is not None, bool(self.sizes)]
        if sum(said) != 1:
            raise UsageError("distill: `student` says one of `every`, `layers` and `sizes`, or names a config.json")


def make_student(wanted: Wanted, teacher: Checkpoint, seed: int) -> Checkpoint:
    """The student that `wanted` describes; its data are read or drawn when they are asked for.

    Raises:
        UsageError: blocks or config keys that do not exist.
        Malformed, Unsupported: a config.json that is none, or of a family that is not known.
    """
    if wanted is None:
        return teacher
    if isinstance(wanted, str):
        return _fresh(teacher, _read_config(wanted), seed)
    options = build(Student, wanted, "distill: student")
    if options.sizes:
        unknown = [key for key in options.sizes if key not in teacher.config]
        if unknown:
            raise UsageError(f"distill: the teacher's config.json has no {unknown[0]!r} to change")
        return _fresh(teacher, {**teacher.config, **options.sizes}, seed)
    total = int(teacher.hyper["layers"])
    stay = options.layers if options.layers is not None else range(0, total, max(options.every or 1, 1))
    _check_layers(stay, total)
    return drop(teacher, [n for n in range(total) if n not in set(stay)])


def _check_layers(stay: Iterable[int], total: int) -> None:
    outside = [n for n in stay if not 0 <= n < total]
    if outside or not list(stay):
        raise UsageError(f"distill: the student keeps some of layers 0 to {total - 1}, found {list(stay)}")


def _read_config(path: str) -> dict[str, Any]:
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"distill: there is no config file {file.name}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Malformed(f"{file.name} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise Malformed(f"{file.name} is no JSON object")
    return config


def _fresh(teacher: Checkpoint, config: Mapping[str, Any], seed: int) -> Checkpoint:
    architecture = architecture_for(config)
    architecture.check_supported(config)
    infos = architecture.lookup(config)
    borrowers = dict(architecture.ties) if architecture.hyper(config)["tied"] else {}
    layers = (int(architecture.hyper(config)["layers"]), int(teacher.hyper["layers"]))
    stock = {identity(info): name for name, info in teacher.infos().items() if name in teacher.weights}
    word = next(w.dtype for w in teacher.weights.values() if not isinstance(w, Alias))
    std = float(config.get("initializer_range", 0.02))
    weights: dict[str, Weight] = {}
    for number, (name, info) in enumerate(infos.items()):
        if name in borrowers:
            weights[name] = Alias(borrowers[name])
            continue
        source = stock.get(identity(info, layers))
        found = teacher.resolve(source) if source is not None else None
        if found is not None and tuple(found.shape) == info.shape:
            weights[name] = found
        elif not info.rule.optional:
            weights[name] = _drawn(info, word, std, [seed, number])
    return teacher.replace(config=dict(config), architecture=architecture, weights=weights, activations={}, adapters={})


def identity(info: TensorInfo, layers: tuple[int, int] | None = None) -> Identity:
    """What a tensor is, whatever its family calls it; with `layers` (n, N), in the numbering of the teacher."""
    block = info.block
    if layers is not None and block is not None:
        block = block * layers[1] // layers[0]
    return info.rule.role, info.rule.kind, block, info.expert, info.name.endswith("bias")


def _drawn(info: TensorInfo, word: str, std: float, seed: list[int]) -> Dense:
    target = dtype(word).numpy

    def filled(make: Callable[[], np.ndarray]) -> Dense:
        return Dense(info.shape, word, lambda: make().astype(target))

    if info.rule.kind == "norm":
        return filled(lambda: np.ones(info.shape, np.float32))
    if info.rule.kind == "bias":
        return filled(lambda: np.zeros(info.shape, np.float32))
    size = math.prod(info.shape)
    return filled(lambda: (std * np.random.default_rng(seed).standard_normal(size, np.float32)).reshape(info.shape))
