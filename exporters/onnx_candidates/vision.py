"""Vision transformers (arXiv 2010.11929): patches of an image as a sequence, then an encoder."""

from __future__ import annotations

from tightship.exporters.onnx_candidates.attention import Sight
from tightship.exporters.onnx_candidates.encoder import layer_of
from tightship.exporters.onnx_candidates.graph_builder import FLOAT
from tightship.exporters.onnx_candidates.network import Network
from tightship.exporters.onnx_candidates.skeleton import BATCH


def vision(net: Network) -> None:
    """The whole graph: pixels in, a score for each label out."""
    side, patch, channels = (int(net.hyper[name]) for name in ("image", "patch", "channels"))
    pixels = net.input("pixel_values", (BATCH, channels, side, side), FLOAT)
    count = (side // patch) ** 2
    cut = net.op("Conv", pixels, *net.parameters(None, "patch_embd"), strides=[patch, patch])
    patches = net.op("Transpose", net.op("Reshape", cut, net.integers(0, net.width, count)), perm=[0, 2, 1])
    batch = net.op("Concat", net.op("Shape", pixels, start=0, end=1), net.integers(1, 1), axis=0)
    first = net.op("Expand", net.parameter(None, "class_embd"), batch)
    x = net.op("Add", net.op("Concat", first, patches, axis=1), net.parameter(None, "position_embd"))
    x = net.shaped(x, (BATCH, count + 1, net.width))
    for block in range(int(net.hyper["layers"])):
        x = layer_of(net, block, x, Sight(None))
    first = net.op("Gather", net.norm(x, None, "output_norm"), net.integer(0), axis=1)
    logits = net.linear(net.shaped(first, (BATCH, net.width)), None, "cls")
    net.output("logits", logits, (BATCH, net.rows(None, "cls")))
