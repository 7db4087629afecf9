"""Which loss checks there are, and what decides them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tightship.report import Check
from tightship.validators.gates import parse_gates
from tightship.validators.loss import NO_BUDGET, loss_checks, mean_by_position, unjudged
from tightship.validators.text import Origin, TextWindows, next_tokens

Outputs = dict[str, np.ndarray]


def windows(origin: Origin, *, padded: int = 0) -> TextWindows:
    ids = np.random.default_rng(0).integers(0, 11, (2, 9))
    mask = np.ones_like(ids)
    mask[1, 9 - padded :] = 0
    return TextWindows(ids, mask, origin, next_tokens(ids, mask), mask == 1)


def outputs(noise: float, shape: tuple[int, ...] = (2, 9, 11), key: str = "logits") -> tuple[Outputs, Outputs]:
    random = np.random.default_rng(1)
    reference = random.normal(0, 3, shape).astype(np.float32)
    return {key: reference}, {key: (reference + random.normal(0, noise, shape)).astype(np.float32)}


def checks(
    noise: float, origin: Origin = "self", gates: dict[str, float] | None = None, key: str = "logits"
) -> dict[str, Check]:
    found = loss_checks(*outputs(noise, key=key), windows(origin), parse_gates(gates or {}), "onnx", "onnxruntime")
    assert {(c.target, c.runtime, c.kind) for c in found} == {("onnx", "onnxruntime", "loss")}
    return {c.metric: c for c in found}


def test_without_a_budget_top1_is_the_gate_and_the_rest_is_told() -> None:
    good, bad = checks(0.01), checks(20)
    assert (good["top1"].op, good["top1"].threshold, good["top1"].threshold_source) == (">=", 0.5, NO_BUDGET)
    assert {c.verdict for c in good.values()} == {"pass"}
    assert [name for name, c in bad.items() if c.verdict == "fail"] == ["top1"]
    assert all(c.op == "report" for name, c in good.items() if name not in ("top1", "non_finite"))


def test_a_budget_replaces_the_default() -> None:
    found = checks(0.3, gates={"kl_mean": 1e-6})
    assert (found["kl_mean"].verdict, found["kl_mean"].threshold_source) == ("fail", "recipe")
    assert "needs <= 1e-06" in (found["kl_mean"].reason or "")
    assert found["top1"].op == "report"
    assert checks(0.3, gates={"kl_mean": 1.0})["kl_mean"].verdict == "pass"


@pytest.mark.parametrize(("origin", "there"), [("file", True), ("shipped", True), ("self", False), ("random", False)])
def test_perplexity_is_for_text_that_others_wrote(origin: Origin, there: bool) -> None:
    assert ("perplexity_ratio" in checks(0.1, origin)) is there


def test_perplexity_ratio_is_torchs() -> None:
    reference, artifact = outputs(0.5)
    text = windows("file", padded=3)
    found = {c.metric: c for c in loss_checks(reference, artifact, text, parse_gates({}), "t", "r")}
    kept = torch.from_numpy(text.targets).flatten()
    nll = [
        torch.nn.functional.cross_entropy(torch.from_numpy(x["logits"]).double().flatten(0, 1), kept, ignore_index=-1)
        for x in (reference, artifact)
    ]
    assert found["perplexity_ratio"].value == pytest.approx((nll[1] - nll[0]).exp().item(), rel=1e-12)
    assert found["kl_mean"].extra["positions"] == 15


def test_padding_is_not_compared() -> None:
    reference, artifact = outputs(0)
    artifact["logits"][1, 6:] = math.nan
    found = loss_checks(reference, artifact, windows("self", padded=3), parse_gates({}), "t", "r")
    assert {c.verdict for c in found} == {"pass"}


def test_one_nan_fails_every_judged_and_reported_figure() -> None:
    reference, artifact = outputs(0.1)
    artifact["logits"][0, 0, 0] = math.nan
    found = loss_checks(reference, artifact, windows("file"), parse_gates({}), "t", "r")
    assert {c.verdict for c in found} == {"fail"}


def test_encoders_without_logits_are_judged_by_cosine() -> None:
    good, bad = checks(0.01, key="last_hidden_state"), checks(30, key="last_hidden_state")
    assert good["cosine"].threshold_source == NO_BUDGET
    assert (good["cosine"].verdict, bad["cosine"].verdict) == ("pass", "fail")
    assert good["cosine"].extra["sentence_cosine_min"] > 0.99


def test_hidden_states_serve_where_the_runtime_gives_no_logits() -> None:
    logits, hidden = outputs(0.1), outputs(0.1, key="last_hidden_state")
    found = loss_checks(logits[0] | hidden[0], hidden[1], windows("self"), parse_gates({}), "t", "llama.cpp")
    assert "cosine" in {c.metric for c in found}


def test_classifiers_are_compared_by_label() -> None:
    found = loss_checks(*outputs(0.01, (7, 3)), windows("shipped"), parse_gates({}), "t", "r")
    by_metric = {c.metric: c for c in found}
    assert by_metric["kl_mean"].extra["positions"] == 7


def test_nothing_in_common_and_other_shapes_do_not_pass() -> None:
    reference, _ = outputs(0)
    nothing = loss_checks(reference, {}, windows("self"), parse_gates({}), "t", "r")
    other = loss_checks(reference, {"logits": reference["logits"][..., :5]}, windows("self"), parse_gates({}), "t", "r")
    assert [c.verdict for c in (*nothing, *other)] == ["not_run", "fail"]
    assert "(2, 9, 5)" in (other[0].reason or "")


def test_a_budget_that_nobody_judged_is_said_and_does_not_pass() -> None:
    gates = parse_gates({"perplexity_ratio": 1.1, "kl_mean": 1.0, "cosine": 0.9})
    text = windows("self")
    found = loss_checks(*outputs(0.1), text, gates, "t", "r")
    missing = {c.metric: c for c in unjudged(found, gates, text, "t")}
    assert set(missing) == {"perplexity_ratio", "cosine"}
    assert {c.verdict for c in missing.values()} == {"not_run"}
    assert "--text FILE" in (missing["perplexity_ratio"].reason or "")


def test_kl_by_position_is_the_mean_over_the_windows_scored_there() -> None:
    scored = np.array([[True, True, False], [True, False, True]])
    # window 0 gives 1 and 2 at positions 0 and 1, window 1 gives 3 and 4 at positions 0 and 2
    assert mean_by_position(np.array([1.0, 2.0, 3.0, 4.0]), scored) == [2.0, 2.0, 4.0]
    assert mean_by_position(np.array([1.0]), scored) == []
