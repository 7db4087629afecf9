"""safetensors artifacts: what transformers, vLLM and SGLang open.

Float tensors keep their element type. Quantized matrices are written as compressed-tensors, GPTQ, AWQ or fine-grained
FP8, the same codes and scales that every other container gets. Aliases that config.json ties are not stored. Names
are those on disk, and Conv1D matrices are turned back. Low rank is said in `safetensors_factors.py`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tightship.architecture import TensorInfo
from tightship.checkpoint import Checkpoint
from tightship.dtypes import dtype
from tightship.errors import Unsupported, UsageError
from tightship.exporters.ct_config import check_readable, module, quantization_config, reader_notes
from tightship.exporters.hf_config import config_bytes, portable_config
from tightship.exporters.method_configs import method_config
from tightship.exporters.safetensors_factors import (
    ADAPTER,
    FACTORED_STEM,
    STEM,
    adapter_bytes,
    parts,
    ranks,
    residuals,
    write_adapter,
)
from tightship.exporters.safetensors_items import COMPRESSED, Item, in_order, items
from tightship.exporters.safetensors_schemes import activations_of, layouts_of, method_of, shard_size
from tightship.exporters.safetensors_shards import Shard, cut, index_bytes
from tightship.formats.safetensors_file import SafetensorsWriter
from tightship.layout import Layout
from tightship.per_layer import KEY, has_unlike_layers
from tightship.target import Exported, Progress, Target, TargetPlan, TensorPlan, no_progress, sorted_files
from tightship.weights import Dense, Factored, Quantized, Stored

METADATA = {"format": "pt"}
# Kinds of tensors that lie in a torch.nn.Linear, those of heads and poolers too.
_LINEAR_MODULES = ("linear", "head", "router", "other")
_TORCH_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "f64": "float64"}


class SafetensorsExporter:
    """The safetensors container; see `tightship.target.Exporter`."""

    container = "safetensors"

    def layout_for(self, checkpoint: Checkpoint, target: Target) -> dict[str, Layout | str]:
        """On-disk name -> layout, or a float word, for every tensor that the scheme touches; empty without a scheme.

        Raises:
            UsageError: unknown scheme or option.
        """
        return layouts_of(checkpoint, target)

    def activations_for(self, target: Target) -> str | None:
        """What w8a8 and fp8 round at run time; None elsewhere."""
        return activations_of(target)

    def plan(self, checkpoint: Checkpoint, target: Target) -> TargetPlan:
        """Storage and bytes of every tensor and of all weight files, exact, without reading a weight.

        Raises:
            Unsupported: a layout or module that this container cannot carry exactly.
            UsageError: the checkpoint is not what the target's scheme asks for.
        """
        if has_unlike_layers(checkpoint.config):
            raise Unsupported(
                f"transformers reads {KEY} and builds no {checkpoint.architecture.family} layers by it",
                hint="leave out uniform: false, or use gguf or onnx, which hold layers of unlike widths",
            )
        _check_scheme(checkpoint, layouts_of(checkpoint, target))
        every = items(checkpoint, method_of(target))
        layouts, infos = _layouts(checkpoint), _infos(checkpoint)
        notes = []
        if method_of(target) == COMPRESSED:
            check_readable(layouts, infos, checkpoint.activations, checkpoint.architecture)
            notes = reader_notes(layouts, infos, checkpoint.architecture)
        elif layouts:
            _quantization(checkpoint, target)
        planned = _planned(checkpoint, every)
        shards = _shards(checkpoint, every, target)
        notes += [f"{len(shards)} shards"] if len(shards) > 1 else []
        notes += ["factored modules: transformers needs its linear modules replaced first"] if ranks(checkpoint) else []
        notes += (
            [f"{ADAPTER}/ holds corrections, a PEFT adapter to load with the model"] if residuals(checkpoint) else []
        )
        nbytes = sum(s.file_bytes(METADATA) for s in shards) + adapter_bytes(checkpoint, METADATA)
        return TargetPlan(target, tuple(planned), nbytes, tuple(notes))

    def export(
        self, checkpoint: Checkpoint, plan: TargetPlan, directory: Path, progress: Progress = no_progress
    ) -> Exported:
        """Write the weights (shards and index above the shard size), config.json, tokenizer and small files.

        Raises:
            Malformed: a weight holds NaN or infinity.
            Unsupported: as `plan`.
        """
        every = items(checkpoint, method_of(plan.target))
        shards = _shards(checkpoint, every, plan.target)
        total = sum(len(item.specs) for item in every)
        digests: dict[str, str] = {}
        done = 0
        for shard in shards:
            with SafetensorsWriter(directory / shard.name, shard.specs, METADATA) as writer:
                for name, array in in_order(writer.order, every):
                    writer.write(name, array)
                    done += 1
                    progress("write safetensors", done, total)
            digests[shard.name] = writer.sha256
        main = _write_index(shards, directory)
        digests |= write_adapter(checkpoint, directory, METADATA)
        _write_companions(checkpoint, plan.target, directory)
        return Exported(tuple(sorted_files(directory)), main, details={"sha256": digests, "notes": list(plan.notes)})


def _check_scheme(checkpoint: Checkpoint, wanted: Mapping[str, Layout | str]) -> None:
    for name, layout in wanted.items():
        found = _layout_word(checkpoint.resolve(name))[0]
        word = layout if isinstance(layout, str) else layout.name
        if found != word:
            raise UsageError(
                f"the scheme wants {word}, and the tensor is {found}",
                tensor=name,
                hint="use the scheme without a quantize pass, or the target without a scheme",
            )


def _planned(checkpoint: Checkpoint, every: Sequence[Item]) -> list[TensorPlan]:
    """One entry a weight of the checkpoint, whatever it is stored as; then scales of activations."""
    grouped: dict[str, list[Item]] = {}
    for item in every:
        grouped.setdefault(item.owner or item.name, []).append(item)
    corrections = residuals(checkpoint)
    planned = []
    for name, members in grouped.items():
        weight = checkpoint.resolve(name) if name in checkpoint.weights else members[0].weight
        word, reason = _layout_word(weight)
        storage = " @ ".join(_storage_word(item) for item in reversed(members))
        nbytes = sum(spec.nbytes for item in members for spec in item.specs.values())
        if module(name) in corrections:
            storage += " + LoRA"
            nbytes += corrections[module(name)].nbytes
        stored_as = _stored_as(members[0])
        planned.append(TensorPlan(name, stored_as, tuple(weight.shape), word, storage, nbytes, reason))
    return planned


def _stored_as(item: Item) -> str:
    return item.name if item.packing is None else f"{module(item.name)}.{item.packing.main}"


def _storage_word(item: Item) -> str:
    return item.packing.storage if item.packing else dtype(item.weight.dtype).safetensors


def _layout_word(weight: Stored) -> tuple[str, str]:
    if isinstance(weight, Dense):
        return weight.dtype, "as the passes left it"
    if isinstance(weight, Quantized):
        return weight.layout.name, "same integers and scales"
    if isinstance(weight, Factored):
        return f"rank-{weight.rank}", "two linear modules"
    return _layout_word(weight.base)[0], f"with a correction of rank {weight.residual.rank}"


def _layouts(checkpoint: Checkpoint) -> dict[str, Layout]:
    """Layouts of the quantized matrices of the model's own file, by on-disk name."""
    return {p.name: p.weight.layout for p in parts(checkpoint) if isinstance(p.weight, Quantized)}


