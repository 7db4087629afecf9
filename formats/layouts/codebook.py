"""A codebook per tensor: every weight is one of a few values found by k-means (Deep Compression, arXiv:1510.00149).

| array | dtype, shape      | meaning                                          |
|-------|-------------------|--------------------------------------------------|
| codes | u8 (rows, cols)   | which value                                      |
| table | f32 (rows, size)  | the values, ascending; the same in every row     |

Value: table[code]. One entry is 0.0, so pruned weights stay zero. The table is written once where it is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tightship.errors import Malformed
from tightship.layout import Arrays, ArraySpec, Context, Layout, TableGrid

LARGEST = 16  # a code is a nibble
_ROUNDS = 100


@dataclass(frozen=True, kw_only=True)
class Codebook(Layout):
    """`size` values, 2 to 16."""

    kind: ClassVar[str] = "codebook"
    size: int = 16

    def __post_init__(self) -> None:
        if not 2 <= self.size <= LARGEST:
            raise Malformed(f"a codebook has 2 to {LARGEST} values, found {self.size}")

    @property
    def name(self) -> str:
        return f"codebook-{self.size}"

    @property
    def block(self) -> int:
        return 0

    @property
    def rows_together(self) -> int:
        return 0

    @property
    def keeps_zero(self) -> bool:
        return True

    def array_specs(self, shape: tuple[int, int]) -> dict[str, ArraySpec]:
        table = ArraySpec(np.dtype(np.float32), (shape[0], self.size))
        return {"codes": ArraySpec(np.dtype(np.uint8), shape), "table": table}

    def fit(self, w: np.ndarray, importance: np.ndarray | None = None, context: Context | None = None) -> Arrays:  # noqa: ARG002
        """Lloyd's algorithm from quantiles; squared error weighted by `importance`."""
        weights = None if importance is None else np.broadcast_to(importance, w.shape).reshape(-1)
        table = cluster(np.asarray(w, np.float64).reshape(-1), weights, self.size).astype(np.float32)
        return {"table": np.repeat(table[None], len(w), axis=0)}

    def grid(self, params: Mapping[str, np.ndarray]) -> TableGrid:
        table = params["table"]
        return TableGrid(np.ones((len(table), 1), np.float32), table[0])

    def values(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.take_along_axis(arrays["table"].astype(np.float64), arrays["codes"].astype(np.int64), axis=1)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "size": self.size}


def cluster(values: np.ndarray, weights: np.ndarray | None, size: int) -> np.ndarray:
    """`size` ascending centres of 1-D float64 values, one of them 0, that no round of Lloyd's algorithm improves."""
    order = np.argsort(values, kind="stable")
    values = values[order]
    mass = np.ones(len(values)) if weights is None or not np.any(weights) else weights.astype(np.float64)[order]
    masses = np.concatenate([[0.0], np.cumsum(mass)])
    moments = np.concatenate([[0.0], np.cumsum(mass * values)])
    centres = _with_zero(np.quantile(values, (np.arange(size) + 0.5) / size))
    for _ in range(_ROUNDS):
        edges = np.searchsorted(values, (centres[1:] + centres[:-1]) / 2)
        bounds = np.concatenate([[0], edges, [len(values)]])
        inside, sums = masses[bounds[1:]] - masses[bounds[:-1]], moments[bounds[1:]] - moments[bounds[:-1]]
        moved = _with_zero(np.divide(sums, inside, out=centres.copy(), where=inside > 0))
        if np.array_equal(moved, centres):
            break
        centres = moved
    return centres


def _with_zero(centres: np.ndarray) -> np.ndarray:
    """Ascending, the centre nearest to 0 put there."""
    centres = np.sort(centres)
    centres[np.abs(centres).argmin()] = 0.0
    return centres
