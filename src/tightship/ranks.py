"""Several processes on one build, as `torchrun` or `accelerate launch` starts them: RANK and WORLD_SIZE say which one.

The first process (rank 0) builds. The others follow its passes and lend their hands to those that train: each takes its
share of a step's micro-batches. They write nothing, and end when the passes are done. All see one work directory, so
they run on one machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def world() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this one."""
    return int(os.environ.get("RANK", "0"))


def join(device: str) -> None:
    """Meet the others, once."""
    if world() == 1:
        return
    import torch

    if not torch.distributed.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")


def shared(value: Any) -> Any:
    """What rank 0 gives, for everyone; picklable."""
    if world() == 1:
        return value
    import torch

    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait for the others."""
    if world() > 1:
        import torch

        torch.distributed.barrier()


@contextmanager
def first() -> Iterator[None]:
    """Rank 0 does the body before all others."""
    if rank() > 0:
        barrier()
    yield
    if rank() == 0:
        barrier()


def add_up(tensors: list[Any], number: float) -> float:
    """Sums over all processes: of the gradients, in place, and of a number."""
    if world() == 1:
        return number
    import torch

    flat = torch.cat([tensor.grad.reshape(-1) for tensor in tensors])
    total = torch.tensor(number, dtype=torch.float64, device=flat.device)
    torch.distributed.all_reduce(flat)
    torch.distributed.all_reduce(total)
    start = 0
    for tensor in tensors:
        tensor.grad.copy_(flat[start : start + tensor.numel()].reshape(tensor.shape))
        start += tensor.numel()
    return float(total)
