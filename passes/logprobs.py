"""Stored log-probabilities of a teacher: a safetensors file that any runtime can have filled.

| array       | dtype, shape                 | meaning                                                |
|-------------|------------------------------|--------------------------------------------------------|
| ids         | i32 (windows, length)        | the text, as tokens                                    |
| lengths     | i32 (windows,)               | tokens of each window; what follows is filler          |
| classes     | i32 (windows, length - 1, k) | the k likeliest next tokens after each position        |
| stored      | f32 (windows, length - 1, k) | log softmax(logits / T) of them, natural logarithm     |
| temperature | f32 (1,)                     | T                                                      |

Decoders only: what a masked language model guesses hangs on which tokens are hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tightship.errors import Malformed, UsageError
from tightship.passes.lessons import Batch, Lessons
from tightship.passes.training import Training
from tightship.stage_codec import read_arrays

if TYPE_CHECKING:
    import torch

ARRAYS = ("ids", "lengths", "classes", "stored", "temperature")


@dataclass(frozen=True)
class LogProbs:
    """See the module's table."""

    ids: np.ndarray
    lengths: np.ndarray
    classes: np.ndarray
    stored: np.ndarray

    @classmethod
    def read(cls, path: Path, temperature: float) -> LogProbs:
        """The file, whole.

        Raises:
            UsageError: it was made at another temperature.
            Malformed: arrays are missing or do not belong together.
        """
        arrays = read_arrays(path, list(ARRAYS))
        made_at = float(arrays["temperature"].reshape(-1)[0])
        if not np.isclose(made_at, temperature):
            raise UsageError(
                f"distill: {path.name} holds log-probabilities at temperature {made_at:g}, not {temperature:g}",
                hint=f"temperature: {made_at:g}, or make the file anew",
            )
        found = cls(*(arrays[name] for name in ARRAYS[:4]))
        windows, length = found.ids.shape
        if found.classes.shape[:2] != (windows, length - 1) or found.classes.shape != found.stored.shape:
            raise Malformed(f"{path.name}: classes {found.classes.shape} do not belong to ids {found.ids.shape}")
        return found

    def lessons(self, how: Training, seed: int) -> Lessons:
        """Its text."""
        windows = [row[:length].astype(np.int64) for row, length in zip(self.ids, self.lengths, strict=True)]
        return Lessons(windows, None, how, seed)

    def rows(self, batch: Batch, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Classes (n, k) int64 and log-probabilities (n, k) float32 of a batch's graded rows."""
        import torch

        real, chosen, width = batch.real[:, 1:], list(batch.rows), batch.ids.shape[1] - 1
        classes, stored = (array[chosen][:, :width][real] for array in (self.classes, self.stored))
        return torch.from_numpy(classes.astype(np.int64)).to(device), torch.from_numpy(stored).to(device)
