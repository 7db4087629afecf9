"""One block of a model at a time, fed with what the blocks before it really put out.

Only the block in hand has its weights in memory (experts that transformers stacks pass through memory once, while
loading). Every multiplication with a weight of the block can be observed, experts included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tightship.addresses import skeleton
from tightship.checkpoint import Checkpoint
from tightship.errors import Malformed, Unsupported
from tightship.modelview import ModelView, disk_value
from tightship.weights import Alias, Weight

if TYPE_CHECKING:
    import torch

TOKENS_AT_ONCE = 4096

Observer = Callable[[tuple[str, ...], Any], None]
"""observer(names, x): the float32 tensor `x` (..., in) is multiplied with each of the named matrices."""


@dataclass
class _Batch:
    """Windows of one length on their way through the model: (windows, length, hidden) and each block's arguments."""

    hidden: Any
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]


class BlockStep:
    """The block in hand.

    Attributes:
        index: block number.
        linears: on-disk names of its matrices, table order; tied ones are left to their owner.
    """

    def __init__(self, walk: BlockWalk, index: int) -> None:
        self._walk = walk
        self.index = index
        prefix = walk.prefixes[index]
        self.linears = tuple(
            info.name
            for info in walk.checkpoint.linears()
            if info.name.startswith(prefix) and not isinstance(walk.checkpoint.weights[info.name], Alias)
        )

    def read(self, name: str) -> np.ndarray:
        """(out, in) float32: the matrix as it is now."""
        return self._view(name).cpu().numpy().copy()

    def write(self, name: str, weight: Weight) -> None:
        """Go on with this weight instead, in this block and wherever it is shared."""
        self._walk.written[name] = weight
        import torch

        self._view(name).copy_(torch.from_numpy(np.ascontiguousarray(weight.value())))

    def passages(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What enters and what leaves the block as it is now: pairs of (windows, length, hidden) float32."""
        with self._walk.view.computing():
            for batch in self._walk.batches:
                yield batch.hidden, self._walk.run(self.index, batch).cpu()

    def observe(self, observer: Observer) -> None:
        """Run the block on all its inputs and show every multiplication with its linears; outputs are dropped.

        Raises:
            Unsupported: a linear is multiplied by other means than `linear`, `matmul` or `addmm`.
        """
        seen: set[str] = set()

        def note(names: tuple[str, ...], x: Any) -> None:
            seen.update(names)
            observer(names, x)

        with self._walk.view.computing(), _multiplications(self._factors(), note):
            for batch in self._walk.batches:
                self._walk.run(self.index, batch)
        # An expert that no token reached is no fault; a whole role that nobody multiplied is.
        infos = self._walk.infos
        silent = {infos[n].rule.role for n in self.linears} - {infos[n].rule.role for n in seen}
        if silent:
            name = next(n for n in self.linears if infos[n].rule.role in silent)
            raise Unsupported("the inputs of this matrix cannot be observed in transformers' module", tensor=name)

    def _view(self, name: str) -> torch.Tensor:
        view = self._walk.addresses[name].view(self._walk.module)
        return view.T if self._walk.infos[name].rule.transposed else view

    def _factors(self) -> dict[int, tuple[str, ...]]:
        """Address in memory of each matrix as it is multiplied -> names fused in it."""
        fused: dict[tuple[str, int | None], list[str]] = {}
        for name in self.linears:
            fused.setdefault(self._walk.addresses[name].factor, []).append(name)
        pointers = {}
        for (parameter, expert), names in fused.items():
            data = self._walk.module.get_parameter(parameter).data
            pointers[(data if expert is None else data[expert]).data_ptr()] = tuple(names)
        return pointers


class BlockWalk:
    """A walk through the blocks of `checkpoint` with `windows`; see `walk_blocks`."""

    def __init__(self, view: ModelView, windows: Sequence[np.ndarray]) -> None:
        self.view = view
        self.checkpoint = view.checkpoint
        self.infos = self.checkpoint.infos()
        self.module, self.addresses = skeleton(self.checkpoint)
        self.written: dict[str, Weight] = {}
        count = int(self.checkpoint.hyper["layers"])
        self.prefixes = [self.checkpoint.architecture.block_prefix.format(i=i) for i in range(count)]
        self.blocks = _block_modules(self.module, self.checkpoint, self.prefixes)
        for prefix in self.prefixes:
            self.empty(prefix)
        with view.computing():
            self.batches = self._enter(windows)

    def steps(self) -> Iterator[BlockStep]:
        for index, block in enumerate(self.blocks):
            self.fill(self.prefixes[index])
            block.to(self.view.device)
            yield BlockStep(self, index)
            with self.view.computing():
                for batch in self.batches:
                    batch.hidden = self.run(index, batch).cpu()
            self.empty(self.prefixes[index])

    def run(self, index: int, batch: _Batch) -> Any:
        """The block's output for a batch: (windows, length, hidden), on the view's device."""
        args, kwargs = _to_device(batch.arguments[index], self.view.device)
        output = self.blocks[index](batch.hidden.to(self.view.device), *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def fill(self, prefix: str | None) -> None:
        """Give the tensors below `prefix` their values; None means all outside the blocks."""
        wanted: dict[str, list[str]] = {}
        for name, address in self.addresses.items():
            inside = any(name.startswith(p) for p in self.prefixes) if prefix is None else name.startswith(prefix)
            if inside != (prefix is None):
                wanted.setdefault(address.parameter, []).append(name)
        for parameter, names in wanted.items():
            import torch

            target = self.module.get_parameter(parameter)
            target.data = torch.empty(target.shape, dtype=torch.float32)
            for name in names:
                value = disk_value(self.checkpoint, name, self.written)
                self.addresses[name].view(self.module).copy_(torch.from_numpy(value))

    def empty(self, prefix: str) -> None:
        """Free the tensors below `prefix`."""
        for name, address in self.addresses.items():
            if name.startswith(prefix):
                target = self.module.get_parameter(address.parameter)
                target.data = target.data.new_zeros(()).cpu().expand(target.shape)

    def _enter(self, windows: Sequence[np.ndarray]) -> list[_Batch]:
        """Embed the windows and note which arguments the model hands to each block."""
        import torch

        self.fill(None)
        self.fill(self.prefixes[0])
        pool = _Pool()
        batches = []
        for ids in batch_windows(windows):
            with _recording(self.blocks, pool) as seen:
                cache = {"use_cache": False} if self.module.can_generate() else {}
                self.module(torch.from_numpy(ids), **cache)
            batches.append(_Batch(seen[0].hidden, [call.arguments for call in seen]))
        self.empty(self.prefixes[0])
        return batches


def walk_blocks(view: ModelView, windows: Sequence[np.ndarray]) -> Iterator[BlockStep]:
    """Every block in order. What the caller wrote into a block is what the next block's inputs passed through.

    `windows` are 1-D int64 token ids; windows of different lengths are kept apart, so that nothing is padded.

    Raises:
        Malformed: a window is empty or no window was given.
        Unsupported: the family's blocks cannot be run one at a time.
    """
    if not windows or any(len(window) == 0 for window in windows):
        raise Malformed("calibration needs at least one window of tokens, and none of them empty")
    yield from BlockWalk(view, windows).steps()


def batch_windows(windows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Windows of equal length stacked, at most TOKENS_AT_ONCE tokens (but at least one window) each; order kept."""
    by_length: dict[int, list[np.ndarray]] = {}
    for window in windows:
        by_length.setdefault(len(window), []).append(np.asarray(window, np.int64))
    batches = []
    for length, group in by_length.items():
        size = max(1, TOKENS_AT_ONCE // length)
        batches += [np.stack(group[i : i + size]) for i in range(0, len(group), size)]
    return batches


@dataclass(frozen=True)
class _Call:
    """How the model called a block: what flows through it, and the rest."""

    hidden: Any
    arguments: tuple[tuple[Any, ...], dict[str, Any]]


class _Pool:
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


def _to_device(value: Any, device: str) -> Any:
    import torch

    return value.to(device) if isinstance(value, torch.Tensor) else _each(value, lambda item: _to_device(item, device))


@contextmanager
def _recording(blocks: Sequence[Any], pool: _Pool) -> Iterator[list[_Call]]:
    """Let blocks hand their input on unchanged and note how each was called."""
    seen: list[_Call] = []
    wrapped: list[bool] = []  # whether this family's blocks return a tuple; the first block is run once to see

    def stand_in(block: Any) -> Callable[..., Any]:
        original = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not wrapped:
                wrapped.append(isinstance(original(*args, **kwargs), tuple))
            rest = dict(kwargs)
            hidden = args[0] if args else rest.pop("hidden_states")
            seen.append(_Call(hidden, (pool.share(args[1:]), pool.share(rest))))
            return (hidden,) if wrapped[0] else hidden

        return forward

    try:
        for block in blocks:
            block.forward = stand_in(block)
        yield seen
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


@contextmanager
def _multiplications(factors: Mapping[int, tuple[str, ...]], observer: Observer) -> Iterator[None]:
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


def _block_modules(module: Any, checkpoint: Checkpoint, prefixes: Sequence[str]) -> list[Any]:
    """The modules of the blocks, in order.

    Raises:
        Unsupported: no list of modules fits the family's block prefix.
    """
    import torch

    stem = checkpoint.architecture.block_prefix.split("{i}")[0].strip(".")
    for name, found in module.named_modules():
        fits = name == stem or name.endswith(f".{stem}") or stem.endswith(f".{name}")
        if name and fits and isinstance(found, torch.nn.ModuleList) and len(found) == len(prefixes):
            return list(found)
    raise Unsupported(f"{type(module).__name__} has no list of {len(prefixes)} blocks named {stem}")
