"""onnxruntime-genai as a client of a published ONNX decoder: its own loader, cache and token loop.

Job: `artifact` (directory with genai_config.json), `main` (the graph of all logits), `want`:

| want      | computed                                                                                              |
|-----------|-------------------------------------------------------------------------------------------------------|
| outputs   | logits of every position: a prefill, then the last `decode` tokens one at a time through the cache;    |
|           | where the prefill gives its last position alone, those before it come from `main` in its place         |
| generate  | `tokens` greedy tokens after each prompt                                                              |

genai runs the graph as it is shipped; it has no mode with optimisations off.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tightship.errors import Unsupported

if TYPE_CHECKING:
    import onnxruntime_genai as og

DECODE = 4


def run(job: dict[str, Any], arrays: dict[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Answers for `input_ids` (b, s) int64: `logits` (b, s, vocab) float32, or `tokens` (b, n) int64.

    Raises:
        ImportError: onnxruntime-genai is not installed.
        Unsupported: the artifact has no genai_config.json.
    """
    import onnxruntime_genai as og

    if not (Path(job["artifact"]) / "genai_config.json").is_file():
        raise Unsupported("there is no genai_config.json, so onnxruntime-genai cannot open this artifact")
    prompts = arrays["input_ids"].astype(np.int32)
    model = _opened(job)
    version = {"version": str(getattr(og, "__version__", "unknown")), "type": str(model.type)}
    if job.get("want", "outputs") == "generate":
        count = int(job["tokens"])
        return version, {"tokens": np.stack([greedy(model, row, count) for row in prompts])}
    found = logits(model, prompts, int(job.get("decode", DECODE)))
    del model  # one at a time
    return version, {"logits": _completed(found, job, prompts)}


def _completed(found: np.ndarray, job: dict[str, Any], prompts: np.ndarray) -> np.ndarray:
    """(b, s, vocab): what the shipped graph gave, behind what the graph of all logits gives of the tokens before."""
    missing = prompts.shape[1] - found.shape[1]
    if not missing:
        return found
    before = logits(_opened(job, job.get("main")), prompts[:, :missing], 0)
    if before.shape[1] < missing:  # there is no graph of all: then every token is a step
        return logits(_opened(job), prompts, prompts.shape[1] - 1)
    return np.concatenate([before, found], axis=1)


def _opened(job: dict[str, Any], main: str | None = None) -> og.Model:
    """The artifact as its config says, or with another graph."""
    import onnxruntime_genai as og

    config = og.Config(str(job["artifact"]))
    if main is not None:
        config.overlay(json.dumps({"model": {"decoder": {"filename": main}}}))
    return og.Model(config)


def logits(model: og.Model, prompts: np.ndarray, decode: int) -> np.ndarray:
    """(b, s, vocab) float32 for prompts (b, s) int32; the last `decode` positions come from single-token steps.

    Of a graph that gives the logits of last tokens (b, decode + 1, vocab): one row for the prefill.
    """
    return np.concatenate([_logits(model, prompt, decode) for prompt in prompts])


def _logits(model: og.Model, prompt: np.ndarray, decode: int) -> np.ndarray:
    loop = generator(model, len(prompt))
    split = max(len(prompt) - decode, 1)
    parts = []
    for start, stop in [(0, split), *((i, i + 1) for i in range(split, len(prompt)))]:
        loop.append_tokens(prompt[None, start:stop])
        parts.append(np.array(loop.get_output("logits"), np.float32))
    return np.concatenate(parts, axis=1)


def greedy(model: og.Model, prompt: np.ndarray, count: int) -> np.ndarray:
    """(count,) int64 tokens after a prompt (s,) int32; padded with -1 where the model ended."""
    loop = generator(model, len(prompt) + count)
    loop.append_tokens(prompt[None])
    found: list[int] = []
    while len(found) < count and not loop.is_done():
        loop.generate_next_token()
        found.append(int(loop.get_next_tokens()[0]))
    return np.array(found + [-1] * (count - len(found)), np.int64)


def generator(model: og.Model, length: int) -> og.Generator:
    """A greedy loop with room for `length` tokens."""
    import onnxruntime_genai as og

    params = og.GeneratorParams(model)
    params.set_search_options(max_length=length, do_sample=False, batch_size=1)
    return og.Generator(model, params)
