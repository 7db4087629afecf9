"""BERT and RoBERTa as Longformer (arXiv:2004.05150): the same tensors under its names, and a window.

| Longformer             | comes from                                                                              |
|------------------------|-----------------------------------------------------------------------------------------|
| *_global projections   | the local ones: a global token asks and answers as it did                               |
| position_embeddings    | RoBERTa's; BERT's behind pad_token_id + 1 rows of zeros, where Longformer begins to count |
| every other tensor     | the tensor of the same role                                                             |

With a window no narrower than the text twice over it computes what the dense model did, so it needs no training.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tightship.architecture import TensorInfo, architecture_for
from tightship.checkpoint import Checkpoint
from tightship.dtypes import dtype
from tightship.errors import Unsupported, UsageError
from tightship.passes.student import identity
from tightship.weights import Alias, Dense, Stored, Weight

_BEHIND = 2  # rows of Longformer's positions beyond its context: those up to the padding token's, 1 as in RoBERTa
_PREFIXES = ("XLMRoberta", "Camembert", "Roberta", "Bert")
_GLOBAL = "_global"


def as_longformer(checkpoint: Checkpoint, size: int, global_tokens: int) -> Checkpoint:
    """The checkpoint as a Longformer whose tokens see `size` / 2 tokens either way, and global tokens everywhere.

    Raises:
        UsageError: an odd size.
        Unsupported: a part that Longformer has not; global tokens that its class cannot say.
    """
    if size % 2:
        raise UsageError(f"window: Longformer's window has two equal halves, found {size}")
    config = _config(checkpoint, size)
    architecture = architecture_for(config)
    _check_global(architecture.task, global_tokens)
    borrowers = dict(architecture.ties) if architecture.hyper(config)["tied"] else {}
    stock = {identity(info): name for name, info in checkpoint.infos().items() if name in checkpoint.weights}
    weights: dict[str, Weight] = {}
    for name, info in architecture.lookup(config).items():
        if name in borrowers:
            weights[name] = Alias(borrowers[name])
            continue
        role, *others = identity(info)
        source = stock.get((role.removesuffix(_GLOBAL), *others))  # type: ignore[arg-type]
        if source is None:
            raise Unsupported(f"{checkpoint.architecture.family} has nothing to make it of", tensor=name)
        weights[name] = _fitted(checkpoint.resolve(source), info, int(config["pad_token_id"]))
    return checkpoint.replace(config=config, architecture=architecture, weights=weights)


def _config(checkpoint: Checkpoint, size: int) -> dict[str, Any]:
    config = dict(checkpoint.config)
    padding = config.get("pad_token_id")
    if checkpoint.architecture.family == "bert" and config.get("hidden_act") != "gelu":
        raise Unsupported(f"window: Longformer's head computes gelu, this model's {config.get('hidden_act')}")
    if padding not in (0, 1):
        raise Unsupported(f"window: Longformer's positions begin behind the padding token 0 or 1, found {padding}")
    prefix = next(word for word in _PREFIXES if config["architectures"][0].startswith(word))
    classes = [name.replace(prefix, "Longformer") for name in config["architectures"]]
    return {
        **{key: value for key, value in config.items() if key != "position_embedding_type"},
        "model_type": "longformer",
        "architectures": classes,
        "attention_window": [size] * int(checkpoint.hyper["layers"]),
        "max_position_embeddings": int(checkpoint.hyper["context"]) + _BEHIND,
    }


def _check_global(task: str, count: int) -> None:
    said = 1 if task == "text-classification" else 0
    if count != said:
        raise Unsupported(
            f"window: a Longformer for {task} has {said} global tokens of its own, found global_tokens: {count}",
            hint="classifiers of texts take the first token; elsewhere global_attention_mask says it at run time",
        )


def _fitted(weight: Stored, info: TensorInfo, padding: int) -> Stored:
    if tuple(weight.shape) == info.shape:
        return weight
    if info.rule.role != "position_embd" or not isinstance(weight, Dense):
        raise Unsupported(f"has shape {weight.shape}, and Longformer wants {info.shape}", tensor=info.name)
    rows, target = weight.shape[0], dtype(weight.dtype).numpy

    def moved() -> np.ndarray:
        table = np.zeros(info.shape, target)
        table[padding + 1 : padding + 1 + rows] = weight.read()
        return table

    return Dense(info.shape, weight.dtype, moved)
