"""How long work says where it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""progress(what, done, total): called often, drawn by the caller. `what` is a task, or `task: detail` (a tensor)."""


def no_progress(what: str, done: int, total: int) -> None:
    """The default: say nothing."""
