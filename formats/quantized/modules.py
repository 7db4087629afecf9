"""Tensors of a quantized checkpoint by module, and what every method's reader does with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tightship.activations import Activations
from tightship.dtypes import dtype
from tightship.errors import Malformed, TightshipError, Unsupported
from tightship.formats.layouts.affine import Affine
from tightship.formats.packings.modules import ModulePacking
from tightship.layout import Arrays, Layout
from tightship.weights import Dense, Quantized

Found = tuple[Mapping[str, Dense | Quantized], dict[str, Activations]]


class Modules:
    """The tensors of a file, taken out as readers claim them."""

    def __init__(self, tensors: Mapping[str, Dense]) -> None:
        self._tensors = dict(tensors)

    def names(self, suffix: str) -> list[str]:
        """Modules that have a tensor `X.suffix`, sorted."""
        return sorted(n.removesuffix(f".{suffix}") for n in self._tensors if n.endswith(f".{suffix}"))

    def peek(self, module: str, suffix: str) -> Dense | None:
        """A tensor, left in place."""
        return self._tensors.get(f"{module}.{suffix}")

    def take(self, module: str, *suffixes: str) -> dict[str, Dense]:
        """Tensors of a module by suffix, those that are there; they are not left any more."""
        names = {suffix: f"{module}.{suffix}" for suffix in suffixes}
        return {suffix: self._tensors.pop(name) for suffix, name in names.items() if name in self._tensors}

    def need(self, module: str, suffix: str) -> Dense:
        """Take one tensor.

        Raises:
            Malformed: it is missing.
        """
        found = self.take(module, suffix)
        if suffix not in found:
            raise Malformed(f"the module is quantized, and its {suffix} is missing", tensor=f"{module}.{suffix}")
        return found[suffix]

    def left(self) -> dict[str, Dense]:
        """What no reader took."""
        return self._tensors


Read = Callable[[Mapping[str, Any], Modules], Found]


def affine(bits: int, group_size: int, scale: np.ndarray, zero_point: np.ndarray | None, *, symmetric: bool) -> Affine:
    """The layout of integers whose scales and signed zero points are known: both of one shape, any orientation.

    The scale type is the narrowest of f16, bf16 and f32 that holds every scale exactly.
    """
    wide = scale.astype(np.float32)
    kind = next(word for word in ("f16", "bf16", "f32") if _fits(wide, dtype(word).numpy))
    low = -(1 << (bits - 1))
    wide_offset = False
    if not symmetric and zero_point is not None and bits < 8:
        wide_offset = not _fits((low - zero_point.astype(np.float64)) * wide, np.float16)
    return Affine(bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=kind, wide_offset=wide_offset)


def _fits(values: np.ndarray, kind: Any) -> bool:
    with np.errstate(over="ignore"):
        return np.array_equal(values.astype(kind).astype(np.float64), values.astype(np.float64))


def quantized(
    name: str, layout: Layout, shape: tuple[int, int], packing: ModulePacking, tensors: Mapping[str, Dense]
) -> Quantized:
    """A lazy weight in its packing; shapes of all tensors are checked now.

    Raises:
        Malformed: a tensor is missing, surplus or of another shape than the layout asks for.
        Unsupported: the packing cannot say this layout.
    """
    specs = packing.check(layout, shape)
    if set(specs) - set(tensors):
        raise Malformed(f"{packing.storage} needs {', '.join(specs)}, found {', '.join(tensors)}", tensor=name)
    for suffix, spec in specs.items():
        if tensors[suffix].shape != spec.shape:
            raise Malformed(
                f"its {suffix} has shape {tensors[suffix].shape}, a {layout.name} matrix of {shape} needs {spec.shape}",
                tensor=name,
            )

    def read() -> Arrays:
        try:
            return packing.unpack(layout, {suffix: tensors[suffix].read() for suffix in specs})
        except TightshipError as error:
            raise type(error)(error.message, tensor=name, hint=error.hint) from error

    return Quantized(layout, shape, read)


def by_column(name: str, weight: Quantized, order: np.ndarray) -> Quantized:
    """A matrix whose columns are in groups `order`, (cols,), wherever they stand: each becomes a group of its own.

    Codes stay, scales and zero points are repeated: the same values.

    Raises:
        Unsupported: not a layout of integers.
    """
    if not isinstance(weight.layout, Affine):
        raise Unsupported(f"groups in another order, of {weight.layout.name}", tensor=name)

    def read() -> Arrays:
        return {key: array if key == "codes" else array[:, order] for key, array in weight.read().items()}

    return Quantized(dataclasses.replace(weight.layout, group_size=1), weight.shape, read)


def group_size_of(value: Any, name: str) -> int:
    """Columns that share a scale; 0 for the formats' -1 and null: the whole row.

    Raises:
        Unsupported: not a size.
    """
    if value in (None, -1, 0):
        return 0
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise Unsupported(f"a group size of {value!r}", tensor=name)
    return value
