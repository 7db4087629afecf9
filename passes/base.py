"""The pass contract: what a pass needs, keeps and destroys, declared; the runner checks it.

A pass is a frozen spec with one verb, `apply(checkpoint, run) -> Checkpoint`. It changes nothing in place. It returns
the checkpoint it was given where nothing is to be done.

Properties that travel (`preserves`, `destroys` and `makes` are sets of these words):

| property  | meaning                                                            |
|-----------|--------------------------------------------------------------------|
| structure | layer count and widths                                             |
| mask      | zeros that a pruning pass made                                     |
| grid      | weights lie on a quantization grid                                 |
| ties      | tensors that share data                                            |
| factors   | low-rank factors                                                   |
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from tightship.checkpoint import Checkpoint
from tightship.errors import UsageError
from tightship.target import Progress, no_progress

PROPERTIES = frozenset({"structure", "mask", "grid", "ties", "factors"})
Needs = Literal["nothing", "calibration", "model"]

Report = Callable[[str, Mapping[str, float | int | str]], None]


def no_report(name: str, figures: Mapping[str, float | int | str]) -> None:
    """The default: figures are dropped."""


@dataclass(frozen=True)
class Run:
    """What a pass gets from the runner.

    Attributes:
        seed: for every random choice; a pass derives its own generator from it.
        device: `cpu` or `cuda`.
        threads: threads a pass may use.
        inputs: named inputs (`teacher`, `data`) as the recipe gave them: Checkpoints or texts.
        texts: calibration documents; () where the pass needs none, or where the model writes its own.
        written: windows of token ids that the source wrote, in place of texts.
        allow: fallbacks that are let through: `unreached`, `singular` (see `Calibration` of the recipe).
        tokens, sequence: how many tokens of them a calibrated pass sees in all, and in one window.
        scratch: directory for resumable state of this stage, or None.
        progress: called as progress(what, done, total).
        report: called as report(tensor name, figures) with what a pass found out about a tensor.
    """

    seed: int = 0
    device: str = "cpu"
    threads: int = 1
    inputs: Mapping[str, Any] = field(default_factory=dict)
    texts: tuple[str, ...] = ()
    written: tuple[Any, ...] = ()
    allow: frozenset[str] = frozenset()
    tokens: int = 65536
    sequence: int = 512
    scratch: Any = None
    progress: Progress = no_progress
    report: Report = no_report


class Pass(ABC):
    """Checkpoint -> Checkpoint. Subclasses are frozen, keyword-only dataclasses; their fields are the recipe's `with`.

    Class attributes:
        name: the recipe's `use`.
        revision: raised whenever the same inputs would give other bytes.
        needs: what the runner must provide. `nothing` marks a data-free pass, `calibration` one that wants text,
            `model` one that trains the whole model, on its input `data`, the calibration text, or text it makes.
        per_tensor: each output tensor is a cheap function of one input tensor; streamed to all targets, not stored.
        paths: options that name files; relative ones start at the recipe.
        makes, destroys: properties. What is not destroyed is preserved.

    A pass whose options decide what it needs, makes or destroys says so by properties of those names.
    """

    name: ClassVar[str]
    revision: ClassVar[int] = 1
    needs: ClassVar[Needs] = "nothing"
    per_tensor: ClassVar[bool] = False
    paths: ClassVar[frozenset[str]] = frozenset()
    makes: ClassVar[frozenset[str]] = frozenset()
    destroys: ClassVar[frozenset[str]] = frozenset()
    registry: ClassVar[dict[str, type[Pass]]] = {}

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        name = cls.__dict__.get("name")
        if name is None:
            return
        said = [words for words in (cls.makes, cls.destroys) if not isinstance(words, property)]
        unknown = frozenset().union(*said) - PROPERTIES
        if unknown:
            raise TypeError(f"pass {name}: unknown properties {sorted(unknown)}")
        if name in Pass.registry and Pass.registry[name].__qualname__ != cls.__qualname__:
            raise TypeError(f"pass {name!r} is already taken by {Pass.registry[name].__qualname__}")
        Pass.registry[name] = cls

    def to_json(self) -> dict[str, Any]:
        """Name, revision and every parameter with its resolved value: what the result depends on."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {"use": self.name, "revision": self.revision, "with": options}

    @property
    def inputs(self) -> tuple[frozenset[str], frozenset[str]]:
        """Names of inputs (the recipe's `inputs`) that the pass needs, and all that it takes."""
        return frozenset(), frozenset()

    def requires(self, checkpoint: Checkpoint) -> None:  # noqa: B027 - optional hook
        """Refuse, from names and shapes alone, what `apply` could not do.

        Raises:
            Unsupported, UsageError: with the tensor's name.
        """

    @abstractmethod
    def apply(self, checkpoint: Checkpoint, run: Run) -> Checkpoint:
        """The new checkpoint."""

    def outline(self, checkpoint: Checkpoint) -> Checkpoint:
        """The result as far as it is known without data: config, names, shapes, layouts. Weights may not be readable.

        The plan walks these, so that `--dry-run` and the run share one path. Passes that change neither names, shapes
        nor layouts inherit this.
        """
        return checkpoint

    def ensures(self, before: Checkpoint, after: Checkpoint) -> None:  # noqa: B027 - optional hook
        """Check the result (exact sparsity, grids intact).

        Raises:
            GateFailed: the pass did not do what it declares.
        """


def check_order(passes: list[Pass], *, allow: bool = False) -> list[str]:
    """Refuse a pass that destroys what an earlier one made.

    Returns the complaints, when `allow` (`--allow-order`) lets them through.

    Raises:
        UsageError: naming both passes, the property and an order that holds.
    """
    complaints = []
    made: dict[str, str] = {}
    for step in passes:
        lost = sorted(step.destroys & made.keys())
        complaints += [f"{step.name} would destroy the {prop} that {made[prop]} made" for prop in lost]
        for prop in step.destroys:
            made.pop(prop, None)
        made.update(dict.fromkeys(step.makes, step.name))
    if complaints and not allow:
        raise UsageError(
            f"the order of passes undoes earlier work: {'; '.join(complaints)}",
            hint="an order that holds: drop-layers, prune-structured, low-rank or distill, prune, recover, "
            "smooth or rotate before any mask, quantize last; --allow-order overrides",
        )
    return complaints
