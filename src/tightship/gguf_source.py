"""A GGUF file as a checkpoint: on-disk names of its family, rows back in their order, codes kept as they are.

The inverse of exporters/to_gguf.py, for families whose architecture file has a GGUF section: tensors are found under
their GGUF names, permuted rows are put back, stacks of experts are taken apart, and config.json is written from the
metadata (`gguf_config.py`). Nothing is decoded: a Q4_K tensor stays Q4_K.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tightship.architecture import Architecture, TensorInfo, TensorRule, all_architectures
from tightship.checkpoint import Checkpoint, Source, check_tensors
from tightship.errors import Malformed, Unsupported
from tightship.gguf_config import Metadata, config_of, contradicts
from tightship.gguf_layers import split_widths
from tightship.target import Progress, no_progress
from tightship.weights import Alias, Dense, Quantized, Weight


def open_gguf(path: str | Path, progress: Progress = no_progress, *, hashed: bool = True) -> Checkpoint:
    """Open a GGUF file, or the first of its shards.

    Raises:
        UsageError: no such file.
        Malformed: the file breaks the container's rules, or its tensors do not fit its metadata.
        Unsupported: an architecture, tensor type, tokenizer or rope scaling that we cannot say in config.json.
    """
    from tightship.exporters.gguf_tokenizer_files import tokenizer_files
    from tightship.formats.gguf_shards import read_shards

    path = Path(path)
    file = read_shards(path)
    architecture = _family(file.metadata, file.tensors)
    metadata, layers = split_widths(architecture, file.metadata)
    config = config_of(architecture, metadata, file.tensors) | layers
    architecture.check_supported(config)
    weights = _weights(architecture, config, file.tensors)
    checkpoint = Checkpoint(
        name=_name(str(file.metadata.get("general.name") or path.stem)),
        config=config,
        weights=weights,
        files=tokenizer_files(file.metadata),
        architecture=architecture,
        source=Source(path.name, None, (), {p.name: p for p in file.paths}),
    )
    check_tensors(checkpoint)
    return checkpoint.replace(source=checkpoint.source.hashed(progress)) if hashed else checkpoint


def _name(text: str) -> str:
    """A file's own word for itself as a part of file names: letters, digits and `._+-`, nothing hidden or long."""
    return re.sub(r"[^\w.+-]+", "-", text).strip(".-")[:96] or "model"


def _family(metadata: Metadata, tensors: Collection[str]) -> Architecture:
    """The family of the file's architecture, with experts or without; its namesake where several share one.

    One with a `told_by` is meant where the file has that tensor, and not where it lacks it.
    """
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise Unsupported(f"this GGUF file holds no model: its general.type is {kind!r}")
    arch = metadata["general.architecture"]
    claims = ("arch", "unlike_arch")
    candidates = [a for a in all_architectures() if a.gguf and arch in (a.gguf.get(claim) for claim in claims)]
    if not candidates:
        raise Unsupported(f"GGUF architecture {arch!r} cannot be opened as a source", hint="start from the original")
    experts = bool(metadata.get(f"{arch}.expert_count"))
    fitting = [a for a in candidates if any("{e}" in rule.disk for rule in a.tensors) == experts]
    fitting = [a for a in fitting if not contradicts(a, metadata)]
    whole = [a for a in fitting if all(_derivable(rule, a) for rule in a.tensors)]
    if not whole:
        raise Unsupported(
            f"a {arch} file lacks tensors that a checkpoint of its family needs",
            hint="start from the original",
        )
    told = [a for a in whole if a.gguf and a.gguf.get("told_by") in tensors]
    whole = told or [a for a in whole if a.gguf and "told_by" not in a.gguf]
    return next((a for a in whole if a.family == arch), whole[0])


def _derivable(rule: TensorRule, architecture: Architecture) -> bool:
    """Whether a file can hold the tensor, or a checkpoint do without it."""
    borrowed = {borrower for borrower, _ in architecture.ties}
    return bool(rule.gguf or rule.optional or rule.when or rule.disk in borrowed)


def _weights(architecture: Architecture, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Weight]:
    weights: dict[str, Weight] = {}
    used = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
    hyper = architecture.hyper(config)
    for name, info in architecture.lookup(config).items():
        stored = info.rule.gguf and info.rule.gguf.format(i=info.block, e=info.expert)
        if stored in tensors:
            used.add(str(stored))
            weights[name] = _back(tensors[str(stored)].weight(), info, hyper)
    surplus = sorted(set(tensors) - used)
    if surplus:
        raise Malformed(f"{len(surplus)} tensors mean nothing to {architecture.family}", tensor=surplus[0])
    if hyper["tied"]:
        weights |= {borrower: Alias(owner) for borrower, owner in architecture.ties if owner in weights}
    return weights


def _back(weight: Dense | Quantized, info: TensorInfo, hyper: Mapping[str, Any]) -> Dense | Quantized:
    """The weight in the checkpoint's order: one expert of a stack, rows put back, a shift taken off."""
    from tightship.exporters.gguf_tensors import FORMULAS, computed, row_order

    if info.expert is not None:
        weight = _expert(weight, info)
    word = info.rule.transform
    if word is None:
        return weight
    if word in FORMULAS:
        return computed(Dense(weight.shape, "f32", weight.value), FORMULAS[word][1], hyper)
    order = np.argsort(row_order(word, weight.shape[0], hyper))
    if isinstance(weight, Quantized):
        return weight.take_rows(order)
    return Dense(weight.shape, weight.dtype, lambda: weight.read()[order])


def _expert(weight: Dense | Quantized, info: TensorInfo) -> Dense | Quantized:
    number, rows = int(info.expert or 0), info.shape[0]
    if isinstance(weight, Quantized):
        return weight.take_rows(range(number * rows, (number + 1) * rows))
    return Dense(weight.shape[1:], weight.dtype, lambda: weight.read()[number])
