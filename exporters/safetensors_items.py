"""What each weight of a checkpoint becomes in a safetensors file: names, element types, shapes, and the data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tightship.activations import Activations, scheme_of
from tightship.architecture import TensorInfo
from tightship.checkpoint import Checkpoint
from tightship.dtypes import BY_NUMPY, dtype
from tightship.errors import Unsupported
from tightship.exporters.ct_config import CACHE_SCALES, module, storage_word
from tightship.exporters.safetensors_factors import Part, parts
from tightship.formats.packings.modules import PACKINGS, ModulePacking
from tightship.formats.safetensors_file import Spec
from tightship.layout import Layout
from tightship.target import Exact, Refused
from tightship.weights import Dense, Quantized, check_finite

COMPRESSED = "compressed-tensors"
_FINE_GRAINED = ("fp8", "fp8-dynamic-g128")  # what the fp8 method says of activations without a word


@dataclass(frozen=True)
class Item:
    """One weight of the checkpoint.

    Attributes:
        specs: the tensors it becomes, by name in the file.
        turned: whether the file holds it as (in, out).
        packing: of a quantized weight.
        owner: the checkpoint's weight that it belongs to, where that has another name.
    """

    name: str
    weight: Dense | Quantized
    specs: Mapping[str, Spec]
    turned: bool
    packing: ModulePacking | None = None
    owner: str | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """The data of `specs`, read now.

        Raises:
            Malformed: NaN or infinity.
        """
        if isinstance(self.weight, Dense):
            array = check_finite(self.name, self.weight.read())
            return {self.name: np.ascontiguousarray(array.T) if self.turned else array}
        arrays = self.weight.read()
        for array in arrays.values():
            check_finite(self.name, array)
        assert self.packing is not None
        packed = self.packing.pack(self.weight.layout, arrays)
        return {f"{module(self.name)}.{suffix}": array for suffix, array in packed.items()}


def storage(weight: Dense | Quantized, method: str = COMPRESSED, activations: str | None = None) -> Exact | Refused:
    """How this container stores a weight by a quantization method, and the bytes of all its tensors.

    `activations` is the word for the inputs of the matrix.
    """
    if isinstance(weight, Dense):
        return Exact(dtype(weight.dtype).safetensors, weight.nbytes)
    packing = _packing(weight.layout, method, activations)
    bits = getattr(weight.layout, "bits", 4)
    nearest = (f"int{bits}-g32", f"int{bits}-g32-asym")
    if packing is None:
        return Refused(f"{method} has no layout {weight.layout.name}", nearest)
    try:
        specs = packing.check(weight.layout, weight.shape)
    except Unsupported as error:
        return Refused(error.message, nearest)
    return Exact(packing.storage, sum(spec.nbytes for spec in specs.values()))


def items(checkpoint: Checkpoint, method: str = COMPRESSED) -> list[Item]:
    """Every stored weight in the order of its name, then static scales of activations and caches.

    Raises:
        Unsupported: naming the tensor, and the layouts that would do.
    """
    if checkpoint.adapters:
        raise Unsupported("safetensors artifacts with adapters are not made yet")
    _check_activations(checkpoint, method)
    found = []
    for part in parts(checkpoint):
        inputs = checkpoint.activations.get(module(part.name))
        answer = storage(part.weight, method, inputs.scheme if inputs else None)
        if isinstance(answer, Refused):
            raise Unsupported(
                f"safetensors cannot store this exactly: {answer.reason}",
                tensor=part.owner,
                hint=f"nearest layouts: {', '.join(answer.nearest)}",
            )
        found.append(_item(part, PACKINGS.get(answer.storage)))
    return found + [
        Item(name, weight, {name: Spec(dtype(weight.dtype), weight.shape)}, turned=False)
        for place, activations in sorted(checkpoint.activations.items())
        for name, weight in static_tensors(place, activations).items()
    ]


def static_tensors(place: str, activations: Activations) -> dict[str, Dense]:
    """Tensors that say static activations, by name; empty for dynamic ones.

    | tensor                    | type | said of                                    |
    |---------------------------|------|--------------------------------------------|
    | X.input_scale             | F32  | inputs of the linear X, static             |
    | X.input_zero_point        | I8   | the same, asymmetric                       |
    | X.input_global_scale      | F32  | the same, NVFP4                            |
    | A.k_scale, A.v_scale      | F32  | the cache of the attention A               |
    """
    scheme = scheme_of(activations.scheme)
    if not scheme.static:
        return {}
    if place.endswith(CACHE_SCALES):
        return {place: _scalar(activations.scale, np.float32)}
    if scheme.numbers == "fp4":
        return {f"{place}.input_global_scale": _scalar(activations.scale, np.float32)}
    found = {f"{place}.input_scale": _scalar(activations.scale, np.float32)}
    if not scheme.symmetric:
        found[f"{place}.input_zero_point"] = _scalar(activations.zero_point, np.int8)
    return found


def _scalar(value: float | None, kind: type[np.generic]) -> Dense:
    return Dense((1,), BY_NUMPY[np.dtype(kind)].name, lambda: np.array([value], kind))


def _packing(layout: Layout, method: str, activations: str | None) -> ModulePacking | None:
    word = storage_word(layout, activations) if method == COMPRESSED else method
    return PACKINGS.get(word) if word else None


def _check_activations(checkpoint: Checkpoint, method: str) -> None:
    """Raises Unsupported: activations that the method cannot say."""
    for place, activations in checkpoint.activations.items():
        if method != COMPRESSED and (method, activations.scheme) != _FINE_GRAINED:
            raise Unsupported(
                f"{method} cannot say that activations are {activations.scheme}",
                tensor=place,
                hint="use the format compressed-tensors",
            )
        weight = checkpoint.weights.get(f"{place}.weight")
        group = scheme_of(activations.scheme).group
        if isinstance(weight, Quantized) and group and weight.shape[1] % group:
            raise Unsupported(
                f"its inputs are rounded in groups of {group}, and {weight.shape[1]} channels are no multiple of that",
                tensor=f"{place}.weight",
                hint="use activations with one scale a token, such as fp8-dynamic",
            )


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


def _item(part: Part, packing: ModulePacking | None) -> Item:
    name, weight = part.name, part.weight
    turned = part.info is not None and part.info.rule.transposed
    if isinstance(weight, Dense):
        shape = weight.shape[::-1] if turned else weight.shape
        return Item(name, weight, {name: Spec(dtype(weight.dtype), tuple(shape))}, turned, owner=part.owner)
    assert packing is not None
    _check_module(name, part.info)
    specs = packing.check(weight.layout, weight.shape)
    named = {f"{module(name)}.{suffix}": Spec(BY_NUMPY[spec.dtype], spec.shape) for suffix, spec in specs.items()}
    return Item(name, weight, named, turned, packing, part.owner)


def _check_module(name: str, info: TensorInfo | None) -> None:
    """Quantization methods pack the weights of `torch.nn.Linear`.

    Raises:
        Unsupported: a Conv1D, or an embedding (and so whatever a head is tied to).
    """
    if info is not None and info.rule.transposed:
        raise Unsupported("it lies in a Conv1D, which quantization methods do not know", tensor=name)
    if info is not None and info.rule.kind in ("embedding", "position"):
        raise Unsupported(
            "transformers cannot look up rows of a packed embedding",
            tensor=name,
            hint="leave embeddings out of include",
        )
