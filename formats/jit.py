"""`@kernel`: compiled by numba without the GIL, and kept on disk in a way that cannot mix versions up.

numba's own cache asks only whether the file of the outermost function changed, not those of the functions it calls,
and numbers its files, so that two processes filling a cold cache may overwrite each other's. Here a file is named by
what it holds: the sources of this package's kernels and of its own file, numba's version, the signature and the CPU.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba import njit
from numba.core.serialize import dumps


@cache
def _sources(origin: str) -> str:
    """Digest of numba's version, of the file `origin`, and of every module of this package that kernels are made of."""
    digest = hashlib.sha256(numba.__version__.encode())
    digest.update(Path(origin).read_bytes())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        text = path.read_bytes()
        if path.name in {"jit.py", "lanes.py"} or b"formats.jit" in text:
            digest.update(text)
    return digest.hexdigest()[:12]


class _Files:
    """What a numba cache asks of its files: `save`, `load`, `flush`."""

    def __init__(self, folder: str, base: str, origin: str) -> None:
        self._folder, self._base, self._origin = Path(folder), base, origin

    def _path(self, key: object) -> Path:
        return (
            self._folder
            / f"{self._base}.{_sources(self._origin)}.{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.nbc"
        )

    def save(self, key: object, data: object) -> None:
        path = self._path(key)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_bytes(dumps(data))
        os.replace(partial, path)
        for other in self._folder.glob(f"{self._base}.*.nbc"):
            if _sources(self._origin) not in other.name:
                other.unlink(missing_ok=True)

    def load(self, key: object) -> Any:
        try:
            return pickle.loads(self._path(key).read_bytes())
        except FileNotFoundError:
            return None

    def flush(self) -> None:
        for path in self._folder.glob(f"{self._base}.*.nbc"):
            path.unlink(missing_ok=True)


def kernel(function: Callable[..., Any]) -> Any:
    """Compile on first use; no fast-math, so that the bits are the same on every CPU."""
    compiled: Any = njit(nogil=True)(function)
    try:
        compiled.enable_caching()
    except RuntimeError:  # nowhere to write: every process compiles for itself
        return compiled
    store = compiled._cache
    store._cache_file = _Files(store.cache_path, store._impl.filename_base, function.__code__.co_filename)
    return compiled
