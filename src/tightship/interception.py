"""Looking into a transformers module while it runs: how blocks are called, and what is multiplied with what."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Observer = Callable[[tuple[str, ...], Any], None]
"""observer(names, x): the float32 tensor `x` (..., in) is multiplied with each of the named matrices."""


@dataclass(frozen=True)
class Call:
    """How the model called a block: what flows through it, and the rest."""

    hidden: Any
    arguments: tuple[tuple[Any, ...], dict[str, Any]]


class Pool:
    """Keeps one of several equal tensors: masks and rotations are the same for most batches and blocks."""

    def __init__(self) -> None:
        self._tensors: list[Any] = []

    def share(self, value: Any) -> Any:
        import torch

        if isinstance(value, torch.Tensor):
            for known in self._tensors:
                if known is value or (known.shape == value.shape and torch.equal(known, value)):
                    return known
            self._tensors.append(value)
            return value
        return _each(value, self.share)


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """Apply `change` inside tuples, lists and dicts; leave everything else alone."""
    if isinstance(value, (tuple, list)):
        return type(value)(change(item) for item in value)
    if isinstance(value, dict):
        return {key: change(item) for key, item in value.items()}
    return value


def to_device(value: Any, device: str) -> Any:
    import torch

    return value.to(device) if isinstance(value, torch.Tensor) else _each(value, lambda item: to_device(item, device))


class Enough(Exception):
    """Thrown through the module when what follows would be computed in vain (the logits, above all)."""


class Recorder:
    """Lets blocks hand their input on unchanged and notes how each was called, up to the last.

    Whether blocks return a tuple the first one shows, which is run once; what it returns beside its output (T5: the
    bias that all blocks of a stack share) the others are handed too, and then it is run every time.
    """

    def __init__(self, blocks: Sequence[Any]) -> None:
        self._blocks = blocks
        self._pool = Pool()
        self._beside: tuple[Any, ...] | None = None  # of a tuple's first entry; None: no tuples
        self._called = False

    def wrapped(self, hidden: Any) -> Any:
        """`hidden` as a block of this family returns it."""
        return hidden if self._beside is None else (hidden, *self._beside)

    @contextmanager
    def standing_in(self) -> Iterator[list[Call]]:
        seen: list[Call] = []

        def stand_in(block: Any) -> Callable[..., Any]:
            original = block.forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                if not seen and (not self._called or any(item is not None for item in self._beside or ())):
                    self._look(original(*args, **kwargs))
                rest = dict(kwargs)
                hidden = args[0] if args else rest.pop("hidden_states")
                seen.append(Call(hidden, (self._pool.share(args[1:]), self._pool.share(rest))))
                if len(seen) == len(self._blocks):
                    raise Enough
                return self.wrapped(hidden)

            return forward

        with replaced(self._blocks, stand_in):
            yield seen

    def _look(self, output: Any) -> None:
        self._called = True
        self._beside = output[1:] if isinstance(output, tuple) else None


@contextmanager
def replaced(blocks: Sequence[Any], stand_in: Callable[[Any], Callable[..., Any]]) -> Iterator[None]:
    """Blocks with another forward."""
    try:
        for block in blocks:
            block.forward = stand_in(block)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


@contextmanager
def multiplications(factors: Mapping[int, tuple[str, ...]], observer: Observer) -> Iterator[None]:
    """Show `observer` every product whose second factor starts at one of these memory addresses."""
    import torch
    from torch.overrides import TorchFunctionMode

    plain = (torch.nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
    factors_at = {**dict.fromkeys(plain, (0, 1)), torch.addmm: (1, 2)}

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            at = factors_at.get(func)
            if at is not None and len(args) > at[1]:
                names = factors.get(args[at[1]].data_ptr())
                if names is not None:
                    observer(names, args[at[0]])
            return func(*args, **(kwargs or {}))

    with Watch():
        yield
