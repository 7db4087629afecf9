"""Every pass that does not say that it destroys masks leaves pruned weights at zero."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tightship import passes
from tightship.checkpoint import Checkpoint
from tightship.opening import open_checkpoint
from tightship.passes import pass_for
from tightship.passes.base import Pass, Run
from tightship.weights import Dense, Factored

pytest.importorskip("torch")

EMBER = Path(__file__).parents[2] / "examples" / "ember"
TEXT = "The old ship lay at anchor in the bay, and nobody on the shore could say whence she had come. " * 20
TRAINED: dict[str, Any] = {"tokens": 256, "sequence": 32, "batch": 4, "snapshot": 2}
WAYS: dict[str, list[dict[str, Any]]] = {
    "dequantize": [{}],
    "distill": [{**TRAINED, "alpha": 0.5}],
    "drop-layers": [{"layers": [1]}],
    "imatrix": [{}],
    "merge": [{}],
    "prune": [{"sparsity": 0.7}, {"sparsity": 0.7, "method": "sparsegpt"}, {"pattern": "2:4", "method": "wanda"}],
    "prune-quantize": [{"sparsity": 0.6, "layout": "int4"}],
    "qat": [{**TRAINED, "layout": "int4"}],
    "quantize": [{"layout": "int4"}, {"layout": "int4-asym", "solver": "gptq", "actorder": False}],
    "recover": [TRAINED],
    "share": [{"codebook": 16}],
    "smooth": [{"steps": 2}],
    "window": [{"size": 64}],
}


@pytest.fixture(scope="module")
def pruned() -> Checkpoint:
    """With the history that the runner writes: solvers that could move zeros ask it."""
    checkpoint = pass_for("prune", {"sparsity": 0.5}).apply(open_checkpoint(EMBER), Run())
    return checkpoint.replace(history=({"use": "prune", "makes": ["mask"]},))


def factored(pruned: Checkpoint) -> Checkpoint:
    """The same numbers, one matrix of them as a product with the identity."""
    name = next(info.name for info in pruned.linears())
    w = pruned.resolve(name).value()
    sides = [Dense.of(side) for side in (w, np.eye(w.shape[1], dtype=np.float32))]
    return pruned.with_weights({name: Factored(*sides)})


@pytest.mark.parametrize(("use", "options"), [(use, options) for use, ways in WAYS.items() for options in ways])
def test_zeros_stay_zero(use: str, options: dict[str, Any], pruned: Checkpoint) -> None:
    step = pass_for(use, options)
    assert "mask" not in step.destroys
    before = factored(pruned) if use == "merge" else pruned
    before = pass_for("quantize", {"layout": "int4"}).apply(pruned, Run()) if use == "dequantize" else before
    run = Run(threads=1, texts=(TEXT,), tokens=256, sequence=64, inputs={"teacher": pruned} if use == "distill" else {})
    step.requires(before)
    after = step.apply(before, run)
    for info in after.linears():
        old, new = before.resolve(info.name).value(), after.resolve(info.name).value()
        assert (old == 0).mean() >= 0.5
        assert not new[old == 0].any(), info.name
        assert new.any()


def test_no_pass_is_left_out() -> None:
    for module in pkgutil.iter_modules(passes.__path__):
        importlib.import_module(f"tightship.passes.{module.name}")
    declared = {name: found.destroys for name, found in Pass.registry.items()}
    kept = {name for name, words in declared.items() if isinstance(words, property) or "mask" not in words}
    assert set(WAYS) == kept - {"low-rank"}  # which destroys them always, whatever else its options decide
