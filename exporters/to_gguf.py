"""GGUF artifacts: one file that llama.cpp, Ollama and their kin open, and an Ollama Modelfile beside it.

Quantized layouts go in as they are; a scheme is what llama-quantize calls a file type. Options of a target:

| option     | meaning                                                                                          |
|------------|--------------------------------------------------------------------------------------------------|
| overrides  | {pattern in the GGUF name: type}; the first that is found decides                                 |
| context    | a shorter context length; makes a sliding window harmless that the loader would ignore            |
| shard_bytes| data bytes of one file; larger models become NAME-00001-of-0000N.gguf ...                         |
| sparse     | `refuse` (the default) a type that undoes pruning, or `steer` to the nearest that keeps zeros    |
| adapter    | a directory with a LoRA adapter of PEFT, written as adapter.gguf beside the model                 |
| chat_template | a file with the template to write instead of the checkpoint's                                 |
| metadata   | {key: value} of `general.*` and of your own; null takes a key away                                |
| solver     | how a scheme is solved; anything but `rtn` counts as importance for the rules of the scheme       |
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported, UsageError
from tightship.exporters import gguf_mixes
from tightship.exporters.gguf_lora import ADAPTER, RESIDUAL, residual_bytes, write_adapter, write_residual
from tightship.exporters.gguf_metadata import closing_fields, general_fields, gguf_section, head_dim, model_fields
from tightship.exporters.gguf_options import STEERED, guarded, with_metadata, with_template
from tightship.exporters.gguf_rope import rope
from tightship.exporters.gguf_tensors import FileTensor, chunks, file_order, file_tensors, stored_type
from tightship.exporters.gguf_tokenizer import tokenizer_fields
from tightship.formats.gguf_file import Field
from tightship.formats.gguf_shards import cut, shards_bytes, write_shards
from tightship.formats.gguf_writer import TensorToWrite, file_bytes, write_gguf
from tightship.formats.layouts import parse_layout
from tightship.formats.packings.ggml import FLOAT_TYPES, ggml_type_for
from tightship.layout import Layout
from tightship.target import Exported, Progress, Target, TargetPlan, TensorPlan, no_progress, sorted_files
from tightship.weights import Dense, Quantized


class GgufExporter:
    """The GGUF container; see `tightship.target.Exporter`."""

    container = "gguf"

    def layout_for(self, checkpoint: Checkpoint, target: Target) -> dict[str, Layout | str]:
        """On-disk name -> layout, or a float word, for every tensor that the scheme touches; empty without a scheme.

        Raises:
            UsageError: unknown scheme or override.
            Unsupported: a type whose layout we cannot solve, or that needs importance data.
        """
        gguf_section(checkpoint)
        tensors = file_tensors(checkpoint)
        choices = _choices(checkpoint, target, tensors)
        return {
            source.name: _layout(choices[tensor.name].type_name, source.name)
            for tensor in tensors
            if tensor.name in choices
            for source in tensor.sources
        }

    def activations_for(self, target: Target) -> str | None:  # noqa: ARG002 - llama.cpp rounds activations by itself
        return None

    def plan(self, checkpoint: Checkpoint, target: Target) -> TargetPlan:
        """Types and sizes of all tensors and of the file, exact, without reading a weight.

        Raises:
            Unsupported: the family, a feature, the tokenizer, or a layout that GGUF cannot hold exactly.
        """
        tensors = file_tensors(checkpoint)
        choices = _choices(checkpoint, target, tensors)
        planned: list[TensorPlan] = []
        for tensor in tensors:
            planned += _planned(tensor, choices.get(tensor.name), mixed="bytes" in target.options)
        fields, notes = _fields(checkpoint, target, [p.storage for p in planned])
        if target.options.get("adapter") is not None:
            notes.append(f"{ADAPTER} is written beside the model; the proof runs the model without it")
        corrections = residual_bytes(checkpoint)
        planned = [dataclasses.replace(p, nbytes=p.nbytes + corrections.get(p.name, 0)) for p in planned]
        if corrections:
            notes.append(f"{RESIDUAL} holds corrections of low rank: load it with the model, --lora {RESIDUAL}")
        steered = sum(STEERED in p.reason for p in planned)
        if checkpoint.activations:
            notes.append("scales of activations and caches have no place in GGUF: llama.cpp rounds in its own way")
        notes += [f"{steered} pruned tensors are stored in types that keep their zeros"] if steered else []
        computed = _computed(checkpoint)
        planned += [
            TensorPlan(t.name, t.name, t.shape, "f32", "F32", t.nbytes, "computed from config") for t in computed
        ]
        types = {p.stored_as: p.storage for p in planned}
        listed = _in_order([_to_write(t, types[t.name]) for t in tensors], computed)
        limit = _shard_limit(target)
        size = shards_bytes(fields, listed, limit) if _is_sharded(listed, limit) else file_bytes(fields, listed)
        return TargetPlan(target, tuple(planned), size + sum(corrections.values()), tuple(notes))

    def export(
        self, checkpoint: Checkpoint, plan: TargetPlan, directory: Path, progress: Progress = no_progress
    ) -> Exported:
        """Write NAME.gguf or NAME-SCHEME.gguf and a Modelfile.

        Raises:
            Malformed: a weight holds NaN or infinity.
            Unsupported: as `plan`; or a value that its type cannot hold.
        """
        types = {p.stored_as: p.storage for p in plan.tensors}
        tensors = file_tensors(checkpoint)
        fields, _ = _fields(checkpoint, plan.target, [p.storage for p in plan.tensors])
        listed = _in_order([_to_write(t, types[t.name]) for t in tensors], _computed(checkpoint))
        stem, limit = file_stem(checkpoint, plan.target), _shard_limit(plan.target)
        if _is_sharded(listed, limit):
            written = write_shards(directory, stem, fields, listed, limit=limit, progress=progress)
        else:
            written = {f"{stem}.gguf": write_gguf(directory / f"{stem}.gguf", fields, listed, progress)}
        main = min(written)
        modelfile = f"FROM ./{main}\n"
        if residual_bytes(checkpoint):
            written[RESIDUAL] = write_residual(checkpoint, directory / RESIDUAL)
            modelfile += f"ADAPTER ./{RESIDUAL}\n"
        (directory / "Modelfile").write_text(modelfile, encoding="utf-8")
        if plan.target.options.get("adapter") is not None:
            write_adapter(checkpoint, Path(str(plan.target.options["adapter"])), directory / ADAPTER)
        if "imatrix.gguf" in checkpoint.files:
            (directory / "imatrix.gguf").write_bytes(checkpoint.files["imatrix.gguf"])
        fallbacks = sum("needs rows in blocks" in p.reason for p in plan.tensors)
        steered = sum(STEERED in p.reason for p in plan.tensors)
        digests = {name: file.sha256 for name, file in written.items()}
        details = {"sha256": digests, "fallbacks": fallbacks, "steered": steered, "notes": list(plan.notes)}
        return Exported(tuple(sorted_files(directory)), main, details=details)


def file_stem(checkpoint: Checkpoint, target: Target) -> str:
    """`NAME`, or `NAME-SCHEME` with the scheme in upper case."""
    return f"{checkpoint.name}-{target.scheme.upper()}" if target.scheme else checkpoint.name


def _shard_limit(target: Target) -> int:
    """Data bytes of one file; 0 means one file for everything."""
    limit = target.options.get("shard_bytes", 0)
    if not isinstance(limit, int) or limit < 0:
        raise UsageError(f"shard_bytes must be a number of bytes, found {limit!r}")
    return limit


def _is_sharded(tensors: Sequence[TensorToWrite], limit: int) -> bool:
    return limit > 0 and len(cut(tensors, limit)) > 1


def _choices(checkpoint: Checkpoint, target: Target, tensors: list[FileTensor]) -> Mapping[str, gguf_mixes.Choice]:
    overrides = target.options.get("overrides") or {}
    if target.scheme is None:
        if overrides:
            raise UsageError("overrides belong to a scheme; without one, what the passes left is carried")
        return {}
    hyper = checkpoint.hyper
    model = gguf_mixes.Model(
        arch=str(gguf_section(checkpoint)["arch"]),
        layers=int(hyper["layers"]),
        heads=int(hyper.get("heads", 0)),
        kv_heads=int(hyper.get("kv_heads", hyper.get("heads", 0))),
        experts=int(hyper.get("experts", 0)),
        importance=target.options.get("solver", "rtn") != "rtn",
    )
    chosen = gguf_mixes.choose(target.scheme.lower(), [t.matrix for t in tensors], model, overrides)
    return guarded(chosen, tensors, checkpoint, target.options)


def _layout(type_name: str, name: str) -> Layout | str:
    if type_name in FLOAT_TYPES:
        return type_name.lower()
    try:
        layout = parse_layout(type_name.lower())
    except UsageError as error:
        raise Unsupported(f"GGML type {type_name} has no solver here", tensor=name) from error
    if ggml_type_for(layout) != type_name:
        raise Unsupported(f"layout {layout.name} is not stored as {type_name}", tensor=name)
    return layout


def _planned(tensor: FileTensor, choice: gguf_mixes.Choice | None, *, mixed: bool) -> list[TensorPlan]:
    """`mixed`: types were chosen within a budget, not by the scheme."""
    wanted = _layout(choice.type_name, tensor.sources[0].name) if choice else None
    type_name, layout = stored_type(tensor, wanted)
    if choice and choice.type_name != type_name and mixed and isinstance(tensor.weights[0], Quantized):
        choice = dataclasses.replace(choice, type_name=type_name, reason="within the budget of bytes")
    if choice and choice.type_name != type_name:
        raise UsageError(
            f"{tensor.sources[0].name} is {layout} already, and the scheme wants {choice.type_name}",
            hint="use the scheme without a quantize pass, or the target without a scheme",
        )
    reason = choice.reason if choice else _why(tensor, type_name)
    nbytes = _to_write(tensor, type_name).nbytes // len(tensor.sources)
    shape = tuple(tensor.weights[0].shape)
    return [TensorPlan(s.name, tensor.name, shape, layout, type_name, nbytes, reason) for s in tensor.sources]


def _why(tensor: FileTensor, type_name: str) -> str:
    if isinstance(tensor.weights[0], Quantized):
        return "as quantized"
    return "as stored" if tensor.weights[0].dtype == type_name.lower() else "widened: llama.cpp wants F32 here"


def _to_write(tensor: FileTensor, type_name: str) -> TensorToWrite:
    return TensorToWrite(tensor.name, type_name, tensor.shape, functools.partial(chunks, tensor, type_name))


def _computed(checkpoint: Checkpoint) -> list[TensorToWrite]:
    """Tensors that no checkpoint holds: rotary factors."""
    gguf = gguf_section(checkpoint)
    if gguf["rope"] == "none":
        return []
    hyper = {**checkpoint.hyper, "head_dim": head_dim(checkpoint.hyper)}
    factors = rope(checkpoint.config, hyper, gguf).factors
    tensors = [FileTensor(name, (), (Dense.of(values),)) for name, values in factors.items()]
    return [_to_write(tensor, "F32") for tensor in tensors]


def _in_order(tensors: list[TensorToWrite], more: list[TensorToWrite]) -> list[TensorToWrite]:
    return sorted([*tensors, *more], key=lambda t: file_order(t.name))


def _fields(checkpoint: Checkpoint, target: Target, types: list[str]) -> tuple[dict[str, Field], list[str]]:
    """All metadata in the file's order, and notes."""
    general, notes = general_fields(checkpoint, str(gguf_section(checkpoint)["arch"]))
    model = model_fields(checkpoint, target.options.get("context"))
    tokenizer, more = tokenizer_fields(with_template(checkpoint, target.options))
    fields = general | model | tokenizer | closing_fields(_file_type(target, types))
    return with_metadata(fields, target.options), [*notes, *more]


def _file_type(target: Target, types: list[str]) -> str | None:
    """The scheme's file type, or the one that names the commonest type of the matrices."""
    if target.scheme:
        return str(gguf_mixes.scheme(target.scheme.lower())["file_type"])
    names: Mapping[str, Any] = gguf_mixes.tables()["file_types"]
    matrices = Counter(t for t in types if t != "F32") or Counter(types)
    commonest = max(matrices, key=lambda t: (matrices[t], t))
    return names.get(commonest)
