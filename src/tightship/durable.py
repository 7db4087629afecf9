"""Files that survive a crash: flushed to the device before a rename makes them visible; and their digests."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_CHUNK = 1 << 22


def flush_file(path: Path) -> None:
    """fsync a file or directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_tree(root: Path, *, deep: bool = True) -> None:
    """fsync every file below a directory, then the directories from the bottom up; with `deep=False` only itself."""
    if deep:
        for folder, _, files in os.walk(root, topdown=False):
            for name in files:
                flush_file(Path(folder) / name)
            if Path(folder) != root:
                flush_file(Path(folder))
    flush_file(root)


def write_file(path: Path, text: str) -> None:
    """Write a small text file so that it is there whole or, after a crash, as it was before."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    flush_file(partial)
    partial.replace(path)
    flush_file(path.parent)


def sha256_file(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
