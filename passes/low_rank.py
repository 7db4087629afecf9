"""Low rank: a linear W (out, in) becomes a product L (out, r) R (r, in).

1. Exactly one of `rank`, `keep` (share of the parameters), `energy` (share of the squared singular values, in the
   method's metric) and `bytes` (for all linears together) says how much is kept. `keep` is a share of each matrix, or,
   with `by`, of all together; `by: energy` (the default of `bytes`) and `by: loss` share ranks out (`rank_shares.py`).
2. A matrix whose factors would be no smaller than itself stays as it is, and the report says so.
3. Factors are stored in the source's element type, or in `dtype`.
4. Ranks are whole multiples of `multiple`, so that layouts with groups fit the left factor.
5. `merge` multiplies the factors again: the values of the low-rank model in a matrix of the old shape, for containers
   that hold no factors. It saves nothing, and says so.

Methods and their sources are in `factorize.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.dtypes import BY_NAME, dtype
from tightship.errors import Unsupported, UsageError
from tightship.passes.base import Needs, Pass, Run
from tightship.passes.calibration import Figures, Moments, calibration_windows, solve_blocks
from tightship.passes.factorize import Metric, Spectrum, by_channel, by_row, most_useful, spectrum, whitening
from tightship.passes.kept import kept
from tightship.passes.masks import finite
from tightship.passes.observed import observed_blocks
from tightship.passes.rank_shares import Found, Sizes, by_energy, by_loss
from tightship.passes.stand_ins import StandIns
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
    by: Literal["energy", "loss"] | None = None
    alpha: float = 0.5
    damp: float = 1e-4
    dtype: str | None = None
    multiple: int = 1
    merge: bool = False

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.rank, self.keep, self.energy, self.bytes)) != 1:
            raise UsageError("low-rank: say exactly one of `rank`, `keep`, `energy` and `bytes`")
        if self.by is not None and self.keep is None and self.bytes is None:
            raise UsageError("low-rank: `by` shares out what `keep` or `bytes` leave; give one of them")
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
        return "nothing" if self.method == "svd" and self.by != "loss" else "calibration"

    def requires(self, checkpoint: Checkpoint) -> None:
        matrices = self._matrices(checkpoint)
        least = sum(self.multiple * sum(w.shape) * self._unit(w) for w in matrices.values())
        if self._shared and self._budget(matrices) < least:
            words = f"bytes: {least}" if self.bytes is not None else f"keep: {least / _elements(matrices):.3g}"
            raise Unsupported(
                f"low-rank: {self.bytes or self.keep} is less than rank {self.multiple} everywhere takes",
                hint=f"give at least {words}",
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
            ranks = self._ranks(checkpoint, matrices, self._survey(checkpoint, matrices, run), run)

            def solve(name: str, moments: Moments) -> tuple[Stored, Figures]:
                found = spectrum(finite(name, matrices[name].value()), self._metric(moments), run.device)
                return self._cut(matrices[name], found, ranks.get(name))

            return checkpoint.with_weights(solve_blocks(checkpoint, run, set(matrices), solve, full=self._full))
        metrics = self._data_free_metrics(checkpoint, matrices, run)
        spectra = {
            name: spectrum(finite(name, weight.value()), metrics[name], run.device) for name, weight in matrices.items()
        }
        ranks = self._ranks(checkpoint, matrices, iter(spectra.items()), run)
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

    def _survey(
        self, checkpoint: Checkpoint, matrices: Mapping[str, Dense], run: Run
    ) -> Iterator[tuple[str, Spectrum]]:
        """Every matrix of the untouched model, decomposed."""
        for _, known in observed_blocks(checkpoint, run, "survey of blocks", matrices, full=self._full):
            for name, moments in known.items():
                yield name, spectrum(finite(name, matrices[name].value()), self._metric(moments), run.device)

    def _ranks(
        self,
        checkpoint: Checkpoint,
        matrices: Mapping[str, Dense],
        spectra: Iterator[tuple[str, Spectrum]],
        run: Run,
    ) -> dict[str, int]:
        """The rank of each matrix where they share a budget, else nothing. Looks at `spectra` only if it has to."""
        if not self._shared:
            return {}
        budget = self._budget(matrices)
        shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in matrices.items()}
        if self.by != "loss":
            elements = budget // max(self._unit(w) for w in matrices.values())
            return by_energy({name: each.singular for name, each in spectra}, shapes, elements, self.multiple)

        def measured() -> Found:
            model = StandIns(checkpoint, calibration_windows(checkpoint, run), run)
            sizes = {name: self._sizes(weight) for name, weight in matrices.items()}
            return by_loss(spectra, sizes, budget, lambda name, each, rank: model.hurt(name, each.cut(rank)))

        chosen: Found = kept(run, "ranks.json", measured)
        for name, figures in chosen.items():
            run.report(f"{name} (rank)", figures)
        return {name: int(figures["rank"]) for name, figures in chosen.items()}

    @property
    def _shared(self) -> bool:
        """Whether there is one budget for all matrices."""
        return self.bytes is not None or self.by is not None

    def _budget(self, matrices: Mapping[str, Dense]) -> int:
        """Of all matrices, in units of `_unit`."""
        return self.bytes if self.bytes is not None else int((self.keep or 0.0) * _elements(matrices))

    def _unit(self, weight: Dense) -> int:
        """What an element of a factor counts: its bytes under a budget of bytes, else one."""
        return dtype(self.dtype or weight.dtype).itemsize if self.bytes is not None else 1

    def _sizes(self, weight: Dense) -> Sizes:
        out, width = weight.shape
        whole = weight.nbytes if self.bytes is not None else out * width
        return Sizes((out, width), (out + width) * self._unit(weight), whole, self.multiple)

    def _cut(self, weight: Dense, found: Spectrum, rank: int | None) -> tuple[Stored, Figures]:
        out, width = weight.shape
        wanted = rank or self._whole(self._rank(weight) or found.rank_for(self.energy or 1.0))
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
        if self.keep is None or self.by is not None:
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


def _elements(matrices: Mapping[str, Dense]) -> int:
    return sum(math.prod(weight.shape) for weight in matrices.values())


def _no_data() -> np.ndarray:
    raise RuntimeError("an outline has no data")
