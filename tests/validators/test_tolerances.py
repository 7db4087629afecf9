"""The tolerance file says what it should, and nothing else gets past its schema."""

from __future__ import annotations

import re
from importlib import resources

import pytest

from tightship.errors import Malformed, Unsupported
from tightship.target import Target, TargetPlan, TensorPlan
from tightship.validators.tolerances import RUNTIMES, parse, storage_of, tolerances

TEXT = (resources.files("tightship.validators") / "tolerances.toml").read_text()


def test_fidelity_is_one_in_a_hundred_thousand_everywhere_but_gelu_and_float16() -> None:
    """Exact activations agree to 1e-5; only llama.cpp's GELU table and graphs computed in float16 may differ more."""
    loose = {key for key, entries in tolerances().graph.items() if entries["rel_l2"].threshold != 1e-5}
    assert loose == {("llama.cpp", "gelu"), ("onnxruntime", "half")}
    assert tolerances().graph["llama.cpp", "gelu"]["rel_l2"].threshold == 1e-3


def test_stored_values_are_exact() -> None:
    assert {m: (t.op, t.threshold) for m, t in tolerances().values.items()} == {
        "mismatches": ("<=", 0),
        "non_finite": ("<=", 0),
    }


def test_default_loss_gate_is_the_contracts() -> None:
    top1 = tolerances().loss["top1"]
    assert (top1.op, top1.threshold) == (">=", 0.5)
    assert "no budget set" in top1.why


@pytest.mark.parametrize("kind", ["graph", "runtime"])
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("storage", ["f32", "f16", "bf16", "quantized"])
def test_every_runtime_and_weight_storage_is_covered(kind: str, runtime: str, storage: str) -> None:
    assert "rel_l2" in tolerances().for_run(kind, runtime, storage)


def test_asking_for_what_is_not_there_is_an_error() -> None:
    with pytest.raises(Unsupported, match=r"no graph tolerance for onnxruntime with gelu weights"):
        tolerances().for_run("graph", "onnxruntime", "gelu")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("[values]", "[value]", "unknown key 'value'"),
        ("[graph.transformers]", "[graph.torch]", "unknown key 'torch'"),
        ("mismatches =", "mismatch =", "unknown key 'mismatch'"),
        ("top1 = { min = 0.5", "top1 = { minimum = 0.5", "unknown key 'minimum'"),
        ("top1 = { min = 0.5", "top1 = { min = 0.5, max = 1", "needs one of max, min or report, found max, min"),
        ("top1 = { min = 0.5", "top1 = { min = nan", "needs a finite number"),
        ("top1 = { min = 0.5", "top1 = { min = true", "needs a finite number"),
        ("top1 = { min = 0.5", 'top1 = { min = "0.5"', "needs a finite number"),
        ("{ report = true", "{ report = false", "can only be true"),
    ],
)
def test_a_key_that_does_not_belong_is_refused(before: str, after: str, message: str) -> None:
    assert before in TEXT
    with pytest.raises(Malformed, match=re.escape(message)):
        parse(TEXT.replace(before, after, 1))


def test_a_reason_and_every_section_are_required() -> None:
    with pytest.raises(Malformed, match="does not say why"):
        parse(re.sub(r'why = "no budget set: a model[^"]*"', 'why = " "', TEXT))
    with pytest.raises(Malformed, match="lacks 'parity'"):
        parse(TEXT[: TEXT.index("[parity]")])


def test_a_check_carries_the_threshold_and_fails_above_it() -> None:
    tolerance = tolerances().for_run("graph", "onnxruntime", "f32")["rel_l2"]
    common = {"target": "onnx", "runtime": "onnxruntime", "kind": "graph"}
    assert tolerance.check(**common, value=1e-5).verdict == "pass"
    failed = tolerance.check(**common, value=1.1e-5)
    assert (failed.verdict, failed.threshold_source) == ("fail", "tolerances.toml")
    assert tolerance.check(**common, value=float("nan")).verdict == "fail"
    assert tolerance.check(**common, value=None).verdict == "fail"


def plan(*layouts: str) -> TargetPlan:
    tensors = [TensorPlan(f"t{i}", f"t{i}", (4, 32), layout, "", 0, "") for i, layout in enumerate(layouts)]
    norm = TensorPlan("norm", "norm", (32,), "f32", "", 0, "")
    return TargetPlan(Target("gguf"), (*tensors, norm), 0)


@pytest.mark.parametrize(
    ("layouts", "storage"),
    [
        (("f32",), "f32"),
        (("f16", "f32"), "f16"),
        (("bf16", "f16"), "bf16"),
        (("f16", "int4-g32"), "quantized"),
        (("q4_k",), "quantized"),
    ],
)
def test_the_coarsest_matrix_decides(layouts: tuple[str, ...], storage: str) -> None:
    assert storage_of(plan(*layouts)) == storage
