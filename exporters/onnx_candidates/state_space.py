"""Mamba's mixer (arXiv 2312.00752, algorithm 2): a causal convolution, then a linear recurrence whose steps depend on
the input. Its past has one size, however long the text.

| cache input | cache output   | shape                           | what it holds                               |
|-------------|----------------|---------------------------------|---------------------------------------------|
| past_conv.i | present_conv.i | (batch_size, inner, kernel - 1) | inputs of the convolution before this token |
| past_ssm.i  | present_ssm.i  | (batch_size, inner, state)      | state of the recurrence                     |

Padding enters both as zeros, as in transformers: before a text it leaves the states zero; behind one they go on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tightship.exporters.onnx_candidates.attention import Sight
from tightship.exporters.onnx_candidates.convolution import causal_convolution
from tightship.exporters.onnx_candidates.graph_builder import FLOAT, GraphBuilder
from tightship.exporters.onnx_candidates.network import Network
from tightship.exporters.onnx_candidates.skeleton import BATCH, SEQUENCE

if TYPE_CHECKING:
    import onnx_ir as ir


def state_space(net: Network, block: int, x: ir.Value, sight: Sight) -> ir.Value:
    """(batch, sequence, hidden) of the same; `sight.kept` says which tokens are no padding."""
    inner, state, rank = (int(net.hyper[key]) for key in ("inner", "state", "dt_rank"))
    both = net.linear(net.op("Mul", x, sight.kept), block, "ssm_in")
    fed, gate = net.ops("Split", both, outputs=2, axis=2, num_outputs=2)
    fed = net.op("Mul", net.activation(causal_convolution(net, block, fed, ("ssm_conv1d", inner))), sight.kept)
    chosen = net.linear(net.shaped(fed, (BATCH, SEQUENCE, inner)), block, "ssm_x")
    parts = net.ops("Split", chosen, net.integers(rank, state, state), outputs=3, axis=2)
    if "mixer_eps" in net.hyper:  # FalconMamba norms each of them, without parameters
        epsilon = float(net.hyper["mixer_eps"])
        parts = [
            net.norm(part, block, "ssm_norm", width=width, epsilon=epsilon)
            for part, width in zip(parts, (rank, state, state), strict=True)
        ]
    step, write, read = parts
    step = net.op("Softplus", net.linear(net.shaped(step, (BATCH, SEQUENCE, rank)), block, "ssm_dt"))
    y = selective_scan(net, block, (step, net.op("Mul", step, fed), write, read), (inner, state))
    y = net.op("Add", y, net.op("Mul", fed, net.parameter(block, "ssm_d")))
    y = net.op("Mul", y, net.activation(gate))
    return net.linear(net.shaped(y, (BATCH, SEQUENCE, inner)), block, "ssm_out")


def selective_scan(
    net: Network, block: int, sequences: tuple[ir.Value, ir.Value, ir.Value, ir.Value], sizes: tuple[int, int]
) -> ir.Value:
    """(batch, sequence, inner) of h * read, where h <- exp(step * A) * h + (step * x) * write.

    `sequences` are step, step * x (batch, sequence, inner), write and read (batch, sequence, state); eq. 2 and 4.
    """
    rates = net.op("Neg", net.op("Exp", net.parameter(block, "ssm_a")))
    body = GraphBuilder(f"scan.{block}.")
    past = body.input("past", (BATCH, *sizes), FLOAT)
    step, moved, write, read = (body.input(word, (BATCH, None), FLOAT) for word in ("step", "moved", "write", "read"))
    last, middle = net.integers(-1), net.integers(1)
    kept = body.op("Mul", past, body.op("Exp", body.op("Mul", body.op("Unsqueeze", step, last), rates)))
    added = body.op("Mul", body.op("Unsqueeze", moved, last), body.op("Unsqueeze", write, middle))
    present = body.op("Add", kept, added)
    seen = body.op("Squeeze", body.op("MatMul", present, body.op("Unsqueeze", read, last)), last)
    body.output("present", present, (BATCH, *sizes))
    body.output("seen", seen, (BATCH, sizes[0]))
    grown, y = net.ops(
        "Scan", net.state(block, "ssm", sizes), *sequences, outputs=2, body=body.graph("scan"),
        num_scan_inputs=4, scan_input_axes=[1] * 4, scan_output_axes=[1],
    )  # fmt: skip
    net.keep_state(block, "ssm", grown, sizes)
    return y
