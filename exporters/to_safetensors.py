"""safetensors artifacts: what transformers, vLLM and SGLang open.

Float tensors keep their element type. Quantized matrices are written as compressed-tensors, GPTQ, AWQ or fine-grained
FP8, the same codes and scales that every other container gets. Aliases that config.json ties are not stored. Names
are those on disk, and Conv1D matrices are turned back.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tightship.checkpoint import Checkpoint
from tightship.dtypes import dtype
from tightship.errors import Unsupported, UsageError
from tightship.exporters.ct_config import check_readable, module, quantization_config, reader_notes
from tightship.exporters.hf_config import config_bytes, portable_config
from tightship.exporters.method_configs import method_config
from tightship.exporters.safetensors_items import COMPRESSED, Item, in_order, items
from tightship.exporters.safetensors_schemes import activations_of, layouts_of, method_of, shard_size
from tightship.exporters.safetensors_shards import Shard, cut, index_bytes
from tightship.formats.safetensors_file import SafetensorsWriter
from tightship.layout import Layout
from tightship.per_layer import KEY, has_unlike_layers
from tightship.target import Exported, Progress, Target, TargetPlan, TensorPlan, no_progress, sorted_files
from tightship.weights import Dense, Quantized, Stored

METADATA = {"format": "pt"}
INDEX = "model.safetensors.index.json"
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
        layouts, infos = _layouts(checkpoint), checkpoint.infos()
        notes = []
        if method_of(target) == COMPRESSED:
            check_readable(layouts, infos, checkpoint.activations)
            notes = reader_notes(layouts, infos, checkpoint.architecture)
        elif layouts:
            _quantization(checkpoint, target)
        planned = [_planned(item) for item in every]
        shards = cut([item.specs for item in every], shard_size(target))
        if len(shards) > 1:
            notes.append(f"{len(shards)} shards")
        return TargetPlan(target, tuple(planned), sum(s.file_bytes(METADATA) for s in shards), tuple(notes))

    def export(
        self, checkpoint: Checkpoint, plan: TargetPlan, directory: Path, progress: Progress = no_progress
    ) -> Exported:
        """Write the weights (shards and index above the shard size), config.json, tokenizer and small files.

        Raises:
            Malformed: a weight holds NaN or infinity.
            Unsupported: as `plan`.
        """
        every = items(checkpoint, method_of(plan.target))
        shards = cut([item.specs for item in every], shard_size(plan.target))
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


def _planned(item: Item) -> TensorPlan:
    word, reason = _layout_word(item.weight)
    nbytes = sum(spec.nbytes for spec in item.specs.values())
    if item.packing is None or not isinstance(item.weight, Quantized):
        stored_as, storage = item.name, dtype(item.weight.dtype).safetensors
    else:
        stored_as, storage = f"{module(item.name)}.{item.packing.main}", item.packing.storage
    return TensorPlan(item.name, stored_as, tuple(item.weight.shape), word, storage, nbytes, reason)


def _layout_word(weight: Stored) -> tuple[str, str]:
    if isinstance(weight, Dense):
        return weight.dtype, "as the passes left it"
    if isinstance(weight, Quantized):
        return weight.layout.name, "same integers and scales"
    return type(weight).__name__.lower(), ""


def _layouts(checkpoint: Checkpoint) -> dict[str, Layout]:
    resolved = {name: checkpoint.resolve(name) for name in checkpoint.weights}
    return {name: weight.layout for name, weight in resolved.items() if isinstance(weight, Quantized)}


def _write_index(shards: list[Shard], directory: Path) -> str:
    """The name of the file that a reader opens first."""
    if len(shards) == 1:
        return shards[0].name
    (directory / INDEX).write_bytes(index_bytes(shards))
    return INDEX


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
    for weight in checkpoint.weights.values():
        if isinstance(weight, Dense) and dtype(weight.dtype).is_float:
            elements[weight.dtype] += math.prod(weight.shape)
    commonest = max(sorted(elements), key=lambda word: elements[word], default="f32")
    section = _quantization(checkpoint, target) if _layouts(checkpoint) else None
    element_type = _TORCH_NAMES.get(commonest, "float32")
    return portable_config(checkpoint.config, dtype=element_type, torch_dtype=None, quantization_config=section)


def _quantization(checkpoint: Checkpoint, target: Target) -> dict[str, Any]:
    """The quantization section for config.json.

    Raises:
        Unsupported: the method has one layout a file, and there are several.
    """
    layouts, infos = _layouts(checkpoint), checkpoint.infos()
    ignored = [
        module(name)
        for name, info in infos.items()
        if name in checkpoint.weights and name not in layouts and info.rule.kind in _LINEAR_MODULES
    ]
    if method_of(target) != COMPRESSED:
        return method_config(method_of(target), layouts, ignored)
    return quantization_config(layouts, infos, ignored, checkpoint.activations)
