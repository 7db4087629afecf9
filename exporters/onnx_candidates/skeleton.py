"""A graph without weights, and the word of a judge about it.

| graph input                      | type  | shape                                                  |
|----------------------------------|-------|--------------------------------------------------------|
| input_ids                        | int64 | (batch_size, sequence_length)                          |
| attention_mask                   | int64 | (batch_size, total_sequence_length)                    |
| position_ids (not where packed)  | int64 | (batch_size, sequence_length)                          |
| token_type_ids (encoders)        | int64 | (batch_size, sequence_length)                          |
| global_attention_mask            | int64 | (batch_size, sequence_length), Longformer              |
| pixel_values                     | float | (batch_size, channels, height, width)                  |
| past_key_values.{i}.key, .value  | float | (batch_size, kv_heads, past_sequence_length, head_dim) |
| past_conv.{i}, past_ssm.{i}      | float | (batch_size, fixed, fixed), in the place of keys       |

The decoder of two graphs (sequence to sequence); its past has `.decoder` and `.encoder` behind the block's number:

| graph input                             | type  | shape                                                 |
|-----------------------------------------|-------|-------------------------------------------------------|
| input_ids                               | int64 | (batch_size, sequence_length)                         |
| encoder_attention_mask                  | int64 | (batch_size, encoder_sequence_length)                 |
| encoder_hidden_states                   | float | (batch_size, encoder_sequence_length, hidden)         |
| past_key_values.{i}.decoder.key, .value | float | (batch_size, heads, past_sequence_length, head_dim)   |
| past_key_values.{i}.encoder.key, .value | float | (batch_size, heads, 0 or all of the source, head_dim) |

| graph output                     | tasks                          | shape                                           |
|----------------------------------|--------------------------------|-------------------------------------------------|
| logits                           | text-generation, fill-mask,    | (batch_size, sequence_length, vocabulary)       |
|                                  | text2text-generation           |                                                 |
| present.{i}.key, .value          | text-generation                | (batch_size, kv_heads, total, head_dim)         |
| present_conv.{i}, present_ssm.{i} | text-generation               | those of the past                               |
| present.{i}.decoder.key, ...     | text2text-generation           | as the past, grown                              |
| last_hidden_state                | feature-extraction, fill-mask, | (batch_size, sequence_length, hidden)           |
|                                  | the encoder of two graphs      |                                                 |
| logits                           | text-, token-classification    | (batch_size[, sequence_length], labels)         |
| logits                           | image-classification           | (batch_size, labels)                            |
| start_logits, end_logits         | question-answering             | (batch_size, sequence_length)                   |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tightship.architecture import Architecture
from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported

if TYPE_CHECKING:
    import onnx_ir as ir

BATCH, SEQUENCE, TOTAL, PAST = "batch_size", "sequence_length", "total_sequence_length", "past_sequence_length"
SOURCE, PAST_SOURCE = "encoder_sequence_length", "past_encoder_sequence_length"
DECODER_TASKS = ("text-generation",)
SEQ2SEQ = "text2text-generation"
IMAGES = "image-classification"
KEPT = "num_logits_to_keep"  # an input with a default, as transformers.js calls it; see last_logits.py
MAIN = "model.onnx"
GENAI = "genai.onnx"  # beside it, over the same data: what onnxruntime-genai runs
# Two graphs, by the names that optimum and transformers.js look for; theirs is called merged since it takes both the
# start and single steps.
ENCODER, DECODER = "encoder_model.onnx", "decoder_model_merged.onnx"
HEADS = {
    "fill-mask": ("logits", "last_hidden_state"),
    "feature-extraction": ("last_hidden_state",),
    "text-classification": ("logits",),
    "token-classification": ("logits",),
    "question-answering": ("start_logits", "end_logits"),
    IMAGES: ("logits",),
}


@dataclass(frozen=True)
class Feed:
    """Where an initializer's data come from.

    Attributes:
        tensor: on-disk name.
        rows: (start, stop) of the (out, in) matrix or vector, or None for all.
        transpose: the initializer is (in, out).
    """

    tensor: str
    rows: tuple[int, int] | None = None
    transpose: bool = False


@dataclass(frozen=True)
class Stack:
    """An initializer made of the integers of several stored matrices.

    Attributes:
        tensors: of each expert, the on-disk names of those matrices (out, in) whose rows take turns.
        operand: of theirs in MatMulNBits: `B` or `scales`.
    """

    tensors: tuple[tuple[str, ...], ...]
    operand: str


@dataclass
class Skeleton:
    """A float32 graph whose weights are initializers without data; `feeds` and `stacks` say what each of them is.

    Initializers with data (shape constants, rotary tables) are the graph's own. `encoder` is the graph that runs before
    this one, in models of two; `twin` the same graph with logits of the last token alone.
    """

    model: ir.Model
    feeds: dict[str, Feed]
    stacks: dict[str, Stack] = field(default_factory=dict)
    encoder: Skeleton | None = None
    twin: Skeleton | None = None

    @property
    def graphs(self) -> dict[str, Skeleton]:
        """Every graph by the name of its file; of two that run together, in the order in which they do."""
        if self.encoder is not None:
            return {ENCODER: self.encoder, DECODER: self}
        return {MAIN: self} | ({GENAI: self.twin} if self.twin is not None else {})


class Candidate(Protocol):
    """One source of graphs.

    Attributes:
        source: library and version, as the report names it.
        rewrites: what was changed in the library's graph.
    """

    @property
    def source(self) -> str: ...

    @property
    def rewrites(self) -> tuple[str, ...]: ...

    def build(
        self, config: Mapping[str, Any], architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]
    ) -> Skeleton:
        """The graph for `architecture.task`. `shapes` are those of the stored tensors, matrices (out, in), no aliases.

        Raises:
            Unsupported: this source has no graph for it. Any other exception counts against the candidate, too.
        """


@dataclass(frozen=True)
class Judgement:
    """What was found out about one candidate.

    Attributes:
        source: of the candidate.
        passed: the verdict.
        margin: largest relative L2 distance over all cases, None where the candidate did not get that far.
        reason: why it was refused.
        cases: relative L2 of each case.
    """

    source: str
    passed: bool
    margin: float | None
    reason: str | None = None
    cases: tuple[tuple[str, float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        found = {"source": self.source, "passed": self.passed, "margin": self.margin, "reason": self.reason}
        return {**{k: v for k, v in found.items() if v is not None}, "cases": dict(self.cases)}


@dataclass(frozen=True)
class Choice:
    """The candidate to use, and everything that was judged on the way to it."""

    candidate: Candidate
    judgements: tuple[Judgement, ...]

    @property
    def graph_source(self) -> str:
        """One line for manifest and report; without the measured distance, which differs between machines."""
        return f"{self.judgements[-1].source}: right on a random model with these flags"


Judge = Callable[[Sequence[Candidate], Checkpoint], Choice]
"""judge(candidates, checkpoint): the first candidate that computes this family, with these flags, correctly."""


def graph_files(main: Path) -> list[Path]:
    """Every graph of an artifact in the order in which they run; `main` is the last of them."""
    return [main.with_name(ENCODER), main] if main.name == DECODER else [main]


def outputs_of(architecture: Architecture) -> tuple[str, ...]:
    """Output names that a graph for this family must have, apart from the KV cache.

    Raises:
        Unsupported: a task that has no graph contract.
    """
    if architecture.task in (*DECODER_TASKS, SEQ2SEQ):
        return ("logits",)
    if architecture.task not in HEADS:
        raise Unsupported(
            f"ONNX export of a {architecture.task} model is not mapped",
            hint=f"mapped tasks: {', '.join((*DECODER_TASKS, SEQ2SEQ, *HEADS))}",
        )
    return HEADS[architecture.task]
