"""The tokens that a proof is made on: a user's text, text that the model writes itself, shipped sentences, or noise.

Decoders predict the token that follows; masked language models predict tokens that `[MASK]` hides; other encoders
predict nothing, and their outputs are compared as they are. A decoder behind an encoder predicts what the original
wrote to the same source, token by token, whatever the artifact would have written (teacher forcing).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported
from tightship.exporters.onnx_candidates.skeleton import SEQ2SEQ
from tightship.modelview import ModelView, shifted
from tightship.texts import codec_of, generated_targets, generated_windows, read_documents, token_windows

Origin = Literal["file", "shipped", "self", "random"]

_PIXEL_AXES = 4
WINDOWS = 8
LENGTH = 128
_HIDE_EVERY = 7
_ORIGINS = {
    "file": "the given text",
    "shipped": "sentences that come with tightship",
    "self": "self-generated: text that the original wrote, sampled at temperature 1",
    "random": "random tokens: there is no tokenizer, and the model does not write",
}

_TARGETS = {True: "which the original wrote to it, sampled at temperature 1", False: "the source once more"}


@dataclass(frozen=True)
class TextWindows:
    """Token windows of one length.

    Attributes:
        ids: (n, length) int64, what the models see; or images (n, channels, height, width) float32, length 1.
        mask: (n, length) int64, 1 where a token is real and 0 where it pads on the right.
        origin: where the tokens come from.
        targets: (n, length) int64, the token to be predicted at each position, -1 where there is none.
        scored: (n, length) bool, where outputs are compared for loss: all real tokens, but only the hidden ones of a
            masked language model, since the rest it has to copy.
        decoder_ids: (n, length) int64, what the decoder behind an encoder is given: its start token, then text that the
            original wrote to the source, or the source itself. `targets` and `scored` are then this text's. None for
            models of one stack.
    """

    ids: np.ndarray
    mask: np.ndarray
    origin: Origin
    targets: np.ndarray = field(repr=False)
    scored: np.ndarray = field(repr=False)
    decoder_ids: np.ndarray | None = field(default=None, repr=False)

    @property
    def real(self) -> np.ndarray:
        """(n, length) bool: positions whose outputs mean something."""
        return self.mask.astype(bool) if self.decoder_ids is None else self.scored

    def feeds(self, rows: slice) -> dict[str, np.ndarray]:
        """The named inputs of some windows, as runtimes take them."""
        if self.ids.ndim == _PIXEL_AXES:
            return {"pixel_values": self.ids[rows]}
        target = {} if self.decoder_ids is None else {"decoder_input_ids": self.decoder_ids[rows]}
        return {"input_ids": self.ids[rows], "attention_mask": self.mask[rows], **target}

    @property
    def shipped(self) -> bool:
        return self.origin == "shipped"

    @property
    def has_real_text(self) -> bool:
        """Somebody else than the model wrote it: perplexities mean something."""
        return self.decoder_ids is None and self.origin in ("file", "shipped")

    @property
    def note(self) -> str:
        """One phrase for the report."""
        if self.ids.ndim == _PIXEL_AXES:
            return f"{len(self.ids)} images of random pixels"
        found = f"{int(self.mask.sum())} tokens in {len(self.ids)} windows, {_ORIGINS[self.origin]}"
        if self.decoder_ids is None:
            return found
        return f"{found}; {int(self.scored.sum())} tokens of a target, {_TARGETS[bool((self.targets >= 0).any())]}"


def proof_windows(
    view: ModelView,
    *,
    text: str | Path | None = None,
    windows: int = WINDOWS,
    length: int = LENGTH,
    seed: int = 0,
    write: bool = True,
) -> TextWindows:
    """Windows for a proof.

    Args:
        view: the original. Only self-generation runs it.
        text: a user's file (`.txt`, or `.jsonl` with `text` or `messages`); None for what the model's task allows.
        windows, length: at most so many, each at most so long and no longer than the model's context.
        seed: of self-generated and random tokens.
        write: whether a decoder may write its own text, a pass over all its weights for each token; otherwise it
            reads the shipped sentences.

    Raises:
        UsageError, Malformed: the text file is missing, empty, not UTF-8, or too short.
        Unsupported: a text file is given, and the checkpoint has no tokenizer.
    """
    checkpoint = view.checkpoint
    if checkpoint.architecture.task == "image-classification":
        return random_images(checkpoint, windows=windows, seed=seed)
    length = min(length, int(checkpoint.hyper.get("context", length)))
    found = _read(view, text, write=write, windows=windows, length=length, seed=seed)
    if checkpoint.architecture.task != SEQ2SEQ:
        return found
    return _with_targets(view, found, seed) if write else _repeating(view, found)


def _read(
    view: ModelView, text: str | Path | None, *, write: bool, windows: int, length: int, seed: int
) -> TextWindows:
    """What the model is shown, an encoder as well as a decoder."""
    checkpoint = view.checkpoint
    decoder = checkpoint.architecture.task == "text-generation"
    tokens = windows * length
    origin: Origin = "shipped"
    if text is not None:
        rows, origin = (
            list(token_windows(checkpoint, read_documents(text, checkpoint), tokens=tokens, sequence=length)),
            "file",
        )
    elif decoder and write:
        rows, origin = list(generated_windows(view, tokens=tokens, sequence=length, seed=seed)), "self"
    elif not _has_tokenizer(checkpoint):
        return random_windows(checkpoint, windows=windows, length=length, seed=seed)
    elif decoder:
        rows = list(token_windows(checkpoint, [" ".join(_sentences())], tokens=tokens, sequence=length))
    else:
        rows = _shipped(checkpoint, windows, length)
    return _windows(checkpoint, _full(rows) if decoder else rows, origin)


def _with_targets(view: ModelView, source: TextWindows, seed: int) -> TextWindows:
    """What the original writes to the source is the target; what follows its end is not compared."""
    ids = generated_targets(view, source.ids, source.mask, seed=seed)
    ends = view.checkpoint.config.get("eos_token_id")
    ended = np.isin(ids, np.atleast_1d(np.asarray(-1 if ends is None else ends, np.int64)))
    ended[:, 0] = False  # BART's start token is its end token
    real = ~np.maximum.accumulate(ended, axis=1)
    return replace(source, decoder_ids=ids, targets=next_tokens(ids, np.ones_like(ids)), scored=real)


def _repeating(view: ModelView, source: TextWindows) -> TextWindows:
    """The source is the target, too."""
    ids = shifted(source.ids, view.checkpoint.config)
    return replace(source, decoder_ids=ids, targets=np.full_like(ids, -1), scored=source.mask == 1)


def _full(rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Those as long as the first. Padding only adds work where nothing has to be padded."""
    return [row for row in rows if len(row) == len(rows[0])]


