"""The whole model with some of its matrices exchanged, measured against what it put out before: for searches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tightship.addresses import skeleton
from tightship.checkpoint import Checkpoint
from tightship.modelview import ModelView
from tightship.passes.base import Run
from tightship.passes.divergence import Yardstick


class StandIns:
    """Starts as `checkpoint`; the whole model is in memory, float32."""

    def __init__(self, checkpoint: Checkpoint, windows: Sequence[np.ndarray], run: Run) -> None:
        self._view = ModelView(checkpoint, threads=run.threads, device=run.device)
        self._places = skeleton(checkpoint)[1]
        self._infos = checkpoint.infos()
        self._yardstick = Yardstick(self._view, windows)

    def put(self, name: str, values: np.ndarray) -> np.ndarray:
        """Give the matrix `name` (out, in) these values; the ones it had."""
        import torch

        place = self._places[name].view(self._view.module())
        target = place.T if self._infos[name].rule.transposed else place
        before = target.cpu().numpy().copy()
        target.copy_(torch.from_numpy(np.ascontiguousarray(values)))
        return before

    def hurt(self, name: str, values: np.ndarray) -> float:
        """The divergence with these values (out, in) of the matrix `name`, which then gets back its own."""
        before = self.put(name, values)
        found = self.divergence()
        self.put(name, before)
        return found

    def divergence(self) -> float:
        """How far the outputs are from those of the checkpoint; see `Yardstick`."""
        return self._yardstick.divergence()
