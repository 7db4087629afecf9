"""Follows tensors through other people's renaming code, without data: storages and strides of meta tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tightship.architecture import Architecture
from tightship.errors import Unsupported
from tightship.exporters.onnx_candidates.skeleton import Feed

if TYPE_CHECKING:
    import torch


def meta_tensors(
    architecture: Architecture, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, torch.Tensor]:
    """One tensor without data for each stored tensor, oriented as on disk; the storage is (out, in) throughout."""
    import torch

    infos = architecture.lookup(config)
    found = {}
    for name, shape in shapes.items():
        tensor = torch.empty(shape, device="meta")
        turned = name in infos and infos[name].rule.transposed
        found[name] = tensor.t() if turned else tensor
    return found


def view_of(name: str, tensor: torch.Tensor, stored: Mapping[str, torch.Tensor]) -> Feed:
    """Which rows of which stored tensor this is, and whether turned.

    Raises:
        Unsupported: it is no plain view of one stored tensor.
    """
    origin = next((key for key, value in stored.items() if _same_storage(value, tensor)), None)
    if origin is None:
        raise Unsupported(f"{name} is computed from stored tensors, not cut from one")
    base = stored[origin]
    shape = tuple(base.shape) if base.is_contiguous() else tuple(base.t().shape)
    width = shape[1] if len(shape) == 2 else 1
    offset = int(tensor.storage_offset())
    transpose = tensor.dim() == 2 and not tensor.is_contiguous()
    rows_first = tensor.t() if transpose else tensor
    if tensor.dim() > 2:
        whole = rows_first.is_contiguous() and tuple(tensor.shape) == shape
        start, stop = (0, shape[0]) if whole else (0, -1)
    else:
        whole = rows_first.is_contiguous() and offset % width == 0 and tuple(rows_first.shape[1:]) == shape[1:]
        start = offset // width
        stop = start + rows_first.shape[0] if whole else -1
    if stop < 0:
        raise Unsupported(f"{name} is neither rows of {origin} nor their transpose")
    return Feed(origin, None if (start, stop) == (0, shape[0]) else (start, stop), transpose)


def _same_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata
