"""`tightship shrink` and `tightship expand`: sparse safetensors and ONNX for shipping."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from tightship.cli_options import shared_options
from tightship.console import emit, envelope, progress_display, size


@click.command(
    short_help="A pruned safetensors or ONNX file in sparse form, for shipping.",
    help="""
\b
Examples:
  tightship shrink out/safetensors/model.safetensors -o model.sparse.safetensors
  tightship shrink out/onnx/model.onnx -o model.sparse.onnx

Write a safetensors or ONNX file in sparse form. It is smaller to store and to ship, and no faster; runtimes want it
expanded (ONNX Runtime opens it as it is, and expands it itself).
""",
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="File to write.")
@click.option("--form", default="auto", show_default=True, help="auto, bitmask, 2:4, csr, coo or dense.")
@shared_options
def shrink(file: Path, output: Path, form: str, as_json: bool, quiet: bool, **_: object) -> int:
    """`tightship shrink`."""
    from tightship import api

    return _shipped(
        lambda progress: api.shrink(file, output, form=form, progress=progress), as_json=as_json, quiet=quiet
    )


@click.command(
    short_help="The file that a sparse form was made of, byte for byte.",
    help="""
\b
Examples:
  tightship expand model.sparse.safetensors -o model.safetensors

Write the dense file that a sparse form was made of, and check its digest.
""",
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="File to write.")
@shared_options
def expand(file: Path, output: Path, as_json: bool, quiet: bool, **_: object) -> int:
    """`tightship expand`."""
    from tightship import api

    return _shipped(functools.partial(api.expand, file, output), as_json=as_json, quiet=quiet)


def _shipped(write: Callable[..., Any], *, as_json: bool, quiet: bool) -> int:
    with progress_display(quiet=quiet or as_json) as progress:
        result = write(progress=progress)
    if as_json:
        emit(envelope(0, result=dataclasses.asdict(result)))
    elif not quiet:
        forms = ", ".join(f"{count} {form}" for form, count in result.forms.items())
        emit(f"{size(result.source_bytes)} to {size(result.bytes)}; tensors: {forms}")
    return 0
