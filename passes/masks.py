"""Which weights go: exact counts of lowest scores, ties broken by position. Shared by every pruning method.

Scores are non-negative and finite; of equal scores the one with the lower column (then row) goes first, so a mask
depends on nothing but the scores.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from tightship.errors import Malformed, Unsupported, UsageError


def lowest_in_rows(scores: np.ndarray, count: int) -> np.ndarray:
    """Boolean (rows, cols): exactly `count` lowest scores of each row of `scores` (rows, cols)."""
    if count <= 0:
        return np.zeros(scores.shape, bool)
    threshold = np.partition(scores, count - 1, axis=1)[:, count - 1 : count]
    below = scores < threshold
    ties = scores == threshold
    room = count - below.sum(axis=1, keepdims=True)
    return below | (ties & (np.cumsum(ties, axis=1) <= room))


def lowest(scores: np.ndarray, count: int) -> np.ndarray:
    """Boolean of `scores`' shape: exactly `count` lowest scores of the whole array."""
    return lowest_in_rows(scores.reshape(1, -1), count).reshape(scores.shape)


def even_rows(scores: np.ndarray, count: int) -> np.ndarray:
    """Boolean (rows, cols): `count` in all, the lowest of each row, rows differing by one at most."""
    return lowest_of_rows(scores, even_counts(len(scores), count))


def even_counts(rows: int, count: int) -> np.ndarray:
    """(rows,) int64 that add up to `count`, differing by one at most; the longer ones are spread evenly."""
    share, extra = divmod(count, rows)
    return share + np.diff(np.arange(rows + 1) * extra // rows)


def lowest_of_rows(scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Boolean (rows, cols): the lowest `counts` (rows,) scores of each row."""
    mask = np.empty(scores.shape, bool)
    for number in np.unique(counts):
        rows = counts == number
        mask[rows] = lowest_in_rows(scores[rows], int(number))
    return mask


def lowest_of_all(scores: Mapping[str, np.ndarray], share: float) -> dict[str, np.ndarray]:
    """Boolean masks of the lowest scores of all arrays together, round(share * all) of them."""
    together = np.concatenate([score.reshape(-1) for score in scores.values()])
    ends = np.cumsum([score.size for score in scores.values()])
    parts = np.split(lowest(together, round(share * together.size)), ends[:-1])
    return {name: part.reshape(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def lowest_in_groups(scores: np.ndarray, keep: int, group: int) -> np.ndarray:
    """Boolean (rows, cols): of each `group` consecutive columns all but the `keep` highest."""
    return lowest_in_rows(scores.reshape(-1, group), group - keep).reshape(scores.shape)


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """(N, M) of an "N:M" pattern (at most N of M consecutive weights are non-zero), None for `unstructured`.

    Raises:
        UsageError: neither, or N is not below M.
    """
    if pattern == "unstructured":
        return None
    match = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", pattern)
    if match is None or not int(match[1]) < int(match[2]):
        raise UsageError(f"pattern {pattern!r} is neither 'unstructured' nor 'N:M' with N below M, such as '2:4'")
    return int(match[1]), int(match[2])


def check_groups(name: str, shape: tuple[int, ...], group: int) -> None:
    """Refuse a matrix whose columns cannot be cut into groups.

    Raises:
        Unsupported: naming the tensor.
    """
    if len(shape) != 2 or shape[1] % group:
        raise Unsupported(
            f"groups of {group} need a matrix whose columns are a multiple of {group}, found shape {shape}", tensor=name
        )


def finite(name: str, array: np.ndarray) -> np.ndarray:
    """The array itself, once it is known to hold neither NaN nor Inf.

    Raises:
        Malformed: naming the tensor and the first bad index.
    """
    good = np.isfinite(array)
    if not good.all():
        at = tuple(int(i) for i in np.argwhere(~good)[0])
        raise Malformed(
            f"holds {int((~good).sum())} values that are NaN or Inf, the first at {at}",
            tensor=name,
            hint="the source checkpoint is damaged; compressing it would spread the damage over whole blocks",
        )
    return array
