"""config.json for old and new readers: hand-derived forms, and transformers reads the same model back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from tightship.exporters.hf_config import config_bytes, portable_config

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def test_unscaled_rope_has_both_forms_and_no_scaling() -> None:
    edited = portable_config({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}})
    assert edited["rope_theta"] == 5e5
    assert edited["rope_scaling"] is None
    assert edited["rope_parameters"] == {"rope_theta": 5e5, "rope_type": "default"}


def test_scaled_rope_has_both_forms() -> None:
    edited = portable_config({"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}})
    assert edited["rope_scaling"] == {"rope_type": "llama3", **LLAMA3}
    assert edited["rope_theta"] == 5e5


def test_old_files_get_the_new_form_and_one_type_key() -> None:
    edited = portable_config(
        {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}}
    )
    assert edited["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert edited["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}
    assert portable_config({"rope_theta": 1e6})["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e6}


def test_rope_by_layer_type() -> None:
    new = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    edited = portable_config({"rope_parameters": new})
    assert edited["rope_theta"] == 1e6
    assert edited["rope_local_base_freq"] == 1e4
    assert edited["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert edited["rope_parameters"] == new


def test_partial_rotation_is_outside_of_the_scaling() -> None:
    new = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}
    edited = portable_config({"rope_parameters": new})
    assert edited["partial_rotary_factor"] == 0.5
    assert edited["rope_scaling"] is None


def test_models_without_rope_stay_without() -> None:
    assert portable_config({"model_type": "bert"}) == {"model_type": "bert"}


def test_changes_and_deletions() -> None:
    edited = portable_config({"dtype": "float32", "a": 1, "b": 2}, dtype="float16", a=None)
    assert edited == {"dtype": "float16", "torch_dtype": "float16", "b": 2}


def test_the_given_config_is_not_touched() -> None:
    config: dict[str, Any] = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    portable_config(config, dtype="float16")
    assert config == {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        transformers.LlamaConfig(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}),
        transformers.Gemma3TextConfig(),
        transformers.Phi3Config(
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
        ),
        transformers.BertConfig(),
    ],
    ids=lambda c: c.model_type,
)
def test_transformers_reads_the_same_model(config: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    before = type(config).from_pretrained(tmp_path).to_dict()
    (tmp_path / "config.json").write_bytes(
        config_bytes(portable_config(json.loads((tmp_path / "config.json").read_text())))
    )
    after = type(config).from_pretrained(tmp_path).to_dict()
    assert {k: after[k] for k in before} == before
