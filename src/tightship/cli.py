"""The command line: a skin. Each command parses, calls one library function of the same name, and prints.

stdout carries data, stderr messages; `--json` prints exactly one object on stdout, also on failure.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import click

from tightship import __version__
from tightship.cli_artifacts import bench, lint
from tightship.cli_options import build_options, shared_options
from tightship.cli_transport import expand, shrink
from tightship.console import emit, envelope, progress_display, say, size, table
from tightship.errors import TightshipError, UsageError


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns the exit code of docs/contract.md (and exits with it when run as a script)."""
    arguments = sys.argv[1:] if argv is None else argv
    as_json = "--json" in arguments
    # Read when OpenMP is loaded: threads that spin while they wait take the processor from the runtimes under proof.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        with _terminate_as_interrupt():
            outcome = cli.main(args=arguments, prog_name="tightship", standalone_mode=False)
        code = outcome if isinstance(outcome, int) else 0
    except TightshipError as error:
        code = _fail(as_json, error.exit_code, error.to_json())
    except click.ClickException as error:
        code = _fail(as_json, 2, {"code": "usage", "message": error.format_message(), "tensor": None, "hint": _help()})
    except (KeyboardInterrupt, click.Abort):
        code = _fail(as_json, 130, _interrupted("interrupted by Ctrl-C; nothing was published"))
    except _Terminated:
        code = _fail(as_json, 143, _interrupted("terminated; nothing was published"))
    except OSError as error:
        message = f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
        code = _fail(as_json, 4, {"code": "environment", "message": message, "tensor": None, "hint": None})
    except Exception as error:  # a fault of ours: pipelines still get their one object, people the whole story
        traceback.print_exc()
        message = f"internal error: {type(error).__name__}: {error}"
        hint = "please report it with the lines above; nothing was published"
        code = _fail(as_json, 1, {"code": "internal", "message": message, "tensor": None, "hint": hint})
    if argv is None:
        sys.exit(code)
    return code


class _Terminated(BaseException):
    """SIGTERM, raised in the main thread so that staging is cleaned up on the way out."""


class _terminate_as_interrupt:
    def __enter__(self) -> None:
        def stop(_signal: int, _frame: Any) -> None:
            raise _Terminated

        try:
            self._old: Any = signal.signal(signal.SIGTERM, stop)
        except ValueError:  # not the main thread: signals are the caller's business
            self._old = None

    def __exit__(self, *_: object) -> None:
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)


def _interrupted(message: str) -> dict[str, Any]:
    hint = "run the same command again; finished stages are kept"
    return {"code": "interrupted", "message": message, "tensor": None, "hint": hint}


def _help() -> str:
    return "tightship --help shows the commands; tightship COMMAND --help their options"


def _fail(as_json: bool, code: int, error: dict[str, Any]) -> int:
    if as_json:
        emit(envelope(code, error=error))
    else:
        say(f"error: {error['message']}")
        if error.get("hint"):
            say(f"  try: {error['hint']}")
    return code


EXAMPLES = """
\b
Examples:
  tightship build examples/ember --quantize int4 --to gguf --to onnx --to safetensors -o out
  tightship build MODEL --to gguf:q4_k_m -o out
  tightship plan MODEL --recipe recipe.yaml
  tightship inspect out/gguf/ember.gguf
  tightship verify out --against MODEL
  tightship bench out
"""


@click.group(help=EXAMPLES + "\nOne checkpoint in; small, runnable, proven artifacts out.")
@click.version_option(__version__, prog_name="tightship")
def cli() -> None:
    """Group of all commands."""


for command in (bench, lint, shrink, expand):
    cli.add_command(command)


