"""Another element type for a dense weight: what a scheme asks of norms, embeddings and heads it leaves unquantized."""

from __future__ import annotations

import numpy as np

from tightship.dtypes import dtype
from tightship.errors import Unsupported
from tightship.passes.masks import finite
from tightship.weights import Dense, Stored

_CHUNK = 1 << 20  # elements that are widened to float32 at a time


def cast(name: str, weight: Stored, word: str) -> Stored:
    """`weight` in the element type `word`, rounded to nearest even when read; itself where nothing changes.

    Raises:
        Unsupported: not a dense weight; or, when read, values beyond the type's range.
    """
    if not isinstance(weight, Dense):
        raise Unsupported(f"is not a plain array, so it cannot be cast to {word}", tensor=name)
    if weight.dtype == word:
        return weight

    def read() -> np.ndarray:
        values = weight.read()
        narrowed = np.empty(values.shape, dtype(word).numpy)
        source, target = values.reshape(-1), narrowed.reshape(-1)
        for first in range(0, source.size, _CHUNK):
            run = slice(first, first + _CHUNK)
            target[run] = _narrowed(name, finite(name, source[run].astype(np.float32, copy=False)), word)
        return narrowed

    return Dense(weight.shape, word, read)


def _narrowed(name: str, values: np.ndarray, word: str) -> np.ndarray:
    """Finite float32 values in a type that may be narrower."""
    if word == "f32":
        return values
    with np.errstate(over="ignore"):
        found = values.astype(dtype(word).numpy)
    if not np.isfinite(found.astype(np.float32)).all():
        raise Unsupported(
            f"reaches {np.abs(values).max():.4g}, beyond the range of {word}",
            tensor=name,
            hint="choose bf16 or f32 for this target",
        )
    return found