def _infos(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """The architecture's table, factors in place of what they make."""
    found = {part.name: part.info for part in parts(checkpoint) if part.info is not None}
    factored = {f"{name}.weight" for name in ranks(checkpoint)}
    return found | {name: info for name, info in checkpoint.infos().items() if name not in factored}


def _shards(checkpoint: Checkpoint, every: Sequence[Item], target: Target) -> list[Shard]:
    stem = FACTORED_STEM if ranks(checkpoint) else STEM
    return cut([item.specs for item in every], shard_size(target), stem)


def _write_index(shards: list[Shard], directory: Path) -> str:
    """The name of the file that a reader opens first."""
    if len(shards) == 1:
        return shards[0].name
    index = f"{shards[0].name.rpartition('-00001-')[0]}.safetensors.index.json"
    (directory / index).write_bytes(index_bytes(shards))
    return index


def _write_companions(checkpoint: Checkpoint, target: Target, directory: Path) -> None:
    """config.json, and the tokenizer's and other small files as they are."""
    files = {**checkpoint.files, "config.json": config_bytes(_config(checkpoint, target))}
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _config(checkpoint: Checkpoint, target: Target) -> dict[str, Any]:
    """config.json with the commonest float type of the stored tensors, and the quantization section if there is one."""
    elements: Counter[str] = Counter()
    for weight in (part.weight for part in parts(checkpoint)):
        if isinstance(weight, Dense) and dtype(weight.dtype).is_float:
            elements[weight.dtype] += math.prod(weight.shape)
    commonest = max(sorted(elements), key=lambda word: elements[word], default="f32")
    section = _quantization(checkpoint, target) if _layouts(checkpoint) else None
    element_type = _TORCH_NAMES.get(commonest, "float32")
    found = portable_config(checkpoint.config, dtype=element_type, torch_dtype=None, quantization_config=section)
    return {**found, "low_rank": ranks(checkpoint)} if ranks(checkpoint) else found


def _quantization(checkpoint: Checkpoint, target: Target) -> dict[str, Any]:
    """The quantization section for config.json.

    Raises:
        Unsupported: the method has one layout a file, and there are several.
    """
    layouts, infos = _layouts(checkpoint), _infos(checkpoint)
    stored = {*checkpoint.weights, *(part.name for part in parts(checkpoint))}
    ignored = [
        module(name)
        for name, info in infos.items()
        if name in stored and name not in layouts and info.rule.kind in _LINEAR_MODULES
    ]
    if method_of(target) != COMPRESSED:
        return method_config(method_of(target), layouts, ignored)
    return quantization_config(layouts, infos, ignored, checkpoint.activations)
