"""How fast one artifact runs in its runtime: one process, one load, timed passes.

Job: `artifact` and `main`, `runtime` (a key of `ENGINES`), `threads`, `prompt`, `decode` (tokens), `passes`. The
answer, seconds and bytes:

| key              | meaning                                                                                      |
|------------------|----------------------------------------------------------------------------------------------|
| load             | from the open call to a model that can compute; libraries are imported before                |
| prefill, decode  | a list of times, one a pass: the whole prompt at once; then `decode` tokens one by one        |
| …_cpu            | processor time of the same passes: hardly depends on what else the machine does              |
| memory           | peak resident memory of the process, mapped files included                                   |
| memory_libraries | the same before the model was opened                                                         |

Token ids are small random numbers: what they say does not change the work. An untimed pass goes before. Encoders have
no `decode`. Of an encoder and its decoder the prompt is the source, and `prefill` ends with the target's first token.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tightship.errors import Unsupported

_IDS = 100  # every vocabulary has as many
_KIB = 1024


class Engine(Protocol):
    """A loaded model. `decode` computes so many tokens after the prompt; None where there is no cache."""

    @property
    def version(self) -> str: ...

    @property
    def decode(self) -> Callable[[int], None] | None: ...

    def prefill(self, ids: np.ndarray) -> None:
        """Compute a prompt (1, s) int64 from the start."""


def run(job: dict[str, Any], arrays: dict[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:  # noqa: ARG001
    """See the module docstring.

    Raises:
        ImportError: the runtime is not installed.
        Unsupported: the model does not take tokens.
    """
    make = ENGINES[job["runtime"]]()
    libraries = _peak()
    ids = np.random.default_rng(0).integers(5, _IDS, (1, int(job["prompt"])))
    engine, (load, _) = _timed(lambda: make(job))
    count = int(job["decode"]) if engine.decode else 0
    answer: dict[str, Any] = {"version": engine.version, "load": load}
    for index in range(int(job["passes"]) + 1):
        parts = {"prefill": _timed(lambda: engine.prefill(ids))[1]}
        if engine.decode and count:
            parts["decode"] = _timed(lambda: engine.decode(count))[1]
        for name, (wall, processor) in parts.items() if index else ():
            answer.setdefault(name, []).append(wall)
            answer.setdefault(f"{name}_cpu", []).append(processor)
    return {**answer, "memory": _peak(), "memory_libraries": libraries}, {}


def _timed(work: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
    """What it gives, and (wall, processor) seconds."""
    start = time.perf_counter(), time.process_time()
    result = work()
    return result, (time.perf_counter() - start[0], time.process_time() - start[1])


def _peak() -> int:
    """Of this program alone: what getrusage gives starts at the size of the process that it was forked from."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * _KIB


def _demand_text(inputs: Iterable[str]) -> None:
    if "input_ids" not in inputs:
        raise Unsupported(f"bench feeds tokens, this model takes {', '.join(inputs)}")


# --- engines: each function imports its libraries and returns what opens a model ---------------------------------


def _onnx_runtime() -> Callable[[dict[str, Any]], Engine]:
    import onnxruntime

    from tightship.validators.runtimes.onnx_runtime import open_graph

    class Own:
        """Our loop; the cache goes from one call to the next as ONNX Runtime gives it."""

        version = f"onnxruntime {onnxruntime.__version__}"

        def __init__(self, job: dict[str, Any]) -> None:
            path = Path(job["artifact"]) / job["main"]
            self.graph = open_graph(path, "shipped", int(job["threads"]))
            _demand_text(self.graph.inputs)
            self.decode = self._decode if self.graph.past else None

        def prefill(self, ids: np.ndarray) -> None:
            self.length = ids.shape[1]
            self.past = self.graph.begin({"input_ids": ids})

        def _decode(self, count: int) -> None:
            for index in range(self.length, self.length + count):
                token = {
                    "input_ids": np.full((1, 1), 7),
                    "attention_mask": np.ones((1, index + 1), np.int64),
                    "position_ids": np.full((1, 1), index),
                }
                self.past = self.graph.advance(token, self.past)[1]

    return Own


