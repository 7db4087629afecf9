"""One block of a model at a time, fed with what the blocks before it really put out.

Behind an encoder the decoder's blocks follow, and their cross-attention reads what the encoder as it is by then puts
out. Both stacks are given the same text, the decoder behind its start token (`tightship.modelview.shifted`), so that a
plain text says what flows at every position of either.

Only the block in hand has its weights in memory (experts that transformers stacks pass through memory once, while
loading). Every multiplication with a weight of the block can be observed, experts included.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tightship.addresses import skeleton, tensor_of
from tightship.errors import Malformed, Unsupported
from tightship.interception import Enough, Observer, multiplications, replaced, to_device
from tightship.modelview import ModelView, disk_value, shifted
from tightship.stacks import Stack, stacks_of
from tightship.weights import Alias, Stored

if TYPE_CHECKING:
    import torch

TOKENS_AT_ONCE = 4096


@dataclass
class _Batch:
    """Windows of one length on their way through the model: (windows, length, hidden) and each block's arguments.

    Both are filled in where a stack of blocks is entered.
    """

    ids: np.ndarray
    hidden: Any = None
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


class BlockStep:
    """The block in hand.

    Attributes:
        index: block number; those of a decoder go on behind its encoder's.
        total: how many blocks there are.
        linears: on-disk names of its matrices, table order; tied ones are left to their owner.
        routers: on-disk names of the matrices that choose among experts.
    """

    routers: tuple[str, ...] = ()

    def __init__(self, walk: BlockWalk, index: int) -> None:
        self._walk = walk
        self.index, self.total = index, len(walk.blocks)
        prefix = walk.prefixes[index]
        self.linears = tuple(
            info.name
            for info in walk.checkpoint.linears()
            if info.name.startswith(prefix) and not isinstance(walk.checkpoint.weights[info.name], Alias)
        )
        self.routers = tuple(
            info.name
            for info in walk.infos.values()
            if info.rule.kind == "router" and info.name.startswith(prefix) and info.name in walk.addresses
        )

    def read(self, name: str) -> np.ndarray:
        """(out, in) float32: the matrix as it is now."""
        return self._view(name).cpu().numpy().copy()

    def write(self, name: str, weight: Stored) -> None:
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

        self._show(self.linears, note)
        # An expert that no token reached is no fault; a whole role that nobody multiplied is.
        infos = self._walk.infos
        silent = {infos[n].rule.role for n in self.linears} - {infos[n].rule.role for n in seen}
        if silent:
            name = next(n for n in self.linears if infos[n].rule.role in silent)
            raise Unsupported("the inputs of this matrix cannot be observed in transformers' module", tensor=name)

    def observe_routers(self, observer: Observer) -> None:
        """As `observe`, of the matrices that choose among experts."""
        self._show(self.routers, observer)

    def _show(self, names: Sequence[str], observer: Observer) -> None:
        with self._walk.view.computing(), multiplications(self._factors(names), observer):
            for batch in self._walk.batches:
                self._walk.run(self.index, batch)

    def inputs(self) -> Iterator[dict[tuple[str, ...], torch.Tensor]]:
        """Batch by batch, what each matrix is multiplied with: names fused in one product -> float32 (tokens, in).

        For matrices that one product a batch feeds all tokens; of an expert only the last product is told.
        """
        for batch in self._walk.batches:
            seen: dict[tuple[str, ...], torch.Tensor] = {}

            def note(names: tuple[str, ...], x: Any, seen: dict[tuple[str, ...], torch.Tensor] = seen) -> None:
                seen[names] = x.reshape(-1, x.shape[-1])

            with self._walk.view.computing(), multiplications(self._factors(self.linears), note):
                self._walk.run(self.index, batch)
            yield seen

    def _view(self, name: str) -> torch.Tensor:
        view = self._walk.addresses[name].view(self._walk.module)
        return view.T if self._walk.infos[name].rule.transposed else view

    def _factors(self, names: Sequence[str]) -> dict[int, tuple[str, ...]]:
        """Address in memory of each matrix as it is multiplied -> names fused in it."""
        fused: dict[tuple[str, int | None], list[str]] = {}
        for name in names:
            fused.setdefault(self._walk.addresses[name].factor, []).append(name)
        pointers = {}
        for (parameter, expert), together in fused.items():
            data = tensor_of(self._walk.module, parameter).data
            pointers[(data if expert is None else data[expert]).data_ptr()] = tuple(together)
        return pointers


class Tail(BlockStep):
    """What follows the last block. `linears` are matrices of `wanted` outside the blocks that are multiplied: heads.

    A head that is tied to the embedding is left out: what is best for the product is not best for looking up rows.
    """

    def __init__(self, walk: BlockWalk, wanted: Collection[str]) -> None:
        self._walk = walk
        self.index = self.total = len(walk.blocks)
        inside = tuple(walk.prefixes)
        kinds = {name: walk.infos[name].rule.kind for name in wanted if name in walk.infos}
        self.linears = tuple(n for n, kind in kinds.items() if kind in ("head", "linear") and not n.startswith(inside))

    def observe(self, observer: Observer) -> None:
        """Run what follows the blocks, up to the last of `linears`, and show the multiplications with them."""
        missing = set(self.linears)

        def note(names: tuple[str, ...], x: Any) -> None:
            observer(names, x)
            missing.difference_update(names)
            if not missing:
                raise Enough

        with self._walk.view.computing(), multiplications(self._factors(self.linears), note):
            for batch in self._walk.batches:
                missing.update(self.linears)
                with self._walk.passed(self._walk.stacks, batch.hidden):
                    self._walk.forward(batch.ids)


class BlockWalk:
    """A walk through the blocks of `checkpoint` with `windows`; see `walk_blocks`."""

    def __init__(self, view: ModelView, windows: Sequence[np.ndarray], at_once: int = TOKENS_AT_ONCE) -> None:
        if not len(windows) or any(len(window) == 0 for window in windows):
            raise Malformed("calibration needs at least one window of tokens, and none of them empty")
        self.view = view
        self.checkpoint = view.checkpoint
        self.infos = self.checkpoint.infos()
        self.module, self.addresses = skeleton(self.checkpoint)
        self.written: dict[str, Stored] = {}
        self.stacks = stacks_of(self.module, self.checkpoint)
        self.prefixes = [prefix for stack in self.stacks for prefix in stack.prefixes]
        self.blocks = [block for stack in self.stacks for block in stack.blocks]
        names = {id(module): name for name, module in self.module.named_modules()}
        self.stems = [f"{names[id(block)]}." for block in self.blocks]
        for prefix in self.prefixes:
            self.empty(prefix)
        self.batches = [_Batch(ids) for ids in batch_windows(windows, at_once)]
        self.fill(None)
        self._enter(0)

    def steps(self, outside: Collection[str] = ()) -> Iterator[BlockStep]:
        """Every block in order, then, if there are any in `outside`, the matrices that follow the last."""
        index = 0
        for number, stack in enumerate(self.stacks):
            if number:
                self._enter(number)
            for block in stack.blocks:
                self.fill(self.prefixes[index])
                block.to(self.view.device)
                yield BlockStep(self, index)
                with self.view.computing():
                    for batch in self.batches:
                        batch.hidden = self.run(index, batch).cpu()
                self.empty(self.prefixes[index])
                index += 1
        tail = Tail(self, outside)
        if tail.linears:
            yield tail

    def run(self, index: int, batch: _Batch, parameters: Mapping[str, torch.Tensor] | None = None) -> Any:
        """The block's output for a batch: (windows, length, hidden), on the view's device.

        `parameters`, by their names in the whole module, take the place of the block's own.
        """
        import torch

        args, kwargs = to_device(batch.arguments[index], self.view.device)
        block, stem = self.blocks[index], self.stems[index]
        inside = {name.removeprefix(stem): value for name, value in (parameters or {}).items()}
        output = torch.func.functional_call(block, inside, (batch.hidden.to(self.view.device), *args), kwargs)
        return output[0] if isinstance(output, tuple) else output

    def forward(self, ids: np.ndarray) -> None:
        """Run the whole module until somebody has seen enough."""
        import torch

        more: dict[str, Any] = {"use_cache": False} if self.module.can_generate() else {}
        if len(self.stacks) > 1:
            more["decoder_input_ids"] = torch.from_numpy(shifted(ids, self.checkpoint.config))
        with suppress(Enough):
            self.module(torch.from_numpy(ids), **more)

    @contextmanager
    def passed(self, stacks: Sequence[Stack], hidden: Any) -> Iterator[None]:
        """The blocks of these stacks hand on `hidden` (windows, length, hidden)."""
        with ExitStack() as every:
            for stack in stacks:
                every.enter_context(replaced(stack.blocks, _always(stack.recorder.wrapped(hidden))))
            yield

    def fill(self, prefix: str | None) -> None:
        """Give the tensors below `prefix` their values; None means all outside the blocks."""
        wanted: dict[str, list[str]] = {}
        for name, address in self.addresses.items():
            inside = any(name.startswith(p) for p in self.prefixes) if prefix is None else name.startswith(prefix)
            if inside != (prefix is None):
                wanted.setdefault(address.parameter, []).append(name)
        for parameter, names in wanted.items():
            import torch

            target = tensor_of(self.module, parameter)
            target.data = torch.empty(target.shape, dtype=torch.float32)
            for name in names:
                value = disk_value(self.checkpoint, name, self.written)
                self.addresses[name].view(self.module).copy_(torch.from_numpy(value))

    def empty(self, prefix: str) -> None:
        """Free the tensors below `prefix`."""
        for name, address in self.addresses.items():
            if name.startswith(prefix):
                target = tensor_of(self.module, address.parameter)
                target.data = target.data.new_zeros(()).cpu().expand(target.shape)

    def _enter(self, number: int) -> None:
        """Bring the batches to the first block of a stack and note which arguments the model hands to each block.

        What lies before that block runs; stacks before it hand on what their last block has put out.
        """
        stack, before = self.stacks[number], self.stacks[:number]
        self.fill(stack.prefixes[0])
        with self.view.computing():
            if not before:
                # Under load a process's first pass came out some 1e-5 off (relative), all later ones bit for bit equal.
                with stack.recorder.standing_in():
                    self.forward(self.batches[0].ids[:1])
            for batch in self.batches:
                with self.passed(before, batch.hidden), stack.recorder.standing_in() as seen:
                    self.forward(batch.ids)
                batch.hidden = seen[0].hidden
                batch.arguments += [call.arguments for call in seen]
        self.empty(stack.prefixes[0])


def _always(output: Any) -> Callable[[Any], Callable[..., Any]]:
    """Makes every block hand on `output`, whatever it is given."""
    return lambda _block: lambda *_args, **_kwargs: output


def walk_blocks(view: ModelView, windows: Sequence[np.ndarray]) -> Iterator[BlockStep]:
    """Every block in order. What the caller wrote into a block is what the next block's inputs passed through.

    `windows` are 1-D int64 token ids; windows of different lengths are kept apart, so that nothing is padded.

    Raises:
        Malformed: a window is empty or no window was given.
        Unsupported: the family's blocks cannot be run one at a time.
    """
    yield from BlockWalk(view, windows).steps()


def batch_windows(windows: Sequence[np.ndarray], at_once: int = TOKENS_AT_ONCE) -> list[np.ndarray]:
    """Windows of equal length stacked, at most `at_once` tokens (but at least one window) each; order kept."""
    by_length: dict[int, list[np.ndarray]] = {}
    for window in windows:
        by_length.setdefault(len(window), []).append(np.asarray(window, np.int64))
    batches = []
    for length, group in by_length.items():
        size = max(1, at_once // length)
        batches += [np.stack(group[i : i + size]) for i in range(0, len(group), size)]
    return batches
