"""The training loop: AdamW as torch has it, schedules by hand, and the same bytes after a kill at any snapshot."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tightship.errors import Malformed, UsageError
from tightship.passes.base import Run
from tightship.passes.training import Training, fit

torch = pytest.importorskip("torch")

HOW = Training(rate=0.05, schedule="linear", warmup=0.25, decay=0.1, clip=0.5, accumulate=2, snapshot=3)


class Killed(Exception):
    """Stands for SIGKILL."""


def problem() -> tuple[dict[str, Any], Callable[[int], Any]]:
    """A matrix and a vector, and a loss that is another one for each micro-batch."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "matrix": torch.randn(4, 3, generator=generator).requires_grad_(),
        "vector": torch.randn(4, generator=generator).requires_grad_(),
    }

    def loss(number: int) -> Any:
        x = torch.from_numpy(np.random.default_rng(number).standard_normal((5, 3)).astype(np.float32))
        return (x @ tensors["matrix"].T + tensors["vector"]).square().mean()

    return tensors, loss


def test_steps_are_those_of_torch() -> None:
    steps = 8
    tensors, loss = problem()
    figures = fit(tensors, loss, HOW, steps, Run())
    theirs, their_loss = problem()
    groups = [{"params": [theirs["matrix"]], "weight_decay": 0.1}, {"params": [theirs["vector"]], "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=1.0)
    rates = [0.05 * k for k in (1 / 2, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)]  # two steps up, six down to 0
    for step, rate in enumerate(rates):
        adam.zero_grad()
        whole = (their_loss(2 * step) + their_loss(2 * step + 1)) / 2
        whole.backward()
        torch.nn.utils.clip_grad_norm_(list(theirs.values()), 0.5)
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-7)
    assert figures["steps"] == steps
    assert figures["loss"] == pytest.approx(float(whole.detach()), rel=1e-6)


def test_cosine_and_constant_rates() -> None:
    cosine = dataclasses.replace(HOW, schedule="cosine", warmup=0.0, rate=1.0)
    assert [cosine.rate_at(step, 4) for step in range(4)] == pytest.approx(
        [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    )
    constant = dataclasses.replace(cosine, schedule="constant")
    assert {constant.rate_at(step, 4) for step in range(4)} == {1.0}


@pytest.mark.parametrize("fatal", [1, 3, 4, 7, 8])
def test_a_killed_run_ends_in_the_same_bytes(tmp_path: Path, fatal: int) -> None:
    steps = 8
    whole, loss = problem()
    expected = fit(whole, loss, HOW, steps, Run(scratch=tmp_path / "whole"), held_out=lambda: float(loss(99).detach()))

    def killer(_: str, done: int, __: int) -> None:
        if done == fatal:
            raise Killed

    first, loss = problem()
    with pytest.raises(Killed):
        fit(first, loss, HOW, steps, Run(scratch=tmp_path / "run", progress=killer), held_out=lambda: 0.0)
    again, loss = problem()
    seen: list[int] = []

    def watched(number: int) -> Any:
        seen.append(number)
        return loss(number)

    measured = {"held_out": lambda: float(loss(99).detach())}
    figures = fit(again, watched, HOW, steps, Run(scratch=tmp_path / "run"), **measured)
    for name, tensor in again.items():
        assert tensor.detach().numpy().tobytes() == whole[name].detach().numpy().tobytes()
    assert figures["loss"] == expected["loss"]
    assert min(seen[1:], default=16) == 2 * ((fatal // 3) * 3 if fatal < 8 else 8)  # goes on after the last snapshot
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["training.safetensors"]


def test_a_loss_that_is_no_number_is_an_error() -> None:
    tensors, _ = problem()
    with pytest.raises(Malformed, match="diverged"):
        fit(tensors, lambda _: tensors["vector"].sum() * math.inf, HOW, 2, Run())


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"rate": 0.0}, {"held_out": 1.0}, {"warmup": -0.1}, {"decay": -1.0}])
def test_options_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Training(**wrong)


def test_bfloat16_passes_keep_weights_and_moments_in_float32(tmp_path: Path) -> None:
    """Autocast rounds the forward pass alone: the result lies near that of float32 and is not the same."""
    found = {}
    for precision in ("f32", "bf16"):
        tensors, loss = problem()
        fit(tensors, loss, dataclasses.replace(HOW, precision=precision), 6, Run(scratch=tmp_path), key=precision)
        assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
        found[precision] = tensors["matrix"].detach()
    assert not torch.equal(found["f32"], found["bf16"])
    torch.testing.assert_close(found["bf16"], found["f32"], atol=0.05, rtol=0.05)
