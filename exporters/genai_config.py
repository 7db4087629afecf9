"""genai_config.json: what onnxruntime-genai reads beside a decoder. Its parser refuses keys it does not know."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tightship.checkpoint import Checkpoint
from tightship.per_layer import has_unlike_layers

# "decoder" is the generic text type: it takes the names of the graph contract and position_ids. Naming a family would
# change nothing for most and break others (gpt2 stands for one combined cache tensor a layer).
MODEL_TYPE = "decoder"
# A shared cache is allocated for this many tokens at once, unless the client asks for another length.
SHARED_LENGTH = 4096


@dataclass(frozen=True)
class Cache:
    """The keys or values that one block keeps.

    Attributes:
        heads: of keys and values.
        size: of a head.
        shared: past and present may be one buffer, which the graph fills in place.
        positions: the graph takes `position_ids`.
    """

    heads: int
    size: int
    shared: bool = False
    positions: bool = True


def fits(checkpoint: Checkpoint) -> bool:
    """Whether the file can describe the model: its past is keys and values, of one number of heads for all layers."""
    if checkpoint.architecture.recurrent:
        return False
    return not has_unlike_layers(checkpoint.config) or len(set(checkpoint.widths("kv_heads"))) == 1


def genai_config(checkpoint: Checkpoint, main: str, cache: Cache) -> bytes:
    """The file's content for a decoder whose graph keeps the contract of `onnx_candidates.skeleton`."""
    hyper = checkpoint.hyper
    generation = _generation(checkpoint)
    eos = _first(generation, checkpoint.config, "eos_token_id")
    tokens = {
        "bos_token_id": _first(generation, checkpoint.config, "bos_token_id"),
        "eos_token_id": eos,
        "pad_token_id": _first(generation, checkpoint.config, "pad_token_id", default=_one(eos)),
    }
    decoder = {
        "filename": main,
        "head_size": cache.size,
        "hidden_size": hyper["hidden"],
        "num_attention_heads": hyper["heads"],
        "num_hidden_layers": hyper["layers"],
        "num_key_value_heads": cache.heads,
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            **({"position_ids": "position_ids"} if cache.positions else {}),
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    model = {
        "type": MODEL_TYPE,
        **{key: value for key, value in tokens.items() if value is not None},
        "vocab_size": hyper["vocab"],
        "context_length": hyper["context"],
        "decoder": decoder,
    }
    length = min(int(hyper["context"]), SHARED_LENGTH) if cache.shared else hyper["context"]
    search = {"max_length": length, "past_present_share_buffer": cache.shared, "do_sample": False}
    return (json.dumps({"model": model, "search": search}, indent=2) + "\n").encode()


def _generation(checkpoint: Checkpoint) -> Mapping[str, Any]:
    data = checkpoint.files.get("generation_config.json")
    return json.loads(data) if data else {}


def _first(generation: Mapping[str, Any], config: Mapping[str, Any], key: str, default: Any = None) -> Any:
    for source in (generation, config):
        if source.get(key) is not None:
            return source[key]
    return default


def _one(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value
