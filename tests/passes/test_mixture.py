"""A Mixtral through every pass: routers stay as they are, experts are counted, the module still loads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from tightship.checkpoint import Checkpoint
from tightship.modelview import ModelView
from tightship.passes import pass_for
from tightship.passes.base import Run

Tiny = Callable[[str], Checkpoint]
SMALL = {"tokens": 128, "sequence": 16, "batch": 4}
COMPRESSING: list[tuple[str, dict[str, Any]]] = [
    ("prune", {"method": "sparsegpt", "sparsity": 0.5}),
    ("prune", {"method": "magnitude", "pattern": "2:4"}),
    ("low-rank", {"method": "svd-llm", "keep": 0.5}),
    ("low-rank", {"method": "fisher", "rank": 8}),
    ("share", {"codebook": 8}),
    ("quantize", {"solver": "gptq", "layout": "int4"}),
    ("window", {"size": 8}),
]
TRAINING: list[tuple[str, dict[str, Any]]] = [
    ("recover", {"method": "lora", "rank": 2, **SMALL}),
    ("recover", {"method": "blockwise", **SMALL}),
    ("distill", {"student": {"every": 2}, "alpha": 1.0, **SMALL}),
]


def run_with(checkpoint: Checkpoint, figures: dict[str, Mapping[str, Any]] | None = None) -> Run:
    report = ({} if figures is None else figures).__setitem__
    return Run(threads=1, tokens=128, sequence=16, inputs={"teacher": checkpoint}, report=report)


def routers(checkpoint: Checkpoint) -> list[str]:
    return [n for n, i in checkpoint.infos().items() if i.rule.kind == "router"]


@pytest.mark.parametrize(("use", "options"), COMPRESSING, ids=lambda value: str(value)[:40])
def test_compressing_passes_leave_routers_alone(use: str, options: dict[str, Any], tiny: Tiny) -> None:
    before = tiny("mixtral")
    step = pass_for(use, options)
    step.requires(before)
    after = step.apply(before, run_with(before))
    assert len(routers(after)) == 2
    assert all(after.weights[name] is before.weights[name] for name in routers(after))
    if use != "window":
        assert all(after.weights[i.name] is not before.weights[i.name] for i in before.linears() if i.expert == 3)
    assert np.isfinite(ModelView(after).outputs(np.arange(12)[None])["logits"]).all()


@pytest.mark.parametrize(("use", "options"), TRAINING, ids=lambda value: str(value)[:40])
def test_training_passes_reach_every_expert(use: str, options: dict[str, Any], tiny: Tiny) -> None:
    dense = tiny("mixtral")
    before = pass_for("prune", {"sparsity": 0.3}).apply(dense, run_with(dense))
    after = pass_for(use, options).apply(before, run_with(dense))
    experts = [i.name for i in after.infos().values() if i.expert is not None and i.block == 0]
    moved = [n for n in experts if not np.array_equal(after.weights[n].value(), before.weights[n].value())]  # type: ignore[union-attr]
    assert len(moved) == len(experts) == 12
    assert np.isfinite(ModelView(after).outputs(np.arange(12)[None])["logits"]).all()


def test_every_token_is_counted_at_the_experts_it_went_to(tiny: Tiny) -> None:
    checkpoint = tiny("mixtral")
    figures: dict[str, Mapping[str, Any]] = {}
    pass_for("prune", {"method": "wanda", "sparsity": 0.5}).apply(checkpoint, run_with(checkpoint, figures))
    infos, counted = checkpoint.infos(), defaultdict(int)
    for name, found in figures.items():
        if name in infos and infos[name].rule.role == "ffn_gate_exps":
            counted[infos[name].block] += found["tokens"]
    assert dict(counted) == {0: 2 * 128, 1: 2 * 128}  # two experts a token
