"""safetensors artifacts: what transformers, vLLM and SGLang open.

Float tensors keep their element type. Affine integers are written as compressed-tensors pack-quantized, the same
integers and scales that every other container gets. Aliases are not stored: config.json ties them. Names are those on
disk, and Conv1D matrices are turned back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tightship.architecture import TensorInfo
from tightship.checkpoint import Checkpoint
from tightship.dtypes import dtype
from tightship.errors import Unsupported, UsageError
from tightship.exporters.ct_config import FORMAT, kernel_notes, module, quantization_config
from tightship.exporters.hf_config import config_bytes, portable_config
from tightship.exporters.safetensors_schemes import layouts_of, shard_size
from tightship.exporters.safetensors_shards import Shard, cut, index_bytes
from tightship.formats.layouts.affine import Affine
from tightship.formats.packings.compressed_tensors import pack_quantized, packed_specs
from tightship.formats.safetensors_file import SafetensorsWriter, Spec
from tightship.layout import ArraySpec, Layout
from tightship.target import (
    Exact,
    Exported,
    Progress,
    Refused,
    Target,
    TargetPlan,
    TensorPlan,
    no_progress,
    sorted_files,
)
from tightship.weights import Alias, Dense, Quantized, Stored, check_finite

METADATA = {"format": "pt"}


@dataclass(frozen=True)
class _Item:
    """One weight of the checkpoint and the tensors it becomes, by name in the file."""

    name: str
    weight: Dense | Quantized
    info: TensorInfo | None
    specs: Mapping[str, Spec]

    def arrays(self) -> dict[str, np.ndarray]:
        """The data of `specs`, read now.

        Raises:
            Malformed: NaN or infinity.
        """
        if isinstance(self.weight, Dense):
            array = check_finite(self.name, self.weight.read())
            return {self.name: np.ascontiguousarray(array.T) if _turned(self.info) else array}
        assert isinstance(self.weight.layout, Affine)
        arrays = self.weight.read()
        check_finite(self.name, arrays["scale"])
        packed = pack_quantized(self.weight.layout, arrays)
        return {f"{module(self.name)}.{suffix}": array for suffix, array in packed.items()}


class SafetensorsExporter:
    """The safetensors container; see `tightship.target.Exporter`."""

    container = "safetensors"

    def layout_for(self, checkpoint: Checkpoint, target: Target) -> dict[str, Layout | str]:
        """On-disk name -> layout, or a float word, for every tensor that the scheme touches; empty without a scheme.

        Raises:
            UsageError: unknown scheme or option.
            Unsupported: a scheme that is not made yet.
        """
        return layouts_of(checkpoint, target)

    def plan(self, checkpoint: Checkpoint, target: Target) -> TargetPlan:
        """Storage and bytes of every tensor and of all weight files, exact, without reading a weight.

        Raises:
            Unsupported: a layout or module that this container cannot carry exactly.
            UsageError: the checkpoint is not what the target's scheme asks for.
        """
        _check_scheme(checkpoint, layouts_of(checkpoint, target))
        items = _items(checkpoint)
        planned = []
        for item in items:
            answer = storage(item.weight)
            assert isinstance(answer, Exact)
            stored_as = f"{module(item.name)}.weight_packed" if isinstance(item.weight, Quantized) else item.name
            word, reason = _layout_word(item.weight)
            shape = tuple(item.weight.shape)
            planned.append(TensorPlan(item.name, stored_as, shape, word, answer.storage, answer.nbytes, reason))
        shards = _shards(items, target)
        notes = kernel_notes(_affine(checkpoint), checkpoint.infos())
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
        items = _items(checkpoint)
        shards = _shards(items, plan.target)
        by_tensor = {tensor: item for item in items for tensor in item.specs}
        digests = {}
        done = 0
        for shard in shards:
            with SafetensorsWriter(directory / shard.name, shard.specs, METADATA) as writer:
                for name, array in _in_order(writer.order, by_tensor):
                    writer.write(name, array)
                    done += 1
                    progress("write safetensors", done, len(by_tensor))
            digests[shard.name] = writer.sha256
        main = shards[0].name
        if len(shards) > 1:
            main = "model.safetensors.index.json"
            (directory / main).write_bytes(index_bytes(shards))
        _write_companions(checkpoint, directory)
        return Exported(tuple(sorted_files(directory)), main, details={"sha256": digests, "notes": list(plan.notes)})


def storage(weight: Stored) -> Exact | Refused:
    """How this container stores a weight, and the bytes of all its tensors."""
    if isinstance(weight, Dense):
        return Exact(dtype(weight.dtype).safetensors, weight.nbytes)
    if isinstance(weight, Quantized):
        if isinstance(weight.layout, Affine):
            return Exact(FORMAT, sum(spec.nbytes for spec in packed_specs(weight.layout, weight.shape).values()))
        bits = getattr(weight.layout, "bits", 4)
        return Refused(
            f"compressed-tensors has no layout {weight.layout.name}", (f"int{bits}-g32", f"int{bits}-g32-asym")
        )
    return Refused("transformers reads no low-rank factors from a checkpoint", ("int4", "int8"))


def _items(checkpoint: Checkpoint) -> list[_Item]:
    """Every stored weight in the order of its name.

    Raises:
        Unsupported: naming the tensor, and the layouts that would do.
    """
    if checkpoint.activations or checkpoint.adapters:
        raise Unsupported("safetensors artifacts with quantized activations or adapters are not made yet")
    infos = checkpoint.infos()
    items = []
    for name, weight in checkpoint.weights.items():
        if isinstance(weight, Alias):
            continue
        answer = storage(weight)
        if isinstance(answer, Refused):
            raise Unsupported(
                f"safetensors cannot store this exactly: {answer.reason}",
                tensor=name,
                hint=f"nearest layouts: {', '.join(answer.nearest)}",
            )
        assert isinstance(weight, Dense | Quantized)
        info = infos.get(name)
        if isinstance(weight, Quantized):
            _check_module(checkpoint, name, info)
        items.append(_Item(name, weight, info, _specs(name, weight, info)))
    return items


def _specs(name: str, weight: Dense | Quantized, info: TensorInfo | None) -> dict[str, Spec]:
    if isinstance(weight, Dense):
        shape = weight.shape[::-1] if _turned(info) else weight.shape
        return {name: Spec(dtype(weight.dtype), tuple(shape))}
    assert isinstance(weight.layout, Affine)
    specs = packed_specs(weight.layout, weight.shape)
    return {f"{module(name)}.{suffix}": _spec(spec) for suffix, spec in specs.items()}


def _spec(spec: ArraySpec) -> Spec:
    from tightship.dtypes import BY_NUMPY

    return Spec(BY_NUMPY[spec.dtype], spec.shape)


def _turned(info: TensorInfo | None) -> bool:
    return info is not None and info.rule.transposed


def _check_module(checkpoint: Checkpoint, name: str, info: TensorInfo | None) -> None:
    """compressed-tensors replaces `torch.nn.Linear` and nothing else.

    Raises:
        Unsupported: a Conv1D, an expert that transformers fuses, or a tensor that others share.
    """
    if _turned(info):
        raise Unsupported("it lies in a Conv1D, which compressed-tensors does not know", tensor=name)
    if info is not None and info.expert is not None:
        raise Unsupported("transformers fuses the experts on loading; compressed-tensors cannot follow", tensor=name)
    borrowers = [n for n, w in checkpoint.weights.items() if isinstance(w, Alias) and w.owner == name]
    if borrowers:
        raise Unsupported(
            f"{borrowers[0]} shares this tensor, and packed tensors cannot be shared here",
            tensor=name,
            hint="leave embeddings and head out",
        )


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


def _layout_word(weight: Stored) -> tuple[str, str]:
    if isinstance(weight, Dense):
        return weight.dtype, "as the passes left it"
    if isinstance(weight, Quantized):
        return weight.layout.name, "same integers and scales"
    return type(weight).__name__.lower(), ""


def _affine(checkpoint: Checkpoint) -> dict[str, Affine]:
    return {
        name: weight.layout
        for name, weight in checkpoint.weights.items()
        if isinstance(weight, Quantized) and isinstance(weight.layout, Affine)
    }


def _shards(items: list[_Item], target: Target) -> list[Shard]:
    return cut([item.specs for item in items], shard_size(target))


def _in_order(order: tuple[str, ...], by_tensor: Mapping[str, _Item]) -> Iterator[tuple[str, np.ndarray]]:
    """Data in the writer's order; the tensors of one weight are neighbours, so that each is read once and let go.

    `weight_shape` alone comes early (it is the only one of 8 bytes), and is known without data.
    """
    ready: dict[str, np.ndarray] = {}
    for name in order:
        item = by_tensor[name]
        if name.endswith(".weight_shape") and isinstance(item.weight, Quantized):
            yield name, np.array(item.weight.shape, np.int64)
            continue
        if name not in ready:
            ready = item.arrays()
        yield name, ready.pop(name)


def _write_companions(checkpoint: Checkpoint, directory: Path) -> None:
    """config.json, and the tokenizer's and other small files as they are."""
    files = {**checkpoint.files, "config.json": config_bytes(_config(checkpoint))}
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _config(checkpoint: Checkpoint) -> dict[str, object]:
    layouts, infos = _affine(checkpoint), checkpoint.infos()
    elements: dict[str, int] = {}
    for weight in checkpoint.weights.values():
        if isinstance(weight, Dense) and dtype(weight.dtype).is_float:
            elements[weight.dtype] = elements.get(weight.dtype, 0) + int(np.prod(weight.shape))
    commonest = max(sorted(elements), key=lambda word: elements[word], default="f32")
    section = None
    if layouts:
        ignored = [
            module(name)
            for name, info in infos.items()
            if name in checkpoint.weights and name not in layouts and info.rule.kind in _LINEAR_MODULES
        ]
        section = quantization_config(layouts, infos, [m for m in ignored if m])
    names = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
    return portable_config(
        checkpoint.config, dtype=names.get(commonest, "float32"), torch_dtype=None, quantization_config=section
    )


# Kinds of tensors that lie in a torch.nn.Linear: the heads' and poolers' too.
_LINEAR_MODULES = ("linear", "head", "router", "other")
