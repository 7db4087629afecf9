"""What a structured pass can take out of a family, and how many of it, from config.json and the architecture file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tightship.architecture import TensorInfo
from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported, UsageError
from tightship.passes.structure import Kept, places, runs_through


@dataclass(frozen=True)
class Space:
    """Units of one kind, `units` of them in every block (or expert).

    Attributes:
        name: the option: `ffn`, `heads`, `width`, `experts`.
        widths: hyper-parameter -> how many of it a unit holds: a key head goes with its query heads.
        channels: columns that a unit holds of whatever reads it; 0 where nothing is counted in channels.
    """

    name: str
    units: int
    widths: dict[str, int]
    channels: int

    def kept(self, units: np.ndarray) -> Kept:
        """The units as numbers of each hyper-parameter."""
        return {w: (units[:, None] * n + np.arange(n)).reshape(-1) for w, n in self.widths.items()}

    def readers(self, checkpoint: Checkpoint) -> list[TensorInfo]:
        """Linears of the blocks whose inputs are these units, table order."""
        read = list(self.widths)[-1]
        return [info for info in checkpoint.linears() if runs_through(info.rule.shape[-1], read)]

    def columns(self, info: TensorInfo, hyper: Mapping[str, Any]) -> np.ndarray:
        """(units, channels) int64: which columns of a reader belong to each unit."""
        axis = info.rule.shape[-1]
        return np.stack([places(axis, hyper, self.kept(np.array([unit]))) for unit in range(self.units)])

    def sizes(self, count: int) -> dict[str, int]:
        """Hyper-parameters where `count` units stay."""
        return {width: count * n for width, n in self.widths.items()}


def space_of(checkpoint: Checkpoint, name: str) -> Space:
    """The space of an option.

    Raises:
        Unsupported: the family's file does not list it; the message says what it lists.
    """
    architecture, hyper = checkpoint.architecture, checkpoint.hyper
    listed = architecture.prunable
    if name not in listed:
        able = ", ".join(sorted(listed)) or "nothing but whole layers"
        raise Unsupported(
            f"prune-structured: a {architecture.family} model cannot lose {name}: its config.json has no width of its "
            f"own for them, or its graph ties them to others; it can lose {able}",
            hint="drop-layers works on every decoder",
        )
    return _MAKERS[name](hyper, listed[name])


def _ffn(hyper: Any, width: Any) -> Space:
    return Space("ffn", int(hyper[width]), {width: 1}, 1)


def _heads(hyper: Any, _rule: Any) -> Space:
    groups = int(hyper["kv_heads"])
    queries = int(hyper["heads"]) // groups
    return Space("heads", groups, {"kv_heads": 1, "heads": queries}, queries * int(hyper["head_dim"]))


def _width(hyper: Any, _rule: Any) -> Space:
    return Space("width", int(hyper["hidden"]), {"hidden": 1}, 1)


def _experts(hyper: Any, _rule: Any) -> Space:
    return Space("experts", int(hyper["experts"]), {"experts": 1}, 0)


_MAKERS: dict[str, Callable[[Any, Any], Space]] = {
    "ffn": _ffn,
    "heads": _heads,
    "width": _width,
    "experts": _experts,
}


def count_kept(checkpoint: Checkpoint, space: Space, share: float, multiple: int) -> int:
    """Units that stay where `share` of them is to go: the nearest number that is allowed.

    Raises:
        UsageError: the nearest allowed number is all of them.
    """
    allowed = [n for n in range(1, space.units + 1) if _allowed(checkpoint, space, n, multiple)]
    wanted = (1 - share) * space.units
    found = min([*allowed, space.units], key=lambda n: (abs(n - wanted), n))
    if found == space.units:
        smaller = [f"{1 - n / space.units:.3g}" for n in reversed(allowed) if n < space.units][:4]
        raise UsageError(
            f"prune-structured: {space.name}: {share:g} of {space.units} units rounds to none in steps of {multiple} "
            "channels",
            hint=f"nearest shares: {', '.join(smaller)}" if smaller else "a smaller `multiple`",
        )
    return found


def _allowed(checkpoint: Checkpoint, space: Space, count: int, multiple: int) -> bool:
    if space.name == "experts":
        return count >= int(checkpoint.hyper["experts_used"])
    divisor = space.name == "heads" and checkpoint.architecture.prunable["heads"] == "divisor"
    if divisor and int(checkpoint.hyper["hidden"]) % (count * space.widths["heads"]):
        return False  # transformers refuses such a config, although it has a head size of its own
    return count * space.channels % multiple == 0
