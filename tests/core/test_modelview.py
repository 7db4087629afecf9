"""ModelView against plain transformers: same logits to the last bit, and no tensor goes unnoticed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tightship.checkpoint import Checkpoint
from tightship.errors import Malformed
from tightship.modelview import ModelView
from tightship.weights import Alias, Dense

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

Tiny = Callable[[str], Checkpoint]


def test_outputs_are_those_of_transformers(family: str, tiny: Tiny, tiny_directory: Callable[[str], Path]) -> None:
    checkpoint = tiny(family)
    ids = np.random.default_rng(0).integers(0, 96, (3, 17))
    mask = np.ones_like(ids)
    mask[1, 9:] = 0
    found = ModelView(checkpoint).outputs(ids, mask)

    model_class = getattr(transformers, checkpoint.config["architectures"][0])
    reference = model_class.from_pretrained(
        tiny_directory(family), dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), output_hidden_states=True)
    assert found
    for key, value in found.items():
        wanted = expected[key] if key in expected else expected["hidden_states"][-1]
        np.testing.assert_array_equal(value, wanted.numpy(), err_msg=key)


def test_every_dropped_tensor_is_an_error(family: str, tiny: Tiny) -> None:
    checkpoint = tiny(family)
    for name in checkpoint.weights:
        with pytest.raises(Malformed):
            ModelView(checkpoint.with_weights({}, [name])).module()


@pytest.mark.parametrize("name", ["surplus.weight", "model.layers.0.self_attn.q_proj.extra"])
def test_an_added_tensor_is_an_error_that_names_it(family: str, tiny: Tiny, name: str) -> None:
    checkpoint = tiny(family).with_weights({name: Dense.of(np.zeros(5, np.float32))})
    with pytest.raises(Malformed, match=name):
        ModelView(checkpoint).module()


def test_an_alias_gives_the_owner_and_the_checkpoint_stays_as_it_was(tiny: Tiny) -> None:
    checkpoint = tiny("llama-tied")
    before = checkpoint.resolve("model.embed_tokens.weight").value().copy()
    aliased = checkpoint.with_weights({"lm_head.weight": Alias("model.embed_tokens.weight")})
    module = ModelView(aliased).module()
    assert module.lm_head.weight.data_ptr() == module.model.embed_tokens.weight.data_ptr()
    with torch.no_grad():
        module.lm_head.weight.zero_()
    np.testing.assert_array_equal(checkpoint.resolve("model.embed_tokens.weight").value(), before)


def test_a_tensor_that_transformers_drops_without_a_word_is_an_error(tiny: Tiny) -> None:
    """GPT-2's class ignores every name with `attn.bias` in it."""
    name = "transformer.h.0.crossattn.bias"
    checkpoint = tiny("gpt2").with_weights({name: Dense.of(np.zeros(5, np.float32))})
    with pytest.raises(Malformed, match="elements"):
        ModelView(checkpoint).module()
