"""What enters the first block: rows of the token table, scaled, and where tokens stand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from tightship.exporters.onnx_candidates.network import Network
from tightship.exporters.onnx_candidates.positions import sinusoids

if TYPE_CHECKING:
    import onnx_ir as ir


def embedded(net: Network, ids: ir.Value, positions: Callable[[], ir.Value], offset: int | None = None) -> ir.Value:
    """(batch, sequence, hidden): tokens, scaled, plus learned or computed positions, and the norm of the sum.

    `positions` makes (batch, sequence) or (sequence) int64, counted from 0; it is called where the model adds any.
    `offset` is the row of position 0, by default the family's.
    """
    x = _tokens(net, ids)
    if net.has(None, "token_norm"):  # BlenderbotSmall's decoder
        x = net.norm(x, None, "token_norm")
    if has_places(net):
        offset = net.family.position_offset if offset is None else offset
        rows = net.op("Add", positions(), net.integer(offset)) if offset else positions()
        x = net.op("Add", x, sinusoids(net, rows) if net.family.sinusoidal else net.lookup("position_embd", rows))
    return net.norm(x, None, "token_embd_norm") if net.has(None, "token_embd_norm") else x


def has_places(net: Network) -> bool:
    """Whether positions are added to the tokens."""
    return net.has(None, "position_embd") or bool(net.family.sinusoidal)


def _tokens(net: Network, ids: ir.Value) -> ir.Value:
    """Rows of the token table, at the width of the blocks, times the family's scale."""
    x = net.lookup("token_embd", ids)
    if net.has(None, "token_embd_proj"):
        x = net.linear(x, None, "token_embd_proj")
    scale = net.family.embed_scale
    if scale is None or not net.option("scale_embedding", True):
        return x
    return net.scaled(x, math.sqrt(net.width) if scale == "sqrt" else float(net.option(scale)))
