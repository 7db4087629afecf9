"""Causal convolutions of single channels, by themselves and in LFM2's gated blocks. Their past has one size.

| cache input | cache output   | shape                              | what it holds                          |
|-------------|----------------|------------------------------------|----------------------------------------|
| past_conv.i | present_conv.i | (batch_size, channels, kernel - 1) | inputs of the kernel before this token |

Padding enters as zeros, as in transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tightship.exporters.onnx_candidates.attention import Sight
from tightship.exporters.onnx_candidates.network import Network
from tightship.exporters.onnx_candidates.skeleton import BATCH, SEQUENCE

if TYPE_CHECKING:
    import onnx_ir as ir


def short_convolution(net: Network, block: int, x: ir.Value, sight: Sight) -> ir.Value:
    """after * convolution(before * y), where before, after and y are products of x: (batch, sequence, hidden).

    LFM2 (arXiv 2511.23404); `sight.kept` says which tokens are no padding.
    """
    three = net.linear(net.op("Mul", x, sight.kept), block, "shortconv_inproj")
    before, after, y = net.ops("Split", three, outputs=3, axis=2, num_outputs=3)
    seen = causal_convolution(net, block, net.op("Mul", before, y), ("shortconv_conv", net.width))
    gated = net.shaped(net.op("Mul", after, seen), (BATCH, SEQUENCE, net.width))
    return net.linear(gated, block, "shortconv_outproj")


def causal_convolution(net: Network, block: int, x: ir.Value, kernel: tuple[str, int]) -> ir.Value:
    """Each channel of (batch, sequence, channels) with itself and its past; `kernel`: its role, number of channels."""
    role, channels = kernel
    reach = int(net.hyper["kernel"]) - 1
    by_channel = net.op("Transpose", x, perm=[0, 2, 1])
    whole = net.op("Concat", net.state(block, "conv", (channels, reach)), by_channel, axis=2)
    end = net.op("Shape", whole, start=2, end=3)
    last = net.op("Slice", whole, net.op("Sub", end, net.integers(reach)), end, net.integers(2))
    net.keep_state(block, "conv", last, (channels, reach))
    y = net.op("Conv", whole, *net.parameters(block, role), group=channels)
    return net.op("Transpose", y, perm=[0, 2, 1])
