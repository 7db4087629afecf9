"""How many threads the block kernels of this thread may use; the bytes never depend on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar

_count: ContextVar[int] = ContextVar("threads", default=1)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let kernels called in this context run on `count` threads."""
    token = _count.set(max(1, count))
    try:
        yield
    finally:
        _count.reset(token)


def over_blocks(kernel: Callable[..., None], blocks: int, *arguments: object, together: int = 16) -> None:
    """`kernel(first, last, *arguments)` over [0, blocks), cut between threads at multiples of `together`.

    The kernel must release the GIL, treat blocks independently and write only to its own.
    """
    count = _count.get()
    share = -(-blocks // (count * together)) * together
    if count == 1 or share >= blocks:
        kernel(0, blocks, *arguments)
        return
    starts = range(0, blocks, share)
    with ThreadPoolExecutor(count) as pool:
        done = [pool.submit(kernel, start, min(start + share, blocks), *arguments) for start in starts]
        for future in done:
            future.result()
