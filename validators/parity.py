"""The parity check: does a graph source compute this family, with these flags, correctly?

A small random model (parity_model.py) is run by transformers and, through the candidate's graph, by ONNX Runtime, with
optimisations off and as shipped. Cases: one token, a prompt past window and rope context, batches, left and right
padding, and token-by-token decoding with the cache. A candidate passes if the relative L2 distance over unpadded
positions stays below `[parity]` of tolerances.toml in every case. The first that passes is used.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tightship.checkpoint import Checkpoint, digest_json
from tightship.errors import Unsupported
from tightship.exporters.onnx_assemble import write_graph
from tightship.exporters.onnx_candidates.skeleton import (
    DECODER_TASKS,
    IMAGES,
    SEQ2SEQ,
    Candidate,
    Choice,
    Judgement,
    outputs_of,
)
from tightship.exporters.onnx_storage import Style
from tightship.modelview import ModelView
from tightship.validators.parity_model import small_checkpoint
from tightship.validators.runtimes.onnx_runtime import open_graph
from tightship.validators.tolerances import tolerances
from tightship.weights import Alias, Quantized

Arrays = dict[str, np.ndarray]
METRIC = "rel_l2"
GLOBAL_SHARE = 0.2  # of tokens, where a family has global ones
MODES = ("graph", "shipped")
# Versions that a verdict depends on; part of its key.
_PACKAGES = ("tightship", "onnxruntime", "onnx-ir", "torch", "transformers", "mobius-onnx")


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: for the report.
        arrays: `input_ids` (b, s), `attention_mask` (b, s), `position_ids` (b, s), `token_type_ids` (b, s),
            `global_attention_mask` (b, s), int64; or `pixel_values` (b, channels, height, width), float32. Where the
            architecture has two stacks these are the source's, and there is `decoder_input_ids` (b, t).
        prefill: tokens before decoding one by one; 0 for a single pass.
    """

    name: str
    arrays: Mapping[str, np.ndarray]
    prefill: int = 0


Reference = tuple[Case, Arrays]


class ParityJudge:
    """Judges candidates; keeps verdicts in memory and, with `cache`, in a directory."""

    def __init__(self, cache: Path | None = None) -> None:
        self.cache = cache
        self._memory: dict[str, Judgement] = {}

    def __call__(self, candidates: Sequence[Candidate], checkpoint: Checkpoint) -> Choice:
        """The first candidate that passes, with every judgement up to it.

        Raises:
            Unsupported: none passes; the message lists each candidate's reason.
            Malformed: transformers itself cannot load a model with these tensors and this config.
        """
        small = small_checkpoint(checkpoint)
        expected: list[Reference] = []
        found: list[Judgement] = []
        for candidate in candidates:
            found.append(self._judged(candidate, small, expected))
            if found[-1].passed:
                return Choice(candidate, tuple(found))
        reasons = "; ".join(f"{j.source}: {j.reason}" for j in found)
        raise Unsupported(
            f"no graph source computes this {checkpoint.architecture.family} model correctly: {reasons}",
            hint="GGUF and safetensors targets do not need a graph",
        )

    def _judged(self, candidate: Candidate, small: Checkpoint, expected: list[Reference]) -> Judgement:
        """The verdict, remembered or found out; `expected` is filled when it is first needed."""
        versions = {name: _version(name) for name in _PACKAGES}
        stored = {name: w for name, w in small.weights.items() if not isinstance(w, Alias)}
        shapes = {name: [*w.shape, w.layout.name if isinstance(w, Quantized) else ""] for name, w in stored.items()}
        cases = [case.name for case in cases_for(small)]
        key = digest_json(
            [candidate.source, candidate.rewrites, dict(small.config), small.architecture.task, shapes, cases, versions]
        )
        if key not in self._memory:
            found = self._read(key)
            if found is None:
                expected[:] = expected or references(small)
                found = judge_candidate(candidate, small, expected)
                self._write(key, found)
            self._memory[key] = found
        return self._memory[key]

    def _read(self, key: str) -> Judgement | None:
        path = self.cache / f"{key}.json" if self.cache else None
        if path is None or not path.is_file():
            return None
        data = json.loads(path.read_text())
        return Judgement(**{**data, "cases": tuple((name, value) for name, value in data["cases"])})

    def _write(self, key: str, judgement: Judgement) -> None:
        if self.cache is None:
            return
        self.cache.mkdir(parents=True, exist_ok=True)
        data = {k: getattr(judgement, k) for k in ("source", "passed", "margin", "reason", "cases")}
        draft = self.cache / f"{key}.draft"
        draft.write_text(json.dumps(data))
        draft.replace(self.cache / f"{key}.json")


