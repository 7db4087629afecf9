"""How far a changed model's outputs are from what they were, on a few windows: the ruler of searches and schedules.

Language models: mean Kullback-Leibler divergence KL(before || now) of the next-token distributions, in nats. Encoders
without a vocabulary: mean square of the change of the last hidden state over its mean square.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tightship.blocks import batch_windows
from tightship.modelview import ModelView

_TOKENS = 2048
_ELEMENTS = 1 << 27  # of the reference that is kept, float32


class Yardstick:
    """Outputs of `view`'s module as it is now, to be compared with after its weights were changed in place."""

    def __init__(self, view: ModelView, windows: Sequence[np.ndarray]) -> None:
        self._view = view
        self._logits = True
        width = int(view.checkpoint.hyper.get("vocab", 1))
        self._windows = batch_windows(_some(windows, min(_TOKENS, max(1, _ELEMENTS // width))))
        self._before = [self._outputs(windows) for windows in self._windows]

    def divergence(self) -> float:
        """Mean over all positions, float64; 0 where nothing changed."""
        total, count = 0.0, 0
        for windows, before in zip(self._windows, self._before, strict=True):
            now = self._outputs(windows)
            if self._logits:
                total += float((np.exp(before, dtype=np.float64) * (before - now)).sum())
                count += len(before)
            else:
                total += float(np.square(now - before, dtype=np.float64).sum())
                count += float(np.square(before, dtype=np.float64).sum())  # type: ignore[assignment]
        return max(total / count, 0.0)

    def _outputs(self, windows: np.ndarray) -> np.ndarray:
        """(positions, vocabulary) log-probabilities, or (positions, hidden), of windows of one length."""
        found = self._view.outputs(windows)
        self._logits = "logits" in found
        if not self._logits:
            return found["last_hidden_state"].reshape(windows.size, -1)
        values = found["logits"].reshape(-1, found["logits"].shape[-1]).astype(np.float64)
        values -= values.max(axis=1, keepdims=True)
        values -= np.log(np.exp(values).sum(axis=1, keepdims=True))
        return values.astype(np.float32)


def _some(windows: Sequence[np.ndarray], tokens: int) -> list[np.ndarray]:
    """The last windows, `tokens` in all at most, but at least one (cut to size)."""
    chosen: list[np.ndarray] = []
    left = tokens
    for window in reversed(windows):
        if chosen and len(window) > left:
            break
        chosen.append(window[:tokens])
        left -= len(window)
    return chosen
