"""Pruning in steps: the schedule, masks that only grow, and recovery that pays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tightship.checkpoint import Checkpoint
from tightship.errors import UsageError
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.passes import pass_for
from tightship.passes.base import Run
from tightship.passes.prune_loop import sparsities
from tightship.texts import token_windows

pytest.importorskip("torch")

EMBER = Path(__file__).parents[2] / "examples" / "ember"
TEXT = "The old ship lay at anchor in the bay, and nobody on the shore could say whence she had come. " * 60


@pytest.fixture(scope="module")
def ember() -> Checkpoint:
    return open_checkpoint(EMBER)


def run(**changes: object) -> Run:
    return Run(**{"threads": 1, "texts": (TEXT,), "tokens": 512, "sequence": 128, **changes})  # type: ignore[arg-type]


def matrices(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {info.name: checkpoint.resolve(info.name).value() for info in checkpoint.linears()}


def test_the_cubic_schedule_by_hand() -> None:
    np.testing.assert_allclose(sparsities(0.8, 4), [0.4625, 0.7, 0.7875, 0.8])
    assert sparsities(0.7, 1) == [0.7]


def test_masks_only_grow_and_end_exactly(ember: Checkpoint) -> None:
    seen: dict[str, list[float]] = {}

    def report(name: str, figures: object) -> None:
        if isinstance(figures, dict) and "sparsity" in figures:
            seen.setdefault(name.partition(": ")[2], []).append(figures["sparsity"])

    first = matrices(pass_for("prune", {"method": "wanda", "sparsity": 0.8 * (1 - 0.5**3)}).apply(ember, run()))
    last = matrices(
        pass_for("prune", {"method": "wanda", "sparsity": 0.8, "steps": 2}).apply(ember, run(report=report))
    )
    for name, w in last.items():
        assert (w == 0).sum() == round(0.8 * w.size)
        assert not w[first[name] == 0].any()
        np.testing.assert_allclose(seen[name], [0.7, 0.8], atol=1e-4)


@pytest.mark.slow
def test_recovery_under_the_mask_pays(ember: Checkpoint, tmp_path: Path) -> None:
    options = {"method": "magnitude", "sparsity": 0.8}
    recover = {"tokens": 8192, "sequence": 64, "rate": 1e-3}
    plain = pass_for("prune", options).apply(ember, run())
    looped = pass_for("prune", {**options, "steps": 2, "recover": recover}).apply(ember, run(scratch=tmp_path))
    for w in matrices(looped).values():
        assert (w == 0).sum() >= round(0.8 * w.size)
    windows = np.stack([w for w in token_windows(ember, [TEXT], tokens=512, sequence=64) if len(w) == 64])

    def loss(checkpoint: Checkpoint) -> float:
        logits = ModelView(checkpoint, threads=1).outputs(windows)["logits"][:, :-1].astype(np.float64)
        logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        return float(-np.take_along_axis(logits, windows[:, 1:, None], axis=-1).mean())

    assert loss(looped) < loss(plain)


@pytest.mark.parametrize(
    "options",
    [{"sparsity": 0.5, "steps": 0}, {"pattern": "2:4", "steps": 2}, {"sparsity": 0.5, "recover": {"tempo": 1}}],
)
def test_what_makes_no_sense(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        pass_for("prune", options)
