"""Inputs of any size through a graph of fixed size: rows in batches, padding on the right, and back.

A graph may fix its batch, its sequence, or both. Rows beyond the last full batch repeat the last row; tokens beyond the
last are masked. What the padding gave is cut off again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from tightship.errors import Unsupported

Arrays = dict[str, np.ndarray]
_BY_TOKEN = ("start_logits", "end_logits")
_HIDDEN_AXES = 3


def fixed_axes(shape: list[int | str]) -> tuple[int | None, int | None]:
    """(rows, tokens) that an input's declared shape fixes; tokens only where it has two axes."""
    rows, second = shape[0], shape[1] if len(shape) == 2 else None
    return rows if isinstance(rows, int) else None, second if isinstance(second, int) else None


def in_boxes(
    given: Mapping[str, np.ndarray], rows: int | None, tokens: int | None, run: Callable[[Arrays], Arrays]
) -> Arrays:
    """Outputs of `run` for all rows and tokens of `given`, asked in its fixed sizes.

    Raises:
        Unsupported: a sequence is longer than the graph's.
    """
    first = next(iter(given.values()))
    count, length = len(first), first.shape[1]
    if tokens is not None and length > tokens:
        raise Unsupported(
            f"the graph is made for {tokens} tokens, given were {length}", hint="shorten the text, or leave shapes open"
        )
    padded = dict(given) if tokens is None else {k: _longer(v, tokens) for k, v in given.items()}
    step = rows or count
    parts: dict[str, list[np.ndarray]] = {}
    for start in range(0, count, step):
        box = {key: _taller(value[start : start + step], step) for key, value in padded.items()}
        for key, value in run(box).items():
            parts.setdefault(key, []).append(value)
    joined = {key: np.concatenate(values)[:count] for key, values in parts.items()}
    return {k: v[:, :length] if k in _BY_TOKEN or v.ndim == _HIDDEN_AXES else v for k, v in joined.items()}


def _longer(value: np.ndarray, tokens: int) -> np.ndarray:
    return np.pad(value, ((0, 0), (0, tokens - value.shape[1])))


def _taller(value: np.ndarray, rows: int) -> np.ndarray:
    return np.concatenate([value, *[value[-1:]] * (rows - len(value))])
