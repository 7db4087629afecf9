"""Factors against NumPy's own singular values, and against theorems."""

from __future__ import annotations

import numpy as np
import pytest

from tightship.passes.factorize import (
    Metric,
    by_channel,
    by_row,
    most_useful,
    spectrum,
    whitening,
)
from tightship.passes.hessian import NotPositive

RNG = np.random.default_rng(3)


def correlated(width: int, tokens: int) -> np.ndarray:
    """Inputs with a decaying spectrum, so that directions differ in weight."""
    return RNG.standard_normal((tokens, width)) @ (RNG.standard_normal((width, width)) / np.arange(1, width + 1))


def output_error(w: np.ndarray, factors: tuple[np.ndarray, np.ndarray], x: np.ndarray) -> float:
    return float(np.square(x @ (w - factors[0] @ factors[1]).T).sum())


@pytest.mark.parametrize("rank", [1, 5, 24])
def test_plain_factors_reach_the_eckart_young_bound(rank: int) -> None:
    w = RNG.standard_normal((32, 24))
    left, right = spectrum(w, Metric()).factors(rank)
    left_out = np.linalg.svd(w, compute_uv=False)[rank:]
    assert left.shape == (32, rank)
    assert right.shape == (rank, 24)
    assert np.square(w - left @ right).sum() == pytest.approx(np.square(left_out).sum(), rel=1e-10, abs=1e-20)


def test_whitened_factors_have_the_least_output_error() -> None:
    x, w = correlated(24, 400), RNG.standard_normal((32, 24))
    second = x.T @ x / len(x)
    whitened = spectrum(w, whitening(second, 0.0))
    for rank in range(1, 24):
        best = output_error(w, whitened.factors(rank), x)
        # the theorem's own value: what is left out of the singular values of W L, L L^T = X^T X
        tail = np.linalg.svd(w @ np.linalg.cholesky(x.T @ x), compute_uv=False)[rank:]
        assert best == pytest.approx(np.square(tail).sum(), rel=1e-8)
        for other in (Metric(), by_channel(np.diagonal(second), 0.5), by_channel(np.diagonal(second), 1.0)):
            assert best <= output_error(w, spectrum(w, other).factors(rank), x) * (1 + 1e-9)


def test_channel_weights_move_the_error_to_quiet_channels() -> None:
    w = RNG.standard_normal((32, 24))
    loud = np.where(np.arange(24) < 4, 100.0, 1.0)
    plain = np.abs(w - np.matmul(*spectrum(w, Metric()).factors(6)))
    weighted = np.abs(w - np.matmul(*spectrum(w, by_channel(loud, 1.0)).factors(6)))
    assert weighted[:, :4].mean() < 0.2 * plain[:, :4].mean()
    assert weighted[:, 4:].mean() > plain[:, 4:].mean()


def test_row_weights_minimise_the_weighted_error() -> None:
    w, gradient = RNG.standard_normal((32, 24)), RNG.random((32, 24))
    metric = by_row(gradient)
    rows = np.sqrt(gradient.sum(axis=1))[:, None]
    error = np.square(rows * (w - np.matmul(*spectrum(w, metric).factors(7)))).sum()
    assert error == pytest.approx(np.square(np.linalg.svd(rows * w, compute_uv=False)[7:]).sum(), rel=1e-9)


def test_rank_for_energy_is_the_smallest_that_reaches_it() -> None:
    w = np.diag([3.0, 2.0, 1.0])  # squares 9, 4, 1 of 14
    found = spectrum(w, Metric())
    assert [found.rank_for(share) for share in (9 / 14, 0.65, 13 / 14, 0.95, 1.0)] == [1, 2, 2, 3, 3]
    assert found.lost(1) == pytest.approx(5 / 14)


def test_saving_as_the_arithmetic_says() -> None:
    assert 128 * (1024 + 4096) == 655_360  # 6.4 times fewer than 1024 x 4096
    assert 10 * 1024 * 4096 == 64 * 655_360
    assert most_useful(1024, 4096) == 819  # 819 * 5120 < 4194304 <= 820 * 5120
    assert most_useful(2, 2) == 0  # 3 // 4: rank 1 would take all 4 elements again


def test_moments_without_an_inverse_are_an_error() -> None:
    with pytest.raises(NotPositive):
        whitening(np.diag([1.0, -1.0]), 0.0)
