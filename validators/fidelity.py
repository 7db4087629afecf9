"""Does an artifact compute what the compressed checkpoint computes? One run of one runtime, compared and judged.

| container   | run                                           | kind    | what an error means                       |
|-------------|-----------------------------------------------|---------|-------------------------------------------|
| gguf        | llama.cpp on the widened file                 | graph   | names, permutations, metadata             |
| gguf        | llama.cpp as shipped                          | runtime | its own rounding of activations and cache |
| onnx        | ONNX Runtime, optimisations off               | graph   | the graph                                 |
| onnx        | the same, token by token through the cache    | graph   | the cache                                 |
| onnx        | ONNX Runtime as shipped                       | runtime | fusions, accuracy level 4                 |
| onnx        | onnxruntime-genai (decoders)                  | runtime | its config, its cache                     |
| safetensors | transformers, float32, activations left alone | graph   | names, packing, config.json               |
| safetensors | transformers as shipped                       | runtime | its element type, activation quantization |
| both others | ONNX Runtime on the reference graph, with the | graph   | the stored weights                        |
|             | weights decoded from the published file       |         |                                           |
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tightship.activations import scheme_of
from tightship.checkpoint import Checkpoint
from tightship.exporters.genai_config import fits
from tightship.exporters.onnx_candidates.skeleton import DECODER_TASKS, SEQ2SEQ
from tightship.exporters.onnx_schemes import HALF
from tightship.report import Check, judge, not_run
from tightship.target import TargetPlan
from tightship.validators.metrics import LogitMeter, compare_hidden
from tightship.validators.references import Outputs
from tightship.validators.runtimes.child import Limits, RuntimeDied, RuntimeMissing, run_child
from tightship.validators.text import TextWindows
from tightship.validators.tolerances import storage_of, tolerances
from tightship.weights import Sum

# Figures of a comparison, under the names of the tolerances.
_FIGURES = {"max_abs": "max_error"}
_SHOWN = ("max_error", "cosine", "kl_mean", "top1", "positions")
_STEPS = 4
GELU = "gelu"


@dataclass(frozen=True)
class Run:
    """One way to run an artifact. `decode` asks for steps through the cache; `tasks` are those it is for, or all."""

    runtime: str
    module: str
    kind: Literal["graph", "runtime"]
    decode: bool = False
    tasks: tuple[str, ...] | None = None

    @property
    def mode(self) -> str:
        return "graph" if self.kind == "graph" else "shipped"


RUNS: Mapping[str, tuple[Run, ...]] = {
    "gguf": (Run("llama.cpp", "llama_cpp", "graph"), Run("llama.cpp", "llama_cpp", "runtime")),
    "onnx": (
        Run("onnxruntime", "onnx_runtime", "graph"),
        Run("onnxruntime", "onnx_runtime", "graph", decode=True, tasks=(*DECODER_TASKS, SEQ2SEQ)),
        Run("onnxruntime", "onnx_runtime", "runtime"),
        Run("onnxruntime-genai", "genai", "runtime", tasks=DECODER_TASKS),
    ),
    "safetensors": (
        Run("transformers", "transformers_client", "graph"),
        Run("transformers", "transformers_client", "runtime"),
    ),
}
DECODED = Run("onnxruntime", "onnx_runtime", "graph")


def runs_for(plan: TargetPlan, checkpoint: Checkpoint) -> list[Run]:
    """The artifact's own runtimes, for the model's task; llama.cpp reads corrections of low rank from an adapter."""
    task = checkpoint.architecture.task
    mine = [run for run in RUNS[plan.target.container] if run.tasks is None or task in run.tasks]
    if plan.target.container == "gguf" and any(isinstance(w, Sum) for w in checkpoint.weights.values()):
        return [dataclasses.replace(run, module="llama_adapter") for run in mine]
    return [run for run in mine if run.module != "genai" or fits(checkpoint)]


def execute(
    run: Run, directory: Path, main: str, windows: TextWindows, limits: Limits
) -> tuple[Outputs, dict[str, Any]]:
    """Outputs on the windows (the first one only for a run through the cache), and what the runtime says of itself.

    Raises:
        RuntimeDied, RuntimeMissing: see `run_child`.
    """
    rows = slice(0, 1) if run.decode else slice(None)
    job = {"artifact": str(directory), "main": main, "mode": run.mode, "threads": limits.threads, "want": "outputs"}
    if run.decode:
        job["want"] = "decode"
    elif run.module in ("llama_cpp", "llama_adapter", "genai"):
        job["decode"] = _STEPS  # the last positions come from single steps through the cache
    arrays = windows.feeds(rows)
    if run.module == "genai":  # it makes the mask itself
        del arrays["attention_mask"]
    about, outputs = run_child(run.module, job, arrays, limits=limits)
    return outputs, about


def judged(run: Run, figures: Mapping[str, Any], target: str, storage: str, version: str | None) -> list[Check]:
    """The run's checks of the figures of `compare`. `storage` is the word of `storage_word`."""
    extra = {key: figures[key] for key in _SHOWN if key in figures} | {"version": version}
    found = []
    for metric, tolerance in tolerances().for_run(run.kind, run.runtime, storage).items():
        value = figures.get(_FIGURES.get(metric, metric))
        check = tolerance.check(target=target, runtime=run.runtime, kind=run.kind, value=value, extra=extra)
        found.append(_renamed(check, "through_cache") if run.decode else check)
    return found


