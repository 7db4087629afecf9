"""Folding scales and rotations into weights leaves float logits as they were, family by family; torch is the judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.passes.base import Run
from tightship.passes.folding import Factors, folds_of
from tightship.passes.rotate import Rotate
from tightship.passes.rotation import Rotation
from tightship.passes.smooth import Smooth
from tightship.weights import Alias

SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**SIZES, "intermediate_size": 96, "max_position_embeddings": 64, "num_key_value_heads": 2}
BIASED = {"attention_bias": True, "mlp_bias": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**DECODER, **BIASED}),
    "llama-tied": ("Llama", {**DECODER, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {**DECODER, "sliding_window": 8}),
    "qwen2": ("Qwen2", DECODER),
    "qwen3": ("Qwen3", {**DECODER, "head_dim": 24}),
    "gemma": ("Gemma", {**DECODER, "head_dim": 32}),
    "gemma2": ("Gemma2", {**DECODER, "head_dim": 16, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3", {**DECODER, "head_dim": 16, "sliding_window": 8}),
    "granite": ("Granite", {**DECODER, "residual_multiplier": 0.5, "embedding_multiplier": 2.0}),
    "phi3": ("Phi3", {**DECODER, "pad_token_id": 0}),
    "mixtral": ("Mixtral", {**DECODER, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "hunyuan_v1_moe": ("HunYuanMoEV1", {**DECODER, "head_dim": 16, "num_experts": 3, "moe_topk": 2}),
    "phimoe": ("Phimoe", {**DECODER, "num_local_experts": 3, "num_experts_per_tok": 2, "attention_bias": True}),
    "opt": ("OPT", {**SIZES, "ffn_dim": 96, "max_position_embeddings": 64, "word_embed_proj_dim": 64}),
    "opt-plain": (
        "OPT",
        {**SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64, "layer_norm_elementwise_affine": False},
    ),
    "bloom": ("Bloom", {"vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "gpt2": ("GPT2", {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_neox": ("GPTNeoX", {**SIZES, "intermediate_size": 96, "max_position_embeddings": 64}),
}
WITHOUT_STREAM = {"bloom", "gemma2", "gemma3", "gpt_neox"}
IDS = np.random.default_rng(1).integers(3, 96, (2, 24))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """name -> a random model with every parameter away from its default, norms with gains from 0.2 to 3."""
    made: dict[str, Checkpoint] = {}

    def make(name: str) -> Checkpoint:
        if name not in made:
            stem, options = MODELS[name]
            suffix = "LMHeadModel" if stem == "GPT2" else "ForCausalLM"
            model_class = getattr(transformers, stem + suffix)
            torch.manual_seed(0)
            model = model_class(model_class.config_class(**options))
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    gain = parameter.ndim == 1 and key.endswith("weight")
                    parameter.uniform_(0.2, 3) if gain else parameter.normal_(0, 0.15)
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name] = open_checkpoint(folder)
        return made[name]

    return make


def distance(a: Checkpoint, b: Checkpoint) -> float:
    first, second = (ModelView(c, threads=1).outputs(IDS)["logits"].astype(np.float64) for c in (a, b))
    return float(np.linalg.norm(first - second) / np.linalg.norm(first))


@pytest.mark.parametrize("name", MODELS)
def test_a_scale_anywhere_changes_nothing(models: Callable[[str], Checkpoint], name: str) -> None:
    checkpoint = models(name)
    rng, factors, moved = np.random.default_rng(0), Factors(), 0
    for fold in folds_of(checkpoint):
        if fold.producer is not None:
            factors.move(checkpoint, fold, np.exp(rng.normal(0, 1, len(fold.rows))))
            moved += 1
    assert moved >= 2 * (1 if name == "opt-plain" else 2)
    changed = factors.applied(checkpoint)
    makers = {fold.producer for fold in folds_of(checkpoint)}
    for fold in folds_of(checkpoint):
        after, before = (c.weights[fold.consumers[0]].value() for c in (changed, checkpoint))
        assert np.array_equal(after, before) == (fold.producer is None and fold.consumers[0] not in makers)
    assert distance(checkpoint, changed) <= 1e-5


def test_a_relu_lets_scales_through_and_a_gelu_does_not(models: Callable[[str], Checkpoint]) -> None:
    checkpoint = models("opt")
    assert sum(fold.name.endswith("fc2.weight") for fold in folds_of(checkpoint)) == 2
    other = checkpoint.replace(config={**checkpoint.config, "activation_function": "gelu"})
    assert not any(fold.name.endswith("fc2.weight") for fold in folds_of(other))


@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize("name", MODELS)
def test_turning_changes_nothing(models: Callable[[str], Checkpoint], name: str, kind: Any) -> None:
    checkpoint = models(name)
    figures: dict[str, Any] = {}
    turned = Rotate(kind=kind).apply(checkpoint, Run(report=figures.__setitem__))
    assert figures["values"]["turned"] == 1
    assert figures["stream"]["turned"] == int(name not in WITHOUT_STREAM)
    assert distance(checkpoint, turned) <= 1e-5
    outputs = [i.name for i in checkpoint.linears() if i.rule.role == "attn_output"]
    assert not any(np.allclose(turned.weights[n].value(), checkpoint.weights[n].value(), atol=0.1) for n in outputs)


def test_a_space_that_is_not_there_is_refused_by_name(models: Callable[[str], Checkpoint]) -> None:
    with pytest.raises(Unsupported, match="norms whose gains"):
        Rotate(spaces=("stream",)).requires(models("bloom"))


def test_a_tied_head_becomes_its_own(models: Callable[[str], Checkpoint]) -> None:
    tied = models("llama-tied")
    assert isinstance(tied.weights["lm_head.weight"], Alias)
    turned = Rotate().apply(tied, Run())
    assert not isinstance(turned.weights["lm_head.weight"], Alias)
    assert turned.config["tie_word_embeddings"] is False
    kept = Rotate(spaces=("values",)).apply(tied, Run())
    assert isinstance(kept.weights["lm_head.weight"], Alias)


@pytest.mark.parametrize("size", [64, 96, 24])
@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize("keeps_mean", [False, True])
def test_a_rotation_is_orthogonal_and_spreads(size: int, kind: Any, keeps_mean: bool) -> None:
    rotation = Rotation.draw(size, kind, np.random.default_rng(0), keeps_mean=keeps_mean)
    written_out = rotation.rows(np.eye(size))
    np.testing.assert_allclose(written_out @ written_out.T, np.eye(size), atol=1e-12)
    w = np.random.default_rng(1).standard_normal((size, 3))
    np.testing.assert_allclose(rotation.columns(w), written_out.T @ w, atol=1e-12)
    if keeps_mean:
        np.testing.assert_allclose(written_out.sum(axis=1), 1, atol=1e-12)
    assert np.abs(written_out).max() < 0.75


@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "bloom", "gemma", "phi3"])
@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_smoothing_changes_nothing_before_rounding(
    models: Callable[[str], Checkpoint], calibrated: Run, name: str, method: Any
) -> None:
    checkpoint = models(name)
    figures: dict[str, Any] = {}
    smoothed = Smooth(method=method, layout="int3", steps=5).apply(
        checkpoint, replace(calibrated, report=figures.__setitem__)
    )
    assert distance(checkpoint, smoothed) <= 1e-5
    for found in figures.values():
        if method == "awq":
            assert found["loss"] <= found["loss_unscaled"]
        else:
            assert found["spread_after"] < found["spread_before"]


def test_a_killed_smoothing_goes_on(models: Callable[[str], Checkpoint], calibrated: Run, tmp_path: Path) -> None:
    checkpoint = models("qwen2")

    def die(_what: str, done: int, _total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    spec = Smooth(steps=3)
    straight = spec.apply(checkpoint, calibrated)
    with pytest.raises(KeyboardInterrupt):
        spec.apply(checkpoint, replace(calibrated, scratch=tmp_path, progress=die))
    assert [p.name for p in tmp_path.iterdir()] == ["scales-00000.json"]
    resumed = spec.apply(checkpoint, replace(calibrated, scratch=tmp_path))
    for name in checkpoint.weights:
        np.testing.assert_array_equal(resumed.resolve(name).value(), straight.resolve(name).value())
