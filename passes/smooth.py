"""Scale input channels so that they round better, exactly folded into whatever makes them: no runtime needs to know.

Places come from `folding`. A scale s multiplies the input channels of a place's matrices and divides the activation.

| method      | scale of channel j                             | places | chosen by                                  |
|-------------|------------------------------------------------|--------|--------------------------------------------|
| awq         | rms(x_j)^a, its geometric middle at 1          | all    | a in 0, 1/steps ... 1: least loss          |
| smoothquant | max abs(x_j)^alpha / max abs(W_:j)^(1 - alpha) | norms  | alpha as given                             |

AWQ: arXiv:2306.00978, equation 5, with root mean squares for mean magnitudes, and with the loss summed over the place's
matrices, each relative to its own output, where the paper takes the module's output. a = 0 changes nothing, so the
loss never rises. SmoothQuant: arXiv:2211.10438, equation 4; it serves quantized activations, and costs nothing else.

Everything is measured on the checkpoint as it is. With a scratch directory every block's scales are kept, so a killed
run goes on with the next block and ends in the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from tightship.blocks import BlockStep
from tightship.checkpoint import Checkpoint
from tightship.durable import write_file
from tightship.errors import Unsupported, UsageError
from tightship.formats.layouts import parse_layout
from tightship.layout import Layout
from tightship.passes.base import Needs, Pass, Run
from tightship.passes.calibration import Figures, Moments, MomentSums
from tightship.passes.folding import Factors, Fold, folds_of
from tightship.passes.hessian import loss
from tightship.passes.observed import passed_blocks

_SMALLEST = 1e-5  # of a scale, as in SmoothQuant's own code: a channel that never speaks stays finite


@dataclass(frozen=True, kw_only=True)
class Smooth(Pass):
    """See the module. `layout` (the grid of the losses) and `steps` (of a) are awq's, `alpha` is smoothquant's."""

    name: ClassVar[str] = "smooth"
    needs: ClassVar[Needs] = "calibration"
    destroys: ClassVar[frozenset[str]] = frozenset({"grid", "factors"})

    method: Literal["awq", "smoothquant"] = "awq"
    layout: str = "int4"
    steps: int = 20
    alpha: float = 0.5

    def __post_init__(self) -> None:
        parse_layout(self.layout)
        if self.steps < 1:
            raise UsageError(f"smooth: steps is at least 1, found {self.steps}")
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"smooth: alpha is between 0 and 1, found {self.alpha}")

    def requires(self, checkpoint: Checkpoint) -> None:
        folds = self._folds(checkpoint)
        if not folds:
            raise Unsupported(f"smooth: no place in a {checkpoint.architecture.family} model lets {self.method} fold")
        self._factors(checkpoint, {fold.name: np.ones(len(fold.rows)) for fold in folds}).applied(checkpoint)
        for fold in folds if self.method == "awq" else ():
            parse_layout(self.layout).blocks_per_row(len(fold.channel))

    def outline(self, checkpoint: Checkpoint) -> Checkpoint:
        ones = {fold.name: np.ones(len(fold.rows)) for fold in self._folds(checkpoint)}
        return self._factors(checkpoint, ones).applied(checkpoint)

    def apply(self, checkpoint: Checkpoint, run: Run) -> Checkpoint:
        scales: dict[str, np.ndarray] = {}
        for step in passed_blocks(checkpoint, run, "smoothed blocks"):
            folds = [fold for fold in self._folds(checkpoint) if fold.block == step.index]
            kept = _Kept(run.scratch, step.index)
            for name, (scale, figures) in (kept.load() or kept.save(self._solve(step, folds))).items():
                scales[name] = scale
                run.report(name, figures)
        return self._factors(checkpoint, scales).applied(checkpoint)

    def _folds(self, checkpoint: Checkpoint) -> list[Fold]:
        usable = [fold for fold in folds_of(checkpoint) if fold.producer is not None]
        return usable if self.method == "awq" else [fold for fold in usable if fold.norm]

    def _factors(self, checkpoint: Checkpoint, scales: Mapping[str, np.ndarray]) -> Factors:
        factors = Factors()
        for fold in self._folds(checkpoint):
            factors.move(checkpoint, fold, scales[fold.name])
        return factors

    def _solve(self, step: BlockStep, folds: Sequence[Fold]) -> _Scales:
        """The scales of one block, by the fold's name."""
        names = {fold.name: [name for name in fold.consumers if name in step.linears] for fold in folds}
        if self.method == "smoothquant":
            peaks = _Peaks()
            step.observe(peaks)
            return {name: self._balanced([step.read(n) for n in fed], peaks.of(fed)) for name, fed in names.items()}
        sums = MomentSums(full=True)
        step.observe(sums)
        found = {}
        for fold in folds:
            matrices = {name: step.read(name) for name in names[fold.name]}
            moments = {name: sums.of(name, w.shape[1]) for name, w in matrices.items()}
            found[fold.name] = self._searched(fold, matrices, moments)
        return found

    def _balanced(self, matrices: Sequence[np.ndarray], peaks: np.ndarray) -> tuple[np.ndarray, Figures]:
        """SmoothQuant's scale of inputs whose largest magnitudes are `peaks` (in,)."""
        columns = np.max([np.abs(w).max(axis=0) for w in matrices], axis=0).astype(np.float64)
        scale = np.maximum(peaks, _SMALLEST) ** self.alpha / np.maximum(columns, _SMALLEST) ** (1 - self.alpha)
        scale = np.maximum(scale, _SMALLEST)
        return scale, {"spread_before": _spread(peaks), "spread_after": _spread(peaks / scale)}

    def _searched(
        self, fold: Fold, matrices: Mapping[str, np.ndarray], moments: Mapping[str, Moments]
    ) -> tuple[np.ndarray, Figures]:
        """AWQ's scale of least loss."""
        layout = parse_layout(self.layout)
        size = np.sqrt(_by_channel(fold, moments))
        energies = {name: loss(w, moments[name].second) or 1.0 for name, w in matrices.items()}
        best, losses = np.ones(len(size)), []
        for step in range(self.steps + 1):
            scale = size ** (step / self.steps)
            scale /= np.sqrt(scale.max() * scale.min())
            wide = scale[fold.channel]
            losses.append(
                sum(loss(_rounded(layout, w, wide) - w, moments[n].second) / energies[n] for n, w in matrices.items())
            )
            if losses[-1] <= min(losses):
                best = scale
        chosen = int(np.argmin(losses))
        return best, {"exponent": chosen / self.steps, "loss": losses[chosen], "loss_unscaled": losses[0]}


