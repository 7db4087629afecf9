"""Which rank each matrix gets where all of them share one budget, of bytes or of elements.

| by     | what is kept or lost                                                                     | solved by        |
|--------|------------------------------------------------------------------------------------------|------------------|
| energy | a rank keeps its squared singular value, as a share of its matrix's sum                  | best ratio first |
| loss   | a matrix of rank r loses divergence(r0) * left_out(r) / left_out(r0), and nothing whole  | `allocation`     |

left_out(r) is the sum of the S_k^2 from k = r on: under svd-llm the mean square of the outputs' error. What such an
error costs the model is measured: divergence(r0) is that of the model's output when this matrix alone is cut to r0, the
rank that it had if all were cut to the same share. So ranks lie where one more is worth the same everywhere
(water-filling, as in `schedules`), and a matrix whose factors would cost nearly as much as itself can stay whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from tightship.passes.allocation import Choice, allocate
from tightship.passes.factorize import Spectrum, most_useful

_CANDIDATES = 512  # ranks of a matrix that are weighed against each other
_LEAST = 1e-12  # nats: no matrix is free

Found = dict[str, dict[str, float | int]]


@dataclass(frozen=True)
class Sizes:
    """A matrix (out, in) as a budget sees it: the size of one rank of its factors, and its own as it is."""

    shape: tuple[int, int]
    per_rank: int
    whole: int
    multiple: int = 1

    @property
    def ranks(self) -> range:
        """What it may get, ascending; empty where factors would save nothing."""
        most = most_useful(*self.shape) // self.multiple
        return range(self.multiple, most * self.multiple + 1, self.multiple * max(-(-most // _CANDIDATES), 1))

    def rank_at(self, share: float) -> int:
        """The largest of them that takes no more than `share` of the whole, or the smallest."""
        return max((r for r in self.ranks if r * self.per_rank <= share * self.whole), default=self.ranks[0])


def by_loss(
    spectra: Iterable[tuple[str, Spectrum]],
    sizes: Mapping[str, Sizes],
    budget: int,
    divergence: Callable[[str, Spectrum, int], float],
) -> Found:
    """Name -> `rank` (that of a whole matrix is its smaller side), the rank `tried`, its `divergence` and the `harm`.

    `divergence(name, spectrum, rank)` is what the model's output loses when this matrix alone is cut to the rank. The
    sum of harms is the least that there is within `budget`.
    """
    share = budget / sum(size.whole for size in sizes.values())
    choices: dict[str, list[Choice]] = {}
    told: Found = {}
    for name, found in spectra:
        size = sizes[name]
        choices[name] = [Choice(str(min(size.shape)), size.whole, 0.0)]
        if not size.ranks:
            continue
        left_out = np.append(np.cumsum(found.singular[::-1] ** 2)[::-1], 0.0)
        tried = size.rank_at(share)
        told[name] = {"tried": tried, "divergence": max(divergence(name, found, tried), _LEAST)}
        level = told[name]["divergence"] / (float(left_out[tried]) or 1.0)
        choices[name] += [Choice(str(r), r * size.per_rank, level * float(left_out[r])) for r in size.ranks]
    chosen = allocate(choices, budget)
    return {n: {"rank": int(choice.word), **told.get(n, {}), "harm": choice.harm} for n, choice in chosen.items()}


def by_energy(
    spectra: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, int]], elements: int, multiple: int = 1
) -> dict[str, int]:
    """Ranks that keep the most, weight for weight, with at most `elements` factor elements in all; `multiple` at least.

    What a rank keeps is its squared singular value as a share of its matrix's sum: layers are compared by the share of
    their own output, not by its size. Singular values descend, so taking the best ratio first is the optimum of the
    relaxed problem. Ties go to the earlier name. A matrix whose factors would save nothing has rank 0.
    """
    packs = {name: most_useful(*shapes[name]) // multiple for name in sorted(spectra)}
    taken = {name: min(1, most) for name, most in packs.items()}
    costs = {name: multiple * sum(shapes[name]) for name in packs}
    spent = sum(taken[name] * costs[name] for name in packs)
    offers = []
    for name, most in packs.items():
        squares = spectra[name] ** 2
        shares = squares[: most * multiple].reshape(-1, multiple).sum(axis=1)
        shares = shares / max(float(squares.sum()), np.finfo(np.float64).tiny)
        offers += [(-float(shares[k]) / costs[name], name, k) for k in range(1, most)]
    for _, name, index in sorted(offers):
        # within a matrix offers come in rank order; one that does not fit closes the matrix
        if taken[name] == index and spent + costs[name] <= elements:
            taken[name] += 1
            spent += costs[name]
    return {name: multiple * count for name, count in taken.items()}
