"""ModelView against plain transformers: same logits to the last bit, and no tensor goes unnoticed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tightship.checkpoint import Checkpoint
from tightship.errors import Malformed
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
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


def test_a_name_that_only_old_files_use_is_the_class_of_today(tmp_path: Path) -> None:
    """Files from before transformers had PhiMoE call its class PhiMoEForCausalLM."""
    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 32, "num_key_value_heads": 2, "num_local_experts": 3}
    model = transformers.PhimoeForCausalLM(transformers.PhimoeConfig(**sizes))
    model.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace("PhimoeForCausalLM", "PhiMoEForCausalLM"))
    ids = np.arange(10)[None]
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(ModelView(open_checkpoint(tmp_path)).outputs(ids)["logits"], expected, atol=1e-5)


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
