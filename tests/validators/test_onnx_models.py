"""Each model of docs/onnx-models.md through the parity check, some through 64 steps; the page against the data."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from tightship.exporters.onnx_candidates.direct import DirectCandidate
from tightship.exporters.onnx_candidates.fused import FusedCandidate
from tightship.exporters.onnx_candidates.skeleton import Candidate
from tightship.modelview import ModelView
from tightship.validators import parity, parity_model
from tightship.validators.parity import ParityJudge
from tightship.validators.runtimes.onnx_runtime import Graph, open_graph, open_session
from tightship.weights import Alias

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 1e-5
CASES = {"text-generation": 9, "text2text-generation": 8, "image-classification": 2}
TEXT_CASES = 4
STEPS, PROMPT = 64, 6
LENGTHS = {"one": [6], "left": [6, 4, 5, 2], "right": [6, 4, 5, 2]}  # of the prompts
STEPPED = ("MistralForCausalLM", "Gemma3ForCausalLM", "GPT2LMHeadModel", "BloomForCausalLM", "MptForCausalLM")
STEPPED += ("MixtralForCausalLM", "GptOssForCausalLM", "DeepseekV3ForCausalLM", "MambaForCausalLM")
STEPPED += ("HunYuanMoEV1ForCausalLM", "PhimoeForCausalLM", "Lfm2ForCausalLM", "FalconForCausalLM: ALiBi in bfloat16")
STEPPED_FUSED = ("LlamaForCausalLM", "MistralForCausalLM", "GptOssForCausalLM", "FalconForCausalLM: ALiBi in bfloat16")
DIRECT, FUSED = DirectCandidate(), FusedCandidate(DirectCandidate(), packed=True)
TWO_STACKS = ("T5ForConditionalGeneration", "BartForConditionalGeneration", "MarianMTModel")
# Kinds of model, and the biases of keys that no output can show.
SEEN: dict[str, tuple[str, ...]] = {
    "GptOssForCausalLM": (),
    "DeepseekV3ForCausalLM": (),
    "MambaForCausalLM": (),
    "Lfm2ForCausalLM": (),
    "DebertaV2ForMaskedLM": (),
    "LongformerForMaskedLM": ("key.bias", "key_global.bias"),
    "ViTForImageClassification": ("key.bias",),
    "T5ForConditionalGeneration": (),
    "BartForConditionalGeneration": ("k_proj.bias",),
}


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("onnx_models_tool", ROOT / "tools" / "onnx_models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


TOOL = load_tool()
MODELS = TOOL.models()


@pytest.fixture(scope="module")
def judge() -> ParityJudge:
    return ParityJudge()


@pytest.mark.parametrize("model", MODELS, ids=[m.name for m in MODELS])
def test_the_graph_computes_the_model(model: object, judge: ParityJudge) -> None:
    choice = TOOL.judged(model, judge)
    used = choice.judgements[-1]
    assert used.passed, used.reason
    assert 0 < used.margin <= LIMIT
    expected = CASES.get(TOOL.outline(model).architecture.task, TEXT_CASES)
    modes = {case.split(" ")[0] for case, _ in used.cases}
    assert modes == {"graph", "shipped"}
    assert len({case.rsplit(" ", 1)[0] for case, _ in used.cases}) == 2 * expected


def test_the_page_is_the_data() -> None:
    """Same models, same words, in the same order; margins are the page's own and within the limit."""
    rows = [line for line in TOOL.PAGE.read_text().splitlines() if line.startswith("| `")]
    cells = [re.split(r" *\| *", line.strip("| ")) for line in rows]
    wanted = [(f"`{m.model_type}`", m.kind, m.feature, TOOL.outline(m).architecture.task) for m in MODELS]
    assert [tuple(c[:4]) for c in cells] == wanted
    assert all(0 < float(c[5]) <= LIMIT for c in cells)


def test_forty_model_types_and_the_ones_that_others_get_wrong() -> None:
    types = {model.model_type for model in MODELS}
    assert len(types) >= 40
    assert {"mistral", "gemma3_text", "opt", "bloom", "falcon", "distilbert", "longformer", "mixtral"} <= types


ROUTED = (
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
    "DeepseekV2ForCausalLM",
    "Glm4MoeForCausalLM",
    "MiniMaxM2ForCausalLM",
    "HunYuanMoEV1ForCausalLM",
    "PhimoeForCausalLM",
)


@pytest.mark.parametrize("kind", ROUTED)
def test_experts_in_one_node_take_every_way_of_routing(kind: str) -> None:
    """Softmax before and behind the choice, shared experts, groups, biased sigmoids: 4-bit experts in QMoE."""
    model = next(m for m in MODELS if m.kind == kind)
    floats = parity_model.small_checkpoint(TOOL.outline(model))
    small = floats.with_weights(parity_model.in_integers(floats))
    found = parity.judge_candidate(DirectCandidate(one_node=True), small, parity.references(small))
    assert found.passed, found.reason
    assert 0 < found.margin <= LIMIT


