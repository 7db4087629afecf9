"""Ranks that share a budget: by hand, and against trying everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tightship.passes.factorize import Metric, Spectrum, most_useful
from tightship.passes.rank_shares import Sizes, by_energy, by_loss

TEN = Sizes((10, 10), 20, 100)  # at most rank 4: 80 elements instead of 100


def diagonal(*squares: float) -> Spectrum:
    """A 10 x 10 matrix with these squared singular values; the others are 0."""
    singular = np.sqrt(np.pad(np.array(squares, np.float64), (0, 10 - len(squares))))
    return Spectrum(Metric(), np.eye(10), singular, np.eye(10))


def test_budget_takes_the_best_ranks_and_stays_inside() -> None:
    spectra = {"a": np.array([4.0, 3.0, 1.0, 0.1]), "b": np.array([1.0, 1.0, 1.0, 1.0])}
    shapes = {"a": (10, 10), "b": (10, 10)}
    # shares of a: 16, 9, 1 of 26.01; of b: 1/4 each. After rank 1 each, a's second (.346) beats b's (.25)
    assert by_energy(spectra, shapes, 40) == {"a": 1, "b": 1}
    assert by_energy(spectra, shapes, 60) == {"a": 2, "b": 1}
    assert by_energy(spectra, shapes, 99) == {"a": 2, "b": 2}
    # in twos: after two each, b's next two (.5) beat a's (.039), and cost 40
    assert by_energy(spectra, shapes, 119, multiple=2) == {"a": 2, "b": 2}
    assert by_energy(spectra, shapes, 120, multiple=2) == {"a": 2, "b": 4}


@pytest.mark.parametrize(
    ("hurt", "budget", "ranks"),
    [
        # left out of a at ranks 1 to 4: 14, 5, 1, 0; of b: 12, 8, 4, 0. Five ranks of 20; tried at 2 (half of each).
        # b hurts 8 where it leaves out 8, a 5 where it leaves out 5: sums 14, 13, 9 and 12 for a = 1 to 4
        ({"a": 5.0, "b": 8.0}, 100, {"a": 3, "b": 2}),
        # b hurts twice as much as it leaves out: 14, 13, 17, 24
        ({"a": 5.0, "b": 16.0}, 100, {"a": 2, "b": 3}),
        # and three times: 14, 17, 25, 36
        ({"a": 5.0, "b": 24.0}, 100, {"a": 1, "b": 4}),
    ],
)
def test_ranks_go_where_their_loss_is_largest(hurt: dict[str, float], budget: int, ranks: dict[str, int]) -> None:
    spectra = {"a": diagonal(16, 9, 4, 1), "b": diagonal(4, 4, 4, 4)}
    asked: list[tuple[str, int]] = []

    def divergence(name: str, _: Spectrum, rank: int) -> float:
        asked.append((name, rank))
        return hurt[name]

    found = by_loss(spectra.items(), dict.fromkeys(spectra, TEN), budget, divergence)
    assert {name: figures["rank"] for name, figures in found.items()} == ranks
    assert asked == [("a", 2), ("b", 2)]
    assert found["a"]["harm"] == pytest.approx([14, 5, 1, 0][ranks["a"] - 1])
    assert found["b"]["divergence"] == hurt["b"]


def test_a_matrix_without_a_tail_stays_whole() -> None:
    """Ten equal values: rank 4 of 80 elements leaves out 6, the whole 100 nothing; the other is of rank 1."""
    spectra = {"flat": diagonal(*[1.0] * 10), "thin": diagonal(5.0)}
    found = by_loss(spectra.items(), dict.fromkeys(spectra, TEN), 120, lambda *_: 1.0)
    assert {name: figures["rank"] for name, figures in found.items()} == {"flat": 10, "thin": 1}
    assert found["flat"]["harm"] == 0


@pytest.mark.parametrize("multiple", [1, 3])
def test_the_sum_of_losses_is_the_least_of_all(multiple: int) -> None:
    rng = np.random.default_rng(5)
    shapes = {"a": (16, 20), "b": (12, 40), "c": (20, 20)}
    sizes = {n: Sizes(s, sum(s), s[0] * s[1], multiple) for n, s in shapes.items()}
    spectra = {
        n: Spectrum(Metric(), np.eye(1), -np.sort(-rng.exponential(size=min(s))), np.eye(1)) for n, s in shapes.items()
    }
    hurt = {"a": 0.2, "b": 0.9, "c": 0.4}
    budget = 800
    found = by_loss(spectra.items(), sizes, budget, lambda name, *_: hurt[name])

    def losses(name: str) -> list[tuple[int, float]]:
        size, squares = sizes[name], spectra[name].singular ** 2
        level = hurt[name] / squares[int(found[name]["tried"]) :].sum()
        ranks = range(multiple, most_useful(*shapes[name]) + 1, multiple)
        return [(r * size.per_rank, level * squares[r:].sum()) for r in ranks] + [(size.whole, 0.0)]

    fitting = [c for c in itertools.product(*map(losses, sizes)) if sum(cost for cost, _ in c) <= budget]
    best = min(sum(loss for _, loss in c) for c in fitting)
    assert sum(figures["harm"] for figures in found.values()) == pytest.approx(best)
    assert all(f["rank"] % multiple == 0 or f["rank"] == min(shapes[n]) for n, f in found.items())
