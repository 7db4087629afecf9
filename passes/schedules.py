"""How much to prune each layer so that all of them together come to one global sparsity, exactly.

Every schedule sees the same facts about each layer and answers with a count of zeros; the counts always add up to
round(sparsity * all weights).

| schedule   | share of layer l                                                                                  |
|------------|---------------------------------------------------------------------------------------------------|
| uniform    | S                                                                                                 |
| log-kmeans | S + spread * (1 - 2 rank / (k - 1)), rank of l's cluster among k clusters of log10 score          |
| owl        | S - (r_l - mean r), r_l the outlier share scaled to [0, 2 spread]; arXiv:2310.05175               |
| water-fill | whatever lies below one cost that is the same for all layers, within [S - 2 spread, S + 2 spread] |
| search     | water-fill's, improved by trial (`prune_search`)                                                  |

log-kmeans follows the idea of arXiv:2409.20094 (layers grouped by the logarithm of their estimated pruning loss); how
the loss is estimated and groups become shares is our own derivation, since the paper's method section gives neither
code nor constants. Clusters are the exact optimum of one-dimensional k-means, found by dynamic programming.

A score can be the loss that the inverse moments predict (`absolute`), the same per output energy (`relative`), or what
pruning this layer alone does to the model's output (`kl`): local loss is not model loss, so the last is the default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

SCHEDULES = ("uniform", "log-kmeans", "owl", "water-fill")
CLUSTERS = 4
SPREAD = {"log-kmeans": 0.1, "owl": 0.08, "water-fill": 0.1}
FLOOR, CEILING = 0.0, 0.99
_TINY = 1e-30


@dataclass(frozen=True)
class Layer:
    """What a schedule may know of a matrix.

    Attributes:
        size: number of weights.
        score: how much pruning it hurts, per weight, in any unit; larger is worse.
        outliers: share of weights whose score is more than five times the layer's mean (owl).
        costs: ascending quantiles of what zeroing a single weight costs the model (water-fill).
    """

    size: int
    score: float = 1.0
    outliers: float = 0.0
    costs: np.ndarray | None = None


def zeros_per_layer(
    schedule: str, layers: Mapping[str, Layer], sparsity: float, spread: float | None = None
) -> dict[str, int]:
    """Zeros of each layer, by name; they add up to round(sparsity * sum of sizes)."""
    names = list(layers)
    facts = [layers[name] for name in names]
    width = SPREAD.get(schedule, 0.0) if spread is None else spread
    if schedule == "log-kmeans":
        shares = _log_kmeans(facts, sparsity, width)
    elif schedule == "owl":
        shares = _owl(facts, sparsity, width)
    elif schedule == "water-fill":
        shares = _water_fill(facts, sparsity, width)
    else:
        shares = np.full(len(facts), sparsity)
    return dict(zip(names, exact_counts(shares, [f.size for f in facts], sparsity), strict=True))


def exact_counts(shares: np.ndarray, sizes: Sequence[int], sparsity: float) -> list[int]:
    """Counts near shares * sizes, all shares moved by one offset so that the counts sum to round(sparsity * total)."""
    n = np.asarray(sizes, np.float64)
    wanted = round(sparsity * int(n.sum()))

    def moved(offset: float) -> np.ndarray:
        return np.clip(shares + offset, FLOOR, max(CEILING, sparsity)) * n

    low, high = -1.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if moved(middle).sum() < wanted else (low, middle)
    exact = moved(high)
    counts = np.floor(exact).astype(np.int64)
    # Largest remainders get what flooring left over; ties go to the layer that comes first.
    left = wanted - int(counts.sum())
    order = np.argsort(-(exact - counts), kind="stable")
    counts[order[:left]] += 1
    return [int(c) for c in counts]


def kmeans_1d(values: np.ndarray, clusters: int) -> np.ndarray:
    """Cluster number of each value, 0 the lowest: the partition with least within-cluster sum of squares.

    Dynamic programming over sorted values, O(k n^2). No more clusters than distinct values.
    """
    order = np.argsort(values, kind="stable")
    x = np.asarray(values, np.float64)[order]
    n, k = len(x), min(clusters, len(np.unique(values)))
    sums, squares = np.concatenate([[0.0], np.cumsum(x)]), np.concatenate([[0.0], np.cumsum(x * x)])

    def scatter(i: int, j: int) -> float:  # of x[i:j]
        return float(squares[j] - squares[i] - (sums[j] - sums[i]) ** 2 / (j - i))

    best = np.full((k + 1, n + 1), np.inf)
    start = np.zeros((k + 1, n + 1), np.int64)
    best[0, 0] = 0.0
    for c in range(1, k + 1):
        for j in range(c, n + 1):
            options = [best[c - 1, i] + scatter(i, j) for i in range(c - 1, j)]
            start[c, j] = c - 1 + int(np.argmin(options))
            best[c, j] = min(options)
    labels, end = np.empty(n, np.int64), n
    for c in range(k, 0, -1):
        labels[start[c, end] : end] = c - 1
        end = start[c, end]
    found = np.empty(n, np.int64)
    found[order] = labels
    return found


def _log_kmeans(layers: Sequence[Layer], sparsity: float, spread: float) -> np.ndarray:
    logs = np.log10([max(layer.score, _TINY) for layer in layers])
    ranks = kmeans_1d(logs, CLUSTERS)
    top = max(int(ranks.max()), 1)
    return sparsity + spread * (1.0 - 2.0 * ranks / top) * (ranks.max() > 0)


def _owl(layers: Sequence[Layer], sparsity: float, spread: float) -> np.ndarray:
    outliers = np.array([layer.outliers for layer in layers])
    reach = outliers.max() - outliers.min()
    scaled = (outliers - outliers.min()) / (reach or 1.0) * 2.0 * spread
    return sparsity - (scaled - scaled.mean())


def _water_fill(layers: Sequence[Layer], sparsity: float, spread: float) -> np.ndarray:
    """Bisect the common cost; a layer's share is how much of it costs less, kept within reach of the global share."""
    curves = [np.asarray(layer.costs if layer.costs is not None else [layer.score]) for layer in layers]
    sizes = np.array([layer.size for layer in layers], np.float64)
    floor, ceiling = max(sparsity - 2 * spread, FLOOR), min(sparsity + 2 * spread, max(CEILING, sparsity))

    def shares(level: float) -> np.ndarray:
        below = [np.searchsorted(curve, np.exp(level), side="right") / len(curve) for curve in curves]
        return np.clip(below, floor, ceiling)

    logs = np.log(np.maximum(np.concatenate(curves), _TINY))
    low, high = float(logs.min()) - 1.0, float(logs.max()) + 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (shares(middle) * sizes).sum() < sparsity * sizes.sum() else (low, middle)
    return shares(high)