judge = ParityJudge()
"""What the pipeline injects into exporters when no cache directory is at hand."""


def judge_candidate(candidate: Candidate, small: Checkpoint, expected: Sequence[Reference]) -> Judgement:
    """The verdict on one candidate for one small model. Whatever the candidate raises is its refusal."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            cases = measure(write_candidate(candidate, small, Path(folder)), expected)
    except Exception as error:
        return Judgement(candidate.source, False, None, f"{type(error).__name__}: {_first_line(error)}")
    limit = tolerances().parity[METRIC].threshold
    worst, margin = max(cases, key=lambda case: np.inf if np.isnan(case[1]) else case[1])
    passed = limit is not None and margin <= limit
    reason = None if passed else f"case {worst}: relative L2 {margin:.2e}, needs <= {limit:g}"
    return Judgement(candidate.source, bool(passed), margin, reason, tuple(cases))


def write_candidate(candidate: Candidate, small: Checkpoint, directory: Path) -> Path:
    """The candidate's graph of a model in memory, as a file: `model.onnx`, or the later of two."""
    shapes = {name: tuple(small.resolve(name).shape) for name in small.weights}
    skeleton = candidate.build(small.config, small.architecture, shapes)
    *_, main = skeleton.graphs
    write_graph(skeleton, small, directory, Style(accuracy_level=0))
    return directory / main


def measure(path: Path, expected: Sequence[Reference]) -> list[tuple[str, float]]:
    """Relative L2 of every case in both modes, graph against the expected outputs."""
    found = []
    for mode in MODES:
        graph = open_graph(path, mode)
        for case, outputs in expected:
            got = graph.decode(case.arrays, case.prefill) if case.prefill else graph.outputs(case.arrays)
            kept = _compared(case.arrays)
            for name, value in outputs.items():
                if name not in got:
                    raise Unsupported(f"the graph gives no {name}")
                by_token = value.shape[:2] == kept.shape
                if got[name].shape != value.shape:
                    raise Unsupported(f"case {case.name}: {name} has shape {got[name].shape}, expected {value.shape}")
                pair = (got[name][kept], value[kept]) if by_token else (got[name], value)
                found.append((f"{mode} {case.name} {name}", relative_l2(*pair)))
    return found


