"""Where graphs come from. Adding a source: a module with a `Candidate`, and a line in `candidates`.

Exporters offer candidates, best first; a judge (validators/parity.py) decides which is used.
"""

from __future__ import annotations

from tightship.exporters.onnx_candidates.last_logits import LastLogitsCandidate
from tightship.exporters.onnx_candidates.skeleton import Candidate


def candidates(
    *, fused: bool = False, packed: bool = False, one_node: bool = False, last: bool = False
) -> tuple[Candidate, ...]:
    """Every graph source, in the order in which they are tried; `fused` puts graphs for ONNX Runtime alone first.

    `packed` has them rotate by themselves. With `one_node`, those alone whose experts are one node a block; with
    `last`, all of them give the last logits.
    """
    found = _sources(fused=fused, packed=packed, one_node=one_node)
    return tuple(map(LastLogitsCandidate, found)) if last else found


def _sources(*, fused: bool, packed: bool, one_node: bool) -> tuple[Candidate, ...]:
    from tightship.exporters.onnx_candidates.capture import CaptureCandidate
    from tightship.exporters.onnx_candidates.direct import DirectCandidate
    from tightship.exporters.onnx_candidates.fused import FusedCandidate
    from tightship.exporters.onnx_candidates.mobius_graphs import MobiusCandidate

    if one_node:
        direct = DirectCandidate(one_node=True)
        return (FusedCandidate(direct, packed=packed), direct)
    first = (FusedCandidate(DirectCandidate(), packed=packed),) if fused else ()
    return (*first, DirectCandidate(), MobiusCandidate(), CaptureCandidate())
