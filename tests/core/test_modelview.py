"""ModelView against plain transformers: same logits to the last bit, and no tensor goes unnoticed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tightship.architecture import architecture_for
from tightship.checkpoint import Checkpoint, Source
from tightship.errors import Malformed
from tightship.modelview import ModelView
from tightship.weights import Alias, Dense

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama": ("LlamaForCausalLM", {**SIZES, "num_key_value_heads": 2}),
    "llama-tied": ("LlamaForCausalLM", {**SIZES, "tie_word_embeddings": True}),
}


def save_random(directory: Path, class_name: str, config: dict) -> Path:
    """A model whose every parameter is random, written as transformers writes it."""
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(directory)
    return directory


def load(directory: Path) -> Checkpoint:
    """The checkpoint of a directory, Conv1D matrices turned as opening does."""
    config = json.loads((directory / "config.json").read_text())
    architecture = architecture_for(config)
    infos = architecture.lookup(config)
    weights = {}
    for name, array in load_file(directory / "model.safetensors").items():
        turned = name in infos and infos[name].rule.transposed
        weights[name] = Dense.of(array.T if turned else array)
    return Checkpoint("tiny", config, weights, {}, architecture, Source("tiny", None, ()))


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp(request.param), *FAMILIES[request.param])


def test_outputs_are_those_of_transformers(directory: Path) -> None:
    checkpoint = load(directory)
    ids = np.random.default_rng(0).integers(0, 96, (3, 17))
    mask = np.ones_like(ids)
    mask[1, 9:] = 0
    found = ModelView(checkpoint).outputs(ids, mask)

    model_class = getattr(transformers, checkpoint.config["architectures"][0])
    reference = model_class.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), output_hidden_states=True)
    assert found
    for key, value in found.items():
        wanted = expected[key] if key in expected else expected["hidden_states"][-1]
        np.testing.assert_array_equal(value, wanted.numpy(), err_msg=key)


def test_every_dropped_tensor_is_an_error(directory: Path) -> None:
    checkpoint = load(directory)
    for name in checkpoint.weights:
        with pytest.raises(Malformed):
            ModelView(checkpoint.with_weights({}, [name])).module()


@pytest.mark.parametrize("name", ["surplus.weight", "model.layers.0.self_attn.q_proj.extra"])
def test_an_added_tensor_is_an_error_that_names_it(directory: Path, name: str) -> None:
    checkpoint = load(directory).with_weights({name: Dense.of(np.zeros(5, np.float32))})
    with pytest.raises(Malformed, match=name):
        ModelView(checkpoint).module()


def test_an_alias_gives_the_owner_and_the_checkpoint_stays_as_it_was(tmp_path: Path) -> None:
    checkpoint = load(save_random(tmp_path, *FAMILIES["llama-tied"]))
    before = checkpoint.resolve("model.embed_tokens.weight").value().copy()
    aliased = checkpoint.with_weights({"lm_head.weight": Alias("model.embed_tokens.weight")})
    module = ModelView(aliased).module()
    assert module.lm_head.weight.data_ptr() == module.model.embed_tokens.weight.data_ptr()
    with torch.no_grad():
        module.lm_head.weight.zero_()
    np.testing.assert_array_equal(checkpoint.resolve("model.embed_tokens.weight").value(), before)
