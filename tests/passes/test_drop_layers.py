"""Dropped blocks: the rest computes what the original computes without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tightship.activations import Activations
from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported, UsageError
from tightship.passes import pass_for
from tightship.passes.base import Run
from tightship.weights import Alias, Dense


def dropped(checkpoint: Checkpoint, *layers: int) -> Checkpoint:
    step = pass_for("drop-layers", {"layers": list(layers)})
    step.requires(checkpoint)
    return step.apply(checkpoint, Run())


def test_transformers_without_the_block_gives_the_same_logits(
    tiny: Callable[[str], Checkpoint], tiny_directory: Callable[[str], Path]
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tightship.modelview import ModelView

    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_directory("llama"), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    del model.model.layers[0]
    model.model.layers[0].self_attn.layer_idx = 0
    ids = np.arange(12).reshape(1, 12)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids), use_cache=False).logits.numpy()
    found = ModelView(dropped(tiny("llama"), 0)).outputs(ids)["logits"]
    np.testing.assert_array_equal(found, expected)


def test_names_config_and_activations_are_renumbered(tiny: Callable[[str], Checkpoint]) -> None:
    before = tiny("llama")
    config = {
        **before.config,
        "layer_types": ["full_attention", "sliding_attention"],
        "mlp_only_layers": [1],
        "full_attn_idxs": [0],
    }
    activations = {f"model.layers.{i}.mlp": Activations("int8", scale=float(i)) for i in range(2)}
    after = dropped(before.replace(config=config, activations=activations), 0)
    assert after.config["num_hidden_layers"] == 1
    assert after.config["layer_types"] == ["sliding_attention"]
    assert after.config["mlp_only_layers"] == [0]
    assert after.config["full_attn_idxs"] == []
    assert after.activations == {"model.layers.0.mlp": Activations("int8", scale=1.0)}
    assert not any(".layers.1." in name for name in after.weights)
    for name in (n for n in before.weights if ".layers.1." in n):
        assert after.weights[name.replace(".layers.1.", ".layers.0.")] is before.weights[name]


def test_a_borrower_inherits_from_a_dropped_owner(tiny: Callable[[str], Checkpoint]) -> None:
    name = "model.layers.{}.mlp.up_proj.weight"
    before = tiny("llama").with_weights({name.format(1): Alias(name.format(0))})
    after = dropped(before, 0)
    assert after.weights[name.format(0)] is before.weights[name.format(0)]
    kept = dropped(before, 1)
    assert kept.weights[name.format(0)] is before.weights[name.format(0)]


@pytest.mark.parametrize(("layers", "words"), [([2], "no layer 2"), ([-1], "no layer -1"), ([0, 1], "at least one")])
def test_what_cannot_be_dropped(tiny: Callable[[str], Checkpoint], layers: list[int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        dropped(tiny("llama"), *layers)


@pytest.mark.parametrize(
    "extra", [{"sliding_window_pattern": 2}, {"use_sliding_window": True}, {"decoder_sparse_step": 2}]
)
def test_kinds_by_position_are_refused(tiny: Callable[[str], Checkpoint], extra: dict[str, object]) -> None:
    before = tiny("llama")
    with pytest.raises(Unsupported, match=next(iter(extra))):
        dropped(before.replace(config={**before.config, "layer_types": None, **extra}), 0)


def test_a_count_is_outlined_without_text(tiny: Callable[[str], Checkpoint]) -> None:
    step = pass_for("drop-layers", {"count": 1})
    assert step.needs == "calibration"
    assert step.outline(tiny("llama")).config["num_hidden_layers"] == 1


def test_a_block_that_adds_nothing_goes_first_and_is_not_missed(
    tiny: Callable[[str], Checkpoint], outputs: Callable[[Checkpoint], np.ndarray], calibrated: Run
) -> None:
    """Both matrices by which the second block writes to the stream are zero, so it hands on what it gets."""
    before = tiny("llama")
    writers = [f"model.layers.1.{name}.weight" for name in ("self_attn.o_proj", "mlp.down_proj")]
    before = before.with_weights({name: Dense.of(np.zeros(before.weights[name].shape, np.float32)) for name in writers})
    after = pass_for("drop-layers", {"count": 1}).apply(before, calibrated)
    assert after.history[-1] == {"dropped": [1]}
    np.testing.assert_array_equal(outputs(after), outputs(before))


def test_influence_is_that_of_transformers_hidden_states(
    tiny: Callable[[str], Checkpoint], tiny_directory: Callable[[str], Path]
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tightship.passes.block_influence import block_influences, least_influential
    from tightship.passes.calibration import calibration_windows

    run = Run(tokens=128, sequence=32)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_directory("llama"), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    entering: dict[int, list[object]] = {0: [], 1: []}
    leaving: dict[int, list[object]] = {0: [], 1: []}

    def note(number: int) -> Callable[..., None]:  # output_hidden_states would give the last one behind the norm
        def hook(_module: object, inputs: tuple[object, ...], output: object) -> None:
            entering[number].append(inputs[0])
            leaving[number].append(output[0] if isinstance(output, tuple) else output)

        return hook

    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(note(number))
    with torch.no_grad():
        for window in calibration_windows(tiny("llama"), run):
            model(torch.from_numpy(window)[None], use_cache=False)
    expected = []
    for number in (0, 1):
        before, after = (torch.cat(states, dim=1).double() for states in (entering[number], leaving[number]))
        expected.append(1 - float(torch.nn.functional.cosine_similarity(before, after, dim=-1).mean()))
    found = block_influences(tiny("llama"), run)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    least = int(np.argmin(expected))
    assert least_influential(tiny("llama"), 1, run) == (least,)
    after = pass_for("drop-layers", {"count": 1}).apply(tiny("llama"), run)
    assert after.history[-1] == {"dropped": [least]}
    assert after.config["num_hidden_layers"] == 1
