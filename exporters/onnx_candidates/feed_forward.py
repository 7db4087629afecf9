"""The other half of a block: MLPs with and without a gate, and experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tightship.exporters.onnx_candidates.network import Network
from tightship.exporters.onnx_candidates.one_node import in_one_node
from tightship.exporters.onnx_candidates.routing import shares
from tightship.exporters.onnx_candidates.skeleton import BATCH, SEQUENCE

if TYPE_CHECKING:
    import onnx_ir as ir


def feed_forward(net: Network, block: int, x: ir.Value) -> ir.Value:
    """The MLP of a block, or its experts."""
    return experts(net, block, x) if net.has(block, "ffn_gate_inp") else mlp(net, block, x)


def mlp(net: Network, block: int, x: ir.Value, suffix: str = "", expert: int | None = None) -> ir.Value:
    """down(act(gate x) * up x), or down(act(up x)) without a gate. `suffix` of the roles: `_exps`, `_shexp`."""
    if net.has(block, f"ffn_gate_up{suffix}"):
        half = net.rows(block, f"ffn_gate_up{suffix}") // 2
        gate, up = (net.linear(x, block, f"ffn_gate_up{suffix}", rows=rows) for rows in ((0, half), (half, 2 * half)))
        inner = net.op("Mul", net.activation(gate), up)
    elif net.has(block, f"ffn_gate{suffix}", expert):
        gate = net.linear(x, block, f"ffn_gate{suffix}", expert=expert)
        inner = net.op("Mul", net.activation(gate), net.linear(x, block, f"ffn_up{suffix}", expert=expert))
    else:
        inner = net.activation(net.linear(x, block, f"ffn_up{suffix}", expert=expert))
    return net.linear(inner, block, f"ffn_down{suffix}", expert=expert)


def experts(net: Network, block: int, x: ir.Value) -> ir.Value:
    """What the chosen experts give, and the shared one if there is one."""
    flat = net.shaped(net.op("Reshape", x, net.integers(-1, net.width)), (None, net.width))
    counts = shares(net, block, flat)
    total = in_one_node(net, block, flat, counts) if net.one_node else _each_expert(net, block, flat, counts)
    if net.has(block, "ffn_down_shexp"):
        total = net.op("Add", total, _shared(net, block, flat))
    return net.shaped(net.op("Reshape", total, net.op("Shape", x)), (BATCH, SEQUENCE, net.width))


def _each_expert(net: Network, block: int, flat: ir.Value, counts: ir.Value) -> ir.Value:
    """Each expert computes the tokens that chose it, and no others; what it gives is added at their places."""
    total = net.op("Mul", flat, net.number(0.0))
    for expert in range(int(net.hyper["experts"])):
        share = net.op("Gather", counts, net.integers(expert), axis=1)
        places = net.op("Transpose", net.op("NonZero", net.op("Squeeze", share, net.integers(1))), perm=[1, 0])
        chosen = net.shaped(net.op("GatherND", flat, places), (None, net.width))
        stacked = net.has(block, "ffn_gate_up_stack")
        y = _of_stack(net, block, chosen, expert) if stacked else mlp(net, block, chosen, "_exps", expert)
        found = net.op("Mul", y, net.op("GatherND", share, places))
        total = net.op("ScatterND", total, places, found, reduction="add")
    return total


def _of_stack(net: Network, block: int, x: ir.Value, expert: int) -> ir.Value:
    """One expert of stacked matrices, gate and up in one."""
    both = net.stacked(x, block, "ffn_gate_up_stack", expert)
    if net.family.stacked == "out_in":
        gate, up = net.ops("Split", both, outputs=2, axis=-1, num_outputs=2)
        inner = net.op("Mul", net.activation(gate), up)
    else:
        inner = _clamped_glu(net, both)
    return net.stacked(inner, block, "ffn_down_stack", expert)


def _clamped_glu(net: Network, both: ir.Value) -> ir.Value:
    """(up + 1) * gate * sigmoid(alpha * gate), gate and up in turns and within bounds (gpt-oss)."""
    end = net.integers(np.iinfo(np.int64).max)
    every_other = (net.integers(-1), net.integers(2))
    gate, up = (net.op("Slice", both, net.integers(start), end, *every_other) for start in (0, 1))
    limit = float(net.option("swiglu_limit"))
    gate, up = net.clipped(gate, None, limit), net.clipped(up, -limit, limit)
    swish = net.op("Mul", gate, net.op("Sigmoid", net.scaled(gate, float(net.option("swiglu_alpha")))))
    return net.op("Mul", net.op("Add", up, net.number(1.0)), swish)


def _shared(net: Network, block: int, flat: ir.Value) -> ir.Value:
    """The expert that every token takes, behind its own gate if it has one."""
    y = mlp(net, block, flat, "_shexp")
    if net.has(block, "ffn_gate_inp_shexp"):
        y = net.op("Mul", y, net.op("Sigmoid", net.linear(flat, block, "ffn_gate_inp_shexp")))
    return y
