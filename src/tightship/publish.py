"""All or nothing: artifacts are made beside their final path and appear there by one rename.

| name beside the output | meaning                                                                             |
|------------------------|-------------------------------------------------------------------------------------|
| `.OUT.partial-N`       | staging of process N; rubbish unless that process holds the lock                     |
| `.OUT.old`             | the replaced output, between the two renames of `--force`; put back after a kill     |
| `.OUT.lock`            | held (flock) by the one build that may write to the output; empty                    |

Killed at any instant, the output is the old artifact, the new one, or nothing, and the next build tidies up.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from tightship.durable import flush_file, flush_tree
from tightship.errors import EnvironmentFailure, UsageError

MANIFEST = "manifest.json"
_ENVIRONMENT = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file grew beyond the allowed size",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.EIO: "the device reports an input/output error",
    errno.ENOMEM: "there is not enough memory",
    errno.EMFILE: "too many files are open",
}


class Publication:
    """Use as a context manager; write below `staging`, then call `publish`. Leaving without it removes the staging."""

    def __init__(self, output: str | Path, *, force: bool = False) -> None:
        self.output = Path(output).absolute()
        self.force = force
        self.staging = self._beside(f"partial-{os.getpid()}")
        self._old = self._beside("old")
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        """Take the lock, tidy up after killed builds, make the staging directory.

        Raises:
            UsageError: the output exists and may not be replaced.
            EnvironmentFailure: another build is writing to it, or the directory cannot be written.
        """
        with environment_failures(f"writing beside {self.output.name}"):
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _take_lock(self._beside("lock"), self.output.name)
            try:
                self._tidy()
                check_output(self.output, force=self.force)
                self.staging.mkdir()
            except BaseException:
                self._release()
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)
        self._release()

    def publish(self) -> None:
        """Flush everything, then rename. An old output is moved aside first and deleted afterwards."""
        flush_tree(self.staging)
        check_output(self.output, force=self.force)  # somebody may have put something there meanwhile
        try:
            if self.output.exists():
                self.output.rename(self._old)
            self.staging.rename(self.output)
            flush_file(self.output.parent)
        except BaseException:
            self._undo()
            raise
        shutil.rmtree(self._old, ignore_errors=True)

    def _undo(self) -> None:
        """Back to how it was before the first rename, from wherever `publish` got to."""
        if not self.staging.exists() and self.output.exists():
            self.output.rename(self.staging)
        if self._old.exists():
            self._old.rename(self.output)

    def _beside(self, suffix: str) -> Path:
        return self.output.with_name(f".{self.output.name}.{suffix}")

    def _tidy(self) -> None:
        """Under the lock every staging directory belongs to a build that died."""
        for stale in self.output.parent.glob(f".{_escaped(self.output.name)}.partial-*"):
            shutil.rmtree(stale)
        if self._old.exists():
            if self.output.exists():
                shutil.rmtree(self._old)
            else:
                self._old.rename(self.output)

    def _release(self) -> None:
        if self._lock is not None:
            self._beside("lock").unlink(missing_ok=True)
            self._lock.close()
            self._lock = None


def check_output(output: Path, *, force: bool) -> None:
    """Refuse an output that may not be (re)placed.

    Raises:
        UsageError: it exists without `force`; or with it, but is not an artifact directory of ours.
    """
    if output.name in ("", ".."):
        raise UsageError(f"output {output} has no name of its own", hint="-o DIR names the directory to be made")
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UsageError(f"output {output.name} exists and is not a directory")
    if not output.exists():
        return
    if not force:
        raise UsageError(f"output {output.name} exists", hint="choose another -o DIR, or add --force to replace it")
    if not (output / MANIFEST).is_file() and any(output.iterdir()):
        raise UsageError(
            f"output {output.name} holds no {MANIFEST}, so it is not a published directory; it will not be replaced",
            hint="choose another -o DIR, or remove it yourself",
        )


@contextmanager
def environment_failures(doing: str) -> Iterator[None]:
    """Turn a full disk, a missing permission and their like into the contract's exit code 4.

    Raises:
        EnvironmentFailure: naming the file and what the system said.
    """
    try:
        yield
    except OSError as error:
        said = _ENVIRONMENT.get(error.errno or 0)
        if said is None:
            raise
        name = f": {Path(os.fsdecode(error.filename)).name}" if error.filename else ""
        raise EnvironmentFailure(
            f"{doing}: {said}{name}", hint="nothing was published; free space or choose another place, then run again"
        ) from error
    except MemoryError as error:
        raise EnvironmentFailure(f"{doing}: there is not enough memory", hint="close other programs") from error


def _take_lock(path: Path, name: str) -> IO[str]:
    while True:
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise EnvironmentFailure(
                f"another build is writing to {name}", hint="wait for it, or choose another -o DIR"
            ) from error
        # The holder before us may have removed the file between our open and our lock.
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            return file
        file.close()


def _escaped(name: str) -> str:
    import glob

    return glob.escape(name)
