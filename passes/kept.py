"""What a pass finds out before its real work, kept in the scratch directory: a killed run need not find it again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tightship.durable import write_file
from tightship.passes.base import Run


def kept(run: Run, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` gives, from the file `name` if a killed run got that far. Numbers survive JSON exactly."""
    file = None if run.scratch is None else Path(run.scratch) / name
    if file is not None and file.exists():
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    made = make()
    if file is not None:
        write_file(file, json.dumps(made))
    return made