def padded(lengths: list[int], *, left: bool) -> dict[str, np.ndarray]:
    """Prompts padded to PROMPT, then STEPS tokens for every row; positions count real tokens."""
    mask = np.ones((len(lengths), PROMPT + STEPS), np.int64)
    for row, length in enumerate(lengths):
        mask[row, slice(0, PROMPT - length) if left else slice(length, PROMPT)] = 0
    ids = np.random.default_rng(2).integers(5, parity_model.VOCABULARY, mask.shape)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0)}


@pytest.mark.parametrize(
    ("name", "candidate"), [*((name, DIRECT) for name in STEPPED), *((name, FUSED) for name in STEPPED_FUSED)]
)
def test_64_steps_through_the_cache_are_one_pass(
    name: str, candidate: Candidate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(parity_model, "CONTEXT", 2 * STEPS)
    model = next(m for m in MODELS if m.name.startswith(name))
    small = parity_model.small_checkpoint(TOOL.outline(model))
    parity.write_candidate(candidate, small, tmp_path)
    view = ModelView(small)
    module = view.module()
    for mode in parity.MODES:
        graph = Graph(open_session(tmp_path / "model.onnx", mode))
        for side, lengths in LENGTHS.items():
            arrays = padded(lengths, left=side == "left")
            with view.computing():
                given = {k: torch.from_numpy(v) for k, v in arrays.items()}
                given = {k: v for k, v in given.items() if k in inspect.signature(module.forward).parameters}
                expected = module(**given, use_cache=False).logits.numpy()
            got = graph.decode(arrays, PROMPT)["logits"]
            kept = arrays["attention_mask"].astype(bool)
            assert parity.relative_l2(got[kept], expected[kept]) <= 1e-5, (mode, side)


@pytest.mark.parametrize("kind", TWO_STACKS)
def test_64_steps_behind_an_encoder_are_one_pass(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Sources of one row, and of four rows padded on either side."""
    monkeypatch.setattr(parity_model, "CONTEXT", 2 * STEPS)
    small = parity_model.small_checkpoint(TOOL.outline(next(m for m in MODELS if m.kind == kind)))
    main = parity.write_candidate(DirectCandidate(), small, tmp_path)
    view = ModelView(small)
    module = view.module()
    target = np.random.default_rng(3).integers(5, parity_model.VOCABULARY, (4, 1 + STEPS))
    for mode in parity.MODES:
        pair = open_graph(main, mode)
        for name, lengths in LENGTHS.items():
            source = {k: v[:, :PROMPT] for k, v in padded(lengths, left=name == "left").items() if k != "position_ids"}
            arrays = {**source, "decoder_input_ids": target[: len(lengths)]}
            with view.computing():
                expected = module(**{k: torch.from_numpy(v) for k, v in arrays.items()}, use_cache=False).logits.numpy()
            assert parity.relative_l2(pair.decode(arrays, 1)["logits"], expected) <= LIMIT, (mode, name)


def test_what_is_written_greedily_is_what_transformers_writes(tmp_path: Path) -> None:
    """By a head of its own: one tied to the tokens of a random model says the last token again."""
    model = next(m for m in MODELS if m.kind == "T5ForConditionalGeneration" and "version 1.1" in m.feature)
    small = parity_model.small_checkpoint(TOOL.outline(model))
    main = parity.write_candidate(DirectCandidate(), small, tmp_path)
    module = ModelView(small).module()
    module.generation_config = GenerationConfig(max_new_tokens=STEPS, do_sample=False, decoder_start_token_id=4)
    source = np.random.default_rng(0).integers(5, 200, 9)
    with torch.no_grad():
        first, *written = module.generate(torch.from_numpy(source[None]))[0].tolist()
    assert len(set(written)) > STEPS // 4
    for mode in parity.MODES:
        assert open_graph(main, mode).greedy(source, STEPS, first).tolist() == written


@pytest.mark.slow
@pytest.mark.parametrize("kind", SEEN)
def test_every_dropped_parameter_is_seen(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Zero the first parameter of each role (set a norm's scale to one) in what the graph gets: red.

    A bias on keys adds the same to every score of a query where nothing rotates it, so softmax does not see it.
    """
    monkeypatch.setattr(parity, "MODES", ("graph",))
    model = next(m for m in MODELS if m.kind == kind)
    small = parity_model.small_checkpoint(TOOL.outline(model))
    expected = [case for case in parity.references(small) if case[0].name in ("short", "batch")]
    infos = small.infos()
    first: dict[tuple[str, bool], str] = {}
    for name in (n for n, w in small.weights.items() if not isinstance(w, Alias)):
        first.setdefault((infos[name].rule.role, name.endswith("bias")), name)
    for index, name in enumerate(n for n in first.values() if not n.endswith(SEEN[kind])):
        folder = tmp_path / str(index)
        folder.mkdir()
        path = parity.write_candidate(DirectCandidate(), parity.without(small, name), folder)
        worst = max(value for _, value in parity.measure(path, expected))
        assert worst > 1e-3, f"dropping {name} moved the outputs by {worst:.1e} only"
