"""How we talk: stdout is data, stderr messages; a bar on a terminal, heartbeat lines elsewhere, silence when quiet."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tightship.target import Progress, no_progress

SCHEMA_VERSION = 1
HEARTBEAT_SECONDS = 10.0


def say(text: str = "") -> None:
    """One line of message on stderr."""
    print(text, file=sys.stderr, flush=True)


def emit(text: str) -> None:
    """One piece of data on stdout."""
    print(text, flush=True)


def envelope(exit_code: int, *, result: Any = None, error: Mapping[str, Any] | None = None) -> str:
    """The one object that `--json` prints, on success and on failure."""
    body: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "exit_code": exit_code}
    if error is not None:
        body["error"] = dict(error)
    if result is not None:
        body["result"] = result
    return json.dumps(body, indent=2, sort_keys=True)


def is_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


@contextmanager
def progress_display(*, quiet: bool) -> Iterator[Progress]:
    """A `Progress` for long work: a bar on a terminal, a line every ten seconds and at each new task elsewhere."""
    if quiet:
        yield no_progress
        return
    if not is_terminal():
        yield _Heartbeat()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description:<28}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                for previous in tasks.values():
                    bars.update(previous, visible=False)
                tasks[what] = bars.add_task(what, total=total or None)
            bars.update(tasks[what], completed=done, total=total or None, visible=True)

        yield advance


class _Heartbeat:
    """Lines for logs: each new task, then at most one line every ten seconds."""

    def __init__(self) -> None:
        self._what = ""
        self._last = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what == self._what and now - self._last < HEARTBEAT_SECONDS:
            return
        count = f" {done}/{total}" if total else ""
        say(f"  {what}{count}")
        self._what, self._last = what, now


def size(count: float) -> str:
    """Bytes in the largest binary unit that keeps three digits: `1.84 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def table(rows: list[list[str]], header: list[str], *, right: frozenset[int] = frozenset()) -> str:
    """Aligned plain text. Columns in `right` are right-aligned."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def render(line: list[str]) -> str:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        return "  ".join(cells).rstrip()

    rule = ["-" * w for w in widths]
    return "\n".join(render(line) for line in [header, rule, *rows])
