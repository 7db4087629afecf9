"""Where each tensor of a checkpoint lands in the torch module.

transformers renames, stacks and concatenates on loading. Nothing of that is repeated here: tensors filled with their
own number are sent through transformers' loading, and where a number is found is the address. A number fills a whole
tensor; column 0 of a matrix carries one half more, which shows whether the matrix was turned on the way. Numbered
tensors are views of one row, so that this costs no memory, except where transformers itself stacks experts.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tightship.checkpoint import Checkpoint
from tightship.errors import Malformed, Unsupported
from tightship.modelview import disk_names, load_module, owner_of
from tightship.weights import Alias

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Address:
    """A tensor's place in a module.

    Attributes:
        parameter: dotted name of the parameter, or buffer.
        index: leading indices and slices into it; () is the whole parameter.
        turned: the place holds the transpose of what lies on disk.
    """

    parameter: str
    index: tuple[int | slice, ...] = ()
    turned: bool = False

    @property
    def factor(self) -> tuple[str, int | None]:
        """The matrix that takes part in one multiplication: (parameter, expert), fused neighbours included."""
        first = self.index[0] if self.index else None
        return self.parameter, first if isinstance(first, int) else None

    def view(self, module: Any) -> torch.Tensor:
        """The place itself, in on-disk orientation; writing to it writes to the module."""
        region = tensor_of(module, self.parameter).data[self.index]
        return region.T if self.turned else region


def tensor_of(module: Any, name: str) -> torch.Tensor:
    """A module's parameter, or buffer where a file holds one (BART's bias on logits)."""
    owner, _, last = name.rpartition(".")
    found: torch.Tensor = getattr(module.get_submodule(owner), last)
    return found


def skeleton(checkpoint: Checkpoint) -> tuple[Any, dict[str, Address]]:
    """The module of a checkpoint with numbers for weights, and the address of every on-disk name.

    Raises:
        Malformed, Unsupported: tensors and class do not belong together; see `tightship.modelview`.
    """
    names = disk_names(checkpoint)
    tied = {a for pair in checkpoint.architecture.ties for a in pair if isinstance(checkpoint.weights.get(a), Alias)}
    # transformers ties by itself where config.json says so, but not two tensors that carry different numbers.
    module, info = _load_numbered(checkpoint, [name for name in names if name not in tied])
    if info["missing_keys"] and tied:
        tied = set()
        module, info = _load_numbered(checkpoint, names)
    strange = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    if strange:
        raise Malformed(f"{type(module).__name__} and the checkpoint do not match", tensor=strange[0])
    places = find_numbers(module, dict(enumerate(names)), checkpoint.architecture.ignored)
    places |= {name: places[owner_of(checkpoint, name)] for name in tied}
    lost = [name for name in names if name not in places]
    if lost:
        raise Malformed(f"{type(module).__name__} has no place for {', '.join(lost[:8])}", tensor=lost[0])
    return module, places


def _load_numbered(checkpoint: Checkpoint, chosen: list[str]) -> tuple[Any, Mapping[str, Any]]:
    infos = checkpoint.infos()
    state = {}
    for number, name in enumerate(disk_names(checkpoint)):
        if name in chosen:
            shape = tuple(checkpoint.resolve(name).shape)
            turned = name in infos and infos[name].rule.transposed
            state[name] = numbered(shape[::-1] if turned else shape, number)
    return load_module(checkpoint, state)


def numbered(shape: tuple[int, ...], number: int) -> torch.Tensor:
    """A tensor that carries its number; see the module docstring."""
    import torch

    row = torch.full((shape[-1] if shape else 1,), float(number))
    if len(shape) > 1:
        row[0] += 0.5
    return row.expand(shape) if shape else row[0]


def find_numbers(module: Any, names: Mapping[int, str], ignored: Iterable[str] = ()) -> dict[str, Address]:
    """The addresses of the numbers found, in a module that was loaded with `numbered` tensors.

    Parameters that fit a pattern of `ignored` come from no file, and are passed over.

    Raises:
        Unsupported: tensors were mixed in a way that is not understood; the parameter is named.
    """
    found: dict[str, Address] = {}
    buffers = {name: tensor for name, tensor in module.named_buffers() if name in names.values()}
    for parameter, tensor in (dict(module.named_parameters()) | buffers).items():
        if any(fnmatch.fnmatchcase(parameter, pattern) for pattern in ignored):
            continue
        for number, index, turned in _regions(parameter, tensor.data):
            if number in names:
                found[names[number]] = Address(parameter, index, turned)
    return found


def _regions(parameter: str, tensor: torch.Tensor) -> list[tuple[int, tuple[int | slice, ...], bool]]:
    if tensor.dim() == 3:
        experts = [_regions(f"{parameter}[{expert}]", tensor[expert]) for expert in range(tensor.shape[0])]
        if len(experts) > 1 and all(regions == experts[0] for regions in experts):  # stored so: a kernel, a stack
            return [(number, (slice(None), *index), turned) for number, index, turned in experts[0]]
        return [
            (number, (expert, *index), turned)
            for expert, regions in enumerate(experts)
            for number, index, turned in regions
        ]
    numbers = tensor.floor()
    if tensor.dim() < 2:
        return [(int(numbers.flatten()[0]), (), False)] if tensor.numel() else []
    if bool((numbers == numbers[:, :1]).all()):  # a number per row: matrices above each other
        runs = [(n, len(list(g))) for n, g in itertools.groupby(numbers[:, 0].tolist())]
        starts = itertools.accumulate((rows for _, rows in runs), initial=0)
        return [
            (int(n), () if len(runs) == 1 else (slice(start, start + rows),), bool(tensor[start, -1] > n))
            for (n, rows), start in zip(runs, starts, strict=False)
        ]
    raise Unsupported(f"transformers mixes tensors in {parameter} in a way that is not mapped", tensor=parameter)