def figure_with_its_gelu(reference: Outputs, outputs: Outputs, windows: TextWindows, target: str) -> Check:
    """llama.cpp against a reference with llama.cpp's GELU, at the middle position: shown, never judged.

    The table is read at float16 inputs, so an input on the other side of a rounding step jumps by half a unit, at some
    positions and by chance; hence the median over positions.
    """
    value = _median_distance(reference, outputs, windows)
    metric = "rel_l2_median_with_its_gelu"
    return judge(target=target, runtime="llama.cpp", kind="graph", metric=metric, value=value)


def figure_with_true_gelu(figures: Mapping[str, Any], target: str) -> Check:
    """llama.cpp against transformers as it is: how much the table costs. Grows with depth, so it is never judged."""
    return judge(
        target=target, runtime="llama.cpp", kind="graph", metric="rel_l2_with_true_gelu", value=figures["rel_l2"]
    )


def _median_distance(reference: Outputs, outputs: Outputs, windows: TextWindows) -> float:
    """Median over real positions of |outputs - reference| / |reference|, of the output that is farthest off."""
    mask = windows.real
    medians = []
    for name in sorted(set(reference) & set(outputs)):
        expected = reference[name][mask].astype(np.float64)
        distance = np.linalg.norm(outputs[name][mask] - expected, axis=-1)
        medians.append(float(np.median(distance / np.linalg.norm(expected, axis=-1))))
    return max(medians)


def failed_run(run: Run, target: str, error: RuntimeDied | RuntimeMissing | ValueError) -> Check:
    """The check of a run that gave no outputs, or none that can be compared."""
    metric = "outputs_through_cache" if run.decode else "outputs"
    if isinstance(error, RuntimeMissing):
        return not_run(target=target, runtime=run.runtime, kind=run.kind, metric=metric, reason=str(error))
    return judge(
        target=target, runtime=run.runtime, kind=run.kind, metric=metric, value=None, reason=str(error),
        tensor=getattr(error, "tensor", None), extra={"log": log} if (log := getattr(error, "log", "")) else None,
    )  # fmt: skip


def storage_word(plan: TargetPlan, checkpoint: Checkpoint, run: Run) -> str:
    """The word under which `tolerances.toml` files this run; `gelu` where llama.cpp reads GELU from its table."""
    scheme = plan.target.scheme or ""
    if run.runtime == "llama.cpp" and run.kind == "graph" and "gelu" in _activation(checkpoint):
        return GELU
    said = set() if run.runtime == "llama.cpp" else {a.scheme for a in checkpoint.activations.values()}
    if plan.target.container == "onnx":  # it rounds to integers alone
        said = {word for word in said if scheme_of(word).numbers == "int8"}
    if said or scheme.startswith(("int8-dynamic", "int8-static")):
        return "activations"
    if plan.target.container == "onnx" and scheme.startswith(HALF):
        return "half"
    return storage_of(plan)


def _activation(checkpoint: Checkpoint) -> str:
    """config.json's word, or, of a family that has one only, what llama.cpp computes for it."""
    computed = (checkpoint.architecture.gguf or {}).get("activation") or [""]
    return str(checkpoint.hyper.get("activation", computed[0]))


def compare(reference: Outputs, outputs: Outputs, windows: TextWindows) -> dict[str, Any]:
    """Figures over all real positions. Of several outputs, those of the one that is farthest off.

    Raises:
        ValueError: no output in common, or shapes that differ.
    """
    rows = len(next(iter(outputs.values()))) if outputs else 0
    mask = windows.real[:rows]
    found = []
    for name in sorted(set(reference) & set(outputs)):
        expected, got = reference[name][:rows], outputs[name]
        if expected.shape != got.shape:
            raise ValueError(f"{name} has shape {got.shape}, the compressed checkpoint's {expected.shape}")
        if name == "last_hidden_state":
            found.append(compare_hidden(expected, got, mask).figures())
        else:
            found.append(_logits(expected, got, mask))
    if not found:
        raise ValueError(f"the runtime gives {sorted(outputs)}, the compressed checkpoint {sorted(reference)}")
    return max(found, key=lambda figures: math.inf if math.isnan(figures["rel_l2"]) else figures["rel_l2"])


def _logits(expected: np.ndarray, got: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
    meter = LogitMeter()
    if expected.ndim == 2:  # one row of labels a sequence
        meter.add(expected, got)
    else:
        for row, kept in enumerate(mask):
            meter.add(expected[row, kept], got[row, kept])
    figures = meter.result().figures()
    return figures if not figures["non_finite"] else {**figures, "rel_l2": math.nan}


def _renamed(check: Check, how: str) -> Check:
    metric = f"{check.metric}_{how}"
    return dataclasses.replace(check, metric=metric, id=f"{check.target}/{check.runtime}/{check.kind}/{metric}")
