"""Stored tensors of a graph and who reads them: the step between a skeleton and its bytes.

A unit is one stored tensor (or a run of its rows) however many initializers show it: tied embeddings are one unit, and
a `Transpose` in front of a MatMul is looked through.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported
from tightship.exporters.onnx_candidates.skeleton import Feed, Skeleton
from tightship.weights import Alias, Dense, Factored, Quantized, Stored, Sum

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Use:
    """Input `index` of `node` reads the tensor; `turned` if as (in, out)."""

    node: ir.Node
    index: int
    turned: bool

    @property
    def is_linear(self) -> bool:
        """The right operand of a MatMul."""
        return self.turned and self.node.op_type == "MatMul" and self.node.domain == "" and self.index == 1

    @property
    def is_lookup(self) -> bool:
        """The table of a Gather along rows."""
        axis = self.node.attributes.get("axis")
        first = axis is None or axis.as_int() == 0
        return not self.turned and self.node.op_type == "Gather" and self.index == 0 and first


@dataclass
class Unit:
    """One stored tensor in the graph.

    Attributes:
        name: on-disk name of the owner, plus `.rows{a}-{b}` for a part.
        tensor: on-disk name of the owner.
        weight: its data, (out, in), rows already taken.
        uses: every reader, in graph order.
    """

    name: str
    tensor: str
    weight: Stored
    uses: list[Use] = field(default_factory=list)


def units_of(skeleton: Skeleton, checkpoint: Checkpoint) -> list[Unit]:
    """The units of a graph in the order of their first reader. Transposes of weights are taken out of the graph."""
    graph = skeleton.model.graph
    found: dict[tuple[str, tuple[int, int] | None], Unit] = {}
    for name, feed in skeleton.feeds.items():
        value = graph.initializers[name]
        owner = owner_of(checkpoint, feed.tensor)
        key = (owner, feed.rows)
        if key not in found:
            suffix = f".rows{feed.rows[0]}-{feed.rows[1]}" if feed.rows else ""
            found[key] = Unit(owner + suffix, owner, take(checkpoint.resolve(owner), feed.rows))
        found[key].uses += _uses(value, feed)
        del graph.initializers[name]
    position = {node: index for index, node in enumerate(graph)}
    units = [u for u in found.values() if u.uses]
    for unit in units:
        unit.uses.sort(key=lambda use: (position[use.node], use.index))
    return sorted(units, key=lambda u: (position[u.uses[0].node], u.uses[0].index))


def owner_of(checkpoint: Checkpoint, name: str) -> str:
    """The name under which the data are stored."""
    weight = checkpoint.weights.get(name)
    return owner_of(checkpoint, weight.owner) if isinstance(weight, Alias) else name


def take(weight: Any, rows: tuple[int, int] | None) -> Any:
    """A run of rows of a stored weight, exactly; a weight of the same kind.

    Raises:
        Unsupported: rows of a sum of matrices.
    """
    if rows is None:
        return weight
    start, stop = rows
    if isinstance(weight, Quantized):
        return weight.take_rows(np.arange(start, stop))
    if isinstance(weight, Dense):
        return Dense((stop - start, *weight.shape[1:]), weight.dtype, lambda: weight.read()[start:stop])
    if isinstance(weight, Factored):
        return Factored(take(weight.left, rows), weight.right)
    return Sum(take(weight.base, rows), take(weight.residual, rows))


def left_out(checkpoint: Checkpoint) -> dict[str, str]:
    """Stored tensors that take no part in the graph's outputs, and why."""
    patterns = checkpoint.architecture.ignored
    found = {n: "a buffer" for n in checkpoint.weights if any(fnmatch.fnmatch(n, pattern) for pattern in patterns)}
    if checkpoint.architecture.task == "feature-extraction":
        poolers = (
            n for n, info in checkpoint.infos().items() if info.rule.role == "pooler" and n in checkpoint.weights
        )
        found |= dict.fromkeys(poolers, "the graph gives last_hidden_state, before the pooler")
    return found


def unused_tensors(skeleton: Skeleton, checkpoint: Checkpoint) -> list[str]:
    """Stored tensors that no initializer shows, wholly or in part: a graph that drops weights is not this model's."""
    shown: dict[str, int] = {}
    feeds = [feed for graph in skeleton.graphs.values() for feed in graph.feeds.values()]
    for owner, rows in {(owner_of(checkpoint, feed.tensor), feed.rows) for feed in feeds}:
        shown[owner] = shown.get(owner, 0) + (rows[1] - rows[0] if rows else _height(checkpoint.resolve(owner)))
    needless = left_out(checkpoint)
    for name in (
        n for graph in skeleton.graphs.values() for stack in graph.stacks.values() for n in chain(*stack.tensors)
    ):
        owner = owner_of(checkpoint, name)
        shown[owner] = _height(checkpoint.resolve(owner))
    stored = {n: w for n, w in checkpoint.weights.items() if not isinstance(w, Alias) and n not in needless}
    return [name for name, weight in stored.items() if shown.get(name, 0) < _height(weight)]


def _height(weight: Stored) -> int:
    return weight.shape[0] if weight.shape else 1


def _uses(value: ir.Value, feed: Feed) -> list[Use]:
    found: list[Use] = []
    for node, index in value.uses():
        if _turns(node):
            if feed.transpose:
                raise Unsupported(f"the graph turns {feed.tensor} twice")
            found += [Use(reader, at, turned=True) for reader, at in node.outputs[0].uses()]
        else:
            found.append(Use(node, index, feed.transpose))
    return found


def _turns(node: ir.Node) -> bool:
    perm = node.attributes.get("perm")
    return node.op_type == "Transpose" and node.domain == "" and (perm is None or list(perm.as_ints()) == [1, 0])
