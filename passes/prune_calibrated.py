"""What wanda and sparsegpt share: tensors solved block by block, with as many zeros as the schedule gives each."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.dtypes import dtype
from tightship.passes.base import Needs, Run
from tightship.passes.calibration import Figures, Moments, solve_blocks
from tightship.passes.hessian import loss
from tightship.passes.kept import kept
from tightship.passes.masks import finite
from tightship.passes.prune import Prune, PruneMethod
from tightship.passes.prune_search import search
from tightship.passes.prune_survey import ablates, global_counts, survey
from tightship.passes.schedules import Layer, zeros_per_layer
from tightship.weights import Dense, Quantized, Stored


class CalibratedPrune(PruneMethod):
    """A method that knows what reaches each matrix."""

    needs: ClassVar[Needs] = "calibration"

    @abstractmethod
    def pruned(self, spec: Prune, w: np.ndarray, moments: Moments, zeros: int, device: str) -> np.ndarray:
        """`w` (rows, cols) float32 with `zeros` zeros, or with the spec's pattern."""

    @abstractmethod
    def costs(self, spec: Prune, w: np.ndarray, moments: Moments) -> np.ndarray:
        """(rows, cols): predicted loss of zeroing each weight alone."""

    def solved(self, spec: Prune, w: np.ndarray, moments: Moments, zeros: int, device: str) -> Dense | Quantized:
        """What takes the place of `w`: `pruned`, unless a method leaves weights on a grid."""
        return Dense.of(self.pruned(spec, w, moments, zeros, device))

    def prune(self, spec: Prune, checkpoint: Checkpoint, run: Run) -> Mapping[str, Stored]:
        tensors = spec.tensors(checkpoint)
        zeros = self._zeros(spec, checkpoint, run)

        def one(name: str, moments: Moments) -> tuple[Stored, Figures]:
            w = finite(name, tensors[name].value())
            solved = self.solved(spec, w, moments, zeros[name], run.device)
            kept = solved.value()
            figures: Figures = {
                "sparsity": float((kept == 0).mean()),
                "loss": loss(kept - w, moments.second) / (loss(w, moments.second) or 1.0),
            }
            return _stored(tensors[name], solved), figures

        return solve_blocks(checkpoint, run, set(tensors), one, full=True)

    def _zeros(self, spec: Prune, checkpoint: Checkpoint, run: Run) -> dict[str, int]:
        """How many zeros each matrix gets."""
        share = spec.sparsity or 0.0
        if spec.compared == "global":
            return kept(run, "counts.json", lambda: global_counts(self, spec, checkpoint, run))
        if spec.schedule == "uniform":
            return {name: round(share * int(np.prod(w.shape))) for name, w in spec.tensors(checkpoint).items()}
        facts = self._facts(spec, checkpoint, run)
        if spec.schedule != "search":
            return zeros_per_layer(spec.schedule, facts, share, spec.spread)
        seed = zeros_per_layer("water-fill", facts, share, spec.spread)
        found: dict[str, int] = kept(run, "shares.json", lambda: search(self, spec, checkpoint, run, seed))
        return found

    def _facts(self, spec: Prune, checkpoint: Checkpoint, run: Run) -> dict[str, Layer]:
        entries = kept(
            run, "survey.json", lambda: {n: _entry(f) for n, f in survey(self, spec, checkpoint, run).items()}
        )
        facts = {name: _layer(entry) for name, entry in entries.items()}
        if ablates(spec):
            for name, layer in facts.items():
                run.report(f"{name} alone", {"divergence": layer.score * layer.size})
        return facts


def _stored(source: Dense | Quantized, solved: Dense | Quantized) -> Stored:
    """Dense results in the source's dtype; a grid that was pruned becomes float32."""
    if isinstance(solved, Quantized) or isinstance(source, Quantized):
        return solved
    return Dense.of(solved.read().astype(dtype(source.dtype).numpy))


def _entry(facts: Layer) -> dict[str, Any]:
    """JSON form; floats survive it exactly."""
    return {**asdict(facts), "costs": [] if facts.costs is None else facts.costs.tolist()}


def _layer(entry: Mapping[str, Any]) -> Layer:
    return Layer(**{**entry, "costs": np.asarray(entry["costs"])})
