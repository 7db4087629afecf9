"""Asking a language model or classifier: from examples to answers.

A model is a function `logits(ids (n, length) int64, mask (n, length) int64) -> float32`: (n, length, vocabulary) of
language models, (n, labels) of classifiers. Rows are padded on the right, so that every runtime can serve.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.errors import GateFailed, Malformed, Unsupported
from tightship.texts import Codec
from tightship.validators.metrics import log_softmax
from tightship.validators.task_data import Choice, Labelled, Writing
from tightship.validators.text import mask_token, mask_word, padded

Logits = Callable[[np.ndarray, np.ndarray], np.ndarray]
Rows = Sequence[Sequence[int]]

NEW_TOKENS = 64
_BATCH_ELEMENTS = 1 << 25


@dataclass(frozen=True)
class Answers:
    """What a model said.

    Attributes:
        chosen, expected: (n,) int64 class numbers (token ids for hidden words).
        probabilities: (n, classes) float64; empty where there are too many classes to keep.
    """

    chosen: np.ndarray
    expected: np.ndarray
    probabilities: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray, expected: Sequence[int]) -> Answers:
        """From (n, classes) logits or log-likelihoods."""
        return cls(scores.argmax(-1), np.array(expected), np.exp(log_softmax(scores.astype(np.float64))))

    @property
    def classes(self) -> int:
        return int(self.probabilities.shape[-1])


@dataclass(frozen=True)
class Written:
    """What a model wrote, and what it should have: one text an example each."""

    texts: tuple[str, ...]
    references: tuple[str, ...]


def choose(examples: Sequence[Choice], checkpoint: Checkpoint, codec: Codec, logits: Logits) -> Answers:
    """Log-likelihood of each whole text, prompt and choice; what all texts of an example begin with cancels out."""
    if len({len(example.choices) for example in examples}) > 1:
        raise Malformed("all examples need the same number of choices")
    rows: list[list[int]] = []
    starts: list[int] = []
    for example in examples:
        texts = [[*codec.before, *codec.encode(example.prompt + choice)] for choice in example.choices]
        start = max(1, _shared_beginning(texts))  # a first token without context has no likelihood
        if min(map(len, texts)) <= start:
            raise Malformed(f"line {example.line}: a choice adds no token of its own to the prompt")
        rows += [_within_context(text, checkpoint, example.line) for text in texts]
        starts += [start] * len(texts)
    scores: list[float] = []
    for ids, mask, found in _run(rows, checkpoint, logits):
        logs = log_softmax(found.astype(np.float64))
        for row, length in enumerate(mask.sum(1)):
            places = np.arange(starts[len(scores)], length)
            scores.append(logs[row, places - 1, ids[row, places]].sum())
    return Answers.of(np.array(scores).reshape(len(examples), -1), [example.label for example in examples])


def classify(examples: Sequence[Labelled], checkpoint: Checkpoint, codec: Codec, logits: Logits) -> Answers:
    """A classifier's logits; labels by number, or by name through config.json's id2label."""
    rows = [_within_context([*codec.before, *codec.encode(e.text), *codec.after], checkpoint, e.line) for e in examples]
    scores = np.concatenate([found for _, _, found in _run(rows, checkpoint, logits)])
    names = {str(name): int(number) for number, name in (checkpoint.config.get("id2label") or {}).items()}
    expected = []
    for example in examples:
        label = names.get(example.label, -1) if isinstance(example.label, str) else example.label
        if not 0 <= label < scores.shape[-1]:
            known = ", ".join(names) or f"0 to {scores.shape[-1] - 1}"
            raise Malformed(f"line {example.line}: label {example.label!r} is not one of the model's: {known}")
        expected.append(label)
    return Answers.of(scores, expected)


def fill(examples: Sequence[Labelled], checkpoint: Checkpoint, codec: Codec, logits: Logits) -> Answers:
    """The likeliest token at the hidden word, and the token that the label would be in its place."""
    hider, word = mask_token(checkpoint), mask_word(checkpoint)
    if hider is None or word is None:
        raise Unsupported("the tokenizer has no mask token")
    rows: list[Sequence[int]] = []
    places: list[int] = []
    expected: list[int] = []
    for example in examples:
        ids = codec.encode(example.text)
        if ids.count(hider) != 1:
            raise Malformed(f"line {example.line}: the text needs {word} once, found {ids.count(hider)}")
        place = ids.index(hider)
        filled = codec.encode(example.text.replace(word, str(example.label)))
        if len(filled) != len(ids) or [*filled[:place], hider, *filled[place + 1 :]] != ids:
            raise Malformed(f"line {example.line}: {example.label!r} is not a single token in this text")
        expected.append(filled[place])
        places.append(len(codec.before) + place)
        rows.append(_within_context([*codec.before, *ids, *codec.after], checkpoint, example.line))
    chosen: list[int] = []
    for ids_, _, found in _run(rows, checkpoint, logits):
        chosen += [int(found[row, places[len(chosen) + row]].argmax()) for row in range(len(ids_))]
    return Answers(np.array(chosen), np.array(expected), np.empty((len(chosen), 0)))


def write(examples: Sequence[Writing], checkpoint: Checkpoint, codec: Codec, logits: Logits) -> Written:
    """Greedy continuations: up to NEW_TOKENS tokens or an end token; the first line where no reference has two."""
    ends = _end_tokens(checkpoint)
    rows = [_within_context([*codec.before, *codec.encode(e.prompt)], checkpoint, e.line) for e in examples]
    lengths = [len(row) for row in rows]
    if not min(lengths):
        raise Malformed("an empty prompt, and the tokenizer has no token that begins a text")
    texts = [list(row) for row in rows]
    context = _context(checkpoint)
    open_rows = list(range(len(texts)))
    for _ in range(NEW_TOKENS):
        open_rows = [r for r in open_rows if len(texts[r]) < context]
        if not open_rows:
            break
        following: list[int] = []
        for _, mask, found in _run([texts[r] for r in open_rows], checkpoint, logits):
            following += [int(found[row, length - 1].argmax()) for row, length in enumerate(mask.sum(1))]
        for row, token in zip(open_rows, following, strict=True):
            texts[row].append(token)
        open_rows = [r for r in open_rows if texts[r][-1] not in ends]
    written = [codec.decode(text[length:]).strip() for text, length in zip(texts, lengths, strict=True)]
    references = tuple(example.reference for example in examples)
    if not any("\n" in reference.strip() for reference in references):
        written = [text.partition("\n")[0] for text in written]
    return Written(tuple(written), references)


def _run(rows: Rows, checkpoint: Checkpoint, logits: Logits) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Ids, mask and logits of a few rows at a time: at most about 128 MB of logits."""
    longest = max(map(len, rows))
    step = max(1, _BATCH_ELEMENTS // (longest * int(checkpoint.hyper["vocab"])))
    for first in range(0, len(rows), step):
        ids, mask = padded(rows[first : first + step], pad=0)
        found = logits(ids, mask)
        if not np.isfinite(found).all():
            raise GateFailed("the model answers an example with NaN or Inf")
        yield ids, mask, found


def _shared_beginning(texts: Rows) -> int:
    """How many tokens all texts begin with."""
    for place, tokens in enumerate(zip(*texts, strict=False)):
        if len(set(tokens)) > 1:
            return place
    return min(map(len, texts))


def _context(checkpoint: Checkpoint) -> int:
    return int(checkpoint.hyper["context"])


def _within_context(row: Sequence[int], checkpoint: Checkpoint, line: int) -> list[int]:
    if len(row) > _context(checkpoint):
        raise Malformed(f"line {line}: {len(row)} tokens, the model reads {_context(checkpoint)}")
    return list(row)


def _end_tokens(checkpoint: Checkpoint) -> set[int]:
    """End-of-text ids of config.json and generation_config.json."""
    generation = json.loads(checkpoint.files.get("generation_config.json", b"{}"))
    found: set[int] = set()
    for value in (checkpoint.config.get("eos_token_id"), generation.get("eos_token_id")):
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return found
