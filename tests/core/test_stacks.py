"""Walking an encoder and then its decoder, against hooks on the whole model in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tightship.addresses import skeleton
from tightship.blocks import BlockWalk, walk_blocks
from tightship.checkpoint import Checkpoint
from tightship.modelview import ModelView
from tightship.weights import Dense

torch = pytest.importorskip("torch")

Tiny = Callable[[str], Checkpoint]
FAMILIES = ("t5", "t5-gated", "bart", "mbart", "marian", "pegasus", "blenderbot")
STARTS = {"t5": 5, "t5-gated": 5}  # decoder_start_token_id of the models; 6 for BART and its kin
IDS = np.random.default_rng(0).integers(7, 96, (3, 17))


def inputs_by_hooks(checkpoint: Checkpoint, start: int) -> dict[str, np.ndarray]:
    """What reaches each nn.Linear of the whole model that reads IDS and is given them again behind `start`."""
    module = ModelView(checkpoint).module()
    places = skeleton(checkpoint)[1]
    seen: dict[str, Any] = {}
    for info in checkpoint.linears():
        owner = module.get_submodule(places[info.name].parameter.removesuffix(".weight"))
        owner.register_forward_pre_hook(lambda _, args, name=info.name: seen.__setitem__(name, args[0]))
    behind = np.concatenate([np.full((len(IDS), 1), start), IDS[:, :-1]], axis=1)
    with torch.no_grad():
        module(input_ids=torch.from_numpy(IDS), decoder_input_ids=torch.from_numpy(behind))
    return {name: x.reshape(-1, x.shape[-1]).numpy() for name, x in seen.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_is_fed_what_the_changed_encoder_puts_out(family: str, tiny: Tiny) -> None:
    """Bit for bit: the untouched encoder, the decoder behind a changed one, every later block behind changed ones."""
    checkpoint, start = tiny(family), STARTS.get(family, 6)
    halves = {i.name: Dense.of(checkpoint.weights[i.name].value() * np.float32(0.5)) for i in checkpoint.linears()}
    changed: dict[str, Dense] = {}
    walk = BlockWalk(ModelView(checkpoint), list(IDS))
    depths = [int(checkpoint.hyper[key]) for key in ("layers", "dec_layers")]
    order = []
    for step in walk.steps():
        found: dict[str, np.ndarray] = {}

        def note(names: tuple[str, ...], x: Any, found: dict[str, np.ndarray] = found) -> None:
            found.update(dict.fromkeys(names, x.reshape(-1, x.shape[-1]).numpy().copy()))

        step.observe(note)
        expected = inputs_by_hooks(checkpoint.with_weights(changed), start)
        assert set(found) == set(step.linears)
        for name, x in found.items():
            np.testing.assert_array_equal(x, expected[name], err_msg=name)
            storage = walk.module.get_parameter(walk.addresses[name].parameter).untyped_storage()
            assert storage.nbytes() > 4096
        for name in step.linears:
            step.write(name, halves[name])
        changed |= {name: halves[name] for name in step.linears}
        order.append((step.index, step.total))
    assert order == [(index, sum(depths)) for index in range(sum(depths))]
    assert set(changed) == set(halves)


def test_the_head_behind_the_decoder_is_observed(tiny: Tiny) -> None:
    """T5 1.1 has a head of its own; transformers saves none for a new model, but reads one."""
    whole = tiny("t5-gated")
    head = np.random.default_rng(1).normal(0, 1, whole.resolve("shared.weight").shape).astype(np.float32)
    config = {**whole.config, "tie_word_embeddings": False}
    checkpoint = whole.replace(config=config).with_weights({"lm_head.weight": Dense.of(head)})
    found: dict[str, np.ndarray] = {}
    for step in BlockWalk(ModelView(checkpoint), list(IDS)).steps(outside=["lm_head.weight"]):
        if step.linears == ("lm_head.weight",):
            step.observe(lambda names, x: found.update(dict.fromkeys(names, x.numpy().copy())))
    module = ModelView(checkpoint).module()
    seen: list[Any] = []
    module.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    behind = np.concatenate([np.full((len(IDS), 1), STARTS["t5-gated"]), IDS[:, :-1]], axis=1)
    with torch.no_grad():
        module(input_ids=torch.from_numpy(IDS), decoder_input_ids=torch.from_numpy(behind))
    np.testing.assert_array_equal(found["lm_head.weight"], seen[0].numpy())


def test_windows_of_unlike_lengths_are_kept_apart(tiny: Tiny) -> None:
    windows = [IDS[0], IDS[1][:9], IDS[2]]
    for step in walk_blocks(ModelView(tiny("t5")), windows):
        shapes: list[tuple[int, ...]] = []
        step.observe(lambda _names, x, shapes=shapes: shapes.append(tuple(x.shape[:2])))
        assert set(shapes) == {(2, 17), (1, 9)}
