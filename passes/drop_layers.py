"""Drop whole blocks and renumber those that stay. Structure only: no weight is read.

1. `layers` names the blocks to drop; `count` drops the least influential ones.
2. Tensor names, module names of activations and alias owners are renumbered without holes.
3. config.json: the layer count is lowered, lists with one entry a layer lose theirs, lists of layer numbers are
   renumbered. A config that derives a layer's kind from its *position* is refused, since dropping would shift it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported, UsageError
from tightship.passes.base import Needs, Pass, Run
from tightship.per_layer import KEY, has_unlike_layers
from tightship.weights import Alias, Weight

_ONE_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
_LAYER_NUMBERS = ("mlp_only_layers", "attn_layer_indices", "full_attn_idxs")
# key -> values under which every layer is of one kind
_BY_POSITION: dict[str, tuple[Any, ...]] = {
    "sliding_window_pattern": (None, 1),
    "full_attention_interval": (None, 1),
    "no_rope_layer_interval": (None, 0),
    "decoder_sparse_step": (None, 1),
    "first_k_dense_replace": (None, 0),
    "moe_layer_freq": (None, 1),
}


@dataclass(frozen=True, kw_only=True)
class DropLayers(Pass):
    """`layers`: block numbers from 0; or `count`: how many, chosen `by` block influence."""

    name: ClassVar[str] = "drop-layers"
    per_tensor: ClassVar[bool] = True
    makes: ClassVar[frozenset[str]] = frozenset({"structure"})

    layers: tuple[int, ...] | None = None
    count: int | None = None
    by: Literal["block-influence"] = "block-influence"

    def __post_init__(self) -> None:
        if (self.layers is None) == (self.count is None):
            raise UsageError("drop-layers needs either `layers` or `count`")
        if self.layers is not None and len(set(self.layers)) != len(self.layers):
            raise UsageError(f"drop-layers: a layer is named twice in {list(self.layers)}")

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        return "nothing" if self.layers is not None else "calibration"

    def requires(self, checkpoint: Checkpoint) -> None:
        total = int(checkpoint.hyper["layers"])
        leaving = len(self.layers) if self.layers is not None else int(self.count or 0)
        outside = [n for n in self.layers or () if not 0 <= n < total]
        if outside:
            raise UsageError(f"drop-layers: there is no layer {outside[0]}; the model has 0 to {total - 1}")
        if not 1 <= leaving < total:
            raise UsageError(f"drop-layers: {leaving} of {total} layers cannot be dropped; at least one must stay")
        _check_position(checkpoint.config)

    def apply(self, checkpoint: Checkpoint, run: Run) -> Checkpoint:
        if self.layers is not None:
            return drop(checkpoint, self.layers)
        from tightship.passes.block_influence import least_influential

        chosen = least_influential(checkpoint, int(self.count or 0), run)
        dropped = drop(checkpoint, chosen)
        return dropped.replace(history=(*dropped.history, {"dropped": list(chosen)}))

    def outline(self, checkpoint: Checkpoint) -> Checkpoint:
        if self.layers is not None:
            return drop(checkpoint, self.layers)
        total = int(checkpoint.hyper["layers"])  # which ones is not known without data; how many is
        return drop(checkpoint, range(total - int(self.count or 0), total))


def drop(checkpoint: Checkpoint, layers: Any) -> Checkpoint:
    """The checkpoint without these blocks; the rest are renumbered from 0 in their order."""
    if checkpoint.architecture.decoder_prefix is not None:
        raise Unsupported(f"drop-layers: {checkpoint.architecture.family} has two stacks of blocks")
    gone = set(layers)
    total = int(checkpoint.hyper["layers"])
    stay = [n for n in range(total) if n not in gone]
    renumber = _Renumber(checkpoint.architecture.block_prefix, {old: new for new, old in enumerate(stay)})
    activations = {}
    for module, scheme in checkpoint.activations.items():
        renamed = renumber(module)
        if renamed is not None:
            activations[renamed] = scheme
    return checkpoint.replace(
        config=_config(checkpoint, stay, total), weights=_weights(checkpoint, renumber), activations=activations
    )


class _Renumber:
    """On-disk name -> new name, or None where its block is gone."""

    def __init__(self, block_prefix: str, numbers: Mapping[int, int]) -> None:
        before, after = block_prefix.split("{i}")
        self._pattern = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
        self._prefix = (before, after)
        self._numbers = numbers

    def __call__(self, name: str) -> str | None:
        match = self._pattern.match(name)
        if match is None:
            return name
        number = self._numbers.get(int(match[1]))
        return None if number is None else f"{self._prefix[0]}{number}{self._prefix[1]}{name[match.end() :]}"


def _weights(checkpoint: Checkpoint, renumber: _Renumber) -> dict[str, Weight]:
    """Renamed weights. Where an owner leaves, its first borrower in name order becomes the owner."""
    kept: dict[str, Weight] = {}
    heirs: dict[str, str] = {}
    for name, weight in checkpoint.weights.items():
        renamed = renumber(name)
        if renamed is None:
            continue
        if isinstance(weight, Alias):
            owner = renumber(weight.owner) or heirs.get(weight.owner)
            if owner is None:
                heirs[weight.owner] = renamed
                kept[renamed] = checkpoint.resolve(weight.owner)
                continue
            kept[renamed] = Alias(owner)
        else:
            kept[renamed] = weight
    return kept


def _config(checkpoint: Checkpoint, stay: list[int], total: int) -> dict[str, Any]:
    config = dict(checkpoint.config)
    alternatives = checkpoint.architecture.config["layers"]
    keys = [alternatives] if isinstance(alternatives, str) else alternatives
    for key in keys:
        if key in config:
            config[key] = len(stay)
    for key in _ONE_PER_LAYER:
        if config.get(key) is not None:
            if len(config[key]) != total:
                raise Unsupported(f"config {key} has {len(config[key])} entries where the model has {total} layers")
            config[key] = [config[key][n] for n in stay]
    if has_unlike_layers(config):
        config[KEY] = {str(new): config[KEY][str(old)] for new, old in enumerate(stay) if str(old) in config[KEY]}
    for key in _LAYER_NUMBERS:
        if config.get(key) is not None:
            config[key] = [stay.index(n) for n in config[key] if n in stay]
    return config


def _check_position(config: Mapping[str, Any]) -> None:
    for key, uniform in _BY_POSITION.items():
        explicit = key == "sliding_window_pattern" and config.get("layer_types") is not None
        if not explicit and config.get(key) not in uniform:
            raise Unsupported(
                f"drop-layers: config {key} = {config[key]!r} gives each layer its kind by position, "
                "and dropping layers would shift it",
                hint="write the kinds out in config.json as layer_types",
            )
    if config.get("use_sliding_window") and config.get("layer_types") is None:
        raise Unsupported(
            "drop-layers: config use_sliding_window without layer_types gives layers their kind by position",
            hint="write the kinds out in config.json as layer_types",
        )
