"""The stacks of blocks in a model's torch module: one, or an encoder's and then a decoder's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported
from tightship.interception import Recorder


@dataclass(frozen=True)
class Stack:
    """Blocks that run one after the other.

    Attributes:
        prefixes: what on-disk names of each block start with.
        blocks: their modules, in order.
        recorder: notes how the model calls them.
    """

    prefixes: tuple[str, ...]
    blocks: tuple[Any, ...]
    recorder: Recorder


def stacks_of(module: Any, checkpoint: Checkpoint) -> tuple[Stack, ...]:
    """The stacks of `module`, in the order in which they run.

    Raises:
        Unsupported: no list of modules fits one of the family's block prefixes.
    """
    architecture, hyper = checkpoint.architecture, checkpoint.hyper
    forms = [(architecture.block_prefix, int(hyper["layers"]))]
    if architecture.decoder_prefix is not None:
        forms.append((architecture.decoder_prefix, int(hyper["dec_layers"])))
    found = []
    for form, count in forms:
        blocks = _block_modules(module, form, count)
        found.append(Stack(tuple(form.format(i=i) for i in range(count)), blocks, Recorder(blocks)))
    return tuple(found)


def _block_modules(module: Any, form: str, count: int) -> tuple[Any, ...]:
    import torch

    stem = form.split("{i}", maxsplit=1)[0].strip(".")
    for name, found in module.named_modules():
        fits = name == stem or name.endswith(f".{stem}") or stem.endswith(f".{name}")
        if name and fits and isinstance(found, torch.nn.ModuleList) and len(found) == count:
            return tuple(found)
    raise Unsupported(f"{type(module).__name__} has no list of {count} blocks named {stem}")
