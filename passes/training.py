"""One training loop for every pass that trains: AdamW with a schedule, accumulated gradients, and exact resume.

A caller gives named tensors and `loss(n)`, the mean loss of the n-th micro-batch. Micro-batches are numbered from 0
through all steps, and whatever is random about one hangs on the seed and its number alone: the number is data cursor
and state of the random generator at once. With the tensors and AdamW's two moments that is all of a snapshot, so a run
that was killed ends in the bytes of one that was not.

Under `torchrun` each process takes its share of a step's micro-batches and gradients are added up (`tightship.ranks`),
so a step is the same step however many processes make it. With two the sums are the same to the bit.

Masks, grids and ties are no business of the loop: they are held by `tightship.passes.leaves`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tightship import ranks
from tightship.errors import Malformed, UsageError
from tightship.passes.base import Run
from tightship.stage_codec import read_arrays, write_whole

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Training:
    """Options that every training pass has; a pass inherits them.

    Attributes:
        tokens: how many tokens are trained on in all, repeats counted.
        sequence: tokens of a window.
        rate: highest learning rate.
        schedule: how the rate falls after `warmup` (a share of the steps): to 0, or not at all.
        batch: windows of a micro-batch; `accumulate`: micro-batches of a step.
        decay: AdamW's weight decay, of matrices only. `clip`: largest norm of a step's gradient.
        precision: of the forward pass; weights, moments and losses are always float32.
        held_out: share of the windows that are never trained on, but measured.
        snapshot: steps between snapshots, and between measurements.
    """

    tokens: int = 65536
    sequence: int = 128
    rate: float = 1e-3
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.05
    batch: int = 16
    accumulate: int = 1
    decay: float = 0.0
    clip: float = 1.0
    precision: Literal["f32", "bf16"] = "f32"
    held_out: float = 0.05
    snapshot: int = 50

    def __post_init__(self) -> None:
        for name in ("tokens", "sequence", "batch", "accumulate", "snapshot"):
            if getattr(self, name) < 1:
                raise UsageError(f"training: {name} is at least 1, found {getattr(self, name)}")
        for name in ("warmup", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"training: {name} is a share from 0 to below 1, found {getattr(self, name)}")
        if self.rate <= 0 or self.clip <= 0 or self.decay < 0:
            raise UsageError("training: `rate` and `clip` are above 0, `decay` is not below it")

    def rate_at(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 0."""
        rising = math.ceil(self.warmup * steps)
        if step < rising:
            return self.rate * (step + 1) / rising
        share = (step - rising) / max(steps - rising, 1)
        falling = {"constant": 1.0, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}
        return self.rate * falling[self.schedule]


def fit(
    tensors: Mapping[str, torch.Tensor],
    loss: Callable[[int], torch.Tensor],
    how: Training,
    steps: int,
    run: Run,
    *,
    held_out: Callable[[], float] | None = None,
    key: str = "training",
) -> dict[str, float | int | str]:
    """Minimise the mean of `loss` over `steps` steps; changes `tensors` (leaves that require gradients) in place.

    `key` names the fit within its stage. Returns the last step's loss, and the held-out loss before and after.

    Raises:
        Malformed: the loss is no finite number.
        UsageError: the processes under `torchrun` cannot share the micro-batches.
    """
    import torch

    if how.accumulate % ranks.world():
        raise UsageError(
            f"training: {how.accumulate} micro-batches of a step cannot be shared by {ranks.world()} processes",
            hint=f"accumulate: {ranks.world()}, with a smaller `batch`",
        )
    optimizer = _adamw(tensors, how)
    kept = _Snapshot(run.scratch, key)
    measured = held_out or (lambda: math.nan)
    with computing(run):
        first, history = kept.load(tensors, optimizer)
        if first < steps:
            # Under load a process's first pass came out some 1e-5 off (relative), all later ones bit for bit equal.
            with torch.no_grad():
                loss(0)
        history = history or [[0, math.nan, measured()]]
        for step in range(first, steps):
            run.progress(f"{key}: {_told(history[-1])}", step, steps)
            for group in optimizer.param_groups:
                group["lr"] = how.rate_at(step, steps)
            batches = range(step * how.accumulate, (step + 1) * how.accumulate)
            mine = batches[ranks.rank() :: ranks.world()]
            found = sum(_add_gradients(loss, number, how, run.device) for number in mine)
            found = ranks.add_up(_with_gradients(tensors), found)
            if not math.isfinite(found):
                raise Malformed(f"training diverged: the loss of step {step} is {found}", hint="a lower `rate`")
            _apply_gradients(tensors, how, optimizer)
            if (step + 1) % how.snapshot == 0 or step + 1 == steps:
                history.append([step + 1, found, measured()])
                kept.save(tensors, optimizer, step + 1, history)
    run.progress(f"{key}: {_told(history[-1])}", steps, steps)
    figures: dict[str, float | int | str] = {"steps": steps, "loss": history[-1][1]}
    if held_out is not None:
        figures |= {"held_out_before": history[0][2], "held_out_after": history[-1][2]}
    return figures


