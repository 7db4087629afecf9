"""`run.jsonl` in the work directory: what a build was doing, when, with how much memory. Survives a kill.

One JSON object a line, flushed at once: `{"time": unix seconds, "event": ..., ...}`. Events: `start`, `step`
(a part of the build), `at` (a tensor, a block), `heartbeat` (every fifteen seconds), `end`.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tightship.target import Progress

HEARTBEAT_SECONDS = 15.0


class RunLog:
    """Context manager. `folder` is the run's own directory; the log before is kept as `run.previous.jsonl`."""

    def __init__(self, work: Path, output: Path) -> None:
        identity = hashlib.sha256(str(Path(output).absolute()).encode()).hexdigest()[:12]
        self.folder = Path(work) / "runs" / f"{Path(output).name}-{identity}"
        self._doing = ("", 0, 0)
        self._stop = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "run.jsonl"
        if path.exists():
            path.replace(self.folder / "run.previous.jsonl")
        self._file = path.open("a", encoding="utf-8")
        self._beat = threading.Thread(target=self._heartbeat, daemon=True)
        self._beat.start()
        self.write("start")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._beat.join()
        self.write("end", outcome="done" if kind is None else kind.__name__, message=str(error) if error else None)
        self._file.close()

    def write(self, event: str, **facts: Any) -> None:
        """Append one line and flush it."""
        line = {"time": round(time.time(), 3), "event": event, **{k: v for k, v in facts.items() if v is not None}}
        with self._lock:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """A named part of the build: written at its start, and with its seconds at its end."""
        started = time.monotonic()
        self._doing = (what, 0, 0)
        self.write("step", what=what, state="begun")
        yield
        self.write("step", what=what, state="done", seconds=round(time.monotonic() - started, 3), rss_bytes=rss())

    def progress(self, onward: Progress) -> Progress:
        """A `Progress` that remembers where the build is and passes it on, without details."""

        def advance(what: str, done: int, total: int) -> None:
            if what != self._doing[0]:
                self.write("at", what=what, rss_bytes=rss())
            self._doing = (what, done, total)
            onward(what.partition(": ")[0], done, total)

        return advance

    def _heartbeat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            what, done, total = self._doing
            self.write("heartbeat", what=what, done=done, total=total, rss_bytes=rss())


def rss() -> int:
    """Resident bytes of this process, 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    import resource

    return pages * resource.getpagesize()
