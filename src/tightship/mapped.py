"""A module whose weights lie in files that are mapped into memory.

For models whose float32 form does not fit: the system reads pages when they are multiplied and lets go of them when
memory runs short, so what has to fit is the widest block and not the model. Numbers, and the order in which they are
multiplied, are those of a module in memory.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tightship.addresses import Address, skeleton, tensor_of
from tightship.checkpoint import Checkpoint
from tightship.modelview import disk_value


def mapped_module(checkpoint: Checkpoint, folder: Path) -> Any:
    """transformers' module of a checkpoint, float32, every parameter a file below `folder`.

    The files have no names by the time this returns: their room is given back when the module is let go of, or when
    the process ends, however it ends. Experts that transformers stacks pass through memory once, while loading.

    Raises:
        Malformed, Unsupported: see `tightship.modelview`.
        OSError: the disk is full.
    """
    import torch

    module, addresses = skeleton(checkpoint)
    for parameter, places in _by_parameter(addresses).items():
        _map(tensor_of(module, parameter), folder)
        for name, address in places.items():
            address.view(module).copy_(torch.from_numpy(disk_value(checkpoint, name)))
    return module


def _by_parameter(addresses: dict[str, Address]) -> dict[str, dict[str, Address]]:
    """Parameter -> on-disk name -> address. Of tied names, which say the same, the last is kept."""
    found: dict[str, dict[Any, tuple[str, Address]]] = {}
    for name, address in addresses.items():
        found.setdefault(address.parameter, {})[str(address.index)] = (name, address)
    return {parameter: dict(places.values()) for parameter, places in found.items()}


def _map(parameter: Any, folder: Path) -> None:
    """Put a parameter's data, of the same shape, into a new unnamed file."""
    import torch

    with tempfile.NamedTemporaryFile(dir=folder, prefix="weights-") as file:
        size = parameter.numel()
        parameter.data = torch.from_file(file.name, shared=True, size=size, dtype=torch.float32).view(parameter.shape)
