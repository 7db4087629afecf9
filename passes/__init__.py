"""Checkpoint -> checkpoint. Adding a pass: its module here, defining a `Pass`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from tightship.errors import UsageError
from tightship.passes.base import Pass
from tightship.passes.options import build
from tightship.suggest import did_you_mean

_MODULES = (
    "drop_layers",
    "prune_structured",
    "prune",
    "prune_quantize",
    "low_rank",
    "merge",
    "imatrix",
    "smooth",
    "rotate",
    "quantize",
    "dequantize",
    "recover",
    "share",
    "window",
    "distill",
    "qat",
)


def pass_for(use: str, options: Mapping[str, Any], where: str = "passes", resolve: Callable[[str], str] = str) -> Pass:
    """The pass called `use` in a recipe, with its options checked. `resolve` says where a file of the recipe is.

    Raises:
        UsageError: no such pass, or an option it does not have; the message suggests the nearest.
    """
    for module in _MODULES:
        importlib.import_module(f"tightship.passes.{module}")
    if use not in Pass.registry:
        raise UsageError(
            f"{where}: pass {use!r} is unknown{did_you_mean(use, Pass.registry)}",
            hint=f"passes: {', '.join(sorted(Pass.registry))}",
        )
    found = Pass.registry[use]
    placed = {k: resolve(v) if k in found.paths and isinstance(v, str) else v for k, v in options.items()}
    return build(found, placed, f"{where} ({use})")
