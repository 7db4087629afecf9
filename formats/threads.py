"""Work on the threads that this context may use; the bytes never depend on their number.

| function    | what runs at once                                                        |
|-------------|--------------------------------------------------------------------------|
| over_blocks | one kernel on several parts of its blocks                                |
| in_order    | one function on several items; its results come one by one, in order     |
| behind      | the caller, and one consumer of what the caller hands over               |

Threads that `in_order` starts are of a context of their own: kernels they call run on that thread alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
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


def in_order(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """`function(item)` of every item, in order. At most one result more than there are threads is under way or waits.

    A single item is left to the caller's thread, so that its kernels may use all.
    """
    count = min(_count.get(), len(items))
    if count <= 1:
        yield from map(function, items)
        return
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(count) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def behind(consume: Callable[[T], object], ahead: int = 4) -> Iterator[Callable[[T], None]]:
    """A function that hands things over to `consume`, which takes them in order and is at most `ahead` things late.

    What `consume` raises is raised by a later call, or at the end. On one thread it is called at once.
    """
    if _count.get() == 1:
        yield consume  # type: ignore[misc]
        return
    waiting: deque[Future[object]] = deque()
    with ThreadPoolExecutor(1) as pool:

        def hand_over(thing: T) -> None:
            waiting.append(pool.submit(consume, thing))
            if len(waiting) > ahead:
                waiting.popleft().result()

        yield hand_over
        while waiting:
            waiting.popleft().result()
