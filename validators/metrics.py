"""How far one model's outputs are from another's.

All sums are float64. Logits arrive in pieces and are turned into float64 a few rows at a time, so a comparison never
holds a second copy of (positions, vocabulary). Definitions follow llama.cpp's `llama-perplexity` (tools/perplexity),
which users compare with, except that nothing is rounded to 16 bits on the way and no probability is left out:

    KL divergence      sum_v p(v) (log p(v) - log q(v)), p the original's softmax, q the artifact's; in nats
    percentiles        linear interpolation between order statistics
    perplexity         exp of the mean negative log-likelihood of the next token
    its ratio's error  exp(mean d) * sqrt(var(d) / (n - 1)), d the difference of log-likelihoods at each position
    same top token     share of positions with equal argmax, with the error of a proportion
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_CHUNK_ELEMENTS = 1 << 19
NEAR_TIE = 0.05
"""Nats. A changed top token is a near tie if the original gave the new one at least exp(-0.05) = 95 % of the chance."""


@dataclass
class ErrorSums:
    """Running sums of a comparison of two equally shaped arrays.

    `rel_l2` is |candidate - reference| / |reference| in the Euclidean norm (the square root of llama.cpp's NMSE),
    `cosine` the cosine of the two arrays as vectors.
    """

    count: int = 0
    difference: float = 0.0
    reference: float = 0.0
    candidate: float = 0.0
    product: float = 0.0
    absolute: float = 0.0
    max_abs: float = 0.0

    def add(self, reference: np.ndarray, candidate: np.ndarray) -> None:
        """Take in float64 arrays of one shape."""
        difference = candidate - reference
        magnitude = np.abs(difference)
        self.count += reference.size
        self.difference += float(np.sum(difference * difference))
        self.reference += float(np.sum(reference * reference))
        self.candidate += float(np.sum(candidate * candidate))
        self.product += float(np.sum(reference * candidate))
        self.absolute += float(np.sum(magnitude))
        # np.maximum and not max(): a NaN has to stay.
        self.max_abs = float(np.maximum(self.max_abs, np.max(magnitude, initial=0.0)))

    @property
    def rel_l2(self) -> float:
        return 0.0 if self.difference == 0 else _ratio(math.sqrt(self.difference), math.sqrt(self.reference))

    @property
    def mean_abs(self) -> float:
        return _ratio(self.absolute, self.count)

    @property
    def cosine(self) -> float:
        if self.difference == 0:
            return 1.0
        return _ratio(self.product, math.sqrt(self.reference) * math.sqrt(self.candidate))


@dataclass(frozen=True)
class LogitMetrics:
    """Comparison of two models' logits on the same tokens. Arrays hold one entry a position, in the order given.

    Attributes:
        positions: how many positions were compared.
        non_finite: how many of them hold NaN or Inf in either model; any makes the sums NaN.
        errors: sums over all logits.
        kl: KL(original || artifact), float64, nats.
        same_top: argmax equal, bool.
        near_tie: the argmax differs, but the original held the artifact's choice for nearly as likely (`NEAR_TIE`).
        has_next: a next token is known, bool.
        nll_reference, nll_candidate: negative log-likelihood of the next token, float64; zero where there is none.
    """

    positions: int
    non_finite: int
    errors: ErrorSums
    kl: np.ndarray
    same_top: np.ndarray
    near_tie: np.ndarray
    has_next: np.ndarray
    nll_reference: np.ndarray
    nll_candidate: np.ndarray

    @property
    def top1(self) -> float:
        return _mean(self.same_top) if self.non_finite == 0 else math.nan

    @property
    def top1_error(self) -> float:
        """Standard error of `top1` as a proportion, as llama-perplexity prints it."""
        share = self.top1
        return math.sqrt(share * (1 - share) / (self.positions - 1)) if self.positions > 1 else math.nan

    @property
    def kl_mean(self) -> float:
        return _mean(self.kl)

    @property
    def kl_error(self) -> float:
        """Standard error of `kl_mean`."""
        return _standard_error(self.kl)

    def kl_quantile(self, fraction: float) -> float:
        return float(np.quantile(self.kl, fraction)) if self.positions and self.non_finite == 0 else math.nan

    @property
    def perplexity_reference(self) -> float:
        return _exp(_mean(self.nll_reference[self.has_next]))

    @property
    def perplexity_candidate(self) -> float:
        return _exp(_mean(self.nll_candidate[self.has_next]))

    @property
    def perplexity_ratio(self) -> float:
        """Artifact's over original's; above 1 is a loss."""
        return _exp(_mean(self._nll_difference()))

    @property
    def perplexity_ratio_error(self) -> float:
        """Standard error of the ratio from the paired differences (covariance included)."""
        return self.perplexity_ratio * _standard_error(self._nll_difference())

    def _nll_difference(self) -> np.ndarray:
        return (self.nll_candidate - self.nll_reference)[self.has_next]

    def figures(self) -> dict[str, Any]:
        """Every scalar under the name that reports and gates use; perplexities are NaN without next tokens."""
        return {
            "positions": self.positions,
            "non_finite": self.non_finite,
            "rel_l2": self.errors.rel_l2,
            "max_error": self.errors.max_abs,
            "mean_error": self.errors.mean_abs,
            "cosine": self.errors.cosine,
            "kl_mean": self.kl_mean,
            "kl_error": self.kl_error,
            "kl_median": self.kl_quantile(0.5),
            "kl_p99": self.kl_quantile(0.99),
            "kl_p999": self.kl_quantile(0.999),
            "kl_max": self.kl_quantile(1.0),
            "top1": self.top1,
            "top1_error": self.top1_error,
            "near_ties": int(self.near_tie.sum()),
            "perplexity_reference": self.perplexity_reference,
            "perplexity_candidate": self.perplexity_candidate,
            "perplexity_ratio": self.perplexity_ratio,
            "perplexity_ratio_error": self.perplexity_ratio_error,
        }


@dataclass
class LogitMeter:
    """Compares logits piece by piece: `add` as often as there are pieces, then `result`."""

    errors: ErrorSums = field(default_factory=ErrorSums)
    non_finite: int = 0
    _parts: list[np.ndarray] = field(default_factory=list)

    def add(self, reference: np.ndarray, candidate: np.ndarray, next_ids: np.ndarray | None = None) -> None:
        """Take in logits of the same positions.

        Args:
            reference, candidate: (..., vocabulary) float32.
            next_ids: (...) integers, the token that follows each position; negative where none does.

        Raises:
            ValueError: the shapes differ. That is the caller's mistake, or a check of its own.
        """
        if reference.shape != candidate.shape:
            raise ValueError(f"cannot compare logits {candidate.shape} with the original's {reference.shape}")
        vocabulary = reference.shape[-1]
        rows = max(1, _CHUNK_ELEMENTS // vocabulary)
        flat = (reference.reshape(-1, vocabulary), candidate.reshape(-1, vocabulary))
        following = np.full(len(flat[0]), -1) if next_ids is None else np.asarray(next_ids, np.int64).reshape(-1)
        for start in range(0, len(following), rows):
            piece = slice(start, start + rows)
            self._add_rows(flat[0][piece].astype(np.float64), flat[1][piece].astype(np.float64), following[piece])

    def _add_rows(self, reference: np.ndarray, candidate: np.ndarray, following: np.ndarray) -> None:
        poisoned = ~(np.isfinite(reference).all(-1) & np.isfinite(candidate).all(-1))
        self.non_finite += int(poisoned.sum())
        reference[poisoned] = np.nan  # one -inf among many logits would leave a plausible perplexity
        with np.errstate(invalid="ignore", over="ignore"):
            self.errors.add(reference, candidate)
            log_p, log_q = log_softmax(reference), log_softmax(candidate)
            # Rounding may leave a divergence of -1e-17; it is a distance and never below zero.
            kl = np.maximum(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1), 0.0)
        row = np.arange(len(reference))
        top, other = reference.argmax(-1), candidate.argmax(-1)
        same = top == other
        near = ~same & (reference[row, top] - reference[row, other] < NEAR_TIE)
        known = following >= 0
        nll = [np.where(known, -log[row, np.maximum(following, 0)], 0.0) for log in (log_p, log_q)]
        self._parts.append(np.stack([kl, same, near, known, *nll]))

    def result(self) -> LogitMetrics:
        """What was found over everything that was added."""
        kl, same, near, known, *nll = np.concatenate([np.empty((6, 0)), *self._parts], axis=1)
        return LogitMetrics(
            positions=len(kl),
            non_finite=self.non_finite,
            errors=self.errors,
            kl=kl,
            same_top=same.astype(bool),
            near_tie=near.astype(bool),
            has_next=known.astype(bool),
            nll_reference=nll[0],
            nll_candidate=nll[1],
        )


@dataclass(frozen=True)
class HiddenMetrics:
    """Comparison of two encoders' hidden states.

    Attributes:
        positions, non_finite, errors: as in `LogitMetrics`.
        cosine: one cosine a position, float64.
        sentence_cosine: one a sequence, of the means over its real positions: what an embedding's user sees.
    """

    positions: int
    non_finite: int
    errors: ErrorSums
    cosine: np.ndarray
    sentence_cosine: np.ndarray

    def figures(self) -> dict[str, Any]:
        """Every scalar under the name that reports and gates use."""
        return {
            "positions": self.positions,
            "non_finite": self.non_finite,
            "rel_l2": self.errors.rel_l2,
            "max_error": self.errors.max_abs,
            "mean_error": self.errors.mean_abs,
            "cosine": _mean(self.cosine),
            "cosine_min": float(np.min(self.cosine)) if self.positions else math.nan,
            "sentence_cosine_min": float(np.min(self.sentence_cosine)) if self.positions else math.nan,
        }


def compare_hidden(reference: np.ndarray, candidate: np.ndarray, mask: np.ndarray) -> HiddenMetrics:
    """Compare hidden states (batch, sequence, hidden) float32 where `mask` (batch, sequence) is not zero.

    Raises:
        ValueError: the shapes differ.
    """
    if reference.shape != candidate.shape:
        raise ValueError(f"cannot compare hidden states {candidate.shape} with the original's {reference.shape}")
    errors, cosines, sentences, non_finite = ErrorSums(), [np.empty(0)], [], 0
    for row, kept in enumerate(np.asarray(mask, bool)):
        if not kept.any():
            continue
        pair = (reference[row, kept].astype(np.float64), candidate[row, kept].astype(np.float64))
        non_finite += int(np.sum(~(np.isfinite(pair[0]).all(-1) & np.isfinite(pair[1]).all(-1))))
        with np.errstate(invalid="ignore", over="ignore"):
            errors.add(*pair)
            cosines.append(_cosines(*pair))
            sentences.append(_cosines(pair[0].mean(0), pair[1].mean(0)))
    joined = np.concatenate(cosines)
    return HiddenMetrics(len(joined), non_finite, errors, joined, np.array(sentences))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities over the last axis, in the dtype given."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine along the last axis; equal vectors give 1, zeros included."""
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosine = np.divide(np.sum(a * b, -1), norms, out=np.full(norms.shape, np.nan), where=norms != 0)
    return np.where((a == b).all(-1), 1.0, cosine)


def _ratio(part: float, whole: float) -> float:
    if whole == 0:
        return math.nan if part == 0 or math.isnan(part) else math.inf
    return part / whole


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if values.size else math.nan


def _standard_error(values: np.ndarray) -> float:
    return math.sqrt(float(np.var(values)) / (values.size - 1)) if values.size > 1 else math.nan


def _exp(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(value))