def _adamw(tensors: Mapping[str, torch.Tensor], how: Training) -> Any:
    import torch

    matrices = [t for t in tensors.values() if t.dim() > 1]
    others = [t for t in tensors.values() if t.dim() < 2]
    groups = [{"params": matrices, "weight_decay": how.decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=how.rate)


def _add_gradients(loss: Callable[[int], torch.Tensor], number: int, how: Training, device: str) -> float:
    """One micro-batch, forwards and backwards; its share of the step's loss."""
    import torch

    with torch.enable_grad(), autocast(how, device):
        part = loss(number) / how.accumulate
    part.backward()
    return float(part.detach())


def _with_gradients(tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The tensors; those that had no part in the loss get zeros, or AdamW would leave their moments unmade."""
    import torch

    for tensor in tensors.values():
        if tensor.grad is None:
            tensor.grad = torch.zeros_like(tensor)
    return list(tensors.values())


def _apply_gradients(tensors: Mapping[str, torch.Tensor], how: Training, optimizer: Any) -> None:
    import torch

    torch.nn.utils.clip_grad_norm_(list(tensors.values()), how.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def autocast(how: Training, device: str) -> Any:
    """The forward pass in bfloat16 where that is asked for."""
    import torch

    return nullcontext() if how.precision == "f32" else torch.autocast(device, torch.bfloat16)


@contextmanager
def computing(run: Run) -> Iterator[None]:
    """The run's threads, and sums in one order on every device, for the duration."""
    import torch

    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(run.threads)
    torch.use_deterministic_algorithms(run.device != "cpu", warn_only=True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)


def _told(entry: list[float]) -> str:
    said = zip(("loss", "held out"), entry[1:], strict=True)
    return ", ".join(f"{word} {value:.4f}" for word, value in said if not math.isnan(value))


class _Snapshot:
    """`KEY.safetensors` in the scratch directory, replaced whole: tensors, AdamW's moments, step and history."""

    def __init__(self, scratch: str | Path | None, key: str) -> None:
        self._path = None if scratch is None else Path(scratch) / f"{key}.safetensors"

    def load(self, tensors: Mapping[str, torch.Tensor], optimizer: Any) -> tuple[int, list[list[float]]]:
        """Put everything back as it was; the number of steps done, and what was measured."""
        import torch

        if self._path is None or not self._path.exists():
            return 0, []
        words = ["step", "history", *(f"{name}/{part}" for name in tensors for part in ("value", "mean", "square"))]
        found = read_arrays(self._path, words)
        step = int(found["step"][0])
        with torch.no_grad():
            for name, tensor in tensors.items():
                value, mean, square = (
                    torch.from_numpy(found[f"{name}/{part}"]).to(tensor.device) for part in ("value", "mean", "square")
                )
                tensor.copy_(value)
                state = {"step": torch.tensor(float(step)), "exp_avg": mean, "exp_avg_sq": square}
                optimizer.state[tensor] = state
        return step, found["history"].tolist()

    def save(self, tensors: Mapping[str, torch.Tensor], optimizer: Any, step: int, history: list[list[float]]) -> None:
        if self._path is None or ranks.rank() > 0:
            return
        arrays = {"step": np.array([step]), "history": np.array(history, np.float64)}
        for name, tensor in tensors.items():
            state = optimizer.state[tensor]
            parts = {"value": tensor, "mean": state["exp_avg"], "square": state["exp_avg_sq"]}
            arrays |= {f"{name}/{part}": value.detach().cpu().numpy() for part, value in parts.items()}
        write_whole(self._path, arrays)
