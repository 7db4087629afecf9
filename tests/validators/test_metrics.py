"""Metrics against torch, scipy-free hand derivations, and degenerate inputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div
from torch.nn.functional import log_softmax as torch_log_softmax

from tightship.validators.metrics import LogitMeter, LogitMetrics, compare_hidden


def meter(reference: np.ndarray, candidate: np.ndarray, next_ids: np.ndarray | None = None) -> LogitMetrics:
    found = LogitMeter()
    found.add(reference, candidate, next_ids)
    return found.result()


@pytest.fixture
def logits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(2, 37, 61) logits, a disturbed copy, and next tokens of which some are missing."""
    random = np.random.default_rng(3)
    reference = random.normal(0, 4, (2, 37, 61)).astype(np.float32)
    candidate = reference + random.normal(0, 0.7, reference.shape).astype(np.float32)
    next_ids = random.integers(0, 61, (2, 37))
    next_ids[:, -1] = -1
    return reference, candidate, next_ids


def test_kl_divergence_is_torchs(logits: tuple[np.ndarray, ...]) -> None:
    reference, candidate, _ = logits
    p, q = (torch_log_softmax(torch.from_numpy(x).double(), -1) for x in (reference, candidate))
    expected = kl_div(q, p, log_target=True, reduction="none").sum(-1).flatten()
    found = meter(reference, candidate)
    # Terms of both signs cancel: rounding is relative to them, which are of order 1, and not to their sum.
    np.testing.assert_allclose(found.kl, expected.numpy(), rtol=1e-12, atol=1e-14)
    figures = found.figures()
    for name, fraction in (("kl_median", 0.5), ("kl_p99", 0.99), ("kl_p999", 0.999), ("kl_max", 1.0)):
        assert figures[name] == pytest.approx(torch.quantile(expected, fraction).item(), rel=1e-12)
    assert figures["kl_mean"] == pytest.approx(expected.mean().item(), rel=1e-12)
    assert figures["kl_error"] == pytest.approx(expected.std().item() / math.sqrt(74), rel=1e-12)


def test_perplexity_is_torchs_cross_entropy(logits: tuple[np.ndarray, ...]) -> None:
    reference, candidate, next_ids = logits
    kept = torch.from_numpy(next_ids).flatten()
    nll = [
        cross_entropy(torch.from_numpy(x).double().flatten(0, 1), kept, ignore_index=-1, reduction="none")[kept >= 0]
        for x in (reference, candidate)
    ]
    found = meter(reference, candidate, next_ids).figures()
    assert found["perplexity_reference"] == pytest.approx(nll[0].mean().exp().item(), rel=1e-12)
    assert found["perplexity_candidate"] == pytest.approx(nll[1].mean().exp().item(), rel=1e-12)
    # The ratio's error as llama-perplexity derives it: variances of both means minus twice their covariance.
    covariance = torch.cov(torch.stack(nll)) / len(nll[0])
    error = math.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    ratio = found["perplexity_candidate"] / found["perplexity_reference"]
    assert found["perplexity_ratio"] == pytest.approx(ratio, rel=1e-12)
    assert found["perplexity_ratio_error"] == pytest.approx(ratio * error, rel=1e-9)


def test_error_norms_are_torchs(logits: tuple[np.ndarray, ...]) -> None:
    reference, candidate, _ = logits
    a, b = torch.from_numpy(reference).double(), torch.from_numpy(candidate).double()
    found = meter(reference, candidate).figures()
    assert found["rel_l2"] == pytest.approx(((b - a).norm() / a.norm()).item(), rel=1e-12)
    assert found["max_error"] == (b - a).abs().max().item()
    assert found["mean_error"] == pytest.approx((b - a).abs().mean().item(), rel=1e-12)
    assert found["cosine"] == pytest.approx(cosine_similarity(a.flatten(), b.flatten(), dim=0).item(), rel=1e-12)


def test_two_words_by_hand() -> None:
    """p = (3/4, 1/4), q = (1/4, 3/4): KL = 3/4 ln 3 + 1/4 ln 1/3 = 1/2 ln 3; next token 0: ratio (3/4)/(1/4) = 3."""
    p, q = (np.log([[a, 1 - a]], dtype=np.float64).astype(np.float32) for a in (0.75, 0.25))
    found = meter(p, q, np.array([0])).figures()
    assert found["kl_mean"] == pytest.approx(0.5 * math.log(3), rel=1e-6)
    assert found["perplexity_reference"] == pytest.approx(4 / 3, rel=1e-6)
    assert found["perplexity_ratio"] == pytest.approx(3, rel=1e-6)
    assert (found["top1"], found["near_ties"], found["positions"]) == (0.0, 0, 1)


