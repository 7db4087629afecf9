"""All experts of a block in one node, ONNX Runtime's QMoE, which reads their integers from stacks.

| input                        | type, shape                               | content                          |
|------------------------------|-------------------------------------------|----------------------------------|
| input                        | float (tokens, hidden)                    |                                  |
| router_probs, router_weights | float (tokens, experts)                   | shares; 0 for experts not chosen |
| fc1_experts_weights          | uint8 (experts, 2 ffn, hidden bits / 8)   | rows of gate and up in turns     |
| fc1_scales                   | float (experts, 2 ffn, hidden / block)    | the same                         |
| fc2_experts_weights          | uint8 (experts, hidden, ffn bits / 8)     | rows of down                     |
| fc2_scales                   | float (experts, hidden, ffn / block)      | the same                         |

Codes lie as in MatMulNBits. The shares are computed in front of the node as for any other form, so every way of routing
is covered: QMoE takes the largest of them and multiplies with them as they are. `swiglu` with alpha 1, beta 0 and no
limit is the usual gate. Bits, block and accuracy level are set when the weights are put in (`onnx_stacks`).
Definition: ContribOperators.md of ONNX Runtime.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tightship.errors import Unsupported
from tightship.exporters.onnx_candidates.network import Network
from tightship.exporters.onnx_candidates.skeleton import Stack

if TYPE_CHECKING:
    import onnx_ir as ir

CONTRIB = "com.microsoft"
OP = "QMoE"
_EXPERTS, _TURNS = re.compile(r"\{0-(\d+)\}"), re.compile(r"\{([^{}]*,[^{}]*)\}")
_UNUSED = 7  # inputs between the second bias and the last one: a third matrix, zero points


def in_one_node(net: Network, block: int, flat: ir.Value, counts: ir.Value) -> ir.Value:
    """(tokens, hidden): what the chosen experts give, times their shares (tokens, experts).

    Raises:
        Unsupported: experts without a gate, with another activation than SiLU, or stacked in the checkpoint.
    """
    word = str(net.hyper.get("activation", net.family.activation))
    if not net.has(block, "ffn_gate_exps", 0) or word not in ("silu", "swish"):
        raise Unsupported(f"the experts of block {block} are not three matrices each around a SiLU")
    first, second = (
        _stacks(net, net.matrices(block, roles)) for roles in (("ffn_gate_exps", "ffn_up_exps"), ("ffn_down_exps",))
    )
    inputs = (flat, counts, *first, None, *second, *(None,) * _UNUSED, counts)
    used = int(net.hyper["experts_used"])
    return net.ops(OP, *inputs, domain=CONTRIB, k=used, normalize_routing_weights=0, **_gate())[0]


def _gate() -> dict[str, Any]:
    """SiLU of the rows that come first in each pair, times the second."""
    return {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}


def _stacks(net: Network, tensors: Sequence[tuple[str, ...]]) -> list[ir.Value]:
    name = stack_name(tensors)
    return [net.stack(f"{name}.{operand}", Stack(tuple(tensors), operand)) for operand in ("B", "scales")]


def stack_name(tensors: Sequence[tuple[str, ...]]) -> str:
    """`experts.{0-7}.{w1,w3}.weight` of `experts.0.w1.weight`, `experts.0.w3.weight`, `experts.1.w1.weight`, ...

    Raises:
        Unsupported: the names differ in more than the number of the expert and the word of the matrix.
    """
    words = [[name.split(".") for name in names] for names in tensors]
    found = []
    for place, word in enumerate(words[0][0]):
        numbers = {names[0][place] for names in words}
        turns = [name[place] for name in words[0]]
        several = f"{{{','.join(turns)}}}" if len({*turns}) > 1 else word
        found.append(f"{{0-{len(words) - 1}}}" if len(numbers) > 1 else several)
    name = ".".join(found)
    if tuple(expand(name)) != tuple(tensors):
        raise Unsupported(f"the experts' names make no stack: {tensors[0][0]}, {tensors[-1][-1]}")
    return name


def expand(name: str) -> list[tuple[str, ...]]:
    """The names of the tensors in a stack, expert by expert; empty if the name is that of no stack."""
    numbers, turns = _EXPERTS.search(name), _TURNS.search(name)
    if numbers is None:
        return []
    each = [name.replace(turns[0], word) for word in turns[1].split(",")] if turns else [name]
    return [tuple(n.replace(numbers[0], str(expert)) for n in each) for expert in range(int(numbers[1]) + 1)]
