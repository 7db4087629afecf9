"""What a published file holds under a checkpoint's name: the view that values and structure are proven on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.errors import UsageError
from tightship.target import Exported, TargetPlan
from tightship.validators.integers import Piece


class Stored(Protocol):
    """The tensors of one artifact, read from its files and from nothing else.

    Names are those of the checkpoint; `part` is "" or, where a weight is stored as several matrices, `.left`, `.right`,
    `.base`, `.residual.left` or `.residual.right`.
    """

    def listing(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Every stored tensor under its name in the file: the container's type word, and its shape."""

    def value(self, name: str, part: str = "") -> np.ndarray:
        """float32 in the checkpoint's orientation and order of rows, decoded by code that is not ours; see `changed`.

        Raises:
            Malformed: the file has no such tensor, or it cannot be decoded.
        """

    def changed(self, name: str, values: np.ndarray) -> np.ndarray:
        """What the container stores for these floats: themselves, or a function of them (Gemma's norms: 1 + w)."""

    def restored(self, name: str, values: np.ndarray) -> np.ndarray:
        """The inverse of `changed`, for what `value` gave."""

    def integers(self, name: str, part: str = "") -> Iterator[Piece] | None:
        """Codes and parameters, unpacked by our own code, rows in the checkpoint's order; None for floats."""


def open_stored(checkpoint: Checkpoint, plan: TargetPlan, directory: Path, exported: Exported) -> Stored:
    """The view of an artifact that was exported from `checkpoint` by `plan`.

    Raises:
        UsageError: no such container.
    """
    if plan.target.container == "gguf":
        from tightship.exporters.gguf_lora import RESIDUAL
        from tightship.formats.gguf_shards import file_names
        from tightship.validators.stored_gguf import GgufStored

        files = [*file_names(exported.main), *({RESIDUAL} & set(exported.files))]
        return GgufStored(checkpoint, plan, [directory / name for name in files])
    if plan.target.container == "onnx":
        from tightship.validators.stored_onnx import OnnxStored

        return OnnxStored(checkpoint, directory / exported.main)
    if plan.target.container == "safetensors":
        from tightship.validators.stored_safetensors import SafetensorsStored

        return SafetensorsStored(checkpoint, directory)
    raise UsageError(f"container {plan.target.container!r} has no proof")
