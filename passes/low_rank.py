"""Low rank: a linear W (out, in) becomes a product L (out, r) R (r, in).

1. Exactly one of `rank`, `keep` (share of each matrix's parameters), `energy` (share of the squared singular values, in
   the method's metric) and `bytes` (for the factors of all linears together) says how much is kept.
2. A matrix whose factors would be no smaller than itself stays as it is, and the report says so.
3. Factors are stored in the source's element type, or in `dtype`.
4. Ranks are whole multiples of `multiple`, so that layouts with groups fit the left factor.
5. `merge` multiplies the factors again: the values of the low-rank model in a matrix of the old shape, for containers
   that hold no factors. It saves nothing, and says so.

Methods and their sources are in `factorize.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.dtypes import BY_NAME, dtype
from tightship.errors import Unsupported, UsageError
from tightship.passes.base import Needs, Pass, Run
from tightship.passes.calibration import Figures, Moments, calibration_windows, solve_blocks
from tightship.passes.factorize import (
    Metric,
    Spectrum,
    by_channel,
    by_row,
    most_useful,
    ranks_within,
    spectrum,
    whitening,
)
from tightship.passes.masks import finite
from tightship.weights import Alias, Dense, Factored, Stored


@dataclass(frozen=True, kw_only=True)
class LowRank(Pass):
    """See the module. `alpha` is ASVD's exponent, `damp` svd-llm's damping as a share of the mean moment."""

    name: ClassVar[str] = "low-rank"
    makes: ClassVar[frozenset[str]] = frozenset({"factors"})
    destroys: ClassVar[frozenset[str]] = frozenset({"grid", "mask"})

    method: Literal["svd", "asvd", "svd-llm", "fisher"] = "svd"
    rank: int | None = None
    keep: float | None = None
    energy: float | None = None
    bytes: int | None = None
    alpha: float = 0.5
    damp: float = 1e-4
    dtype: str | None = None
    multiple: int = 1
    merge: bool = False

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.rank, self.keep, self.energy, self.bytes)) != 1:
            raise UsageError("low-rank: say exactly one of `rank`, `keep`, `energy` and `bytes`")
        for word in ("rank", "multiple"):
            if getattr(self, word) is not None and getattr(self, word) < 1:
                raise UsageError(f"low-rank: {word} is at least 1, found {getattr(self, word)}")
        for word in ("keep", "energy"):
            share = getattr(self, word)
            if share is not None and not 0 < share <= 1:
                raise UsageError(f"low-rank: {word} is a share above 0 and up to 1, found {share}")
        if self.dtype is not None and (self.dtype not in BY_NAME or not BY_NAME[self.dtype].is_float):
            raise UsageError(f"low-rank: dtype {self.dtype!r} is not a float type; f32, f16 and bf16 are")

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        return "nothing" if self.method == "svd" else "calibration"

    def requires(self, checkpoint: Checkpoint) -> None:
        matrices = self._matrices(checkpoint)
        if self.bytes is not None:
            least = sum(sum(w.shape) * self._itemsize(w) for w in matrices.values())
            if self.bytes < least:
                raise Unsupported(
                    f"low-rank: {self.bytes} bytes are less than rank 1 everywhere takes, {least} bytes",
                    hint=f"give at least bytes: {least}",
                )

    def outline(self, checkpoint: Checkpoint) -> Checkpoint:
        """Factors of the given rank; where the data decide, of the largest rank that still saves something."""
        if self.merge:
            return checkpoint
        outlined: dict[str, Stored] = {}
        for name, weight in self._matrices(checkpoint).items():
            most = most_useful(*weight.shape)
            rank = self._whole(self._rank(weight) or most)
            if rank <= most:
                outlined[name] = self._shapes(weight, rank)
        return checkpoint.with_weights(outlined)

    def apply(self, checkpoint: Checkpoint, run: Run) -> Checkpoint:
        matrices = self._matrices(checkpoint)
        if self.method in ("asvd", "svd-llm"):
            ranks = self._budget(self._survey(checkpoint, matrices, run), matrices)

            def solve(name: str, moments: Moments) -> tuple[Stored, Figures]:
                found = spectrum(finite(name, matrices[name].value()), self._metric(moments), run.device)
                return self._cut(matrices[name], found, ranks.get(name))

            return checkpoint.with_weights(solve_blocks(checkpoint, run, set(matrices), solve, full=self._full))
        metrics = self._data_free_metrics(checkpoint, matrices, run)
        spectra = {
            name: spectrum(finite(name, weight.value()), metrics[name], run.device) for name, weight in matrices.items()
        }
        ranks = self._budget({name: found.singular for name, found in spectra.items()}, matrices)
        solved = {}
        for name, found in spectra.items():
            solved[name], figures = self._cut(matrices[name], found, ranks.get(name))
            run.report(name, figures)
        return checkpoint.with_weights(solved)

    @property
    def _full(self) -> bool:
        return self.method == "svd-llm"

    def _metric(self, moments: Moments) -> Metric:
        if moments.tokens == 0:
            return Metric()
        return whitening(moments.second, self.damp) if self._full else by_channel(moments.importance, self.alpha)

    def _data_free_metrics(self, checkpoint: Checkpoint, matrices: Mapping[str, Dense], run: Run) -> dict[str, Metric]:
        if self.method == "svd":
            return dict.fromkeys(matrices, Metric())
        from tightship.passes.gradients import mean_over_windows

        squares = mean_over_windows(checkpoint, run, calibration_windows(checkpoint, run), lambda g: g.square())
        return {name: by_row(squares[name]) for name in matrices}

    def _survey(self, checkpoint: Checkpoint, matrices: Mapping[str, Dense], run: Run) -> dict[str, np.ndarray]:
        """Singular values of every matrix in the untouched model; only a byte budget needs them beforehand."""
        spectra: dict[str, np.ndarray] = {}
        if self.bytes is None:
            return spectra

        def look(name: str, moments: Moments) -> tuple[Stored, Figures]:
            spectra[name] = spectrum(matrices[name].value(), self._metric(moments), run.device).singular
            return matrices[name], {}

        quiet = Run(**{**vars(run), "scratch": None, "report": lambda name, figures: None})  # noqa: ARG005
        solve_blocks(checkpoint, quiet, set(matrices), look, full=self._full)
        return spectra

    def _budget(self, spectra: dict[str, np.ndarray], matrices: Mapping[str, Dense]) -> dict[str, int]:
        if self.bytes is None:
            return {}
        shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in matrices.items()}
        return ranks_within(spectra, shapes, self.bytes // max(self._itemsize(w) for w in matrices.values()))

    def _cut(self, weight: Dense, found: Spectrum, rank: int | None) -> tuple[Stored, Figures]:
        out, width = weight.shape
        wanted = self._whole(rank or self._rank(weight) or found.rank_for(self.energy or 1.0))
        if wanted > most_useful(out, width):
            return weight, {"rank": min(out, width), "kept_dense": 1, "parameters": out * width, "loss": 0.0}
        left, right = found.factors(wanted)
        figures: Figures = {"rank": wanted, "parameters": wanted * (out + width), "loss": found.lost(wanted)}
        target = dtype(self.dtype or weight.dtype).numpy
        factored = Factored(Dense.of(left.astype(target)), Dense.of(right.astype(target)))
        if self.merge:
            return Dense.of(factored.value().astype(target)), {**figures, "parameters": out * width, "merged": 1}
        return factored, figures

    def _rank(self, weight: Dense) -> int | None:
        """The rank where it does not depend on data."""
        if self.keep is None:
            return self.rank
        out, width = weight.shape
        return max(int(self.keep * out * width / (out + width)), 1)

    def _whole(self, rank: int) -> int:
        """The next multiple: below, or above where an energy has to be kept; at least one."""
        up = self.multiple - 1 if self.energy is not None else 0
        return max((rank + up) // self.multiple, 1) * self.multiple

    def _shapes(self, weight: Dense, rank: int) -> Factored:
        word = self.dtype or weight.dtype
        return Factored(Dense((weight.shape[0], rank), word, _no_data), Dense((rank, weight.shape[1]), word, _no_data))

    def _itemsize(self, weight: Dense) -> int:
        return dtype(self.dtype or weight.dtype).itemsize

    def _matrices(self, checkpoint: Checkpoint) -> dict[str, Dense]:
        found: dict[str, Dense] = {}
        for info in checkpoint.linears():
            weight = checkpoint.weights[info.name]
            if isinstance(weight, Alias):
                continue
            if not isinstance(weight, Dense):
                kind = type(weight).__name__.lower()
                raise Unsupported(
                    f"low-rank: only dense matrices can be factored, found one that is {kind}", tensor=info.name
                )
            found[info.name] = weight
        return found


def _no_data() -> np.ndarray:
    raise RuntimeError("an outline has no data")
