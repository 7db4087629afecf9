"""Importance matrices: measured here, or taken from a file that llama.cpp's tools made.

The pass measures, block by block on the checkpoint as it is, what flows into every linear of the blocks, and adds
`imatrix.gguf` to the checkpoint's small files; every target then holds it beside its weights. Sums are float64 until
the file, which stores float32. It differs from llama-imatrix in that alone: that one adds up in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from tightship.architecture import TensorInfo
from tightship.checkpoint import Checkpoint
from tightship.errors import Malformed, Unsupported, UsageError
from tightship.formats.imatrix import Entry, Imatrix, imatrix_bytes, read_imatrix
from tightship.passes.base import Needs, Pass, Run
from tightship.passes.calibration import Moments, calibration_windows
from tightship.passes.observed import observed_blocks

FILE = "imatrix.gguf"


@dataclass(frozen=True, kw_only=True)
class MeasureImportance(Pass):
    """Adds `imatrix.gguf`; weights stay as they are."""

    name: ClassVar[str] = "imatrix"
    needs: ClassVar[Needs] = "calibration"

    def requires(self, checkpoint: Checkpoint) -> None:
        if not _names(checkpoint, (info.name for info in checkpoint.linears())):
            raise Unsupported(
                f"{checkpoint.architecture.family} tensors have no names in GGUF, and an importance matrix goes by them"
            )

    def apply(self, checkpoint: Checkpoint, run: Run) -> Checkpoint:
        windows = calibration_windows(checkpoint, run)
        moments: dict[str, Moments] = {}
        names = {info.name for info in checkpoint.linears()}
        for _, known in observed_blocks(checkpoint, run, "importance", names, windows=windows, full=False):
            moments |= known
        found = Imatrix(gathered(checkpoint, moments), ("calibration",), len(windows), run.sequence)
        return checkpoint.replace(files={**checkpoint.files, FILE: imatrix_bytes(found)})


def gathered(checkpoint: Checkpoint, moments: Mapping[str, Moments]) -> dict[str, Entry]:
    """Entries by GGUF name; the experts of a stack are the rows of one entry, in their order."""
    stacks: dict[str, list[tuple[int, Moments]]] = {}
    for name, (stored, info) in _names(checkpoint, moments).items():
        stacks.setdefault(stored, []).append((int(info.expert or 0), moments[name]))
    entries = {}
    for stored, parts in stacks.items():
        ordered = [part for _, part in sorted(parts, key=lambda p: p[0])]
        sums = np.stack([m.second * m.tokens for m in ordered]).astype(np.float32)
        entries[stored] = Entry(sums, np.array([m.tokens for m in ordered], np.float32))
    return entries


def importance_of(checkpoint: Checkpoint, names: Iterable[str], path: str | Path) -> dict[str, np.ndarray]:
    """(columns,) float32 of each of the named tensors that the file knows, found by their GGUF names.

    Raises:
        UsageError, Malformed: as `read_imatrix`; the file knows none of them; an entry has another width.
    """
    entries = read_imatrix(path).entries
    found = {}
    known = _names(checkpoint, names)
    for name, (stored, info) in known.items():
        if stored not in entries:
            continue
        cols = checkpoint.resolve(name).shape[-1]
        table = entries[stored].importance
        if table.size % cols or int(info.expert or 0) >= table.size // cols:
            raise Malformed(
                f"{Path(path).name} says {stored} has {table.size} input channels, the model has {cols}",
                tensor=name,
                hint="this importance matrix belongs to another model",
            )
        found[name] = table.reshape(-1, cols)[int(info.expert or 0)]
    if known and not found:
        raise UsageError(
            f"{Path(path).name} knows none of the {len(known)} tensors to quantize",
            hint="this importance matrix belongs to another model",
        )
    return found


def _names(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, tuple[str, TensorInfo]]:
    """On-disk name -> name in GGUF and table row, where there is one."""
    infos = checkpoint.infos()
    rows = {name: infos[name] for name in names if name in infos and infos[name].rule.gguf}
    return {name: (str(i.rule.gguf).format(i=i.block, e=i.expert), i) for name, i in rows.items()}