def test_a_constant_added_to_all_logits_changes_no_probability() -> None:
    random = np.random.default_rng(0)
    reference = random.normal(0, 1, (5, 9)).astype(np.float32)
    found = meter(reference, reference + np.float32(64)).figures()
    assert found["kl_max"] < 1e-9
    assert (found["top1"], found["max_error"]) == (1.0, pytest.approx(64, rel=1e-6))


def test_near_ties_are_told_from_real_changes() -> None:
    reference = np.array([[2.0, 1.96, 0.0], [2.0, 1.0, 0.0], [2.0, 1.0, 0.0]], np.float32)
    candidate = np.array([[1.9, 1.96, 0.0], [0.0, 1.0, 0.0], [3.0, 1.0, 0.0]], np.float32)
    found = meter(reference, candidate)
    assert found.same_top.tolist() == [False, False, True]
    assert found.near_tie.tolist() == [True, False, False]
    assert found.top1 == pytest.approx(1 / 3)
    assert found.top1_error == pytest.approx(math.sqrt(1 / 3 * 2 / 3 / 2))


def test_pieces_add_up_to_the_whole(logits: tuple[np.ndarray, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    reference, candidate, next_ids = logits
    whole = meter(reference, candidate, next_ids).figures()
    monkeypatch.setattr("tightship.validators.metrics._CHUNK_ELEMENTS", 61 * 3)
    pieces = LogitMeter()
    for row in range(2):
        pieces.add(reference[row], candidate[row], next_ids[row])
    assert pieces.result().figures() == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_one_poisoned_logit_spoils_every_figure(logits: tuple[np.ndarray, ...], poison: float, side: int) -> None:
    pair = [logits[0].copy(), logits[1].copy()]
    pair[side][1, 5, 7] = poison
    found = meter(*pair, logits[2]).figures()
    assert found["non_finite"] == 1
    judged = ("rel_l2", "max_error", "mean_error", "cosine", "kl_mean", "kl_p99", "kl_max", "top1", "perplexity_ratio")
    assert not [name for name in judged if math.isfinite(found[name])]


def test_nothing_compared_gives_no_figure() -> None:
    found = meter(np.empty((0, 4), np.float32), np.empty((0, 4), np.float32)).figures()
    assert found["positions"] == 0
    assert not [name for name in ("kl_mean", "kl_max", "top1", "perplexity_ratio") if math.isfinite(found[name])]


def test_an_all_zero_reference_is_equal_only_to_zeros() -> None:
    zeros, ones = np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)
    assert meter(zeros, zeros).errors.rel_l2 == 0
    assert meter(zeros, ones).errors.rel_l2 == math.inf


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(2, 3\)"):
        meter(np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match="hidden states"):
        compare_hidden(np.zeros((1, 2, 3)), np.zeros((1, 2, 4)), np.ones((1, 2)))


def test_hidden_states_are_compared_where_the_mask_says() -> None:
    random = np.random.default_rng(1)
    reference = random.normal(size=(2, 6, 8)).astype(np.float32)
    candidate = reference + random.normal(0, 0.1, reference.shape).astype(np.float32)
    mask = np.ones((2, 6), np.int64)
    mask[1, 4:] = 0
    candidate[1, 4:] = np.nan
    found = compare_hidden(reference, candidate, mask)
    a, b = (torch.from_numpy(x).double()[torch.from_numpy(mask).bool()] for x in (reference, candidate))
    figures = found.figures()
    assert (figures["positions"], figures["non_finite"]) == (10, 0)
    assert figures["rel_l2"] == pytest.approx(((a - b).norm() / a.norm()).item(), rel=1e-12)
    np.testing.assert_allclose(found.cosine, cosine_similarity(a, b, dim=-1).numpy(), rtol=1e-12)
    means = [[x[:6].mean(0), x[6:].mean(0)] for x in (a, b)]
    expected = [cosine_similarity(means[0][i], means[1][i], dim=0).item() for i in range(2)]
    np.testing.assert_allclose(found.sentence_cosine, expected, rtol=1e-12)
    candidate[0, 0, 0] = np.nan
    assert not math.isfinite(compare_hidden(reference, candidate, mask).figures()["cosine"])
