"""What artifacts are measured against: the text, and the outputs of the original and of the compressed checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.errors import EnvironmentFailure
from tightship.exporters.onnx_candidates.skeleton import Judge
from tightship.modelview import ModelView
from tightship.target import Progress, no_progress
from tightship.texts import read_documents
from tightship.validators.gates import Gates
from tightship.validators.llama_gelu import llama_gelus
from tightship.validators.parity import judge as parity_judge
from tightship.validators.runtimes.child import Limits
from tightship.validators.text import LENGTH, WINDOWS, TextWindows, proof_windows
from tightship.weights import Alias

Outputs = Mapping[str, np.ndarray]

# Outputs of one model on all windows; wide vocabularies get fewer windows.
_OUTPUT_BYTES = 1 << 30
_LINES = 256


@dataclass(frozen=True)
class ProofSettings:
    """How a proof is made.

    Attributes:
        text: file to prove on, or None for what the model's task allows (self-generated, shipped, random).
        gates: the recipe's budgets.
        seed: of self-generated and random tokens.
        threads: of every runtime.
        windows, length: at most so many token windows, each at most so long.
        seconds: wall time of one job of one runtime.
        memory: bytes that one runtime may take, or None for the machine's.
        judge: of graph sources, for the reference graph (one with a cache saves half a minute).
        scratch: directory for what the proof writes (reference graphs, exchange with runtimes), or None.
        progress: called as progress(what, done, total).
    """

    text: Path | None = None
    gates: Gates = field(default_factory=lambda: Gates({}))
    seed: int = 0
    threads: int = 1
    windows: int = WINDOWS
    length: int = LENGTH
    seconds: float = 3600.0
    memory: int | None = None
    judge: Judge = parity_judge
    scratch: Path | None = None
    progress: Progress = no_progress

    @property
    def limits(self) -> Limits:
        return Limits(seconds=self.seconds, memory=self.memory, threads=self.threads, scratch=self.scratch)


def must_be_mapped(checkpoint: Checkpoint, settings: ProofSettings) -> bool:
    """Whether the model in float32 does not fit twice (a reference, and a runtime's) into the memory that is given.

    Raises:
        EnvironmentFailure: its largest tensor alone does not.
    """
    given = settings.limits.memory_bytes
    sizes = ((4 * math.prod(w.shape), n) for n, w in checkpoint.weights.items() if not isinstance(w, Alias))
    largest, name = max(sizes)
    if 2 * largest > given:
        raise EnvironmentFailure(
            f"the proof holds the largest tensor twice in float32, which takes {2 * largest / 2**30:.2g} GiB; "
            f"{given / 2**30:.2g} GiB are given",
            tensor=name,
            hint="raise --max-memory, or build on a larger machine",
        )
    return 2 * checkpoint.float32_bytes > given


class References:
    """Windows and outputs of one original, made when first asked for and kept: one for all targets of a build.

    `mapped` tells whether weights lie in mapped files because the model does not fit into the memory that is given.
    `digests` collects, for each target without a scheme, the integers that its files hold, by tensor.
    """

    def __init__(self, original: Checkpoint, settings: ProofSettings) -> None:
        self.original = original
        self.settings = settings
        self.mapped = must_be_mapped(original, settings)
        self.digests: dict[str, dict[str, str]] = {}
        self._view: ModelView | None = self._view_of(original)

    @property
    def limits(self) -> Limits:
        """What a runtime may use."""
        mapped = 2 * self.original.float32_bytes if self.mapped else 0  # ONNX Runtime sets as much aside untouched
        return dataclasses.replace(self.settings.limits, mapped=mapped)

    def _view_of(self, checkpoint: Checkpoint) -> ModelView:
        """A view in memory, or over files in the scratch directory where it would not fit."""
        folder = (self.settings.scratch or Path(tempfile.gettempdir())) if self.mapped else None
        return ModelView(checkpoint, threads=self.settings.threads, folder=folder)

    @functools.cached_property
    def windows(self) -> TextWindows:
        """The tokens of every comparison."""
        vocabulary = int(self.original.hyper.get("vocab", 1))
        most = max(1, _OUTPUT_BYTES // (4 * self.settings.length * vocabulary))
        return proof_windows(
            self._view or self._view_of(self.original),
            text=self.settings.text,
            write=not self.mapped,
            windows=min(self.settings.windows, most),
            length=self.settings.length,
            seed=self.settings.seed,
        )

    @functools.cached_property
    def outputs(self) -> Outputs:
        """The original's outputs on the windows."""
        windows = self.windows
        self.settings.progress("outputs of the original", 0, 1)
        view = self._view or self._view_of(self.original)
        found = view.outputs(windows.ids, windows.mask, decoder_input_ids=windows.decoder_ids)
        self._view = None  # the module is no longer needed
        return found

    def logits(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """The original's logits for ids and mask (n, length) int64: what task metrics ask."""
        if self._view is None:
            self._view = self._view_of(self.original)
        return self._view.outputs(ids, mask)["logits"]

    def outputs_of(self, checkpoint: Checkpoint, *, with_llama_gelu: bool = False) -> Outputs:
        """Outputs of a compressed checkpoint; with llama.cpp's table in place of every GELU if asked for."""
        if checkpoint is self.original and not with_llama_gelu:
            return self.outputs
        self.settings.progress("outputs of the compressed checkpoint", 0, 1)
        view = self._view_of(checkpoint)
        with llama_gelus(view.module()) if with_llama_gelu else contextlib.nullcontext():
            return view.outputs(self.windows.ids, self.windows.mask, decoder_input_ids=self.windows.decoder_ids)

    @functools.cached_property
    def strings(self) -> list[str]:
        """Lines of the text, for the proof of the tokenizer."""
        if self.settings.text is None:
            shipped = resources.files("tightship.validators") / "sentences.json"
            return list(json.loads(shipped.read_text("utf-8")))
        lines = (line for document in read_documents(self.settings.text) for line in document.splitlines())
        return [line for line in lines if line.strip()][:_LINES]
