"""Distillation losses against torch's own, finite differences, and their limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tightship.errors import UsageError
from tightship.passes.teaching import LayerMap, soft_loss, stored_loss

torch = pytest.importorskip("torch")
F = torch.nn.functional


def logits(seed: int, scale: float = 2.0, rows: int = 6, classes: int = 40) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_soft_loss_is_kl_div_times_the_square_of_the_temperature(temperature: float) -> None:
    student, teacher = logits(0), logits(1)
    p, q = F.softmax(teacher / temperature, dim=1), F.log_softmax(student / temperature, dim=1)
    expected = temperature**2 * F.kl_div(q, p, reduction="none").sum(dim=1).mean()
    torch.testing.assert_close(soft_loss(student, teacher, temperature), expected)


def test_limits() -> None:
    student, teacher = logits(0), logits(1)
    assert float(soft_loss(teacher, teacher, 3.0)) == pytest.approx(0, abs=1e-12)
    # one-hot teacher, T = 1: cross-entropy
    sure = torch.full_like(teacher, -1e4).scatter(1, torch.arange(6)[:, None], 0.0)
    torch.testing.assert_close(soft_loss(student, sure, 1.0), F.cross_entropy(student, torch.arange(6)))
    # high T: the mean over classes of half the squared difference of the centred logits (Hinton et al., section 2.1)
    centred = (student - student.mean(dim=1, keepdim=True)) - (teacher - teacher.mean(dim=1, keepdim=True))
    expected = centred.square().mean(dim=1).mean() / 2
    assert float(soft_loss(student, teacher, 1e4)) == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_gradients_agree_with_finite_differences(temperature: float) -> None:
    student, teacher = logits(0, rows=3, classes=7).requires_grad_(), logits(1, rows=3, classes=7)
    top = torch.log_softmax(teacher / temperature, dim=1).topk(4, dim=1)
    assert torch.autograd.gradcheck(lambda x: soft_loss(x, teacher, temperature), (student,))
    assert torch.autograd.gradcheck(lambda x: stored_loss(x, top.indices, top.values, temperature), (student,))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_stored_log_probabilities_stay_within_their_bound(temperature: float) -> None:
    """live - stored = T^2 * mean of (rest of the teacher) * KL within the rest: never negative, nothing for all k."""
    student, teacher = logits(0, 4.0), logits(1, 4.0)
    live = float(soft_loss(student, teacher, temperature))
    theirs = torch.log_softmax(teacher / temperature, dim=1)
    ours = torch.log_softmax(student / temperature, dim=1)
    for k in (1, 4, 16, 40):
        top = theirs.topk(k, dim=1)
        found = float(stored_loss(student, top.indices, top.values, temperature))
        outside = torch.ones_like(theirs, dtype=torch.bool).scatter(1, top.indices, False)
        gap = 0.0
        for row in range(len(theirs)):
            p, q = theirs[row][outside[row]].exp().numpy(), ours[row][outside[row]].exp().numpy()
            gap += p.sum() * float(np.sum(p / p.sum() * np.log((p / p.sum()) / (q / q.sum())))) if k < 40 else 0.0
        assert live - found == pytest.approx(temperature**2 * gap / len(theirs), abs=1e-9)
        assert found <= live + 1e-9


def test_layer_maps() -> None:
    assert LayerMap.of(None, 3, 6).pairs == (1, 3, 5)
    assert LayerMap.of(None, 6, 12).pairs == (1, 3, 5, 7, 9, 11)
    assert LayerMap.of([0, 5], 2, 6).pairs == (0, 5)
    for wrong in ([0], [0, 6]):
        with pytest.raises(UsageError, match="map"):
            LayerMap.of(wrong, 2, 6)