def _compared(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """(batch, positions) bool of the tokens whose outputs count."""
    if "decoder_input_ids" in arrays:
        return np.ones(arrays["decoder_input_ids"].shape, bool)
    return arrays["attention_mask"].astype(bool) if "attention_mask" in arrays else np.ones(0, bool)


def references(small: Checkpoint) -> list[Reference]:
    """Every case with the outputs that transformers computes in one pass without a cache."""
    import torch

    view = ModelView(small)
    module = view.module()
    accepted = inspect.signature(module.forward).parameters
    wanted = outputs_of(small.architecture)
    decoder = small.architecture.task in (*DECODER_TASKS, SEQ2SEQ)
    found = []
    with view.computing():
        for case in cases_for(small):
            # An encoder counts positions itself, each family in its own way, and so must its graph.
            given = {k: v for k, v in case.arrays.items() if k in accepted and (decoder or k != "position_ids")}
            inputs = {k: torch.from_numpy(v) for k, v in given.items()}
            extra = {"use_cache": False} if decoder else {}
            out = module(**inputs, output_hidden_states="last_hidden_state" in wanted, return_dict=True, **extra)
            found.append((case, {name: _output(out, name) for name in wanted}))
    return found


def _output(out: Any, name: str) -> np.ndarray:
    value = out[name] if name in out else out["hidden_states"][-1]
    return np.asarray(value.float().numpy())


def cases_for(small: Checkpoint) -> list[Case]:
    """See the module docstring; the longest prompt is longer than the window and rope's original context."""
    hyper = small.hyper
    if small.architecture.task == IMAGES:
        return image_cases(hyper)
    longest = min(40, int(hyper.get("context", 40)) - 4)
    rng = np.random.default_rng(1)

    def case(name: str, lengths: Sequence[int], *, left: bool = False, prefill: int = 0, behind: int = 0) -> Case:
        mask = np.zeros((len(lengths), max(lengths)), np.int64)
        for row, length in enumerate(lengths):
            mask[row, slice(-length, None) if left else slice(length)] = 1
        mask = np.pad(mask, ((0, 0), (0, behind)), constant_values=1)  # tokens that follow the padding
        ids = rng.integers(5, int(hyper["vocab"]), mask.shape)
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
        arrays = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        if small.config.get("type_vocab_size"):
            arrays["token_type_ids"] = rng.integers(0, int(small.config["type_vocab_size"]), mask.shape)
        if "attention_window" in small.config and small.architecture.task != "text-classification":
            arrays["global_attention_mask"] = (rng.random(mask.shape) < GLOBAL_SHARE).astype(np.int64)
        if small.architecture.task == SEQ2SEQ:  # as long as the source, so that the same numbers split it
            arrays["decoder_input_ids"] = rng.integers(5, int(hyper["vocab"]), mask.shape)
        return Case(name, arrays, prefill)

    found = [
        case("one token", [1]),
        case("short", [7, 7]),
        case("long", [longest]),
        case("right padding", [11, 6, 9]),
    ]
    if small.architecture.task in (*DECODER_TASKS, SEQ2SEQ):
        found += [
            case("left padding", [11, 6, 9], left=True),
            case("decode", [12, 12], prefill=5),
            case("long decode", [longest], prefill=longest - 3),
            case("decode after left padding", [12, 8], left=True, prefill=9),
        ]
    if small.architecture.task in DECODER_TASKS:
        found.append(case("decode after right padding", [9, 6, 4], prefill=9, behind=3))
    return found


def image_cases(hyper: Mapping[str, Any]) -> list[Case]:
    """One image, and a batch: all that can vary."""
    shape = (int(hyper["channels"]), int(hyper["image"]), int(hyper["image"]))
    rng = np.random.default_rng(1)
    batches = {"one image": 1, "batch": 3}
    return [
        Case(name, {"pixel_values": rng.standard_normal((count, *shape)).astype(np.float32)})
        for name, count in batches.items()
    ]


def relative_l2(got: np.ndarray, expected: np.ndarray) -> float:
    """|got - expected| / |expected| in float64."""
    difference = np.linalg.norm(got.astype(np.float64) - expected.astype(np.float64))
    return float(difference / max(float(np.linalg.norm(expected.astype(np.float64))), 1e-30))


def without(small: Checkpoint, name: str) -> Checkpoint:
    """The same model with one parameter dropped: zero, or one for the scale of a norm."""
    from tightship.weights import Dense

    info = small.infos()[name]
    scale = info.rule.kind == "norm" and not name.endswith("bias") and info.rule.transform != "plus_one"
    shape = tuple(small.resolve(name).shape)
    return small.with_weights({name: Dense.of(np.full(shape, 1.0 if scale else 0.0, np.float32))})


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else "no message"
