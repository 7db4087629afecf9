"""Put weights on a grid. The layout says which numbers there are, the solver which of them each weight becomes.

1. `layout` goes to the linears of the blocks, and to `include`: embeddings, head.
2. `layouts` names tensors one by one and wins over `layout`: a layout, or an element type to cast to. Schemes of a
   container arrive this way.
3. Low-rank factors are put on the grid one by one. Borrowed tensors (`Alias`) follow their owner, unless `layouts`
   names them: then they become tensors of their own.
4. A weight that lies on a grid already stays there if it is the same grid, and is refused otherwise.
5. A layout that cannot say 0.0 is refused for tensors that a pass has pruned.
6. `activations` says how the inputs of the same matrices are rounded at run time, embeddings left aside; `kv_cache`
   the same of keys and values. Static scales are calibrated on the solved weights (`passes/activation_ranges.py`).
7. With `bytes` the linears of the blocks share a budget: see `budget.py`. `same` is what `layout` and `layouts` take.

Adding a solver: a module with a `Solver` called `SOLVER`, and its line in `_SOLVERS`.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from tightship.activations import scheme_of
from tightship.checkpoint import Checkpoint
from tightship.dtypes import BY_NAME
from tightship.durable import sha256_file
from tightship.errors import Unsupported, UsageError
from tightship.formats.layouts import parse_layout
from tightship.layout import Layout
from tightship.passes.base import Needs, Pass, Run
from tightship.passes.quantize import activations as _activations
from tightship.passes.quantize.budget import spent, uniform
from tightship.passes.quantize.cast import cast
from tightship.suggest import did_you_mean
from tightship.weights import Alias, Dense, Factored, Quantized, Stored, Sum, Weight

_SOLVERS = {
    "rtn": "tightship.passes.quantize.rtn",
    "importance": "tightship.passes.quantize.importance",
    "gptq": "tightship.passes.quantize.gptq",
}
_IMPORTANCE_FILE = "tightship.passes.quantize.importance_file"
_SOLVER_OPTIONS = ("actorder", "damp", "sweeps", "propagate", "compensate")
_INCLUDE = {"embeddings": ("embedding", "position"), "head": ("head",)}


@dataclass(frozen=True)
class Matrix:
    """One thing to solve: a dense (rows, cols) matrix and the layout it shall have."""

    weight: Dense
    layout: Layout

    @property
    def shape(self) -> tuple[int, int]:
        return (self.weight.shape[0], self.weight.shape[1])


class Solver(ABC):
    """Chooses codes and parameters.

    Class attributes:
        needs, revision, per_tensor: as of a pass.
        options: which of `actorder`, `damp`, `sweeps`, `propagate` and `compensate` it has.
    """

    needs: ClassVar[Needs] = "nothing"
    revision: ClassVar[int] = 1
    per_tensor: ClassVar[bool] = False
    options: ClassVar[frozenset[str]] = frozenset()

    def check(self, spec: Quantize) -> None:
        """Refuse options that this solver does not have.

        Raises:
            UsageError: naming the option.
        """
        for option in _SOLVER_OPTIONS:
            if getattr(spec, option) is not None and option not in self.options:
                raise UsageError(f"quantize: solver {spec.solver} has no {option}", hint="gptq has")

    def check_matrix(self, name: str, matrix: Matrix) -> None:  # noqa: B027 - optional hook
        """Refuse a layout or shape that this solver cannot do.

        Raises:
            Unsupported: naming the tensor.
        """

    def check_all(self, spec: Quantize, checkpoint: Checkpoint, matrices: Mapping[str, Matrix]) -> None:  # noqa: ARG002
        """Refuse what cannot be solved, from names and shapes: every matrix by `check_matrix`."""
        for name, matrix in matrices.items():
            self.check_matrix(name, matrix)

    @abstractmethod
    def solve(
        self, spec: Quantize, checkpoint: Checkpoint, matrices: Mapping[str, Matrix], run: Run
    ) -> Mapping[str, Quantized]:
        """The matrices on their grids, under the same names. Factors are called `NAME:left` and `NAME:right`."""


@dataclass(frozen=True, kw_only=True)
class Quantize(Pass):
    """See the module.

    For gptq alone: `actorder` (static activation order; by default the better of both), `damp` (share of the mean
    diagonal), `sweeps` (of coordinate descent afterwards), `propagate` (0 to 1: how far each matrix makes good for the
    errors of the blocks before it) and `compensate` (rank of a correction beside each matrix). For importance alone:
    `imatrix`, a file of llama.cpp's importance matrix; no calibration is needed then. `activations` is a word of
    `tightship.activations`, static ranges come from `activation_range` (`percentile` of the values, in percent). With
    `bytes`: `container` says whose types and sizes count, `candidates` which types, `sensitivity` how harm is measured.
    """

    name: ClassVar[str] = "quantize"
    makes: ClassVar[frozenset[str]] = frozenset({"grid"})
    destroys: ClassVar[frozenset[str]] = frozenset({"grid"})
    paths: ClassVar[frozenset[str]] = frozenset({"imatrix"})

    solver: str = "rtn"
    layout: str | None = None
    include: tuple[Literal["embeddings", "head"], ...] = ()
    layouts: Mapping[str, Any] = field(default_factory=dict)
    actorder: bool | None = None
    damp: float | None = None
    sweeps: int | None = None
    propagate: float | None = None
    compensate: int | None = None
    imatrix: str | None = None
    activations: str | None = None
    activation_range: Literal["minmax", "percentile", "entropy"] = "minmax"
    percentile: float = 99.99
    kv_cache: Literal["fp8"] | None = None
    bytes: int | Literal["same"] | None = None
    container: Literal["gguf", "onnx", "safetensors"] = "gguf"
    candidates: tuple[str, ...] = ()
    sensitivity: Literal["both", "fisher"] = "both"

    def __post_init__(self) -> None:
        if self.layout is None and not self.layouts and not isinstance(self.bytes, int):
            raise UsageError("quantize: needs `layout`, such as int4")
        if self.layout is not None:
            layout_of(self.layout)
        object.__setattr__(self, "layouts", {name: layout_of(word) for name, word in self.layouts.items()})
        if self.damp is not None and not 0 < self.damp <= 1:
            raise UsageError(
                f"quantize: damp is a share of the mean diagonal, above 0 and at most 1; found {self.damp}"
            )
        if self.sweeps is not None and self.sweeps < 0:
            raise UsageError(f"quantize: sweeps is a count, found {self.sweeps}")
        if self.propagate is not None and not 0 <= self.propagate <= 1:
            raise UsageError(f"quantize: propagate is between 0 and 1, found {self.propagate}")
        if self.compensate is not None and self.compensate < 1:
            raise UsageError(f"quantize: compensate is a rank, at least 1; found {self.compensate}")
        if self.imatrix is not None and self.solver != "importance":
            raise UsageError(f"quantize: imatrix is for the solver importance, found {self.solver}")
        if self.imatrix is not None and not Path(self.imatrix).is_file():
            raise UsageError(f"quantize: there is no importance matrix {self.imatrix}")
        if not 50 <= self.percentile <= 100:
            raise UsageError(f"quantize: percentile is a number from 50 to 100, found {self.percentile}")
        if self.activations is not None:
            scheme_of(self.activations)
        if self.bytes is None and self.candidates:
            raise UsageError("quantize: candidates share a budget; say `bytes`")
        for word in self.candidates:
            parse_layout(word)
        self.method.check(self)

    @property
    def measures_activations(self) -> bool:
        """Whether static scales must be calibrated."""
        return self.kv_cache is not None or (self.activations is not None and scheme_of(self.activations).static)

    @property
    def method(self) -> Solver:
        """The solver.

        Raises:
            UsageError: no such solver.
        """
        if self.solver not in _SOLVERS:
            raise UsageError(
                f"quantize: solver {self.solver!r} is unknown{did_you_mean(self.solver, _SOLVERS)}",
                hint=f"solvers: {', '.join(_SOLVERS)}",
            )
        module = _SOLVERS[self.solver] if self.imatrix is None else _IMPORTANCE_FILE
        found: Solver = importlib.import_module(module).SOLVER
        return found

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        return "calibration" if self.measures_activations or self.bytes is not None else self.method.needs

    @property
    def per_tensor(self) -> bool:  # type: ignore[override]
        return self.method.per_tensor and not self.measures_activations and self.bytes is None

    def to_json(self) -> dict[str, Any]:
        data = super().to_json()
        words = {n: v.to_json() if isinstance(v, Layout) else v for n, v in self.layouts.items()}
        options = {**data["with"], "layouts": dict(sorted(words.items()))}
        if self.layout is not None:
            layout = layout_of(self.layout)
            options["layout"] = layout.name if isinstance(layout, Layout) else layout
        if self.imatrix is not None:
            options["imatrix"] = sha256_file(Path(self.imatrix))
        return {**data, "revision": f"{self.revision}.{self.method.revision}", "with": options}

    def requires(self, checkpoint: Checkpoint) -> None:
        if self.bytes is not None:
            for spec in uniform(self, checkpoint):
                spec.requires(checkpoint)
            return
        pruned = any("mask" in step.get("makes", ()) for step in checkpoint.history)
        if pruned and self.compensate:
            raise UsageError(
                "quantize: a correction of low rank would fill the zeros of pruning; leave out `compensate`"
            )
        matrices = self.jobs(checkpoint)[0]
        linears = {info.name for info in checkpoint.linears()}
        for name, matrix in matrices.items():
            try:
                matrix.layout.array_specs(matrix.shape)
            except Unsupported as error:
                raise Unsupported(error.message, tensor=name, hint=error.hint) from error
            if pruned and name.split(":")[0] in linears and not matrix.layout.keeps_zero:
                raise Unsupported(
                    f"layout {matrix.layout.name} has no exact zero in every block: it would undo the pruning",
                    tensor=name,
                    hint="int layouts, q8_0 and q6_k keep zeros; a gguf target can be told `sparse: steer`",
                )
        self.method.check_all(self, checkpoint, matrices)

    def outline(self, checkpoint: Checkpoint) -> Checkpoint:
        """With a budget: the largest candidate that fits it everywhere, since the data decide."""
        if self.bytes is not None:
            return uniform(self, checkpoint)[-1].outline(checkpoint)
        matrices, others = self.jobs(checkpoint)
        solved = {name: Quantized(m.layout, m.shape, not_yet) for name, m in matrices.items()}
        whole = _assembled(solved) | others
        if self.compensate:
            from tightship.passes.quantize.compensation import outlined

            whole |= outlined(checkpoint, matrices, self.compensate)
        after = checkpoint.with_weights(whole)
        return after.replace(activations={**after.activations, **_activations.outline(self, checkpoint)})

    def apply(self, checkpoint: Checkpoint, run: Run) -> Checkpoint:
        if self.bytes is not None:
            return spent(self, checkpoint, run).apply(checkpoint, run)
        matrices, others = self.jobs(checkpoint)
        solved = self.method.solve(self, checkpoint, matrices, run) if matrices else {}
        after = checkpoint.with_weights(_assembled(solved) | others)
        return after.replace(activations={**after.activations, **_activations.found(self, after, run)})

    def wanted(self, checkpoint: Checkpoint) -> dict[str, Layout | str]:
        """Layout or element type of each tensor that changes, by on-disk name.

        Raises:
            UsageError: `layouts` names a tensor that is not there, or `include` a head that is borrowed.
        """
        found: dict[str, Layout | str] = {}
        if self.layout is not None:
            kinds = {"linear", *(kind for word in self.include for kind in _INCLUDE[word])}
            for info in checkpoint.infos().values():
                weight = checkpoint.weights.get(info.name)
                if weight is None or info.rule.kind not in kinds:
                    continue
                if isinstance(weight, Alias):
                    _check_borrowed(checkpoint, info.name, weight, kinds)
                    continue
                found[info.name] = layout_of(self.layout)
        for name, layout in self.layouts.items():
            if name not in checkpoint.weights:
                raise UsageError(
                    f"quantize: layouts names {name!r}, which is not there{did_you_mean(name, checkpoint.weights)}"
                )
            found[name] = layout
        return found

    def jobs(self, checkpoint: Checkpoint) -> tuple[dict[str, Matrix], dict[str, Weight]]:
        """Matrices to solve (factors apart), and weights that are cast or stay as they are."""
        matrices: dict[str, Matrix] = {}
        others: dict[str, Weight] = {}
        for name, layout in self.wanted(checkpoint).items():
            weight = checkpoint.resolve(name)
            if isinstance(layout, str):
                others[name] = cast(name, weight, layout)
            elif isinstance(weight, Factored):
                for side in ("left", "right"):
                    matrices[f"{name}:{side}"] = _matrix(name, getattr(weight, side), layout)
            elif isinstance(weight, Quantized) and weight.layout == layout:
                others[name] = checkpoint.weights[name]
            else:
                matrices[name] = _matrix(name, weight, layout)
        return matrices, others


def layout_of(word: Any) -> Layout | str:
    """A layout word, a layout's JSON form or a layout -> Layout; an element type's word -> that word.

    Raises:
        UsageError: no such layout.
    """
    if isinstance(word, Layout):
        return word
    if isinstance(word, Mapping):
        return Layout.from_json(word)
    return str(word) if word in BY_NAME and BY_NAME[word].is_float else parse_layout(str(word))


def _matrix(name: str, weight: Stored, layout: Layout) -> Matrix:
    if isinstance(weight, Quantized):
        raise Unsupported(
            f"lies on the grid of {weight.layout.name} already; rounding it again to {layout.name} adds error on error",
            tensor=name,
            hint="start from the unquantized checkpoint, or export without --quantize",
        )
    if isinstance(weight, Sum):
        raise Unsupported("is a quantized matrix with its correction already", tensor=name)
    if not isinstance(weight, Dense) or len(weight.shape) != 2:
        raise Unsupported(f"only matrices can be quantized, found shape {weight.shape}", tensor=name)
    return Matrix(weight, layout)


def _assembled(solved: Mapping[str, Quantized]) -> dict[str, Weight]:
    """Solved matrices under their tensors' names, factors put together again."""
    whole: dict[str, Weight] = {name: weight for name, weight in solved.items() if ":" not in name}
    for name in {name.rpartition(":")[0] for name in solved if ":" in name}:
        whole[name] = Factored(solved[f"{name}:left"], solved[f"{name}:right"])
    return whole


def _check_borrowed(checkpoint: Checkpoint, name: str, weight: Alias, kinds: set[str]) -> None:
    owner = checkpoint.infos().get(weight.owner)
    if owner is not None and owner.rule.kind not in kinds:
        raise UsageError(
            f"quantize: {name} shares its data with {weight.owner}, which is not included",
            hint="add embeddings to include, or leave head out",
        )


def not_yet() -> Any:
    """Data of an outline: there is none."""
    raise RuntimeError("an outline has no data")
