"""What tests of the passes compute with: windows of random tokens, and a model's outputs before and after."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tightship.checkpoint import Checkpoint
from tightship.modelview import ModelView
from tightship.passes.base import Run

IDS = np.arange(24).reshape(2, 12)


@pytest.fixture
def calibrated() -> Run:
    """What the runner gives a pass: eight windows for models with a vocabulary of 96."""
    return Run(threads=1, written=tuple(np.random.default_rng(0).integers(0, 96, (8, 32))))


@pytest.fixture(scope="session")
def outputs() -> Callable[[Checkpoint], np.ndarray]:
    """checkpoint -> logits or hidden states of tokens 0 to 23 in two rows; shapes are those that config.json says."""

    def compute(checkpoint: Checkpoint) -> np.ndarray:
        infos = checkpoint.infos()
        assert {n: w.shape for n, w in checkpoint.weights.items()} == {n: infos[n].shape for n in checkpoint.weights}
        return next(iter(ModelView(checkpoint).outputs(IDS).values()))

    return compute


@pytest.fixture(scope="session")
def assert_lossless(outputs: Callable[[Checkpoint], np.ndarray]) -> Callable[[Checkpoint, Checkpoint], None]:
    """(checkpoint, checkpoint): both compute the same; sums of fewer products come in another order."""

    def check(found: Checkpoint, expected: Checkpoint) -> None:
        np.testing.assert_allclose(outputs(found), outputs(expected), atol=2e-5, rtol=2e-5)

    return check
