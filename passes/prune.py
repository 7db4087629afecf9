"""Unstructured and N:M pruning: zeros in the linears of the blocks. What to zero is the method's business.

1. `sparsity` s: of n weights exactly round(s * n) are zero afterwards, or more where more were zero before. `scope`
   says what they are compared with, and so where they lie:

   | scope     | zeros                                             | methods, the first one's default               |
   |-----------|---------------------------------------------------|------------------------------------------------|
   | `tensor`  | the lowest scores of a tensor                     | magnitude, gradient, sensitivity; all others   |
   | `row`     | as many in each row, or one more                  | wanda; all others                              |
   | `columns` | as many in each run of columns that a sweep takes | sparsegpt alone                                |
   | `global`  | the lowest scores of all tensors together         | none; all                                      |

2. `pattern` "N:M": of M consecutive weights of a row at most N stay; `sparsity` is then 1 - N/M and need not be said.
3. Zeroed weights are +0.0 in the source's dtype; all others keep their bits.

Adding a method: a module with a `PruneMethod` called `METHOD`, and its line in `_METHODS`.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported, UsageError
from tightship.passes.base import Needs, Pass, Run
from tightship.passes.masks import check_groups, parse_pattern
from tightship.passes.options import build
from tightship.passes.recover import Recover
from tightship.suggest import did_you_mean
from tightship.weights import Alias, Dense, Factored, Quantized, Stored, Sum

_METHODS = {
    "magnitude": "tightship.passes.prune_magnitude",
    "gradient": "tightship.passes.prune_gradient",
    "sensitivity": "tightship.passes.prune_sensitivity",
    "wanda": "tightship.passes.prune_wanda",
    "sparsegpt": "tightship.passes.prune_sparsegpt",
}
_METHOD_OPTIONS = {
    "schedule": "uniform",
    "score": None,
    "spread": None,
    "trials": None,
    "damp": None,
}


class PruneMethod(ABC):
    """How the weights to be zeroed are chosen.

    Class attributes:
        needs, revision: as of a pass.
        options: which of `schedule`, `score`, `spread`, `trials` and `damp` it has.
        scopes: which it has, its default first.
    """

    needs: ClassVar[Needs] = "nothing"
    revision: ClassVar[int] = 1
    options: ClassVar[frozenset[str]] = frozenset()
    scopes: ClassVar[tuple[str, ...]] = ("tensor", "row", "global")

    def per_tensor(self, spec: Prune) -> bool:  # noqa: ARG002 - most methods do not look at it
        """Whether each tensor can be pruned apart from all others, cheaply."""
        return False

    def check(self, spec: Prune) -> None:
        """Refuse options that this method does not have.

        Raises:
            UsageError: naming the option.
        """
        for option, default in _METHOD_OPTIONS.items():
            if getattr(spec, option) != default and option not in self.options:
                raise UsageError(f"prune: method {spec.method} has no {option}")
        if spec.scope not in (None, *self.scopes):
            raise UsageError(
                f"prune: method {spec.method} has no scope {spec.scope}", hint=f"it has {', '.join(self.scopes)}"
            )

    @abstractmethod
    def prune(self, spec: Prune, checkpoint: Checkpoint, run: Run) -> Mapping[str, Stored]:
        """The pruned tensors, by on-disk name."""


@dataclass(frozen=True, kw_only=True)
class Prune(Pass):
    """See the module.

    `scope`: see above; None is the default. `schedule`: how the calibrated methods share a global sparsity out among
    tensors, by which `score`, and how far shares may lie apart (`spread`); see `schedules`. `trials`: of a search.
    `damp`: see `hessian`. `steps`: in how many, and `recover`: options of the pass `recover` after each; see
    `prune_loop`.
    """

    name: ClassVar[str] = "prune"
    makes: ClassVar[frozenset[str]] = frozenset({"mask"})
    destroys: ClassVar[frozenset[str]] = frozenset({"grid"})

    method: str = "magnitude"
    sparsity: float | None = None
    pattern: str = "unstructured"
    scope: Literal["tensor", "row", "columns", "global"] | None = None
    schedule: Literal["uniform", "log-kmeans", "owl", "water-fill", "search"] = "uniform"
    score: Literal["kl", "relative", "absolute"] | None = None
    spread: float | None = None
    trials: int | None = None
    damp: float | None = None
    steps: int = 1
    recover: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        groups = parse_pattern(self.pattern)
        if groups is None and self.sparsity is None:
            raise UsageError("prune: needs `sparsity` (a share between 0 and 1) or a `pattern` such as '2:4'")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise UsageError(f"prune: sparsity is a share between 0 and 1, found {self.sparsity}")
        if groups and self.sparsity is not None and abs(self.sparsity - (1 - groups[0] / groups[1])) > 1e-9:
            raise UsageError(
                f"prune: pattern {self.pattern} is sparsity {1 - groups[0] / groups[1]:g}, not {self.sparsity:g}"
            )
        if groups and self.scope is not None:
            raise UsageError(f"prune: pattern {self.pattern} counts within its groups; leave scope out")
        if groups and self.schedule != "uniform":
            raise UsageError(f"prune: pattern {self.pattern} leaves nothing to schedule; leave schedule out")
        if self.scope == "global" and self.schedule != "uniform":
            raise UsageError("prune: scope global shares zeros out by itself; leave schedule out")
        if self.schedule == "uniform" and (self.score is not None or self.spread is not None):
            raise UsageError("prune: score and spread belong to a schedule other than uniform")
        if self.spread is not None and not 0 < self.spread <= 0.5:
            raise UsageError(f"prune: spread is a difference of shares, above 0 and at most 0.5; found {self.spread}")
        if self.trials is not None and (self.schedule != "search" or self.trials < 1):
            raise UsageError(f"prune: trials is a count for the schedule search, found {self.trials}")
        if self.damp is not None and not 0 < self.damp <= 1:
            raise UsageError(f"prune: damp is a share of the mean diagonal, above 0 and at most 1; found {self.damp}")
        if self.steps < 1 or (groups and self.steps > 1):
            raise UsageError(f"prune: steps is at least 1, and a pattern is made in one; found {self.steps}")
        if self.recover is not None:
            build(Recover, self.recover, "prune: recover")
        self.solver.check(self)

    @property
    def looped(self) -> bool:
        """Whether there is more to do than to prune once."""
        return self.steps > 1 or self.recover is not None

    @property
    def solver(self) -> PruneMethod:
        """The method.

        Raises:
            UsageError: no such method.
        """
        if self.method not in _METHODS:
            raise UsageError(
                f"prune: method {self.method!r} is unknown{did_you_mean(self.method, _METHODS)}",
                hint=f"methods: {', '.join(_METHODS)}",
            )
        found: PruneMethod = importlib.import_module(_METHODS[self.method]).METHOD
        return found

    @property
    def compared(self) -> str:
        """The scope."""
        return self.scope or self.solver.scopes[0]

    @property
    def groups(self) -> tuple[int, int] | None:
        """(N, M) of the pattern."""
        return parse_pattern(self.pattern)

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        return "calibration" if self.recover is not None else self.solver.needs

    @property
    def per_tensor(self) -> bool:  # type: ignore[override]
        return self.solver.per_tensor(self) and not self.looped

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "revision": f"{self.revision}.{self.solver.revision}"}

    def tensors(self, checkpoint: Checkpoint) -> dict[str, Dense | Quantized]:
        """What is pruned: the linears of the blocks, each once.

        Raises:
            Unsupported: a tensor that is stored as factors.
        """
        found: dict[str, Dense | Quantized] = {}
        for info in checkpoint.linears():
            weight = checkpoint.weights[info.name]
            if isinstance(weight, Alias):
                continue
            if isinstance(weight, Factored | Sum):
                raise Unsupported("factors cannot be pruned; prune first, or leave this tensor whole", tensor=info.name)
            found[info.name] = weight
        return found

    def requires(self, checkpoint: Checkpoint) -> None:
        tensors = self.tensors(checkpoint)
        if not tensors:
            raise Unsupported(f"prune: a {checkpoint.architecture.family} model has no linears to prune")
        for name, weight in tensors.items():
            check_groups(name, weight.shape, self.groups[1] if self.groups else 1)

    def apply(self, checkpoint: Checkpoint, run: Run) -> Checkpoint:
        if self.looped:
            from tightship.passes.prune_loop import pruned_in_steps

            return pruned_in_steps(self, checkpoint, run)
        return checkpoint.with_weights(self.solver.prune(self, checkpoint, run))
