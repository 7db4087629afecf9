"""Schedules: exact sums, and what each of them promises."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tightship.passes.schedules import SCHEDULES, Layer, exact_counts, kmeans_1d, zeros_per_layer


def layers(seed: int = 0) -> dict[str, Layer]:
    rng = np.random.default_rng(seed)
    return {
        f"layer{i}": Layer(
            size=int(rng.integers(50, 5000)),
            score=float(10 ** rng.uniform(-6, 0)),
            outliers=float(rng.random() * 0.1),
            costs=np.sort(10 ** rng.normal(rng.uniform(-4, 0), 1, 256)),
        )
        for i in range(20)
    }


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sparsity", [0.031, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("seed", [0, 1])
def test_zeros_add_up_exactly(schedule: str, sparsity: float, seed: int) -> None:
    facts = layers(seed)
    zeros = zeros_per_layer(schedule, facts, sparsity)
    assert sum(zeros.values()) == round(sparsity * sum(f.size for f in facts.values()))
    assert all(0 <= zeros[name] <= facts[name].size for name in facts)


def test_uniform_is_uniform() -> None:
    facts = layers()
    for name, zeros in zeros_per_layer("uniform", facts, 0.7).items():
        assert abs(zeros - 0.7 * facts[name].size) < 1


@pytest.mark.parametrize("schedule", ["log-kmeans", "owl", "water-fill"])
def test_the_share_stays_within_the_spread(schedule: str) -> None:
    facts = layers()
    shares = [zeros / facts[name].size for name, zeros in zeros_per_layer(schedule, facts, 0.7, spread=0.05).items()]
    assert 0.02 < max(shares) - min(shares) <= (0.2 if schedule == "water-fill" else 0.1) + 0.03


def test_log_kmeans_prunes_layers_that_hurt_more_less() -> None:
    facts = {f"l{i}": Layer(1000, score=10.0 ** -(i // 2)) for i in range(8)}  # four clusters of two
    zeros = zeros_per_layer("log-kmeans", facts, 0.7, spread=0.06)
    assert list(zeros.values()) == [640, 640, 680, 680, 720, 720, 760, 760]
    alike = zeros_per_layer("log-kmeans", {name: Layer(1000) for name in facts}, 0.7)
    assert set(alike.values()) == {700}


def test_owl_by_hand() -> None:
    facts = {name: Layer(1000, outliers=share) for name, share in (("a", 0.0), ("b", 0.01), ("c", 0.02))}
    # r = 0, 0.08, 0.16; mean 0.08
    assert zeros_per_layer("owl", facts, 0.7) == {"a": 780, "b": 700, "c": 620}


def test_water_fill_has_one_price_for_all() -> None:
    costs = np.linspace(0.001, 1.0, 1000)
    facts = {"cheap": Layer(1000, costs=costs), "dear": Layer(1000, costs=costs * 1.5)}
    # below level t lie t of the cheap and t / 1.5 of the dear: t + t / 1.5 = 1 at t = 0.6
    assert zeros_per_layer("water-fill", facts, 0.5, spread=0.2) == {"cheap": 600, "dear": 400}
    assert zeros_per_layer("water-fill", facts, 0.5, spread=0.025) == {"cheap": 550, "dear": 450}


@pytest.mark.parametrize("clusters", [1, 2, 3, 4])
def test_kmeans_is_the_best_of_all_partitions(clusters: int) -> None:
    values = np.random.default_rng(clusters).normal(size=9)
    found = kmeans_1d(values, clusters)

    def scatter(labels: np.ndarray) -> float:
        return sum(float(((values[labels == c] - values[labels == c].mean()) ** 2).sum()) for c in set(labels))

    ranks = values.argsort().argsort()
    best = min(
        scatter(np.searchsorted(np.array(cuts), ranks, side="right"))
        for cuts in itertools.combinations(range(1, 9), clusters - 1)
    )
    assert scatter(found) == pytest.approx(best)
    assert (np.diff(found[values.argsort()]) >= 0).all()


def test_no_more_clusters_than_values() -> None:
    assert kmeans_1d(np.array([3.0, 1.0, 3.0]), 4).tolist() == [1, 0, 1]


def test_counts_respect_the_ends() -> None:
    assert sum(exact_counts(np.array([1.5, -0.5]), [100, 100], 0.6)) == 120