@cli.command(
    short_help="Compress, export, prove, publish.",
    help="""
\b
Examples:
  tightship build examples/ember --quantize int4 --to gguf --to onnx --to safetensors -o out
  tightship build MODEL --to gguf:q4_k_m --to onnx:int4 -o out
  tightship build --recipe recipe.yaml -o out

Compress SOURCE (directory, hub id or GGUF file), export it, prove every artifact, publish.
""",
)
@build_options
@click.option("--dry-run", is_flag=True, help="Print the plan and stop (the same as `tightship plan`).")
@shared_options
def build(as_json: bool, quiet: bool, verbose: bool, dry_run: bool, **options: Any) -> int:
    """`tightship build`."""
    if dry_run:
        return _plan(as_json=as_json, verbose=verbose, options=options)
    if options["output"] is None:
        raise UsageError("build needs -o DIR to publish to", hint="add -o out, or use `tightship plan` to look first")
    from tightship import api

    with progress_display(quiet=quiet or as_json) as progress:
        result = api.build(**_library(options), progress=progress)
    if as_json:
        emit(envelope(0, result=result.to_json()))
    elif not quiet:
        emit(result.summary(verbose=verbose))
    return 0


@cli.command(
    short_help="What a build would do, in seconds.",
    help="""
\b
Examples:
  tightship plan examples/ember --quantize int4 --to gguf --to onnx
  tightship plan MODEL --recipe recipe.yaml --json

What a build would do: stages, layout and bytes of each tensor in each target, memory, disk. Reads no weights, but for
a sample of rows where pruning, factors or lost zeros may be worth a warning.
""",
)
@build_options
@shared_options
def plan(as_json: bool, quiet: bool, verbose: bool, **options: Any) -> int:  # noqa: ARG001 - same options everywhere
    """`tightship plan`."""
    return _plan(as_json=as_json, verbose=verbose, options=options)


def _plan(*, as_json: bool, verbose: bool, options: dict[str, Any]) -> int:
    from tightship import api

    outcome = api.plan(**_library(options))
    emit(envelope(0, result=outcome.to_json()) if as_json else outcome.summary(verbose=verbose))
    return 0


def _library(options: dict[str, Any]) -> dict[str, Any]:
    """Command-line options under the names of `tightship.build`; unset ones left out."""
    renamed = {**options, "to": list(options["targets"]), "accept_unproven": list(options["accept_unproven"])}
    del renamed["targets"]
    if options.get("include"):
        renamed["include"] = [word.strip() for word in options["include"].split(",") if word.strip()]
    return {key: value for key, value in renamed.items() if value not in (None, [], False)}


