"""What the calibrated solvers share: blocks in order, factors one after the other, and what lies outside the blocks.

A tensor outside the blocks (embeddings, head) has no moments: it is rounded to nearest, and the report says so.
Of a factored weight `left @ right`, `right` is solved with the moments of the tensor, `left` with those of what the
solved `right` puts out.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.layout import Arrays
from tightship.passes.base import Needs, Run
from tightship.passes.calibration import Figures, Moments, solve_blocks
from tightship.passes.hessian import NotPositive, loss
from tightship.passes.masks import finite
from tightship.passes.quantize import Matrix, Quantize, Solver
from tightship.passes.quantize.compensation import compensated
from tightship.passes.quantize.rtn import lazily, quantize
from tightship.weights import Dense, Factored, Quantized, Stored, Weight


class Calibrated(Solver):
    """A solver that knows what reaches each matrix. `full`: whole moments, else their diagonal."""

    needs: ClassVar[Needs] = "calibration"
    full: ClassVar[bool]

    @abstractmethod
    def matrix(
        self, spec: Quantize, name: str, matrix: Matrix, moments: Moments, *, pruned: bool, device: str
    ) -> tuple[Arrays, Figures]:
        """Codes and parameters of one matrix, and figures for the report. `pruned`: its zeros must stay."""

    def solve(
        self, spec: Quantize, checkpoint: Checkpoint, matrices: Mapping[str, Matrix], run: Run
    ) -> Mapping[str, Quantized]:
        tensors = {name.partition(":")[0] for name in matrices}
        pruned = any("mask" in step.get("makes", ()) for step in checkpoint.history)

        def one(name: str, moments: Moments) -> tuple[Stored, Figures]:
            if name in matrices:
                arrays, figures = self._solved(spec, name, matrices[name], moments, run, pruned=pruned)
                found = Quantized.of(matrices[name].layout, arrays)
                if spec.compensate is None:
                    return found, figures
                whole, more = compensated(matrices[name], found, moments, spec.compensate, run.device)
                return whole, figures | more
            right, left = matrices[f"{name}:right"], matrices[f"{name}:left"]
            arrays, first = self._solved(spec, name, right, moments, run, pruned=False)
            solved_right = Quantized.of(right.layout, arrays)
            between = _through(solved_right, moments)
            arrays, second = self._solved(spec, name, left, between, run, pruned=False)
            figures = {f"right_{k}": v for k, v in first.items()} | {f"left_{k}": v for k, v in second.items()}
            return Factored(Quantized.of(left.layout, arrays), solved_right), figures

        solved = solve_blocks(
            checkpoint, run, tensors, one, full=self.full or _has_factors(matrices), drift=bool(spec.propagate)
        )
        parts = {part: weight for name, stored in solved.items() for part, weight in _parts(name, stored)}
        for name in matrices.keys() - parts.keys():
            parts[name] = lazily(name, matrices[name], None)
            run.report(name, {"solver": "rtn", "reason": "lies outside the blocks, so nothing was measured for it"})
        return parts

    def _solved(
        self, spec: Quantize, name: str, matrix: Matrix, moments: Moments, run: Run, *, pruned: bool
    ) -> tuple[Arrays, Figures]:
        """`matrix`, or where its moments have no inverse and that is allowed, the better of the searches."""
        try:
            return self.matrix(spec, name, matrix, moments, pruned=pruned, device=run.device)
        except NotPositive as failure:
            if "singular" not in run.allow:
                hint = f"{failure.hint}, or `allow: [singular]` under the recipe's `calibration`"
                raise NotPositive(failure.message, tensor=name, hint=hint) from failure
        best, figures = better_search(name, matrix, moments)
        return best, {**figures, "fallback": "singular"}


def better_search(name: str, matrix: Matrix, moments: Moments) -> tuple[Arrays, Figures]:
    """The importance search, or the data-free one where the former turns out worse on its own measure."""
    w = values(name, matrix)
    (plain, loss_rtn), (searched, loss_searched) = rounded(name, matrix, w, moments)
    best = searched if loss_searched <= loss_rtn else plain
    energy = output_energy(w, moments) or 1.0
    return best, {
        "solver": "importance" if best is searched else "rtn",
        "loss": min(loss_searched, loss_rtn) / energy,
        "loss_rtn": loss_rtn / energy,
    }


def rounded(
    name: str, matrix: Matrix, w: np.ndarray, moments: Moments
) -> tuple[tuple[Arrays, float], tuple[Arrays, float]]:
    """The data-free and the importance search of `w`, each with its loss."""
    plain = quantize(name, Dense.of(w), matrix.layout)
    searched = quantize(name, Dense.of(w), matrix.layout, moments.importance)
    return tuple((arrays, error(matrix, w, arrays, moments)) for arrays in (plain, searched))  # type: ignore[return-value]


def error(matrix: Matrix, w: np.ndarray, arrays: Arrays, moments: Moments) -> float:
    """Mean square of the change of the outputs; with a diagonal only, as if channels were uncorrelated."""
    difference = w - matrix.layout.values(arrays)
    if moments.second.ndim == 1:
        return float(np.einsum("ij,j,ij->", difference, moments.second, difference))
    return loss(difference, moments.second)


def output_energy(w: np.ndarray, moments: Moments) -> float:
    """Mean square of the outputs themselves: what losses are measured against."""
    if moments.second.ndim == 1:
        return float(np.einsum("ij,j,ij->", w, moments.second, w, dtype=np.float64))
    return loss(w, moments.second)


def values(name: str, matrix: Matrix) -> np.ndarray:
    """(rows, cols) float32, known to be finite."""
    return finite(name, matrix.weight.value())


def _through(weight: Quantized, moments: Moments) -> Moments:
    first = weight.value().astype(np.float64)
    return Moments(first @ moments.second @ first.T, moments.tokens)


def _has_factors(matrices: Mapping[str, Matrix]) -> bool:
    return any(":" in name for name in matrices)


def _parts(name: str, weight: Weight) -> list[tuple[str, Quantized]]:
    if isinstance(weight, Factored):
        return [(f"{name}:left", weight.left), (f"{name}:right", weight.right)]  # type: ignore[list-item]
    return [(name, weight)]  # type: ignore[list-item]
