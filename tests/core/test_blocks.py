"""Walking a model block by block, against hooks on the whole model in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tightship.addresses import skeleton
from tightship.blocks import BlockWalk, walk_blocks
from tightship.checkpoint import Checkpoint
from tightship.errors import Malformed
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.weights import Alias, Dense

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

Tiny = Callable[[str], Checkpoint]


def windows() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 96, length) for length in (17, 17, 9, 17)]


def inputs_by_hooks(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """What reaches each nn.Linear or Conv1D of the whole model, windows of 17 tokens only, by on-disk name."""
    module = ModelView(checkpoint).module()
    places = skeleton(checkpoint)[1]
    seen: dict[str, Any] = {}
    for info in checkpoint.linears():
        place = places[info.name]
        if place.index == ():
            owner = module.get_submodule(place.parameter.removesuffix(".weight"))
            owner.register_forward_pre_hook(lambda _, args, name=info.name: seen.__setitem__(name, args[0]))
    with torch.no_grad():
        module(torch.from_numpy(np.stack([w for w in windows() if len(w) == 17])))
    return {name: x.reshape(-1, x.shape[-1]).numpy() for name, x in seen.items()}


class Notes:
    """An observer that keeps copies of what it is shown, (tokens, in) a batch."""

    def __init__(self, found: dict[str, list[np.ndarray]]) -> None:
        self.found = found

    def __call__(self, names: tuple[str, ...], x: Any) -> None:
        for name in names:
            self.found.setdefault(name, []).append(x.reshape(-1, x.shape[-1]).numpy().copy())


def test_observed_inputs_are_those_of_the_whole_model(family: str, tiny: Tiny) -> None:
    assert_observed(tiny(family))


def test_blocks_of_two_kinds_are_observed_as_one_model(tmp_path: Path) -> None:
    """LFM2: convolutions, whose kernels are no stack of experts, before attention."""
    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 96, "num_key_value_heads": 2}
    config = transformers.Lfm2Config(**sizes, layer_types=["conv", "full_attention", "conv"])
    transformers.Lfm2ForCausalLM(config).save_pretrained(tmp_path)
    assert_observed(open_checkpoint(tmp_path))


def assert_observed(checkpoint: Checkpoint) -> None:
    expected = inputs_by_hooks(checkpoint)
    found: dict[str, list[np.ndarray]] = {}
    for step in walk_blocks(ModelView(checkpoint), windows()):
        step.observe(Notes(found))
        for name in step.linears:
            np.testing.assert_array_equal(step.read(name), checkpoint.weights[name].value())
    assert set(expected) <= set(found) == {info.name for info in checkpoint.linears()}
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name][0], x, err_msg=name)


def test_what_is_written_into_a_block_is_what_the_next_one_sees(family: str, tiny: Tiny) -> None:
    checkpoint = tiny(family)
    changed = {
        info.name: Dense.of(checkpoint.weights[info.name].value() * np.float32(0.5))
        for info in checkpoint.linears()
        if info.block == 0
    }
    expected = inputs_by_hooks(checkpoint.with_weights(changed))
    for step in walk_blocks(ModelView(checkpoint), windows()):
        found: dict[str, list[np.ndarray]] = {}
        step.observe(Notes(found))
        for name in step.linears:
            if name in changed:
                step.write(name, changed[name])
            elif name in expected:
                np.testing.assert_array_equal(found[name][0], expected[name], err_msg=name)


def test_only_the_block_in_hand_has_weights_in_memory(family: str, tiny: Tiny) -> None:
    checkpoint = tiny(family)
    walk = BlockWalk(ModelView(checkpoint), windows())
    for step in walk.steps():
        for name in (info.name for info in checkpoint.linears()):
            storage = walk.module.get_parameter(walk.addresses[name].parameter).untyped_storage()
            assert (storage.nbytes() > 4096) == (name in step.linears), name


def test_a_matrix_shared_between_blocks_is_written_once(tiny: Tiny) -> None:
    owner, borrower = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
    checkpoint = tiny("llama").with_weights({borrower: Alias(owner)})
    walk = BlockWalk(ModelView(checkpoint), windows())
    new = Dense.of(np.ones(checkpoint.resolve(owner).shape, np.float32))
    for step in walk.steps():
        if step.index == 0:
            step.write(owner, new)
        else:
            assert borrower not in step.linears
            np.testing.assert_array_equal(step.read(borrower), new.value())


def test_no_window_is_an_error(tiny: Tiny) -> None:
    with pytest.raises(Malformed, match="at least one window"):
        next(walk_blocks(ModelView(tiny("llama")), []))


def test_the_head_is_not_computed_on_the_way_in(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of many windows at once would be the largest array of all."""

    def watched(checkpoint: Checkpoint) -> Any:
        module, places = skeleton(checkpoint)
        module.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("the head ran"))
        return module, places

    monkeypatch.setattr("tightship.blocks.skeleton", watched)
    assert len(list(walk_blocks(ModelView(tiny("llama")), windows()))) == 2