_Scales = dict[str, tuple[np.ndarray, Figures]]


class _Peaks:
    """Observer: the largest magnitude of every input channel."""

    def __init__(self) -> None:
        self._peaks: dict[str, np.ndarray] = {}

    def __call__(self, names: tuple[str, ...], x: Any) -> None:
        found = x.reshape(-1, x.shape[-1]).abs().amax(dim=0).double().cpu().numpy()
        for name in names:
            self._peaks[name] = np.maximum(self._peaks.get(name, 0.0), found)

    def of(self, names: Sequence[str]) -> np.ndarray:
        """(in,) float64: the largest over all these matrices, which are fed the same channels."""
        return np.max([self._peaks[name] for name in names if name in self._peaks], axis=0)


def _by_channel(fold: Fold, moments: Mapping[str, Moments]) -> np.ndarray:
    """(channels,) mean square over all tokens and matrices, and over the columns that share a channel; above 0."""
    tokens = sum(m.tokens for m in moments.values()) or 1
    columns = sum(np.diagonal(m.second) * (m.tokens / tokens) for m in moments.values())
    found = np.bincount(fold.channel, columns) / np.bincount(fold.channel)
    seen = found[found > 0]
    return np.maximum(found, seen.min() if len(seen) else 1.0)


def _rounded(layout: Layout, w: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """`w * scale` rounded to nearest in `layout`, over `scale` again: the activation is divided by it."""
    scaled = (w * scale).astype(np.float32)
    return layout.values(layout.quantize(scaled)) / scale


def _spread(peaks: np.ndarray) -> float:
    """Largest over median magnitude: how much an activation's outliers cost a common scale."""
    return float(peaks.max() / max(float(np.median(peaks)), _SMALLEST))


class _Kept:
    """A block's scales in the scratch directory."""

    def __init__(self, scratch: str | Path | None, index: int) -> None:
        self._file = None if scratch is None else Path(scratch) / f"scales-{index:05d}.json"

    def load(self) -> _Scales | None:
        if self._file is None or not self._file.exists():
            return None
        found = json.loads(self._file.read_text())
        return {name: (np.array(scale), figures) for name, (scale, figures) in found.items()}

    def save(self, scales: _Scales) -> _Scales:
        if self._file is not None:
            written = {name: (scale.tolist(), figures) for name, (scale, figures) in scales.items()}
            write_file(self._file, json.dumps(written))
        return scales
