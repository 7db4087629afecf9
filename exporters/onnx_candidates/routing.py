"""Which experts a token takes, and what each of them counts for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tightship.exporters.onnx_candidates.graph_builder import BOOL, LOWEST
from tightship.exporters.onnx_candidates.network import Network

if TYPE_CHECKING:
    import onnx_ir as ir


def shares(net: Network, block: int, flat: ir.Value) -> ir.Value:
    """(tokens, experts) float of (tokens, hidden): what each expert counts for a token, 0 for those not chosen."""
    scores = net.linear(flat, block, "ffn_gate_inp")
    values, chosen = _mixed(net, scores) if net.family.routing.mixed else _ranked(net, block, scores)
    empty = net.op("Mul", scores, net.number(0.0))
    return net.op("ScatterElements", empty, chosen, values, axis=1)


def _ranked(net: Network, block: int, scores: ir.Value) -> tuple[ir.Value, ir.Value]:
    """What the experts with the best scores count, float, and which they are, int64: both (tokens, used)."""
    routing = net.family.routing
    if not routing.late:
        scores = net.op("Sigmoid", scores) if routing.sigmoid else net.op("Softmax", scores, axis=-1)
    chosen = _chosen(net, block, scores)
    values = net.op("GatherElements", scores, chosen, axis=1)
    if routing.late:
        values = net.op("Softmax", values, axis=-1)
    elif net.answer(routing.renormalized):
        values = net.op("Div", values, net.op("ReduceSum", values, net.integers(-1), keepdims=1))
    values = net.scaled(values, float(net.option(routing.scale))) if routing.scale else values
    return values, chosen


def _mixed(net: Network, scores: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The same by SparseMixer-v2 (arXiv 2409.12136, section 2) without its noise: the best expert, then the best left.

    Each counts its softmax among experts that are left and whose scores are not far below its own.
    """
    tolerance = net.number(2 * float(net.option(str(net.family.routing.mixed))))
    size, hidden = net.op("Abs", scores), net.number(LOWEST)
    found, left = [], scores
    for _ in range(int(net.hyper["experts_used"])):
        top, place = _best(net, left, 1)
        below = net.op("Div", net.op("Sub", top, scores), net.op("Max", size, top))
        near = net.op("Where", net.op("Greater", below, tolerance), hidden, left)
        share = net.op("GatherElements", net.op("Softmax", near, axis=-1), place, axis=1)
        found.append((share, place))
        left = net.op("ScatterElements", left, place, net.op("Expand", hidden, net.op("Shape", place)), axis=1)
    values, chosen = (net.op("Concat", *parts, axis=1) for parts in zip(*found, strict=True))
    return values, chosen


def _chosen(net: Network, block: int, scores: ir.Value) -> ir.Value:
    """(tokens, used) int64: experts with the best scores, a bias on them and a choice of groups allowed for."""
    routing = net.family.routing
    bias = net.bias(block, "exp_probs_b")
    if bias is not None:
        scores = net.op("Add", scores, bias)
    if net.answer(routing.grouped):
        scores = net.op("Where", _in_best_groups(net, scores), scores, net.number(LOWEST))
    return _best(net, scores, int(net.hyper["experts_used"]))[1]


def _in_best_groups(net: Network, scores: ir.Value) -> ir.Value:
    """(tokens, experts) bool: those in the groups whose best expert, or best two together, score highest.

    DeepSeek-V2 (arXiv 2405.04434), section 2.2.2, and DeepSeek-V3 (arXiv 2412.19437), section 2.1.2.
    """
    groups, used = int(net.option("n_group")), int(net.option("topk_group"))
    apart = net.op("Reshape", scores, net.integers(0, groups, -1))
    best = _best(net, apart, net.family.routing.best_of_group)[0]
    totals = net.op("ReduceSum", best, net.integers(2), keepdims=0)
    empty = net.op("Mul", totals, net.number(0.0))
    chosen = _best(net, totals, used)[1]
    one = net.op("Expand", net.number(1.0), net.op("Shape", chosen))
    marked = net.op("ScatterElements", empty, chosen, one, axis=1)
    each = int(net.hyper["experts"]) // groups
    wide = net.op("Expand", net.op("Unsqueeze", marked, net.integers(2)), net.integers(1, 1, each))
    return net.op("Cast", net.op("Reshape", wide, net.integers(0, -1)), to=BOOL)


def _best(net: Network, scores: ir.Value, count: int) -> tuple[ir.Value, ir.Value]:
    values, places = net.ops("TopK", scores, net.integers(count), outputs=2, axis=-1)
    return values, places
