"""A teacher's likeliest next tokens on a text, from any runtime, as the file that `distill` reads.

| teacher                     | computed by                                   |
|-----------------------------|-----------------------------------------------|
| a directory with model.onnx | ONNX Runtime, as shipped                      |
| a .gguf file                | llama.cpp, as shipped                         |
| anything else that opens    | torch, float32                                |

The arrays are those of the table in `passes/logprobs.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported, UsageError
from tightship.progress import Progress, no_progress

_AT_ONCE = 8


@dataclass(frozen=True)
class Written:
    """What was written. `kept`: mean probability that the stored classes hold."""

    path: Path
    runtime: str
    windows: int
    tokens: int
    kept: float

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "path": str(self.path)}

    def summary(self) -> str:
        return f"{self.path}: {self.tokens} tokens by {self.runtime}, {self.kept:.1%} of the probability kept"


def write_logprobs(
    teacher: str | Path,
    text: str | Path,
    output: str | Path,
    *,
    top: int = 256,
    temperature: float = 1.0,
    tokens: int = 65536,
    sequence: int = 128,
    threads: int = 1,
    progress: Progress = no_progress,
) -> Written:
    """Run the teacher on whole windows of the text and keep the `top` likeliest tokens after each position.

    Raises:
        UsageError: no such text; `top` or `temperature` out of range; the output exists.
        Unsupported: not a model that writes text.
    """
    from tightship.stage_codec import write_whole
    from tightship.texts import read_documents, token_windows

    path = Path(output)
    if path.suffix != ".safetensors" or path.exists():
        raise UsageError(f"{path.name} must be a new .safetensors file")
    checkpoint, runtime, place = _open(Path(teacher), progress)
    vocabulary = int(checkpoint.hyper["vocab"])
    if checkpoint.architecture.task != "text-generation":
        raise Unsupported(f"a {checkpoint.architecture.family} model has no next token to store")
    if not 1 <= top <= vocabulary or temperature <= 0:
        raise UsageError(f"top lies between 1 and the vocabulary of {vocabulary}, temperature above 0")
    windows = token_windows(checkpoint, read_documents(text), tokens=tokens, sequence=sequence)
    whole = [window for window in windows if len(window) == len(windows[0])]
    ids = np.stack(whole)
    answer = _runner(checkpoint, runtime, place, threads)
    parts = []
    for start in range(0, len(ids), _AT_ONCE):
        progress("log-probabilities", start, len(ids))
        parts.append(_top(answer(ids[start : start + _AT_ONCE])[:, :-1].astype(np.float64) / temperature, top))
    classes, stored = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    write_whole(
        path,
        {
            "ids": ids.astype(np.int32),
            "lengths": np.full(len(ids), ids.shape[1], np.int32),
            "classes": classes,
            "stored": stored,
            "temperature": np.array([temperature], np.float32),
        },
    )
    kept = float(np.exp(stored.astype(np.float64)).sum(axis=-1).mean())
    return Written(path, runtime, len(ids), ids.size, kept)


def _open(teacher: Path, progress: Progress) -> tuple[Checkpoint, str, Path]:
    """The teacher's config and tokenizer, the runtime, and the file that it opens."""
    from tightship.opening import open_checkpoint, open_small_files

    if (teacher / "model.onnx").is_file():
        return open_small_files(teacher), "onnx_runtime", teacher / "model.onnx"
    checkpoint = open_checkpoint(teacher, hashed=False, progress=progress)
    return checkpoint, "llama_cpp" if teacher.suffix.lower() == ".gguf" else "torch", teacher


def _runner(checkpoint: Checkpoint, runtime: str, place: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """ids (rows, length) -> logits (rows, length, vocabulary) float32."""
    if runtime == "torch":
        from tightship.modelview import ModelView

        view = ModelView(checkpoint, threads=threads)
        return lambda ids: view.outputs(ids)["logits"]
    from tightship.validators.runtimes.child import Limits, run_child

    job = {"artifact": str(place.parent.absolute()), "main": place.name, "mode": "shipped", "threads": threads}

    def run(ids: np.ndarray) -> np.ndarray:
        arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        return np.array(run_child(runtime, job, arrays, limits=Limits(threads=threads))[1]["logits"])

    return run


def _top(logits: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` likeliest classes, falling, and their log-probabilities."""
    logits = logits - logits.max(axis=-1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    classes = np.argsort(-logs, axis=-1, kind="stable")[..., :count]
    return classes.astype(np.int32), np.take_along_axis(logs, classes, axis=-1).astype(np.float32)
