"""What each weight of a checkpoint becomes in a safetensors file: names, element types, shapes, and the data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tightship.architecture import TensorInfo
from tightship.checkpoint import Checkpoint
from tightship.dtypes import BY_NUMPY, dtype
from tightship.errors import Unsupported
from tightship.exporters.ct_config import FORMAT, module
from tightship.formats.layouts.affine import Affine
from tightship.formats.packings.compressed_tensors import pack_quantized, packed_specs
from tightship.formats.safetensors_file import Spec
from tightship.target import Exact, Refused
from tightship.weights import Alias, Dense, Quantized, Stored, check_finite


@dataclass(frozen=True)
class Item:
    """One weight of the checkpoint.

    Attributes:
        specs: the tensors it becomes, by name in the file.
        turned: whether the file holds it as (in, out).
    """

    name: str
    weight: Dense | Quantized
    specs: Mapping[str, Spec]
    turned: bool

    def arrays(self) -> dict[str, np.ndarray]:
        """The data of `specs`, read now.

        Raises:
            Malformed: NaN or infinity.
        """
        if isinstance(self.weight, Dense):
            array = check_finite(self.name, self.weight.read())
            return {self.name: np.ascontiguousarray(array.T) if self.turned else array}
        arrays = self.weight.read()
        check_finite(self.name, arrays["scale"])
        packed = pack_quantized(_affine(self.weight), arrays)
        return {f"{module(self.name)}.{suffix}": array for suffix, array in packed.items()}


def storage(weight: Stored) -> Exact | Refused:
    """How this container stores a weight, and the bytes of all its tensors."""
    if isinstance(weight, Dense):
        return Exact(dtype(weight.dtype).safetensors, weight.nbytes)
    if isinstance(weight, Quantized):
        if isinstance(weight.layout, Affine):
            return Exact(FORMAT, sum(spec.nbytes for spec in packed_specs(weight.layout, weight.shape).values()))
        bits = getattr(weight.layout, "bits", 4)
        nearest = (f"int{bits}-g32", f"int{bits}-g32-asym")
        return Refused(f"compressed-tensors has no layout {weight.layout.name}", nearest)
    return Refused("transformers reads no low-rank factors from a checkpoint", ("int4", "int8"))


def items(checkpoint: Checkpoint) -> list[Item]:
    """Every stored weight in the order of its name.

    Raises:
        Unsupported: naming the tensor, and the layouts that would do.
    """
    if checkpoint.activations or checkpoint.adapters:
        raise Unsupported("safetensors artifacts with quantized activations or adapters are not made yet")
    infos = checkpoint.infos()
    found = []
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
        found.append(_item(checkpoint, name, weight, infos.get(name)))
    return found


def in_order(order: Sequence[str], every: Sequence[Item]) -> Iterator[tuple[str, np.ndarray]]:
    """Data in the writer's order; the tensors of one weight are neighbours, so that each is read once and let go.

    `weight_shape` alone comes early (it is the only one of 8 bytes), and is known without data.
    """
    owner = {tensor: item for item in every for tensor in item.specs}
    ready: dict[str, np.ndarray] = {}
    for name in order:
        item = owner[name]
        if name.endswith(".weight_shape") and isinstance(item.weight, Quantized):
            yield name, np.array(item.weight.shape, np.int64)
            continue
        if name not in ready:
            ready = item.arrays()
        yield name, ready.pop(name)


def _item(checkpoint: Checkpoint, name: str, weight: Stored, info: TensorInfo | None) -> Item:
    turned = info is not None and info.rule.transposed
    if isinstance(weight, Dense):
        shape = weight.shape[::-1] if turned else weight.shape
        return Item(name, weight, {name: Spec(dtype(weight.dtype), tuple(shape))}, turned)
    assert isinstance(weight, Quantized)
    _check_module(checkpoint, name, info)
    specs = packed_specs(_affine(weight), weight.shape)
    named = {f"{module(name)}.{suffix}": Spec(BY_NUMPY[spec.dtype], spec.shape) for suffix, spec in specs.items()}
    return Item(name, weight, named, turned)


def _check_module(checkpoint: Checkpoint, name: str, info: TensorInfo | None) -> None:
    """compressed-tensors packs the weights of `torch.nn.Linear`.

    Raises:
        Unsupported: a Conv1D, an embedding, or a tensor that others share.
    """
    if info is not None and info.rule.transposed:
        raise Unsupported("it lies in a Conv1D, which compressed-tensors does not know", tensor=name)
    if info is not None and info.rule.kind in ("embedding", "position"):
        raise Unsupported(
            "transformers cannot look up rows of a packed embedding",
            tensor=name,
            hint="leave embeddings out of include",
        )
    borrowers = [n for n, w in checkpoint.weights.items() if isinstance(w, Alias) and w.owner == name]
    if borrowers:
        raise Unsupported(
            f"{borrowers[0]} shares this tensor, and packed tensors cannot be shared here",
            tensor=name,
            hint="leave embeddings and head out of include",
        )


def _affine(weight: Quantized) -> Affine:
    if not isinstance(weight.layout, Affine):
        raise TypeError(f"{weight.layout.name} was refused by `storage`")
    return weight.layout
