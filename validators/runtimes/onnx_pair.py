"""An encoder's graph and its decoder's, run one after the other (sequence to sequence)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tightship.validators.runtimes.onnx_runtime import Arrays, Graph

_SOURCE = ("encoder_attention_mask", "encoder_hidden_states")


class Pair:
    """The interface of `onnx_runtime.Graph` for two graphs.

    `input_ids` (b, s) and `attention_mask` are the source's, `decoder_input_ids` (b, t) the target's, int64. A past
    holds what the encoder gave, too, so that every step gets it again, as clients do.
    """

    def __init__(self, encoder: Graph, decoder: Graph) -> None:
        self.encoder = encoder
        self.decoder = decoder
        self.inputs = encoder.inputs
        self.past = decoder.past

    def outputs(self, arrays: Mapping[str, np.ndarray]) -> Arrays:
        """One pass over the target, past empty."""
        return self.advance({"input_ids": arrays["decoder_input_ids"]}, self._encoded(arrays))[0]

    def decode(self, arrays: Mapping[str, np.ndarray], prefill: int) -> Arrays:
        """`prefill` target tokens at once, the rest one by one; outputs joined to the shape of one pass."""
        target = arrays["decoder_input_ids"]
        past = self._encoded(arrays)
        parts = []
        for start, stop in [(0, prefill), *((i, i + 1) for i in range(prefill, target.shape[1]))]:
            found, past = self.advance({"input_ids": target[:, start:stop]}, past)
            parts.append(found["logits"])
        return {"logits": np.concatenate(parts, axis=1)}

    def greedy(self, prompt: np.ndarray, count: int, first: int) -> np.ndarray:
        """(count,) int64 most likely tokens for a source (s,) int64, after the target's token `first`."""
        past = self._encoded({"input_ids": prompt[None]})
        found = [first]
        while len(found) <= count:
            out, past = self.advance({"input_ids": np.array([found[-1:]], np.int64)}, past)
            found.append(int(out["logits"][0, -1].argmax()))
        return np.array(found[1:], np.int64)

    def begin(self, arrays: Mapping[str, np.ndarray]) -> Arrays:
        """The past of a source and one token of a target."""
        first = np.zeros((len(arrays["input_ids"]), 1), np.int64)
        return self.advance({"input_ids": first}, self._encoded(arrays))[1]

    def advance(self, arrays: Mapping[str, np.ndarray], past: Arrays) -> tuple[Arrays, Arrays]:
        """Outputs of the target's `input_ids` that follow a past, and the past with them in it."""
        source = {name: past[name] for name in _SOURCE}
        caches = {name: value for name, value in past.items() if name not in source}
        found, grown = self.decoder.step({"input_ids": arrays["input_ids"].astype(np.int64), **source}, caches)
        return found, {**grown, **source}

    def _encoded(self, arrays: Mapping[str, np.ndarray]) -> Arrays:
        """The past before any target."""
        ids = arrays["input_ids"]
        mask = arrays.get("attention_mask", np.ones_like(ids)).astype(np.int64)
        states = self.encoder.outputs({"input_ids": ids, "attention_mask": mask})["last_hidden_state"]
        empty = self.decoder.empty_past(len(ids))
        return {**empty, "encoder_attention_mask": mask, "encoder_hidden_states": states}
