"""Layers of unlike widths: `per_layer_config` of config.json, the key that transformers 5 has for them.

    {"0": {"intermediate_size": 640, "num_key_value_heads": 1}, "1": {"intermediate_size": 448}}

What a layer does not say is what the top level says. Only widths may differ: MLP channels, heads and key heads.
transformers reads the key (5.23) but builds no layer of the common families by it; `unlike_layers` does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from tightship.errors import Malformed, Unsupported

KEY = "per_layer_config"
WIDTHS = ("ffn", "heads", "kv_heads")


def has_unlike_layers(config: Mapping[str, Any]) -> bool:
    """Whether layers have widths of their own."""
    return bool(config.get(KEY))


def layer_config(config: Mapping[str, Any], block: int) -> Mapping[str, Any]:
    """config.json as it holds for one block."""
    own = (config.get(KEY) or {}).get(str(block))
    return {**config, **own} if own else config


def shared_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without what layers say for themselves."""
    return {key: value for key, value in config.items() if key != KEY}


def check_layers(config: Mapping[str, Any], layers: int, allowed: Iterable[str]) -> None:
    """Refuse what is no table of widths, one entry a layer.

    Raises:
        Malformed: another shape, a layer that does not exist, or a width that is no positive number.
        Unsupported: layers differ in something else.
    """
    table = config[KEY]
    if not isinstance(table, Mapping) or not all(isinstance(own, Mapping) for own in table.values()):
        raise Malformed(f"config.json: {KEY} is no mapping of layer numbers to mappings")
    known, numbers = set(allowed), {str(number) for number in range(layers)}
    for number, own in table.items():
        if number not in numbers:
            raise Malformed(f"config.json: {KEY} speaks of layer {number!r}; the model has 0 to {layers - 1}")
        for key, value in own.items():
            if key not in known:
                raise Unsupported(f"config.json: {KEY} gives layer {number} its own {key}; only widths may differ")
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise Malformed(f"config.json: {KEY}: {key} of layer {number} is {value!r}, not a positive number")


def unlike_layers(model_class: type[Any], config: Mapping[str, Any]) -> type[Any]:
    """A class that is `model_class`, except that its layers are made from configs of their own.

    Raises:
        Unsupported: when it is called, if the class keeps its layers in no list of its own.
    """
    import torch

    table: Mapping[str, Mapping[str, Any]] = config[KEY]

    def init(self: Any, shared: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, shared, *args, **kwargs)
        count = int(shared.num_hidden_layers)
        lists = (m for m in self.base_model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count)
        layers = next(lists, None)  # the outermost
        if layers is None:
            raise Unsupported(f"{model_class.__name__} keeps no list of {count} layers, so they cannot differ in width")
        for number, own in table.items():
            narrow = copy.copy(shared)
            for key, value in own.items():
                setattr(narrow, key, value)
            layers[int(number)] = type(layers[int(number)])(narrow, int(number))

    return type(model_class.__name__, (model_class,), {"__init__": init, "__module__": model_class.__module__})
