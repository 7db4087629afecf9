"""What is worth knowing before a model is pruned, cut, factored, or loses its zeros: warnings, never errors.

| warning          | when                                         | why                                                |
|------------------|----------------------------------------------|----------------------------------------------------|
| sparse already   | 5 % or more of what is looked at is zero     | the share asked for counts these                   |
| small            | fewer than 200 million weights in the blocks | little is redundant: 70 % sparsity multiplies      |
|                  |                                              | OPT-125M's perplexity by 4, OPT-66B's by 1.25      |
|                  |                                              | (arXiv:2301.00774, arXiv:2409.20094)               |
| precision counts | a matrix with ten times a Gaussian's         | few weights carry much; zeros or coarse grids may  |
|                  | kurtosis or more                             | hit them                                           |
| zeros get lost   | the same 5 %, and a target's grid without an | Q4_K and its like keep a zero in a thousand: what  |
|                  | exact zero                                   | was pruned elsewhere is dense again                |

Looked at are the first rows of a few matrices, so that a plan stays a matter of seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.weights import Dense, Quantized

SPARSE, SMALL, HEAVY = 0.05, 200_000_000, 30.0
_MATRICES, _WEIGHTS = 16, 1 << 16


def warnings(
    checkpoint: Checkpoint, makes: Iterable[str], outlines: Mapping[str, Checkpoint] = MappingProxyType({})
) -> tuple[str, ...]:
    """Remarks for a build; () where nothing is taken away, and no target can lose a zero.

    Args:
        makes: properties that its passes make (see `passes.base`).
        outlines: target's id -> what is exported there, without data.
    """
    takes = bool({"mask", "structure", "factors"} & set(makes))
    filling = {target: words for target, outline in outlines.items() if (words := _without_zero(outline))}
    if not takes and not filling:
        return ()
    sample = _sample(checkpoint)
    found = [_lost(sample, target, words) for target, words in filling.items()]
    found += [_sparse(sample), _small(checkpoint), _heavy(sample)] if takes else []
    return tuple(text for text in found if text)


def _without_zero(outline: Checkpoint) -> list[str]:
    """Grids of the linears that say no exact zero, by name."""
    weights = [outline.resolve(info.name) for info in outline.linears()]
    return sorted({w.layout.name for w in weights if isinstance(w, Quantized) and not w.layout.keeps_zero})


def _share(sample: dict[str, np.ndarray]) -> float:
    """Of zeros."""
    total = sum(values.size for values in sample.values())
    return sum(int((values == 0).sum()) for values in sample.values()) / max(total, 1)


def _lost(sample: dict[str, np.ndarray], target: str, grids: list[str]) -> str | None:
    if _share(sample) < SPARSE:
        return None
    return (
        f"{_share(sample):.0%} of the weights looked at are zero, and {', '.join(grids)} in {target} holds no exact "
        "zero; a prune pass with that sparsity would demand that they stay"
    )


def _sparse(sample: dict[str, np.ndarray]) -> str | None:
    share = _share(sample)
    if share < SPARSE:
        return None
    return f"the model is sparse already: {share:.0%} of the weights looked at are zero, and any sparsity counts them"


def _small(checkpoint: Checkpoint) -> str | None:
    weights = sum(math.prod(info.shape) for info in checkpoint.linears())
    if weights >= SMALL:
        return None
    return f"the model is small ({weights / 1e6:.1f} million weights in its blocks): little of it is redundant"


def _heavy(sample: dict[str, np.ndarray]) -> str | None:
    tails = {name: kurtosis(values) for name, values in sample.items()}
    heavy = {name: value for name, value in tails.items() if value >= HEAVY}
    if not heavy:
        return None
    worst = max(heavy, key=lambda name: heavy[name])
    return (
        f"precision counts: {len(heavy)} of {len(sample)} matrices looked at have heavy tails (kurtosis "
        f"{heavy[worst]:.0f} in {worst}, 3 is a Gaussian's), so few weights carry much"
    )


def kurtosis(values: np.ndarray) -> float:
    """Fourth standardised moment; 0 where nothing varies."""
    centred = values.astype(np.float64) - values.mean(dtype=np.float64)
    variance = float(np.square(centred).mean())
    return float(np.power(centred, 4).mean()) / variance**2 if variance else 0.0


def _sample(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """The first rows of matrices from all depths, finite values only."""
    dense = [(info.name, checkpoint.resolve(info.name)) for info in checkpoint.linears()]
    names = [(name, weight) for name, weight in dense if isinstance(weight, Dense)]
    found = {}
    for place in np.unique(np.linspace(0, len(names) - 1, min(_MATRICES, len(names))).round().astype(int)):
        name, weight = names[place]
        rows = min(weight.shape[0], max(1, _WEIGHTS // max(math.prod(weight.shape[1:]), 1)))
        values = weight.rows()(0, rows).astype(np.float32).reshape(-1)
        found[name] = values[np.isfinite(values)]
    return found