def random_windows(
    checkpoint: Checkpoint, *, windows: int = WINDOWS, length: int = LENGTH, seed: int = 0
) -> TextWindows:
    """Uniformly drawn token ids: for fidelity, and for loss only where there is nothing better."""
    length = min(length, int(checkpoint.hyper.get("context", length)))
    ids = np.random.default_rng(seed).integers(0, int(checkpoint.hyper["vocab"]), (windows, length))
    return _windows(checkpoint, list(ids), "random")


def random_images(checkpoint: Checkpoint, *, windows: int = WINDOWS, seed: int = 0) -> TextWindows:
    """Images of normal noise, normalized as processors leave theirs."""
    hyper = checkpoint.hyper
    shape = (windows, int(hyper["channels"]), int(hyper["image"]), int(hyper["image"]))
    pixels = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    single = np.ones((windows, 1), np.int64)
    return TextWindows(pixels, single, "random", -single, single == 1)


def next_tokens(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(n, length) int64: the token after each position, -1 at the last and before padding."""
    following = np.full(ids.shape, -1, np.int64)
    following[:, :-1] = np.where(mask[:, 1:] == 1, ids[:, 1:], -1)
    return following


def _windows(checkpoint: Checkpoint, rows: Sequence[np.ndarray], origin: Origin) -> TextWindows:
    ids, mask = padded(rows, max(0, int(checkpoint.config.get("pad_token_id") or 0)))
    real = mask == 1
    if checkpoint.architecture.task == "text-generation":
        return TextWindows(ids, mask, origin, next_tokens(ids, mask), real)
    hider = mask_token(checkpoint) if checkpoint.architecture.task == "fill-mask" else None
    hidden = np.zeros(ids.shape, bool)
    if hider is not None:
        hidden[:, _HIDE_EVERY // 2 :: _HIDE_EVERY] = True
        hidden &= real & ~np.isin(ids, list(_special_tokens(checkpoint).values()))
        real = hidden
    return TextWindows(np.where(hidden, hider or 0, ids), mask, origin, np.where(hidden, ids, -1), real)


def padded(rows: Sequence[np.ndarray | Sequence[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different lengths side by side, padded on the right: ids and mask, (n, longest) int64."""
    longest = max(len(row) for row in rows)
    ids = np.full((len(rows), longest), pad, np.int64)
    mask = np.zeros((len(rows), longest), np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return ids, mask


def mask_word(checkpoint: Checkpoint) -> str | None:
    """The token that hides others as it is written in a text, as tokenizer_config.json says; None without one."""
    word = _json(checkpoint, "tokenizer_config.json").get("mask_token")
    return word.get("content") if isinstance(word, dict) else word


def mask_token(checkpoint: Checkpoint) -> int | None:
    """Its id, as tokenizer.json says."""
    return _special_tokens(checkpoint).get(mask_word(checkpoint))


def _special_tokens(checkpoint: Checkpoint) -> dict[str | None, int]:
    added = _json(checkpoint, "tokenizer.json").get("added_tokens", [])
    return {token["content"]: int(token["id"]) for token in added if token.get("special")}


def _sentences() -> list[str]:
    return list(json.loads((resources.files("tightship.validators") / "sentences.json").read_text(encoding="utf-8")))


def _shipped(checkpoint: Checkpoint, windows: int, length: int) -> list[np.ndarray]:
    """The shipped sentences, one to three in a window, so that windows differ in length."""
    sentences = _sentences()
    codec = codec_of(checkpoint)
    rows = []
    for index in range(windows):
        chosen = [sentences[(2 * index + k) % len(sentences)] for k in range(1 + index % 3)]
        body = codec.encode(" ".join(chosen))[: length - len(codec.before) - len(codec.after)]
        rows.append(np.array([*codec.before, *body, *codec.after], np.int64))
    return rows


def _has_tokenizer(checkpoint: Checkpoint) -> bool:
    try:
        codec_of(checkpoint)
    except Unsupported:
        return False
    return True


def _json(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    data = json.loads(checkpoint.files.get(name, b"{}"))
    return data if isinstance(data, dict) else {}
