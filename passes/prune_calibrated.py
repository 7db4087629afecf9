"""What wanda and sparsegpt share: tensors solved block by block, and the survey that a schedule needs.

The survey walks the unpruned model once. Of each matrix it notes what zeroing a weight is predicted to cost, how many
outliers it has, and, for the score `kl`, what the model's output loses when this matrix alone is pruned.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tightship.addresses import skeleton
from tightship.blocks import walk_blocks
from tightship.checkpoint import Checkpoint
from tightship.dtypes import dtype
from tightship.durable import write_file
from tightship.modelview import ModelView
from tightship.passes.base import Needs, Run
from tightship.passes.calibration import Figures, Moments, MomentSums, calibration_windows, solve_blocks
from tightship.passes.divergence import Yardstick
from tightship.passes.hessian import loss
from tightship.passes.masks import finite
from tightship.passes.prune import Prune, PruneMethod
from tightship.passes.schedules import Layer, zeros_per_layer
from tightship.weights import Dense, Quantized, Stored

_OUTLIER = 5.0  # times the layer's mean score; M of arXiv:2310.05175
_QUANTILES = 257


class CalibratedPrune(PruneMethod):
    """A method that knows what reaches each matrix."""

    needs: ClassVar[Needs] = "calibration"

    @abstractmethod
    def pruned(self, spec: Prune, w: np.ndarray, moments: Moments, zeros: int, device: str) -> np.ndarray:
        """`w` (rows, cols) float32 with `zeros` zeros, or with the spec's pattern."""

    @abstractmethod
    def costs(self, spec: Prune, w: np.ndarray, moments: Moments) -> np.ndarray:
        """(rows, cols): predicted loss of zeroing each weight alone."""

    def prune(self, spec: Prune, checkpoint: Checkpoint, run: Run) -> Mapping[str, Stored]:
        tensors = spec.tensors(checkpoint)
        share = spec.sparsity or 0.0
        if spec.schedule == "uniform":
            zeros = {name: round(share * int(np.prod(weight.shape))) for name, weight in tensors.items()}
        else:
            zeros = zeros_per_layer(spec.schedule, _facts(self, spec, checkpoint, run), share, spec.spread)

        def one(name: str, moments: Moments) -> tuple[Stored, Figures]:
            weight = tensors[name]
            w = finite(name, weight.value())
            kept = self.pruned(spec, w, moments, zeros[name], run.device)
            figures: Figures = {
                "sparsity": float((kept == 0).mean()),
                "loss": loss(kept - w, moments.second) / (loss(w, moments.second) or 1.0),
            }
            return _stored(weight, kept), figures

        return solve_blocks(checkpoint, run, set(tensors), one, full=True)


def _stored(weight: Dense | Quantized, values: np.ndarray) -> Dense:
    """In the source's dtype; a grid that was pruned becomes float32."""
    word = weight.dtype if isinstance(weight, Dense) else "f32"
    return Dense.of(values.astype(dtype(word).numpy))


def _facts(method: CalibratedPrune, spec: Prune, checkpoint: Checkpoint, run: Run) -> dict[str, Layer]:
    """The survey, from the scratch directory if a killed run got that far."""
    file = None if run.scratch is None else Path(run.scratch) / "survey.json"
    if file is not None and file.exists():
        return {name: _layer(entry) for name, entry in json.loads(file.read_text()).items()}
    found = survey(method, spec, checkpoint, run)
    if file is not None:
        write_file(file, json.dumps({name: _entry(facts) for name, facts in found.items()}))
        found = {name: _layer(entry) for name, entry in json.loads(file.read_text()).items()}
    return found


def _entry(facts: Layer) -> dict[str, Any]:
    """JSON form; floats survive it exactly."""
    return {**asdict(facts), "costs": [] if facts.costs is None else facts.costs.tolist()}


def _layer(entry: Mapping[str, Any]) -> Layer:
    return Layer(**{**entry, "costs": np.asarray(entry["costs"])})


def survey(method: CalibratedPrune, spec: Prune, checkpoint: Checkpoint, run: Run) -> dict[str, Layer]:
    """What schedules want to know of each matrix, on the unpruned model."""
    windows = calibration_windows(checkpoint, run)
    tensors = spec.tensors(checkpoint)
    wants_kl = spec.score in (None, "kl") and spec.schedule != "owl"
    alone = _Alone(checkpoint, windows, run) if wants_kl else None
    layers: dict[str, Layer] = {}
    for step in walk_blocks(ModelView(checkpoint, threads=run.threads, device=run.device), windows):
        run.progress("survey of blocks", step.index, int(checkpoint.hyper["layers"]))
        names = [name for name in step.linears if name in tensors]
        sums = MomentSums(full=True)
        step.observe(sums)
        found = {}
        for name in names:
            w = finite(name, step.read(name))
            moments = sums.of(name, w.shape[1])
            hurt = None
            if alone is not None:
                zeros = round((spec.sparsity or 0.0) * w.size)
                hurt = alone.without(name, method.pruned(spec, w, moments, zeros, run.device))
            found[name] = _measure(method, spec, w, moments, hurt)
        # Outliers are counted over whole blocks, as in OWL.
        share = sum(f.outliers * f.size for f in found.values()) / max(1, sum(f.size for f in found.values()))
        layers |= {n: Layer(f.size, f.score, share, f.costs) for n, f in found.items()}
    return layers


def _measure(method: CalibratedPrune, spec: Prune, w: np.ndarray, moments: Moments, hurt: float | None) -> Layer:
    """`hurt`: divergence of the model when this matrix alone is pruned, for the score `kl`."""
    costs = method.costs(spec, w, moments)
    curve = np.quantile(costs, np.linspace(0, 1, _QUANTILES))
    predicted = float(costs[costs <= np.quantile(costs, spec.sparsity or 0.0)].sum())
    scale = 1.0
    if spec.score == "relative":
        scale = 1.0 / (loss(w, moments.second) or 1.0)
    elif hurt is not None:
        scale = hurt / (predicted or 1.0)
    flows = np.abs(w) * np.sqrt(np.diagonal(moments.second))
    outliers = float((flows > _OUTLIER * flows.mean()).mean())
    value = hurt / w.size if hurt is not None else float(costs.mean()) * scale
    return Layer(w.size, value, outliers, curve * scale)


class _Alone:
    """The whole model, one matrix of which is exchanged at a time."""

    def __init__(self, checkpoint: Checkpoint, windows: Sequence[np.ndarray], run: Run) -> None:
        self._view = ModelView(checkpoint, threads=run.threads, device=run.device)
        self._places = skeleton(checkpoint)[1]
        self._infos = checkpoint.infos()
        self._yardstick = Yardstick(self._view, windows)

    def without(self, name: str, values: np.ndarray) -> float:
        """Divergence of the outputs when `name` (out, in) has these values; the matrix is put back afterwards."""
        import torch

        place = self._places[name].view(self._view.module())
        target = place.T if self._infos[name].rule.transposed else place
        before = target.clone()
        target.copy_(torch.from_numpy(np.ascontiguousarray(values)))
        try:
            return self._yardstick.divergence()
        finally:
            target.copy_(before)