@cli.command(
    short_help="What a file or directory holds.",
    help="""
\b
Examples:
  tightship inspect model.gguf
  tightship inspect out/onnx --json

What a file or directory of any of the three containers holds: tensors, layouts, sizes, sparsity. Runs nothing.
""",
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--sparsity", is_flag=True, help="Also read the data and count exact zeros.")
@shared_options
def inspect(path: Path, sparsity: bool, as_json: bool, quiet: bool, verbose: bool) -> int:
    """`tightship inspect`."""
    from tightship import inspection

    found = inspection.inspect(path, sparsity=sparsity)
    if as_json:
        emit(envelope(0, result=found))
    elif not quiet:
        emit(inspection.render(found, verbose=verbose))
    return 0


@cli.command(
    short_help="Re-hash a published directory, or prove it again.",
    help="""
\b
Examples:
  tightship verify out
  tightship verify out --against MODEL

Re-hash every file of a published directory; with --against, run the whole proof again.
""",
)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--against", metavar="SOURCE", help="The original checkpoint: prove again.")
@click.option("--text", type=click.Path(path_type=Path), help="Text to prove on.")
@click.option("--threads", type=click.IntRange(1), help="Threads to use.")
@shared_options
def verify(directory: Path, as_json: bool, quiet: bool, verbose: bool, **options: Any) -> int:
    """`tightship verify`."""
    from tightship import api

    with progress_display(quiet=quiet or as_json) as progress:
        result = api.verify(directory, **{k: v for k, v in options.items() if v is not None}, progress=progress)
    if as_json:
        emit(envelope(0, result=result.to_json()))
    elif not quiet:
        emit(result.summary(verbose=verbose))
    return 0


@cli.command(
    help="What is installed, and what is missing for which target. Exit 4 if a target cannot be built or proven."
)
@shared_options
def doctor(as_json: bool, quiet: bool, verbose: bool) -> int:  # noqa: ARG001
    """`tightship doctor`."""
    from tightship.doctor import examine

    found = examine()
    code = 0 if found["healthy"] else 4
    if as_json:
        emit(envelope(code, result=found))
        return code
    if not quiet:
        rows = [[p["package"], p["version"], p["state"], p["purpose"]] for p in found["packages"]]
        emit(table(rows, ["package", "version", "state", "for"]))
        machine = found["machine"]
        emit(
            f"\npython {machine['python']} on {machine['system']} {machine['processor']}, {machine['cores']} cores, "
            f"{size(machine['free_memory_bytes'])} memory free, {size(machine['free_disk_bytes'])} disk free"
        )
        for container, missing in found["targets"].items():
            emit(f"{container:<12} " + (f"lacks {', '.join(missing)}" if missing else "ready"))
    return code


@cli.command(
    short_help="Store a teacher's likeliest next tokens.",
    help="""
\b
Examples:
  tightship logprobs MODEL --text novel.txt -o teacher.safetensors
  tightship logprobs teacher.gguf --text novel.txt --top 64 -o teacher.safetensors

Run TEACHER (a checkpoint in torch, an ONNX artifact in ONNX Runtime, a .gguf file in llama.cpp) on a text and store the
likeliest tokens after each position: the input `logprobs` of the pass `distill`.
""",
)
@click.argument("teacher", type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(path_type=Path), required=True, help="What the teacher reads.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="A new .safetensors file.")
@click.option("--top", type=int, default=256, show_default=True, help="Tokens to keep for each position.")
@click.option("--temperature", type=float, default=1.0, show_default=True, help="That of the distillation.")
@click.option("--tokens", type=int, default=65536, show_default=True, help="Tokens of text in all.")
@click.option("--sequence", type=int, default=128, show_default=True, help="Tokens of a window.")
@click.option("--threads", type=click.IntRange(1), default=1, help="Threads to use.")
@shared_options
def logprobs(teacher: Path, as_json: bool, quiet: bool, verbose: bool, **options: Any) -> int:  # noqa: ARG001
    """`tightship logprobs`."""
    from tightship.logprobs import write_logprobs

    with progress_display(quiet=quiet or as_json) as progress:
        written = write_logprobs(teacher, **options, progress=progress)
    if as_json:
        emit(envelope(0, result=written.to_json()))
    elif not quiet:
        emit(written.summary())
    return 0


@cli.group(
    short_help="List or free kept stages.", help="The stage store: what finished stages are kept, and how to free them."
)
def store() -> None:
    """Group of the store commands."""


def _store(work: Path | None) -> Any:
    from tightship.store import Store, default_work

    return Store(work or default_work())


@store.command("ls", help="List finished stages.")
@click.option("--work", type=click.Path(path_type=Path), help="Work directory; default: the XDG cache.")
@shared_options
def store_ls(work: Path | None, as_json: bool, quiet: bool, verbose: bool) -> int:  # noqa: ARG001
    """`tightship store ls`."""
    stages = _store(work).ls()
    if as_json:
        emit(envelope(0, result={"stages": stages}))
    elif not quiet:
        rows = [[s["key"][:12], s["pass"], size(s["bytes"]), s["state"]] for s in stages]
        emit(table(rows, ["key", "pass", "size", "state"], right=frozenset({2})) if rows else "the store is empty")
    return 0


@store.command("gc", help="Delete unfinished and unused stages.")
@click.option("--work", type=click.Path(path_type=Path), help="Work directory; default: the XDG cache.")
@click.option("--all", "everything", is_flag=True, help="Delete finished stages too.")
@shared_options
def store_gc(work: Path | None, everything: bool, as_json: bool, quiet: bool, verbose: bool) -> int:  # noqa: ARG001
    """`tightship store gc`."""
    freed = _store(work).gc(everything=everything)
    if as_json:
        emit(envelope(0, result={"freed_bytes": freed}))
    elif not quiet:
        emit(f"freed {size(freed)}")
    return 0
