"""From text to micro-batches for training passes.

The text is the pass's input `data` (a file of plain text, or JSON lines with `text` and, for classifiers, `label`),
else the recipe's calibration text, else text that a model writes itself. The last windows are held out. Windows are
drawn without replacement, every epoch in a new order that hangs on the seed and the number of the epoch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tightship import ranks
from tightship.checkpoint import Checkpoint
from tightship.errors import Malformed, UsageError
from tightship.modelview import ModelView
from tightship.passes.base import Run
from tightship.passes.training import Training
from tightship.stage_codec import read_arrays, write_whole
from tightship.texts import codec_of, generated_windows, token_windows


@dataclass(frozen=True)
class Batch:
    """Windows side by side.

    Attributes:
        number: of the micro-batch; held-out ones are counted from -1 downwards.
        ids: (rows, length) int64, shorter windows filled up with 0.
        real: (rows, length) bool, False where filled up.
        labels: (rows,) int64 class numbers, or None.
        rows: which windows these are, for caches of what a teacher said about them.
    """

    number: int
    ids: np.ndarray
    real: np.ndarray
    labels: np.ndarray | None
    rows: tuple[int, ...]

    def inputs(self, device: str) -> dict[str, Any]:
        """What the module takes; a mask only where something was filled up."""
        import torch

        given = {"input_ids": torch.from_numpy(self.ids).to(device)}
        if not self.real.all():
            given["attention_mask"] = torch.from_numpy(self.real.astype(np.int64)).to(device)
        return given


@dataclass(frozen=True)
class Lessons:
    """Windows of token ids (1-D int64), their class numbers if there are any, and how they are shown."""

    windows: Sequence[np.ndarray]
    labels: Sequence[int] | None
    how: Training
    seed: int

    @property
    def held_out(self) -> int:
        """How many windows, from the end, are never trained on."""
        return min(math.ceil(self.how.held_out * len(self.windows)), len(self.windows) - 1)

    @property
    def steps(self) -> int:
        """Steps that see the wanted number of tokens, at least one."""
        mean = sum(map(len, self.windows)) / len(self.windows)
        return max(1, round(self.how.tokens / (mean * self._rows * self.how.accumulate)))

    def batch(self, number: int) -> Batch:
        """The micro-batch of this number, from 0."""
        taught = len(self.windows) - self.held_out
        places = range(number * self._rows, (number + 1) * self._rows)
        epochs = {place // taught for place in places}
        orders = {epoch: np.random.default_rng([self.seed, epoch]).permutation(taught) for epoch in epochs}
        return self._stack(number, [int(orders[place // taught][place % taught]) for place in places])

    def exam(self) -> list[Batch]:
        """The held-out windows, every time the same."""
        first, last, size = len(self.windows) - self.held_out, len(self.windows), self.how.batch
        starts = range(first, last, size)
        return [self._stack(-1 - n, list(range(at, min(at + size, last)))) for n, at in enumerate(starts)]

    def and_more(self, other: Lessons) -> Lessons:
        """With the windows of `other` before these, so that what is held out stays the same kind of text."""
        return replace(self, windows=(*other.windows, *self.windows))

    @property
    def _rows(self) -> int:
        return min(self.how.batch, len(self.windows) - self.held_out)

    def _stack(self, number: int, rows: Sequence[int]) -> Batch:
        chosen = [self.windows[row] for row in rows]
        ids = np.zeros((len(chosen), max(map(len, chosen))), np.int64)
        real = np.zeros(ids.shape, bool)
        for line, window in enumerate(chosen):
            ids[line, : len(window)], real[line, : len(window)] = window, True
        labels = None if self.labels is None else np.array([self.labels[row] for row in rows], np.int64)
        return Batch(number, ids, real, labels, tuple(rows))


def lessons(checkpoint: Checkpoint, run: Run, how: Training, *, written: bool = False) -> Lessons:
    """What a pass trains on; with `written`, or where no text is given, `checkpoint` writes it itself.

    Raises:
        UsageError: the input `data` is no text.
        Malformed, Unsupported: see `tightship.texts`; a classifier's line without a label it knows.
    """
    data = run.inputs.get("data")
    if data is not None and not isinstance(data, str):
        raise UsageError("the input `data` is text to train on, found a checkpoint", hint="name a text file")
    if data is not None and not written and data.lstrip().startswith("{"):
        return _labelled(checkpoint, data, how, run.seed)
    texts = run.texts if data is None else (data,)
    if texts and not written:
        read = token_windows(checkpoint, texts, tokens=how.tokens, sequence=how.sequence)
        return Lessons(read, None, how, run.seed)
    return Lessons(_written(checkpoint, run, how), None, how, run.seed)


def _written(writer: Checkpoint, run: Run, how: Training) -> Sequence[np.ndarray]:
    """Text of the model's own, kept in the scratch directory so that a resumed run reads the same."""
    path = None if run.scratch is None else Path(run.scratch) / "written.safetensors"
    with ranks.first():
        if path is None or not path.exists():
            view = ModelView(writer, threads=run.threads, device=run.device)
            ids = np.stack(generated_windows(view, tokens=how.tokens, sequence=how.sequence, seed=run.seed))
            if path is None:
                return tuple(ids)
            write_whole(path, {"ids": ids})
    return tuple(read_arrays(path, ["ids"])["ids"])


def _labelled(checkpoint: Checkpoint, content: str, how: Training, seed: int) -> Lessons:
    """Windows, one a line, cut at the window's length; with class numbers where the lines have labels."""
    codec = codec_of(checkpoint)
    length = min(how.sequence, int(checkpoint.hyper.get("context", how.sequence)))
    room = length - len(codec.before) - len(codec.after)
    names = {str(name): int(number) for number, name in (checkpoint.config.get("id2label") or {}).items()}
    windows: list[np.ndarray] = []
    labels: list[Any] = []
    for number, line in enumerate(filter(str.strip, content.splitlines()), 1):
        try:
            example = json.loads(line)
            text, label = example["text"], example.get("label")
        except (ValueError, KeyError, TypeError) as error:
            raise Malformed(f"data, line {number}: needs a JSON object with `text`") from error
        windows.append(np.array([*codec.before, *codec.encode(text)[:room], *codec.after], np.int64))
        labels.append(names.get(str(label), label))
    if all(label is None for label in labels) or checkpoint.architecture.task != "text-classification":
        return Lessons(windows, None, how, seed)
    for number, label in enumerate(labels, 1):
        if not isinstance(label, int) or not 0 <= label < int(checkpoint.hyper["labels"]):
            raise Malformed(f"data, line {number}: label {label!r} is none of {', '.join(names)}")
    return Lessons(windows, labels, how, seed)
