"""Structured pruning: what is cut was silent, and what is left runs in unmodified transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tightship.checkpoint import Checkpoint, Source
from tightship.errors import Unsupported, UsageError
from tightship.modelview import ModelView
from tightship.passes import pass_for
from tightship.passes.base import Run
from tightship.passes.silence import silenced, unit_costs
from tightship.passes.spaces import counts_kept, space_of
from tightship.passes.structural import cut_silent
from tightship.weights import Dense

pytest.importorskip("torch")


def with_silent_units(checkpoint: Checkpoint, space: str, count: int) -> Checkpoint:
    """The first, third ... units of a space made silent in every block (and expert)."""
    found = space_of(checkpoint, space)
    changed = {}
    for info in found.readers(checkpoint):
        w = checkpoint.resolve(info.name).value().copy()
        w[:, found.columns(info, checkpoint.hyper)[::2][:count].reshape(-1)] = 0
        changed[info.name] = Dense.of(w)
    return checkpoint.with_weights(changed)


@pytest.mark.parametrize("space", ["ffn", "heads"])
def test_cutting_silent_units_leaves_logits_as_they_are(
    family: str,
    space: str,
    tiny: Callable[[str], Checkpoint],
    outputs: Callable[[Checkpoint], np.ndarray],
    assert_lossless: Callable[[Checkpoint, Checkpoint], None],
) -> None:
    checkpoint = tiny(family)
    if space not in checkpoint.architecture.prunable:
        with pytest.raises(Unsupported, match=f"cannot lose {space}"):
            space_of(checkpoint, space)
        return
    found = space_of(checkpoint, space)
    gone = found.units // 2 if space == "heads" else 32
    silent = with_silent_units(checkpoint, space, gone)
    cut = cut_silent(silent, [found], {space: [found.units - gone] * 2})
    assert sum(np.prod(w.shape) for w in cut.weights.values() if hasattr(w, "shape")) < sum(
        np.prod(w.shape) for w in checkpoint.weights.values() if hasattr(w, "shape")
    )
    assert_lossless(cut, silent)
    assert not np.allclose(outputs(silent), outputs(checkpoint), atol=1e-3)


@pytest.mark.parametrize(
    ("name", "space"),
    [("llama", "ffn"), ("llama", "heads"), ("mixtral", "ffn"), ("qwen3", "heads"), ("gpt2", "ffn"), ("opt", "ffn")],
)
def test_the_pass_finds_the_silent_units(
    name: str,
    space: str,
    tiny: Callable[[str], Checkpoint],
    assert_lossless: Callable[[Checkpoint, Checkpoint], None],
    calibrated: Run,
) -> None:
    """Nobody tells it which units go, and what stays needs no refitting."""
    found = space_of(tiny(name), space)
    gone = found.units // 2 if space == "heads" else 32
    silent = with_silent_units(tiny(name), space, gone)
    after = pass_for("prune-structured", {space: gone / found.units, "multiple": 16}).apply(silent, calibrated)
    assert set(after.widths(list(found.widths)[-1])) == {(found.units - gone) * list(found.widths.values())[-1]}
    assert_lossless(after, silent)


def test_a_cut_model_loads_in_transformers_without_us(
    tiny: Callable[[str], Checkpoint], tmp_path: Path, outputs: Callable[[Checkpoint], np.ndarray], calibrated: Run
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from tightship.exporters import exporter_for
    from tightship.target import Target

    step = pass_for("prune-structured", {"ffn": 0.34, "heads": 0.5, "width": 0.25, "multiple": 16})
    before = tiny("llama-tied")
    step.requires(before)
    after = step.apply(before, calibrated)
    exporter = exporter_for("safetensors")
    target = Target("safetensors")
    exporter.export(after, exporter.plan(after, target), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    config = model.config
    assert (config.hidden_size, config.intermediate_size, config.num_attention_heads) == (48, 64, 2)
    with torch.no_grad():
        np.testing.assert_allclose(
            model(torch.arange(24).reshape(2, 12)).logits.numpy(), outputs(after), atol=2e-5, rtol=2e-5
        )


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3", "mixtral", "phi3"])
def test_directions_that_nothing_uses_can_be_sliced_away(
    name: str, tiny: Callable[[str], Checkpoint], outputs: Callable[[Checkpoint], np.ndarray], calibrated: Run
) -> None:
    """Rotate a narrow model into a wide stream at random: slicing must find the way back."""
    from tightship.passes.slicing import principal_directions, sliced

    narrow = sliced(tiny(name), np.linalg.qr(np.random.default_rng(0).normal(size=(64, 64)))[0][:, :48])
    wide = sliced(narrow, np.linalg.qr(np.random.default_rng(1).normal(size=(64, 64)))[0][:48])
    np.testing.assert_allclose(outputs(wide), outputs(narrow), atol=1e-3, rtol=1e-3)
    directions, energy = principal_directions(wide, calibrated)
    assert energy[:48].sum() == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(outputs(sliced(wide, directions[:, :48])), outputs(narrow), atol=1e-3, rtol=1e-3)


def test_least_squares_and_costs_by_definition() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 12)) @ rng.normal(size=(12, 12))
    second, w = x.T @ x / len(x), rng.normal(size=(5, 12)).astype(np.float32)
    columns = np.arange(12).reshape(4, 3)
    costs = unit_costs(w.astype(np.float64), second, columns)
    for unit in range(4):
        keep = np.setdiff1d(np.arange(12), columns[unit])
        best = np.linalg.lstsq(x[:, keep], x @ w.T, rcond=None)[0]
        assert costs[unit] == pytest.approx(np.square(x[:, keep] @ best - x @ w.T).sum() / len(x), rel=1e-6)
    found = silenced(w, second, columns, 3, damp=1e-9)
    lost = int(np.argmin(costs))
    keep = np.setdiff1d(np.arange(12), columns[lost])
    assert not found[:, columns[lost]].any()
    np.testing.assert_allclose(found[:, keep].T, np.linalg.lstsq(x[:, keep], x @ w.T, rcond=None)[0], atol=1e-4)


def test_experts_that_no_token_reaches_go_first_and_change_nothing(
    tiny: Callable[[str], Checkpoint], assert_lossless: Callable[[Checkpoint, Checkpoint], None], calibrated: Run
) -> None:
    """Router rows of experts 1 and 3 point away from everything, so that the others are always chosen."""
    before = tiny("mixtral")
    routers = [name for name, info in before.infos().items() if info.rule.kind == "router"]
    norms = [name for name in before.weights if "post_attention_layernorm" in name]
    rows = np.zeros((4, 64), np.float32)
    rows[[0, 2], 0], rows[[1, 3], 0] = 1, -1
    far = {name: Dense.of(rows) for name in routers}
    # The gain of channel 0 is what the router reads; its sign follows the stream's, so the stream is made positive.
    raised = {name: Dense.of(np.eye(1, 64, dtype=np.float32)[0] + before.weights[name].value()) for name in norms}
    table = before.weights["model.embed_tokens.weight"].value().copy()  # type: ignore[union-attr]
    table[:, 0] = 60
    before = before.with_weights({**far, **raised, "model.embed_tokens.weight": Dense.of(table)})
    after = pass_for("prune-structured", {"experts": 0.5}).apply(before, calibrated)
    assert after.config["num_local_experts"] == 2
    name = "model.layers.1.block_sparse_moe.experts.{}.w1.weight"
    np.testing.assert_array_equal(after.weights[name.format(1)].value(), before.weights[name.format(2)].value())  # type: ignore[union-attr]
    assert_lossless(after, before)


@pytest.mark.parametrize("merge", [False, True])
def test_router_statistics_are_those_of_transformers(
    merge: bool, tiny: Callable[[str], Checkpoint], calibrated: Run
) -> None:
    import torch

    from tightship.passes.experts import saliencies

    checkpoint = tiny("mixtral")
    ids = np.random.default_rng(0).integers(0, 96, (8, 32))
    module = ModelView(checkpoint).module()
    logits = module(torch.from_numpy(ids), output_router_logits=True).router_logits[0]
    weights, chosen = torch.softmax(logits.float(), dim=-1).topk(2, dim=-1)
    gates = torch.zeros_like(logits).scatter_(1, chosen, weights / weights.sum(-1, keepdim=True)).sum(0)
    found = saliencies(checkpoint, calibrated)[0]
    assert (found > 0).all()
    ratio = found / gates.detach().numpy()
    assert ratio.max() / ratio.min() < 1.5  # what is left is the size of the experts' outputs, alike in random ones
    after = pass_for("prune-structured", {"experts": 0.5, "merge": merge}).apply(checkpoint, calibrated)
    stay = np.sort(np.argsort(-found)[:2])
    router = "model.layers.0.block_sparse_moe.gate.weight"
    np.testing.assert_array_equal(after.weights[router].value(), checkpoint.weights[router].value()[stay])  # type: ignore[union-attr]
    expert = "model.layers.0.block_sparse_moe.experts.{}.w2.weight"
    same = [
        np.array_equal(after.weights[expert.format(i)].value(), checkpoint.weights[expert.format(e)].value())  # type: ignore[union-attr]
        for i, e in enumerate(stay)
    ]
    assert all(same) is not merge


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_shares_of_experts_add_up_to_one_where_the_family_says_so(norm_topk_prob: bool) -> None:
    import torch
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    from tightship.architecture import architecture_for
    from tightship.passes.experts import RoutingWeights, renormalizes

    config = Qwen3MoeConfig(hidden_size=64, num_experts=6, num_experts_per_tok=2, norm_topk_prob=norm_topk_prob)
    router = Qwen3MoeTopKRouter(config)
    rows = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32) / 8
    router.weight.data = torch.from_numpy(rows)
    tokens = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    said = {**config.to_dict(), "architectures": ["Qwen3MoeForCausalLM"]}
    checkpoint = Checkpoint("moe", said, {}, {}, architecture_for(said), Source("moe", None, ()))
    found = RoutingWeights("gate", rows, 2, renormalized=renormalizes(checkpoint))
    found(("gate",), tokens)
    with torch.no_grad():
        _, weights, chosen = router(tokens)
    wanted = np.bincount(chosen.reshape(-1).numpy(), weights.reshape(-1).numpy(), minlength=6)
    np.testing.assert_allclose(found.total, wanted, rtol=1e-5)
    assert bool(abs(found.total.sum() - 40) < 1e-3) is norm_topk_prob


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, UsageError),
        ({"ffn": 1.0}, UsageError),
        ({"ffn": 0.1, "multiple": 64}, UsageError),
        ({"heads": 0.5, "multiple": 256}, UsageError),
        ({"experts": 0.5}, Unsupported),
        ({"ffn": 0.5, "merge": True}, UsageError),
    ],
)
def test_what_cannot_be_asked_for(
    options: dict[str, object], error: type[Exception], tiny: Callable[[str], Checkpoint]
) -> None:
    with pytest.raises(error):
        pass_for("prune-structured", options).requires(tiny("llama"))


def test_transformers_wants_llamas_stream_in_multiples_of_its_heads(tiny: Callable[[str], Checkpoint]) -> None:
    nine = tiny("llama").replace(config={**tiny("llama").config, "hidden_size": 144, "num_attention_heads": 9,
                                         "num_key_value_heads": 3, "head_dim": 16})  # fmt: skip
    assert counts_kept(nine, {"width": 0.3}, 8) == {"width": 72}  # 104 and 96 are no multiples of 9
    assert counts_kept(nine, {"heads": 0.34, "width": 0.2}, 8) == {"heads": 2, "width": 120}
    assert counts_kept(tiny("qwen3"), {"width": 0.06}, 4) == {"width": 60}  # no such rule there


def test_where_k_quants_follow_widths_are_whole_super_blocks(
    tiny: Callable[[str], Checkpoint], calibrated: Run
) -> None:
    """Four heads of 64 a key head: one super-block of the output projection; of 32, half a one."""
    from tightship.recipe import Recipe
    from tightship.stages import make_stages

    sizes = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 5632}
    wide = tiny("mistral").replace(config={**tiny("mistral").config, **sizes, "head_dim": 64})
    narrow = tiny("mistral").replace(config={**wide.config, "head_dim": 32})
    recipe = {"passes": [{"use": "prune-structured", "with": {"heads": 0.3, "ffn": 0.25}}]}
    for scheme, multiple, heads, ffn in (("q4_k_m", 256, 6, 4096), ("q8_0", 32, 6, 4224)):
        targets = [{"to": "gguf", "scheme": scheme}]
        (stage,), _ = make_stages(Recipe.from_json({"source": "m", **recipe, "targets": targets}))
        assert stage.work.multiple == multiple  # type: ignore[attr-defined]
        assert stage.work.counts(wide) == {"heads": heads, "ffn": ffn}  # type: ignore[attr-defined]
    figures: dict[str, Any] = {}
    assert counts_kept(narrow, {"heads": 0.2}, 32) == {"heads": 6}  # 1.6 of 8 to go
    assert counts_kept(narrow, {"heads": 0.4}, 256) == {"heads": 4}  # two of these make one super-block: 4.8 becomes 4
    step = pass_for("prune-structured", {"ffn": 0.5})
    step.apply(tiny("llama"), replace(calibrated, report=figures.__setitem__))
    assert figures["ffn"] == {"asked": 0.5, "share": pytest.approx(1 - 32 / 96), "units": 32}


@pytest.mark.parametrize("name", ["mixtral", "llama-tied"])
def test_the_outline_has_the_shapes_of_the_result(
    name: str, tiny: Callable[[str], Checkpoint], calibrated: Run
) -> None:
    shares = {"ffn": 0.34, "heads": 0.5, "width": 0.25, **({"experts": 0.5} if name == "mixtral" else {})}
    step = pass_for("prune-structured", {**shares, "multiple": 16})
    before = tiny(name)
    outline, result = step.outline(before), step.apply(before, calibrated)
    assert outline.config == result.config
    shapes = [{n: w.shape for n, w in c.weights.items() if hasattr(w, "shape")} for c in (outline, result)]
    assert shapes[0] == shapes[1]