def _genai() -> Callable[[dict[str, Any]], Engine]:
    import onnxruntime_genai

    from tightship.validators.runtimes.genai import generator

    class Genai:
        """The client's own loop and cache, which it keeps in place where the graph allows it."""

        version = f"onnxruntime-genai {onnxruntime_genai.__version__}"

        def __init__(self, job: dict[str, Any]) -> None:
            config = onnxruntime_genai.Config(job["artifact"])
            options = {"intra_op_num_threads": int(job["threads"])}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
            self.model = onnxruntime_genai.Model(config)
            self.room = int(job["prompt"]) + int(job["decode"]) + 1

        def prefill(self, ids: np.ndarray) -> None:
            self.generator = generator(self.model, self.room)
            self.generator.append_tokens(ids.astype(np.int32))

        def decode(self, count: int) -> None:
            for _ in range(count):
                self.generator.append_tokens(np.full((1, 1), 7, np.int32))

    return Genai


def _llama_cpp() -> Callable[[dict[str, Any]], Engine]:
    from tightship.validators.runtimes import llama_cpp

    llama_cpp.version()

    class LlamaCpp:
        """llama.cpp with its defaults, logits of the last position alone."""

        def __init__(self, job: dict[str, Any]) -> None:
            self.version = llama_cpp.version()
            self.model = llama_cpp.load(Path(job["artifact"]) / job["main"])
            encoder = llama_cpp.is_encoder(self.model)
            room = int(job["prompt"]) + int(job["decode"])
            self.context = llama_cpp.new_context(self.model, job, room, encoder=encoder)
            self.encoder = encoder
            self.decode = None if encoder else self._decode

        def prefill(self, ids: np.ndarray) -> None:
            if not self.encoder:
                self.context.kv_cache_clear()
            prompt = llama_cpp.encoded(self.model, self.context, ids[0])[: 1 if self.model.has_encoder() else None]
            self.length = len(prompt)
            llama_cpp.step(self.context, prompt, 0, last_only=not self.encoder)

        def _decode(self, count: int) -> None:
            for index in range(self.length, self.length + count):
                llama_cpp.step(self.context, np.array([7]), index)

    return LlamaCpp


def _transformers() -> Callable[[dict[str, Any]], Engine]:
    import torch
    import transformers

    from tightship.validators.runtimes import transformers_client

    class Transformers:
        """transformers' own loader and cache, in the element type that config.json names."""

        version = f"transformers {transformers.__version__}, torch {torch.__version__}"

        def __init__(self, job: dict[str, Any]) -> None:
            torch.set_num_threads(int(job["threads"]))
            directory = Path(job["artifact"])
            self.model = transformers_client.load(
                directory, json.loads((directory / "config.json").read_text()), "shipped"
            )
            _demand_text([self.model.main_input_name])
            self.decode = self._decode if self.model.can_generate() else None

        @torch.inference_mode()
        def prefill(self, ids: np.ndarray) -> None:
            self.past, self.source = None, {}
            if self.model.config.is_encoder_decoder:
                self.source = {"encoder_outputs": self.model.get_encoder()(torch.from_numpy(ids))}
                self._decode(1)
                return
            cached = {"use_cache": True} if self.decode else {}
            out = self.model(torch.from_numpy(ids), **cached)
            self.past = out.past_key_values if cached else None

        @torch.inference_mode()
        def _decode(self, count: int) -> None:
            name = "decoder_input_ids" if self.source else "input_ids"
            for _ in range(count):
                token = {name: torch.full((1, 1), 7)}
                out = self.model(**token, **self.source, past_key_values=self.past, use_cache=True)
                self.past = out.past_key_values

    return Transformers


ENGINES: dict[str, Callable[[], Callable[[dict[str, Any]], Engine]]] = {
    "onnxruntime": _onnx_runtime,
    "onnxruntime-genai": _genai,
    "llama.cpp": _llama_cpp,
    "transformers": _transformers,
}
