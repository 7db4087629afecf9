"""The passes of a recipe in order: made, outlined without data, and run.

Cheap passes (`per_tensor` and in need of nothing) are streamed: they only wrap lazy weights. All others are stages in
the store. Both advance the key of what they made, so that a stage knows everything before it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightship import ranks
from tightship.calibration_text import Reading, read
from tightship.checkpoint import Checkpoint
from tightship.durable import sha256_file
from tightship.errors import UsageError
from tightship.recipe import Recipe, Step, is_quantizing
from tightship.settings import Settings
from tightship.store import Store, source_key, stage_key
from tightship.suggest import did_you_mean
from tightship.target import Progress, Target, no_progress

if TYPE_CHECKING:
    from tightship.passes.base import Pass, Run


Make = Callable[[Path], Checkpoint]
_MERGE = "merge"


@dataclass(frozen=True)
class Stage:
    """One pass of the recipe, ready to run."""

    step: Step
    work: Pass

    @property
    def streamed(self) -> bool:
        """Whether its results are computed on the way instead of stored."""
        return self.work.per_tensor and self.work.needs == "nothing"


@dataclass(frozen=True)
class State:
    """A checkpoint on its way, the key of all that made it, and what was done (`report.json`'s stages)."""

    checkpoint: Checkpoint
    key: str
    log: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Workshop:
    """What stages are run with. `results` maps ids of the recipe to what they made, for later inputs."""

    recipe: Recipe
    settings: Settings
    progress: Progress
    results: dict[str, State] = field(default_factory=dict)

    @property
    def store(self) -> Store:
        return Store(self.settings.work)


def make_stages(recipe: Recipe, *, allow_order: bool = False) -> tuple[list[Stage], list[str]]:
    """The passes of a recipe with their options checked, and complaints about their order that were let through.

    Raises:
        UsageError: an unknown pass or option; an order that undoes earlier work, unless allowed.
    """
    from tightship.passes import pass_for
    from tightship.passes.base import check_order

    stages = []
    for number, step in enumerate(recipe.passes):
        options = dict(step.options)
        if step.use == "quantize":
            options = _with_solver(options, recipe)
        if step.use == "prune-structured":
            options = {"multiple": recipe.width_multiple(), **options}
        where = f"passes[{number}]"
        work = pass_for(step.use, options, where, recipe.path)
        _check_inputs(step, work, where)
        stages.append(Stage(step, work))
    return stages, check_order([stage.work for stage in stages], allow=allow_order)


def _check_inputs(step: Step, work: Pass, where: str) -> None:
    """Refuse inputs that a pass does not take, and demand those it cannot do without.

    Raises:
        UsageError: naming the input.
    """
    needed, taken = work.inputs
    for name in step.inputs:
        if name not in taken:
            raise UsageError(
                f"{where} ({work.name}): takes no input {name!r}{did_you_mean(name, taken)}",
                hint=f"inputs: {', '.join(sorted(taken)) or 'none'}",
            )
    for name in sorted(needed - step.inputs.keys()):
        raise UsageError(f"{where} ({work.name}): needs an input `{name}`", hint=f"inputs: {{{name}: source}}")


def scheme_stage(checkpoint: Checkpoint, target: Target, exporter: Any, recipe: Recipe) -> Stage | None:
    """What a target's scheme wants of each tensor, as a pass; None where it wants nothing.

    Raises:
        UsageError: options of a solver where nothing is solved.
    """
    from tightship.passes import pass_for

    layouts = exporter.layout_for(checkpoint, for_container(target, recipe))
    options = {key: value for key, value in target.options.items() if key in _solver_options()}
    if not layouts:
        if options:
            raise UsageError(f"target {target.id} quantizes nothing, so {', '.join(options)} would have no effect")
        return None
    options = _with_solver(options, recipe) if is_quantizing(target) else {"solver": "rtn", **options}
    rounded = exporter.activations_for(target)
    if rounded is not None:
        options = {"activations": rounded, **options}
    if "bytes" in options:
        options["container"] = target.container
    work = pass_for("quantize", {**options, "layouts": dict(layouts)}, f"target {target.id}", recipe.path)
    return Stage(Step("quantize", f"scheme {target.id}"), work)


def merge_stage(target: Target) -> Stage | None:
    """What multiplies factors out for this target alone, where its option `merge` asks for it.

    Raises:
        UsageError: `merge` is neither true nor false.
    """
    from tightship.passes import pass_for

    asked = target.options.get(_MERGE, False)
    if not isinstance(asked, bool):
        raise UsageError(f"target {target.id}: merge is true or false, found {asked!r}")
    return Stage(Step(_MERGE, f"merge {target.id}"), pass_for(_MERGE, {})) if asked else None


def for_container(target: Target, recipe: Recipe) -> Target:
    """The target as its exporter sees it: `solver` said outright, `merge` and further options of the solver left out.

    GGUF hears of `bytes` too: its schemes name every type, and under a budget they are not the ones that are stored.
    """
    theirs = _solver_options() - ({"solver", "bytes"} if target.container == "gguf" else {"solver"})
    options = {key: value for key, value in target.options.items() if key not in {*theirs, _MERGE}}
    if is_quantizing(target):
        options["solver"] = _with_solver(dict(target.options), recipe)["solver"]
    for key in ("adapter", "chat_template"):
        if options.get(key) is not None:
            options[key] = recipe.path(str(options[key]))
    return dataclasses.replace(target, options=options)


def _with_solver(options: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The options of a quantization with its solver said, and the path of an importance matrix as one to open."""
    if options.get("imatrix") is not None:
        options = {"solver": "importance", **options, "imatrix": recipe.path(str(options["imatrix"]))}
    return {"solver": recipe.default_solver(), **options}


def _solver_options() -> set[str]:
    from tightship.passes.quantize import Quantize

    return {f.name for f in dataclasses.fields(Quantize)} - {"layout", "layouts", "include"}


def outline(checkpoint: Checkpoint, stage: Stage) -> Checkpoint:
    """What a stage will make, as far as it is known without data.

    Raises:
        Unsupported, UsageError: what the pass cannot do, before any work.
    """
    stage.work.requires(checkpoint)
    return _recorded(checkpoint, stage.work.outline(checkpoint), stage.work)


def run_stage(state: State, stage: Stage, shop: Workshop) -> State:
    """Run a pass, or find its result in the store."""
    from tightship.passes.base import Run

    before, work = state.checkpoint, stage.work
    work.requires(before)
    given = _inputs(stage.step, shop)
    reads = work.needs == "calibration" or (work.needs == "model" and shop.recipe.calibration is not None)
    reading = read(shop, conditions(shop.settings)) if reads else Reading()
    key = stage_key(
        state.key,
        work.to_json(),
        inputs=_digests(given, reading, shop.recipe),
        seed=shop.recipe.seed,
        conditions={} if work.needs == "nothing" else conditions(shop.settings),
    )
    entry: dict[str, Any] = {"id": stage.step.id, "use": work.name, "figures": {}}
    run = Run(
        seed=shop.recipe.seed,
        device=shop.settings.device,
        threads=shop.settings.threads,
        inputs={name: value.checkpoint if isinstance(value, State) else value for name, value in given.items()},
        texts=reading.texts,
        written=reading.written,
        progress=shop.progress,
        report=lambda tensor, figures: entry["figures"].__setitem__(tensor, dict(figures)),
        **_amount(shop.recipe),
    )

    def make(scratch: Path | None) -> Checkpoint:
        after = work.apply(before, replace(run, scratch=scratch))
        work.ensures(before, after)
        return after

    if stage.streamed:
        after, how = make(None), "streamed"
    else:
        with _hands(work, before, run) as lent:
            after, how, entry = shop.store.get_or_make(key, before, lent(make), about=entry)
        if shop.settings.keep_stages:
            shop.store.pin(key)
    entry |= {"state": how, "key": key}
    told = tuple(stage for stage in reading.log if stage["key"] not in {known["key"] for known in state.log})
    return State(_recorded(before, after, work), key, (*state.log, *told, entry))


@contextmanager
def _hands(work: Pass, before: Checkpoint, run: Run) -> Iterator[Callable[[Make], Make]]:
    """The first process makes the stage, or finds it, in the body, and others lend their hands if it trains.

    Yields what has to be put around the making. Those others enter the body when the stage is stored.
    """
    from tightship.passes.base import no_report
    from tightship.passes.training import Training

    if ranks.rank() > 0:
        scratch = ranks.shared(None)
        if scratch is not None and isinstance(work, Training):
            work.apply(before, replace(run, scratch=scratch, progress=no_progress, report=no_report))
        ranks.barrier()
        yield lambda make: make
        return
    told = False

    def around(make: Make) -> Make:
        def telling(scratch: Path) -> Checkpoint:
            nonlocal told
            told = ranks.shared(scratch) is not None
            return make(scratch)

        return telling

    yield around
    if not told:
        ranks.shared(None)
    ranks.barrier()


def first_state(checkpoint: Checkpoint) -> State:
    """A checkpoint as it was opened."""
    return State(checkpoint, source_key(checkpoint))


def conditions(settings: Settings) -> dict[str, Any]:
    """What the bytes of calibrated and trained passes depend on beside their inputs."""
    import torch

    return {
        "device": settings.device,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": settings.threads,
        "torch": torch.__version__,
        **({"processes": ranks.world()} if ranks.world() > 1 else {}),
    }


def _recorded(before: Checkpoint, after: Checkpoint, work: Pass) -> Checkpoint:
    """The result with this pass in its history; what the pass itself noted there stays."""
    entry = {**work.to_json(), "makes": sorted(work.makes)}
    return after.replace(history=(*before.history, entry, *after.history[len(before.history) :]))


def _inputs(step: Step, shop: Workshop) -> dict[str, Any]:
    """Named inputs: a State of this build or of another checkpoint, the text of a file, or the path of one of arrays.

    Raises:
        UsageError: neither an id that came before nor a path.
    """
    found: dict[str, Any] = {}
    for name, word in step.inputs.items():
        path = Path(shop.recipe.path(word))
        if word in shop.results:
            found[name] = shop.results[word]
        elif path.is_file() and path.suffix == ".safetensors":
            found[name] = path
        elif path.is_file() and path.suffix.lower() != ".gguf":
            found[name] = path.read_text(encoding="utf-8")
        elif path.exists():
            from tightship.opening import open_checkpoint

            found[name] = first_state(open_checkpoint(path, progress=shop.progress))
        else:
            raise UsageError(
                f"passes {step.id}: input {name}: {word!r} is neither an earlier result nor a path"
                f"{did_you_mean(word, shop.results)}",
                hint=f"earlier results: {', '.join(shop.results)}",
            )
    return found


def _amount(recipe: Recipe) -> dict[str, Any]:
    asked = recipe.calibration
    return {"tokens": asked.tokens, "sequence": asked.sequence, "allow": frozenset(asked.allow)} if asked else {}


def _digests(given: Mapping[str, Any], reading: Reading, recipe: Recipe) -> dict[str, str]:
    """Digests of what a pass is given beside its checkpoint."""
    found = {name: _digest(value) for name, value in given.items()}
    if reading.digest:
        found["calibration"] = reading.digest
    if recipe.calibration and recipe.calibration.allow:
        found["allow"] = " ".join(sorted(recipe.calibration.allow))
    return found


def _digest(value: State | Path | str) -> str:
    if isinstance(value, State):
        return value.key
    return sha256_file(value) if isinstance(value, Path) else _sha256(value)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
