"""The proof table of graph sources, and the mutations that the parity check must see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tightship.architecture import architecture_for
from tightship.checkpoint import Checkpoint, Source
from tightship.errors import Unsupported
from tightship.exporters.onnx_candidates import candidates
from tightship.exporters.onnx_candidates.capture import CaptureCandidate
from tightship.exporters.onnx_candidates.direct import DirectCandidate
from tightship.exporters.onnx_candidates.mobius_graphs import MobiusCandidate
from tightship.exporters.onnx_candidates.skeleton import Judgement
from tightship.validators import parity
from tightship.validators.parity_model import layer_kinds, small_checkpoint
from tightship.weights import Alias, Dense

LIMIT = 1e-5
Tiny = Callable[[str], Checkpoint]
BY_MOBIUS = ("llama", "llama-tied", "qwen2", "qwen3", "gpt2", "mixtral")
MOBIUS_IS_WRONG = ("mistral", "gemma2", "gemma3", "opt", "falcon", "bert", "bert-encoder", "distilbert")
CAPTURED = ("mistral", "bert")


def verdict(candidate: object, checkpoint: Checkpoint) -> Judgement:
    small = small_checkpoint(checkpoint)
    return parity.judge_candidate(candidate, small, parity.references(small))


@pytest.mark.parametrize("family", BY_MOBIUS)
def test_declarative_graphs_that_are_right(tiny: Tiny, family: str) -> None:
    found = verdict(MobiusCandidate(), tiny(family))
    assert found.passed, found.reason
    assert len(found.cases) == 2 * 9
    assert found.margin <= LIMIT


@pytest.mark.parametrize("family", MOBIUS_IS_WRONG)
def test_declarative_graphs_that_are_wrong(tiny: Tiny, family: str) -> None:
    """Windows that are ignored, offsets, heads and positions that are missed: the judge says so."""
    found = verdict(MobiusCandidate(), tiny(family))
    assert not found.passed
    assert found.margin is None or found.margin > 1e-3


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("bert", "BertForSequenceClassification"),
        ("bert", "BertForQuestionAnswering"),
        ("distilbert", "DistilBertForTokenClassification"),
        ("distilbert", "DistilBertForSequenceClassification"),
    ],
)
def test_heads_of_classifiers(tiny: Tiny, family: str, name: str) -> None:
    labels = {str(i): f"label {i}" for i in range(2 if "Question" in name else 3)}
    config = {**tiny(family).config, "architectures": [name], "id2label": labels}
    outline = Checkpoint(name, config, {}, {}, architecture_for(config), Source(name, None, ()))
    found = verdict(DirectCandidate(), outline)
    assert found.passed, found.reason


def test_wrong_shapes_are_no_match(tiny: Tiny, tmp_path: Path) -> None:
    """An output with a surplus axis would compare by broadcasting."""
    small = small_checkpoint(tiny("llama"))
    case, outputs = parity.references(small)[0]
    parity.write_candidate(MobiusCandidate(), small, tmp_path)
    with pytest.raises(Unsupported, match="shape"):
        parity.measure(tmp_path / "model.onnx", [(case, {"logits": outputs["logits"][:, None]})])


@pytest.mark.slow
@pytest.mark.parametrize("family", CAPTURED)
def test_captured_graphs_are_right(tiny: Tiny, family: str) -> None:
    found = verdict(CaptureCandidate(), tiny(family))
    assert found.passed, found.reason
    assert found.margin <= LIMIT


@pytest.mark.parametrize(
    ("scaling", "passes"),
    [
        ({"rope_type": "linear", "factor": 4.0}, True),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, True),
        ({"rope_type": "yarn", "factor": 4.0}, True),
        ({"rope_type": "dynamic", "factor": 4.0}, False),
    ],
)
@pytest.mark.parametrize("candidate", [MobiusCandidate(), DirectCandidate()])
def test_rope_types(tiny: Tiny, candidate: object, scaling: dict[str, object], passes: bool) -> None:
    llama = tiny("llama")
    rope = {**scaling, "rope_theta": 10000.0, "original_max_position_embeddings": 32}
    found = verdict(candidate, llama.replace(config={**llama.config, "rope_parameters": rope}))
    assert found.passed == passes, found.reason


@pytest.mark.parametrize("family", ["llama", "mistral", "bert"])
def test_the_first_that_passes_is_used(tiny: Tiny, family: str) -> None:
    choice = parity.ParityJudge()(candidates(), tiny(family))
    assert isinstance(choice.candidate, DirectCandidate)
    assert [j.passed for j in choice.judgements] == [True]


@pytest.mark.slow
def test_capture_is_the_last_resort(tiny: Tiny) -> None:
    """An activation that neither our blocks nor mobius have, and that capture sees."""
    config = {**tiny("gpt2").config, "activation_function": "laplace"}
    choice = parity.ParityJudge()(candidates(), tiny("gpt2").replace(config=config))
    assert isinstance(choice.candidate, CaptureCandidate)
    assert [j.passed for j in choice.judgements] == [False, False, True]
    assert all(j.reason for j in choice.judgements[:-1])


def test_none_left_is_unsupported_with_every_reason(tiny: Tiny) -> None:
    with pytest.raises(Unsupported, match=r"mobius-onnx .*: case .*relative L2"):
        parity.ParityJudge()((MobiusCandidate(),), tiny("mistral"))


def test_verdicts_are_kept_on_disk(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = parity.ParityJudge(tmp_path)((MobiusCandidate(),), tiny("llama"))

    class Broken(MobiusCandidate):
        def build(self, *_: object) -> object:
            raise AssertionError("asked again")

    second = parity.ParityJudge(tmp_path)((Broken(),), tiny("llama"))
    assert second.judgements == first.judgements
    other = tiny("llama").replace(config={**tiny("llama").config, "rms_norm_eps": 1e-3})
    with pytest.raises(Unsupported, match="asked again"):
        parity.ParityJudge(tmp_path)((Broken(),), other)
    cases = parity.cases_for(other)
    monkeypatch.setattr(parity, "cases_for", lambda _: [*cases, replace(cases[0], name="another")])
    with pytest.raises(Unsupported, match="asked again"):
        parity.ParityJudge(tmp_path)((Broken(),), tiny("llama"))


@pytest.mark.parametrize(
    ("family", "candidate"),
    [
        ("qwen2", MobiusCandidate()),
        ("qwen3", DirectCandidate()),
        ("gpt2", DirectCandidate()),
        ("bert", DirectCandidate()),
    ],
)
def test_every_dropped_parameter_is_seen(tiny: Tiny, family: str, candidate: object, tmp_path: Path) -> None:
    """Zero a parameter (set a norm's scale to one) in what the candidate gets: red, each time.

    A bias on keys adds the same to every score of a query where nothing rotates it, so softmax does not see it.
    """
    small = small_checkpoint(tiny(family))
    expected = parity.references(small)
    names = [name for name, weight in small.weights.items() if not isinstance(weight, Alias)]
    unseen = {name for name in names if family == "bert" and name.endswith("key.bias")}
    assert len(names) > 20
    for index, name in enumerate(sorted(set(names) - unseen)):
        folder = tmp_path / str(index)
        folder.mkdir()
        parity.write_candidate(candidate, parity.without(small, name), folder)
        worst = max(value for _, value in parity.measure(folder / "model.onnx", expected[:2]))
        assert worst > 1e-3, f"dropping {name} moved the outputs by {worst:.1e} only"


def test_every_parameter_is_random(tiny: Tiny, family: str) -> None:
    small = small_checkpoint(tiny(family))
    for name, weight in small.weights.items():
        if isinstance(weight, Dense):
            assert np.std(weight.value()) > 0.01, name


def test_small_models_keep_the_flags(tiny: Tiny) -> None:
    gemma = tiny("gemma2")
    config = {**gemma.config, "num_hidden_layers": 26, "sliding_window": 4096, "layer_types": None}
    small = small_checkpoint(gemma.replace(config=config))
    assert small.config["num_hidden_layers"] == 2
    assert small.config["sliding_window"] == 5
    assert 0 < small.config["attn_logit_softcapping"] < 10
    qwen = tiny("qwen3").replace(config={**tiny("qwen3").config, "head_dim": 128})
    assert small_checkpoint(qwen).hyper["head_dim"] * 4 != small_checkpoint(qwen).hyper["hidden"]


def test_far_layer_types_are_pulled_to_the_front(tiny: Tiny) -> None:
    qwen = tiny("qwen2")
    config = {**qwen.config, "num_hidden_layers": 30, "use_sliding_window": True, "sliding_window": 64}
    config |= {"max_window_layers": 20, "layer_types": None}
    kinds = layer_kinds(config, 30)
    assert len(set(kinds)) == 2
    small = small_checkpoint(qwen.replace(config=config))
    assert small.config["num_hidden_layers"] == 2
    assert len(set(layer_kinds(small.config, 2))) == 2
