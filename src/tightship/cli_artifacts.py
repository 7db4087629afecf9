"""`tightship bench` and `tightship lint`: what published artifacts are like in the runtimes they are meant for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tightship.cli_options import shared_options
from tightship.console import emit, envelope, progress_display, table


@click.command(
    short_help="Speed, size and memory of artifacts in their runtimes.",
    help="""
\b
Examples:
  tightship bench out
  tightship bench out --prompt 512 --threads 4 --plot speed.svg
  tightship bench model.gguf --json

Load time, prefill and decode tokens per second, size and peak memory of every artifact below a directory, each in its
own runtime and process. Artifacts take turns; ratios (x) are to the first one, round by round.
""",
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--prompt", type=click.IntRange(1), default=128, show_default=True, help="Tokens of the prompt.")
@click.option("--decode", type=click.IntRange(0), default=32, show_default=True, help="Tokens decoded one by one.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Loads of each artifact.")
@click.option("--threads", type=click.IntRange(1), help="Threads of the runtimes; default 1.")
@click.option("--plot", type=click.Path(path_type=Path), help="Also write a picture, as SVG.")
@shared_options
def bench(path: Path, plot: Path | None, as_json: bool, quiet: bool, verbose: bool, **options: Any) -> int:
    """`tightship bench`."""
    from tightship import api

    with progress_display(quiet=quiet or as_json) as progress:
        result = api.bench(path, **options, progress=progress)
    if plot is not None:
        plot.write_text(result.plot())
    if as_json:
        emit(envelope(0, result=result.to_json()))
    elif not quiet:
        emit(result.summary(verbose=verbose))
    return 0


@click.command(
    short_help="What a runtime would refuse or compute wrongly.",
    help="""
\b
Examples:
  tightship lint out/safetensors --for vllm
  tightship lint out --for llama.cpp --for ollama --json

Check an artifact against what a runtime's loader demands and silently ignores (vllm, sglang, tgi, trt, llama.cpp,
genai, ollama, transformers). Loads nothing into the runtime; exit 1 if the file would be refused, or accepted and
computed wrongly.
""",
)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--for", "runtimes", multiple=True, required=True, metavar="RUNTIME", help="As above; repeatable.")
@shared_options
def lint(directory: Path, runtimes: tuple[str, ...], as_json: bool, quiet: bool, verbose: bool) -> int:
    """`tightship lint`."""
    from tightship import api

    found = api.lint(directory, runtimes)
    code = 1 if any(f["effect"] != "note" for f in found["findings"]) else 0
    if as_json:
        emit(envelope(code, result=found))
    elif not quiet:
        columns = ["rule", "runtime", "effect", "where", "message", *(["source"] if verbose else [])]
        rows = [[str(f[column]) for column in columns] for f in found["findings"]]
        emit(table(rows, columns) if rows else f"nothing found by {found['rules']} rules")
    return code
