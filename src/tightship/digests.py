"""sha256 of files, streamed; each content is hashed once in a process."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tightship.progress import Progress, no_progress


def digest_files(paths: Mapping[str, Path], progress: Progress = no_progress) -> tuple[tuple[str, int, str], ...]:
    """(name, size, sha256) of files, sorted by name. Two are hashed at a time."""
    names = sorted(paths)
    rows: list[tuple[str, int, str]] = []
    with ThreadPoolExecutor(max_workers=2) as pool:
        hashed = pool.map(lambda name: digest_file(paths[name]), names)
        for name, (size, digest) in zip(names, hashed, strict=True):
            rows.append((name, size, digest))
            progress("hash source", len(rows), len(names))
    return tuple(rows)


def digest_file(path: Path) -> tuple[int, str]:
    """(size, sha256) of one file."""
    stat = path.stat()
    return stat.st_size, _digest(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)


@functools.lru_cache(maxsize=4096)
def _digest(path: Path, _size: int, _changed: int, _inode: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
