"""The stage store: results of passes under their key, whole or not at all.

| path                         | content                                                                    |
|------------------------------|----------------------------------------------------------------------------|
| stages/KEY/stage.json        | what the pass changed; `{"body": ..., "sha256": digest of body}`           |
| stages/KEY/weights/N.safetensors | arrays of one changed weight                                           |
| stages/KEY/blobs/N           | adapters and small files that the pass made                                |
| stages/KEY/pinned            | present: `store gc` leaves the stage alone                                 |
| stages/KEY.partial/scratch/  | what an unfinished pass keeps to resume                                    |
| stages/KEY.lock              | held while the stage is computed                                           |

A stage becomes visible by one rename after everything in it was flushed. A stage whose bytes do not match its digests
is thrown away and computed again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tightship.checkpoint import Checkpoint, digest_json
from tightship.durable import flush_tree, sha256_file
from tightship.errors import Malformed
from tightship.settings import default_work
from tightship.stage_codec import load_stage, save_stage

__all__ = ["Store", "default_work"]

UNUSED_SECONDS = 30 * 24 * 3600.0  # `gc` frees finished stages that no build has used for this long


class Store:
    """Stages below `work`."""

    def __init__(self, work: Path) -> None:
        self.root = Path(work) / "stages"

    def get_or_make(
        self, key: str, parent: Checkpoint, make: Callable[[Path], Checkpoint], *, about: dict[str, Any]
    ) -> tuple[Checkpoint, str, dict[str, Any]]:
        """The stage's checkpoint; how it was had (`reused`, `made`, or `redone`: it was damaged); and its `about`.

        `make(scratch)` computes it; `scratch` outlives a kill. `about` is kept as it is after `make`. The result reads
        from the store, so that a build that made the stage and one that found it go on from the same bytes.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with self._lock(key):
            final = self.root / key
            how = "reused" if final.exists() else "made"
            if final.exists() and not _intact(final):
                how = "redone"
                shutil.rmtree(final)
            if not final.exists():
                self._make(key, parent, make, about)
            os.utime(final)
            body = read_body(final)
            return load_stage(final, body, parent), how, body["about"]

    def _make(self, key: str, parent: Checkpoint, make: Callable[[Path], Checkpoint], about: dict[str, Any]) -> None:
        partial = self.root / f"{key}.partial"
        scratch = partial / "scratch"
        scratch.mkdir(parents=True, exist_ok=True)
        result = make(scratch)
        for left in ("weights", "blobs"):
            shutil.rmtree(partial / left, ignore_errors=True)
        body = {**save_stage(partial, parent, result), "key": key, "about": about}
        (partial / "stage.json").write_text(json.dumps({"body": body, "sha256": digest_json(body)}))
        shutil.rmtree(scratch)
        flush_tree(partial)
        partial.rename(self.root / key)
        flush_tree(self.root, deep=False)

    def pin(self, key: str) -> None:
        """Protect a finished stage from `gc`."""
        (self.root / key / "pinned").touch()

    def ls(self) -> list[dict[str, Any]]:
        """One entry a stage: `key`, `pass`, `bytes`, `state` (finished, unfinished, damaged), `pinned`, `used` (s)."""
        found = []
        for path in sorted(self._stages()):
            use, state = "?", "unfinished"
            if not path.name.endswith(".partial"):
                try:
                    use, state = read_body(path)["about"].get("use", "?"), "finished"
                except Malformed:
                    state = "damaged"
            found.append(
                {
                    "key": path.name.removesuffix(".partial"),
                    "pass": use,
                    "bytes": sum(p.stat().st_size for p in path.rglob("*") if p.is_file()),
                    "state": state,
                    "pinned": (path / "pinned").exists(),
                    "used": path.stat().st_mtime,
                }
            )
        return found

    def gc(self, *, everything: bool = False) -> int:
        """Delete unfinished, damaged and long unused stages (`everything`: all) that no build holds; bytes freed."""
        freed = 0
        for stage in self.ls():
            unused = stage["state"] == "finished" and time.time() - stage["used"] > UNUSED_SECONDS
            if not (everything or stage["state"] != "finished" or (unused and not stage["pinned"])):
                continue
            try:
                with self._lock(stage["key"], wait=False):
                    suffix = ".partial" if stage["state"] == "unfinished" else ""
                    shutil.rmtree(self.root / (stage["key"] + suffix))
                    freed += stage["bytes"]
            except BlockingIOError:
                continue  # a build is at work on it
        return freed

    def _stages(self) -> Iterator[Path]:
        if self.root.is_dir():
            yield from (p for p in self.root.iterdir() if p.is_dir())

    @contextmanager
    def _lock(self, key: str, *, wait: bool = True) -> Iterator[None]:
        with (self.root / f"{key}.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            yield


def stage_key(
    parent: str, step: dict[str, Any], *, inputs: dict[str, str], seed: int, conditions: dict[str, Any]
) -> str:
    """sha256 of all that a stage depends on.

    Args:
        parent: key of the checkpoint that the pass is given.
        step: `Pass.to_json()`.
        inputs: digests of further inputs (teacher, texts), by name.
        conditions: device, ISA, threads and versions for calibrated or trained passes, else empty.
    """
    return digest_json({"parent": parent, "step": step, "inputs": inputs, "seed": seed, "conditions": conditions})


def source_key(checkpoint: Checkpoint) -> str:
    """Key of a checkpoint as it was opened: digest of its files' digests."""
    files = sorted((path, digest) for path, _, digest in checkpoint.source.files)
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def read_body(path: Path) -> dict[str, Any]:
    """What `stage.json` of a finished stage says.

    Raises:
        Malformed: it is not what was written.
    """
    try:
        data = json.loads((path / "stage.json").read_text())
        whole = data["sha256"] == digest_json(data["body"]) and data["body"]["key"] == path.name
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Malformed(f"stage {path.name} has no readable description") from error
    if not whole:
        raise Malformed(f"the description of stage {path.name} was changed")
    return dict(data["body"])


def _intact(path: Path) -> bool:
    """Whether every byte of a finished stage is what was written."""
    try:
        return all(sha256_file(path / name) == digest for name, digest in read_body(path)["files"].items())
    except (OSError, Malformed):
        return False
