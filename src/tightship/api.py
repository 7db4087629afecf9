"""The library: the commands of the command line, with its names and defaults."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightship.recipe import Recipe
from tightship.settings import Settings, integer, text_setting
from tightship.target import Progress, no_progress

if TYPE_CHECKING:
    from tightship.formats.transport import Shipped
    from tightship.pipeline import Built
    from tightship.planning import Plan
    from tightship.validators.bench import Bench
    from tightship.verification import Verified


def build(
    source: str | Path | None = None,
    *,
    output: str | Path,
    recipe: str | Path | Recipe | None = None,
    to: Sequence[str] = (),
    quantize: str | None = None,
    include: Sequence[str] = (),
    solver: str | None = None,
    calibration: str | Path | None = None,
    seed: int | None = None,
    threads: int | None = None,
    progress: Progress = no_progress,
    **settings: Any,
) -> Built:
    """Compress, export, prove, publish.

    Args:
        source: directory, hub id (`org/name[@revision]`) or .gguf file; wins over the recipe's.
        output: directory to publish; it must not exist, unless `force`.
        recipe: a YAML file or a `Recipe`.
        to: targets, `CONTAINER[:SCHEME]` each; win over the recipe's.
        quantize: a layout for the linears of the blocks, and for what `include` names (`embeddings`, `head`).
        solver: `rtn`, `importance` or `gptq`.
        calibration: a text file, or `self`.
        settings: fields of `tightship.settings.Settings`: `work`, `device`, `max_memory`, `text`, `keep_stages`,
            `force`, `allow_order`, `accept_unproven`.

    Raises:
        TightshipError: the subclass is the exit code of docs/contract.md; nothing is published then.
    """
    from tightship import pipeline

    flags = {"source": source, "to": to, "quantize": quantize, "include": include, "solver": solver, "seed": seed}
    asked = _recipe(recipe, {**flags, "calibration": calibration, "threads": threads})
    return pipeline.build(asked, Path(output), _settings(asked, settings), progress)


def plan(
    source: str | Path | None = None,
    *,
    recipe: str | Path | Recipe | None = None,
    to: Sequence[str] = (),
    quantize: str | None = None,
    include: Sequence[str] = (),
    solver: str | None = None,
    calibration: str | Path | None = None,
    seed: int | None = None,
    threads: int | None = None,
    output: str | Path | None = None,
    progress: Progress = no_progress,
    **settings: Any,
) -> Plan:
    """What `build` would do, from names and shapes alone; arguments are those of `build`.

    Raises:
        TightshipError: what `build` would refuse before any work.
    """
    from tightship.planning import check_disk, make_plan
    from tightship.publish import check_output

    flags = {"source": source, "to": to, "quantize": quantize, "include": include, "solver": solver, "seed": seed}
    asked = _recipe(recipe, {**flags, "calibration": calibration, "threads": threads})
    where = _settings(asked, settings)
    if output is not None:
        check_output(Path(output).absolute(), force=where.force)
    planned = make_plan(asked, where, progress=progress)
    if output is not None:
        check_disk(planned, Path(output), where.work)
    return planned


def verify(
    directory: str | Path,
    *,
    against: str | Path | None = None,
    text: str | Path | None = None,
    calibration: str | Path | None = None,
    threads: int | None = None,
    work: str | Path | None = None,
    progress: Progress = no_progress,
) -> Verified:
    """Re-hash every file of a published directory; `against` its source, make and prove everything again.

    Raises:
        GateFailed: a file is missing, surplus or changed; other weights come out; a proof fails.
        UsageError: not a published directory.
    """
    from tightship import verification

    settings = Settings.resolve(text=text, threads=threads or integer("THREADS"), work=work)
    source = None if against is None else str(against)
    words = None if calibration is None else str(calibration)
    return verification.verify(Path(directory).absolute(), source, settings, calibration=words, progress=progress)


def bench(
    path: str | Path,
    *,
    prompt: int = 128,
    decode: int = 32,
    rounds: int = 3,
    threads: int | None = None,
    progress: Progress = no_progress,
) -> Bench:
    """Measure every artifact below a directory, or one GGUF file, in each runtime that opens it.

    Args:
        path: a published directory, or any that holds artifacts.
        prompt: tokens of the prompt.
        decode: tokens decoded one by one after it.
        rounds: how often each artifact is loaded and timed; they take turns.
        threads: of the runtimes.

    Raises:
        UsageError: there is nothing to run.
        EnvironmentFailure: no runtime for any of it is installed.
        GateFailed: a runtime failed on an artifact.
    """
    from tightship.validators.bench import Plan, bench

    used = threads or integer("THREADS") or 1
    return bench(Path(path), Plan(prompt=prompt, decode=decode, rounds=rounds, threads=used), progress)


def lint(directory: str | Path, runtimes: Iterable[str]) -> dict[str, Any]:
    """What runtimes would refuse in an artifact, or load and compute wrongly; see `docs/lint.md`.

    Args:
        directory: an artifact, or a published directory.
        runtimes: words such as `vllm` or `llama.cpp`.

    Raises:
        UsageError: an unknown runtime; a directory with nothing that the runtime loads.
        Malformed: a file breaks a rule of its own container.
    """
    from tightship.validators.lint import lint

    return lint(Path(directory), runtimes)


def shrink(file: str | Path, output: str | Path, *, form: str = "auto", progress: Progress = no_progress) -> Shipped:
    """Write a safetensors or ONNX file in sparse form, for shipping.

    `form` is one of `formats/sparse_forms.py`, or `auto`; ONNX has its own sparse tensors and takes `auto` alone.

    Raises:
        Malformed, Unsupported, UsageError: see `formats/transport.py` and `formats/onnx_transport.py`.
    """
    from tightship.formats import onnx_transport, transport

    if Path(file).suffix == ".onnx" and form == "auto":
        return onnx_transport.shrink_onnx(Path(file), Path(output), progress)
    return transport.shrink(Path(file), Path(output), form, progress)


def expand(file: str | Path, output: str | Path, *, progress: Progress = no_progress) -> Shipped:
    """Write the file that a sparse form was made of, byte for byte.

    Raises:
        Malformed, UsageError: see `formats/transport.py` and `formats/onnx_transport.py`.
    """
    from tightship.formats import onnx_transport, transport

    if Path(file).suffix == ".onnx":
        return onnx_transport.expand_onnx(Path(file), Path(output), progress)
    return transport.expand(Path(file), Path(output), progress)


def _recipe(recipe: str | Path | Recipe | None, flags: dict[str, Any]) -> Recipe:
    """Flags over environment over recipe."""
    known = recipe if isinstance(recipe, Recipe) else Recipe.from_file(recipe) if recipe is not None else Recipe()
    environment = {
        "solver": text_setting("SOLVER"),
        "calibration": text_setting("CALIBRATION"),
        "seed": integer("SEED"),
        "threads": integer("THREADS"),
    }
    merged = {**flags, **{key: value for key, value in environment.items() if flags[key] is None}}
    for key in ("source", "calibration"):
        merged[key] = None if merged[key] is None else str(merged[key])
    merged["to"] = [merged["to"]] if isinstance(merged["to"], str) else merged["to"]
    return known.override(**merged)


def _settings(recipe: Recipe, settings: dict[str, Any]) -> Settings:
    return Settings.resolve(threads=recipe.threads, **settings)
