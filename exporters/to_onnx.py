"""ONNX artifacts: `model.onnx`, `model.onnx_data`, and what each runtime expects beside them.

A decoder has `genai.onnx` too: the same graph over the same data with logits of the last token alone, which is all that
onnxruntime-genai reads of a prompt. A model of two stacks becomes `encoder_model.onnx` and
`decoder_model_merged.onnx` with one `model.onnx_data` for both.

The graph comes from one of the candidates of `onnx_candidates`; which one, a judge decides (validators/parity.py). The
weights are the checkpoint's own: integers stay the same integers, matrices in f16 and bf16 stay in that type behind a
Cast, everything else is float32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tightship.checkpoint import Checkpoint
from tightship.errors import GateFailed, Unsupported, UsageError
from tightship.exporters.genai_config import Cache, fits, genai_config
from tightship.exporters.onnx_activations import left_in_float32
from tightship.exporters.onnx_assemble import write_graph
from tightship.exporters.onnx_candidates import candidates
from tightship.exporters.onnx_candidates.fused import shares_cache
from tightship.exporters.onnx_candidates.graph_edits import fix_axes
from tightship.exporters.onnx_candidates.last_logits import twin_of
from tightship.exporters.onnx_candidates.packed import packs
from tightship.exporters.onnx_candidates.skeleton import (
    DECODER,
    DECODER_TASKS,
    GENAI,
    MAIN,
    SEQ2SEQ,
    Choice,
    Judge,
    Skeleton,
    outputs_of,
)
from tightship.exporters.onnx_schemes import PORTABLE, ROUNDED, fixed_shapes, layouts_of, style_for, style_of
from tightship.exporters.onnx_speed import ONE_NODE, SLOW_HALF, speed_notes
from tightship.exporters.onnx_stacks import check_experts, stack_words
from tightship.exporters.onnx_storage import IN_FLOAT32, Style, storage
from tightship.exporters.onnx_units import left_out
from tightship.layout import Layout
from tightship.target import Exported, Progress, Refused, Target, TargetPlan, TensorPlan, no_progress, sorted_files
from tightship.weights import Alias, Dense, Factored, Quantized, Stored

TABLES = ("embedding", "position")  # kinds of tensors whose rows are looked up


class OnnxExporter:
    """See the module docstring. `judge` may be left out for planning; exporting needs it."""

    container = "onnx"

    def __init__(self, judge: Judge | None = None) -> None:
        self.judge = judge

    def layout_for(self, checkpoint: Checkpoint, target: Target) -> Mapping[str, Layout | str]:
        """What the scheme wants of each tensor: a layout, or the word of a float type.

        Raises:
            UsageError: unknown scheme or option.
        """
        return layouts_of(checkpoint, target)

    def activations_for(self, target: Target) -> str | None:
        """The word for calibrated activations; `int8-dynamic` needs none."""
        return ROUNDED.get((target.scheme or "").removesuffix(PORTABLE))

    def plan(self, checkpoint: Checkpoint, target: Target) -> TargetPlan:
        """Storage and bytes of every tensor, without data.

        Raises:
            Unsupported: ONNX cannot say a tensor's values exactly; the message names the nearest layouts.
        """
        if target.options.get("logits") == "last" and checkpoint.architecture.task not in DECODER_TASKS:
            raise Unsupported(f"logits: last is for decoders; this is a {checkpoint.architecture.task} model")
        outputs_of(checkpoint.architecture)
        style = style_for(checkpoint, target)
        fixed_shapes(checkpoint, target)
        needless = left_out(checkpoint)
        stacked: Mapping[str, str] = {}
        if style.one_node:
            check_experts(checkpoint)
            stacked = stack_words(checkpoint)
        tables = {name for name, info in checkpoint.infos().items() if info.rule.kind in TABLES}
        tensors = []
        for name, weight in checkpoint.weights.items():
            if isinstance(weight, Alias) or name in needless:
                continue
            answer = storage(weight, style, table=name in tables)
            if isinstance(answer, Refused):
                nearest = f"nearest layouts: {', '.join(answer.nearest)}" if answer.nearest else None
                raise Unsupported(f"ONNX cannot store this exactly: {answer.reason}", tensor=name, hint=nearest)
            word, reason = _layout_word(weight)
            stored = stacked.get(name, answer.storage)
            tensors.append(TensorPlan(name, name, tuple(weight.shape), word, stored, answer.nbytes, reason))
        total = sum(t.nbytes for t in tensors)
        multiplied = speed_notes(t.storage for t in tensors if t.name not in tables)
        notes = (*_notes(tensors), *multiplied, *left_in_float32(checkpoint), *_omissions(needless))
        notes = (*[SLOW_HALF] * style.half, *[ONE_NODE] * style.one_node, *notes)
        if not fits(checkpoint):
            notes = (*notes, "no genai_config.json: onnxruntime-genai wants keys of one number of heads in all layers")
        return TargetPlan(target, tuple(tensors), total, notes)

    def export(
        self, checkpoint: Checkpoint, plan: TargetPlan, directory: Path, progress: Progress = no_progress
    ) -> Exported:
        """Write the artifact into an existing empty directory.

        Raises:
            Unsupported: no graph source passes the parity check, or a weight does not fit the graph.
            GateFailed: the bytes written are not the planned ones.
        """
        style = style_for(checkpoint, plan.target)
        choice, skeleton = _graph(checkpoint, self.judge, style)
        fix_axes(skeleton.model, fixed_shapes(checkpoint, plan.target))
        cache = cache_of(skeleton)
        if cache and fits(checkpoint) and "logits" not in plan.target.options:
            skeleton.twin = twin_of(skeleton)
        main = main_of(checkpoint, plan.target)
        home = (directory / main).parent
        home.mkdir(exist_ok=True)
        written = write_graph(skeleton, checkpoint, home, style, progress=progress)
        _compare(plan, written)
        write_companions(checkpoint, directory, cache, main, twin=skeleton.twin is not None)
        details = {"candidates": [judgement.to_json() for judgement in choice.judgements]}
        return Exported(tuple(sorted_files(directory)), main, choice.graph_source, details)


def reference_graph(checkpoint: Checkpoint, directory: Path, judge: Judge) -> Path:
    """The plain float32 graph of any checkpoint, weights decoded; returns the path of its main file.

    Raises:
        Unsupported: no graph source passes the parity check.
    """
    decoded = {name: w if isinstance(w, Alias) else _decoded(w) for name, w in checkpoint.weights.items()}
    plain = checkpoint.replace(weights=decoded)
    _, skeleton = _graph(plain, judge, Style(portable=True))
    write_graph(skeleton, plain, directory, style_of(Target("onnx")))
    return directory / main_of(plain, Target("onnx"))


def main_of(checkpoint: Checkpoint, target: Target) -> str:
    """Where the graph lies below the artifact's directory: at its root, or in `onnx/` as model hubs have it.

    Of two graphs it is the decoder's; the encoder's lies beside it.
    """
    folder = target.options.get("folder")
    name = DECODER if checkpoint.architecture.task == SEQ2SEQ else MAIN
    return f"{folder}/{name}" if folder else name


def cache_of(skeleton: Skeleton) -> Cache | None:
    """Heads and head size of the first key cache, or None without a cache, or with one that genai does not know."""
    if skeleton.encoder is not None:
        return None
    first = next((v for v in skeleton.model.graph.inputs if str(v.name).startswith("past_key_values.")), None)
    if first is None or first.shape is None:
        return None
    heads, size = first.shape[1], first.shape[3]
    if not (isinstance(heads, int) and isinstance(size, int)):
        return None
    graph = skeleton.model.graph
    positions = any(value.name == "position_ids" for value in graph.inputs)
    return Cache(heads, size, shared=shares_cache(graph), positions=positions)


def write_companions(
    checkpoint: Checkpoint, directory: Path, cache: Cache | None, main: str = MAIN, *, twin: bool = False
) -> None:
    """config.json, tokenizer files, and genai_config.json for decoders that it can describe (those with a cache).

    `twin`: genai.onnx lies beside the main file, and is what onnxruntime-genai is told to open.
    """
    config = dict(checkpoint.config)
    if Path(main).name == MAIN:  # transformers.js finds data by a graph's own name, so not what two graphs share
        config["transformers.js_config"] = {"use_external_data_format": {MAIN: True}}
    files = {**checkpoint.files, "config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}
    if cache and fits(checkpoint):
        opened = Path(main).with_name(GENAI).as_posix() if twin else main
        files["genai_config.json"] = genai_config(checkpoint, opened, cache)
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _graph(checkpoint: Checkpoint, judge: Judge | None, style: Style) -> tuple[Choice, Skeleton]:
    if judge is None:
        raise UsageError(
            "no graph source is trusted: an ONNX export needs a judge", hint="pass validators.parity.judge"
        )
    packed = packs(checkpoint) and not style.half  # half the casts would stand in the way of one product
    sources = candidates(fused=style.fused, packed=packed, one_node=style.one_node, last=style.last)
    choice = judge(sources, checkpoint)
    shapes = {name: tuple(checkpoint.resolve(name).shape) for name in checkpoint.weights}
    return choice, choice.candidate.build(checkpoint.config, checkpoint.architecture, shapes)


def _decoded(weight: Stored) -> Dense:
    return Dense(tuple(weight.shape), "f32", weight.value)


def _layout_word(weight: Stored) -> tuple[str, str]:
    """Layout word and why it is stored that way."""
    if isinstance(weight, Dense):
        widened = weight.dtype in ("f16", "bf16") and len(weight.shape) < 2
        return weight.dtype, "vectors are widened to float32" if widened else "as the passes left it"
    if isinstance(weight, Quantized):
        return weight.layout.name, "same integers and scales"
    if isinstance(weight, Factored):
        return f"rank-{weight.rank}", "two matrices"
    return f"{_layout_word(weight.base)[0]}+rank-{weight.residual.rank}", "base plus low-rank residual"


def _notes(tensors: list[TensorPlan]) -> tuple[str, ...]:
    notes = ["the graph itself (model.onnx, about 10 kB a block) and alignment come on top of the tensors"]
    narrow = sorted({t.storage for t in tensors if t.storage in ("FLOAT16", "BFLOAT16")})
    if narrow:
        notes.append(f"{' and '.join(narrow)} tensors are widened to float32 when ONNX Runtime loads them")
    tables = sum(t.storage.endswith(IN_FLOAT32) for t in tensors)
    if tables:
        notes.append(f"{tables} matrices are small in the file alone: loaded, they take the memory and time of float32")
    return tuple(notes)


def _omissions(needless: Mapping[str, str]) -> list[str]:
    return [f"left out: {name} ({reason})" for name, reason in sorted(needless.items())]


def _compare(plan: TargetPlan, written: Mapping[str, int]) -> None:
    for tensor in plan.tensors:
        if written.get(tensor.name) != tensor.nbytes:
            raise GateFailed(
                f"{written.get(tensor.name)} bytes were written where the plan says {tensor.nbytes}", tensor=tensor.name
            )
