"""Graphs written down here, from the roles that the architecture data give to tensors. Standard operators of opset 23.

Widths are read off the stored tensors, block by block, so blocks may differ in heads and in the width of their MLP.
Frequencies of the rotary embedding are transformers' own; cosines are computed in the graph, so no table limits the
context. What a family adds to the plain block is in `families`; anything else that a config asks for is not seen here
and shows in the parity check.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tightship import __version__
from tightship.architecture import Architecture
from tightship.errors import Unsupported
from tightship.exporters.onnx_candidates.decoder import decoder
from tightship.exporters.onnx_candidates.encoder import encoder
from tightship.exporters.onnx_candidates.families import FAMILIES
from tightship.exporters.onnx_candidates.graph_edits import OPSET
from tightship.exporters.onnx_candidates.network import Network
from tightship.exporters.onnx_candidates.sequence_to_sequence import target_decoder
from tightship.exporters.onnx_candidates.skeleton import DECODER_TASKS, IMAGES, SEQ2SEQ, Skeleton, outputs_of
from tightship.exporters.onnx_candidates.vision import vision


class DirectCandidate:
    """Our own construction: milliseconds, no tracing. With `one_node`, experts are left to ONNX Runtime's QMoE."""

    def __init__(self, *, one_node: bool = False) -> None:
        self.one_node = one_node

    @property
    def source(self) -> str:
        return f"tightship {__version__} blocks, opset {OPSET}{', experts in QMoE' if self.one_node else ''}"

    @property
    def rewrites(self) -> tuple[str, ...]:
        return ("QMoE",) if self.one_node else ()

    def build(
        self, config: Mapping[str, Any], architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]
    ) -> Skeleton:
        family = FAMILIES.get(architecture.family)
        outputs_of(architecture)
        two = architecture.task == SEQ2SEQ
        if family is None or family.encoder == (two or architecture.task in DECODER_TASKS):
            raise Unsupported(f"{architecture.family} for {architecture.task} is not written down here")
        for key, value, why in family.must:
            if config.get(key, value) != value:
                raise Unsupported(f"{architecture.family} with {key} = {config[key]!r} is not written down here: {why}")
        if two:
            return _two_graphs(*(Network(config, architecture, shapes, family, stack) for stack in ("enc", "dec")))
        net = Network(config, architecture, shapes, family, one_node=self.one_node)
        writer = vision if architecture.task == IMAGES else encoder if family.encoder else decoder
        writer(net)
        return net.skeleton()


def _two_graphs(source: Network, target: Network) -> Skeleton:
    encoder(source)
    target_decoder(target)
    skeleton = target.skeleton()
    skeleton.encoder = source.skeleton()
    return skeleton
