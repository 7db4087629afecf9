"""Options that several commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Command = Callable[..., Any]


def shared_options(command: Command) -> Command:
    """Options that every command has."""
    options = [
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, also on failure."),
        click.option("--quiet", is_flag=True, help="No progress, no summary."),
        click.option("--verbose", is_flag=True, help="Say more on stderr."),
    ]
    return functools.reduce(lambda inner, option: option(inner), reversed(options), command)


def build_options(command: Command) -> Command:
    """Options of build and plan."""
    options = [
        click.argument("source", required=False),
        click.option("--to", "targets", multiple=True, metavar="CONTAINER[:SCHEME]", help="gguf, onnx or safetensors."),
        click.option(
            "--quantize", metavar="LAYOUT", help="Solve the linears of the blocks in this layout, once for all."
        ),
        click.option("--include", metavar="ROLES", help="Also quantize: embeddings, head (comma-separated)."),
        click.option("--solver", metavar="NAME", help="rtn (default), importance, gptq."),
        click.option("--recipe", type=click.Path(path_type=Path), help="YAML recipe; flags win over it."),
        click.option("-o", "--output", type=click.Path(path_type=Path), help="Directory to publish."),
        click.option(
            "--calibration", metavar="FILE|self", help="Text to calibrate on; by default the model writes it."
        ),
        click.option("--text", type=click.Path(path_type=Path), help="Text to prove on; default: self-generated."),
        click.option("--threads", type=click.IntRange(1), help="Threads to use."),
        click.option("--seed", type=int, help="Seed of everything random."),
        click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Where calibrated passes run."),
        click.option("--max-memory", metavar="SIZE", help="Memory for the proof, such as 8GiB."),
        click.option("--work", type=click.Path(path_type=Path), help="Work directory; default: the XDG cache."),
        click.option("--keep-stages", is_flag=True, help="Pin this build's stages against `store gc`."),
        click.option("--force", is_flag=True, help="Replace an existing output."),
        click.option("--allow-order", is_flag=True, help="Let a pass undo what an earlier one made."),
        click.option(
            "--accept-unproven", multiple=True, metavar="RUNTIME", help="Publish without this runtime's proof."
        ),
    ]
    return functools.reduce(lambda inner, option: option(inner), reversed(options), command)
