"""config.json for readers old and new, edited key by key: transformers 5 renamed keys that others still read.

| new (transformers 5)          | old, written beside it                                                            |
|-------------------------------|-----------------------------------------------------------------------------------|
| dtype                         | torch_dtype                                                                       |
| rope_parameters.rope_theta    | rope_theta                                                                        |
| rope_parameters, the rest     | rope_scaling: null when unscaled; `rope_type` alone, never beside `type`          |
| rope_parameters by layer type | those of full_attention as above; rope_local_base_freq from sliding_attention     |

A reader that misses the old names falls back to base 10000 without a word; where the two forms differ, transformers 5
follows the new one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def portable_config(config: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy with both spellings of every renamed key, then `changes` (None deletes a key)."""
    edited = dict(config)
    _rope(edited)
    for key, value in changes.items():
        if value is None:
            edited.pop(key, None)
        else:
            edited[key] = value
    element_type = edited.get("dtype", edited.get("torch_dtype"))
    if isinstance(element_type, str):
        edited["dtype"] = edited["torch_dtype"] = element_type
    return edited


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """The file's bytes: keys sorted, as transformers writes them."""
    return (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _rope(config: dict[str, Any]) -> None:
    new = config.get("rope_parameters")
    if isinstance(new, Mapping):
        _old_from_new(config, new)
    elif "rope_theta" in config:
        scaling = config.get("rope_scaling")
        config["rope_scaling"] = _one_type_key(scaling) if isinstance(scaling, Mapping) else None
        config["rope_parameters"] = {
            **(config["rope_scaling"] or {"rope_type": "default"}),
            "rope_theta": config["rope_theta"],
        }


def _old_from_new(config: dict[str, Any], new: Mapping[str, Any]) -> None:
    if isinstance(new.get("full_attention"), Mapping):
        sliding = new.get("sliding_attention")
        if isinstance(sliding, Mapping) and "rope_theta" in sliding:
            config["rope_local_base_freq"] = sliding["rope_theta"]
        new = new["full_attention"]
    if "rope_theta" in new:
        config["rope_theta"] = new["rope_theta"]
    rest = _one_type_key({k: v for k, v in new.items() if k not in ("rope_theta", "partial_rotary_factor")})
    config["rope_scaling"] = None if rest.get("rope_type", "default") == "default" else rest
    if "partial_rotary_factor" in new:
        config["partial_rotary_factor"] = new["partial_rotary_factor"]


def _one_type_key(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_type` alone; some readers refuse a file that has `type` too."""
    rest = {k: v for k, v in scaling.items() if k != "type"}
    if "type" in scaling:
        rest.setdefault("rope_type", scaling["type"])
    return rest
