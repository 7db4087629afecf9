"""What is asked of a container, what it answers, and what lies in one artifact directory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tightship.checkpoint import Checkpoint
from tightship.layout import Layout
from tightship.progress import Progress, no_progress

__all__ = ["CONTAINERS", "Exact", "Exported", "Exporter", "Progress", "Refused", "Target", "TargetPlan", "TensorPlan"]
__all__ += ["no_progress", "sorted_files", "total_bytes"]

CONTAINERS = ("gguf", "onnx", "safetensors")


@dataclass(frozen=True)
class Target:
    """One `--to CONTAINER[:SCHEME]`. No scheme: carry what the passes left. `options` is the recipe's `with`."""

    container: str
    scheme: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """`CONTAINER[-SCHEME]`, also the directory's name."""
        return f"{self.container}-{self.scheme}" if self.scheme else self.container


@dataclass(frozen=True)
class Exact:
    """The container stores this weight exactly: `storage` is its own word (Q4_0, MatMulNBits), `nbytes` the size."""

    storage: str
    nbytes: int


@dataclass(frozen=True)
class Refused:
    """The container cannot store this weight exactly; `nearest` names layouts that it could."""

    reason: str
    nearest: tuple[str, ...] = ()


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of one target.

    Attributes:
        name: on-disk name in the checkpoint.
        stored_as: name in the artifact.
        shape: logical shape, (out, in) for matrices.
        layout: layout word (`int4-g32`, `bf16`).
        storage: the container's own word.
        nbytes: bytes in the file, without alignment.
        reason: why this layout, one phrase.
    """

    name: str
    stored_as: str
    shape: tuple[int, ...]
    layout: str
    storage: str
    nbytes: int
    reason: str


@dataclass(frozen=True)
class TargetPlan:
    """Everything an export will do, known without data. `notes` are remarks for the user."""

    target: Target
    tensors: tuple[TensorPlan, ...]
    file_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per logical element, scales included."""
        elements = 0
        for tensor in self.tensors:
            count = 1
            for extent in tensor.shape:
                count *= extent
            elements += count
        return 8 * sum(t.nbytes for t in self.tensors) / max(elements, 1)


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        files: relative names, sorted.
        main: the file a runtime opens (`NAME.gguf`, `model.onnx`, `model.safetensors` or its index).
        graph_source: for ONNX, which candidate's graph was chosen, and why; None elsewhere.
        details: remarks for the report (fallbacks counted, candidates refused).
    """

    files: tuple[str, ...]
    main: str
    graph_source: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


class Exporter(Protocol):
    """One container. Both methods see the same checkpoint: as the passes left it."""

    container: str

    def layout_for(self, checkpoint: Checkpoint, target: Target) -> Mapping[str, Layout | str]:
        """What a quantizing scheme wants of each tensor; empty without a scheme.

        The pipeline solves those layouts (data-free or calibrated) before `plan` and `export` see the checkpoint.

        Raises:
            Unsupported: unknown scheme, or one this family cannot have.
        """

    def activations_for(self, target: Target) -> str | None:
        """The word (`tightship.activations`) for activations that a scheme rounds at run time; None if it does not."""

    def plan(self, checkpoint: Checkpoint, target: Target) -> TargetPlan:
        """What would be written. Reads no tensor data.

        Raises:
            Unsupported: a tensor that the container cannot hold exactly; the message names the nearest layouts.
        """

    def export(self, checkpoint: Checkpoint, plan: TargetPlan, directory: Path, progress: Progress) -> Exported:
        """Write the artifact into an existing empty directory."""


def sorted_files(directory: Path) -> list[str]:
    """Relative POSIX names of all files below a directory, sorted."""
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())


def total_bytes(directory: Path, names: Iterable[str]) -> int:
    return sum((directory / name).stat().st_size for name in names)
