"""From text to windows of tokens, for calibration and for proofs.

A *document* is a string; documents are never run together. A *window* is a 1-D int64 array of token ids, wrapped in
the special tokens that the tokenizer itself puts around a text (`<s>`, `[CLS] ... [SEP]`).
"""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.errors import Malformed, Unsupported, UsageError
from tightship.modelview import ModelView, start_token

SHORTEST = 8  # a shorter rest of a document says little; it is left out
_ROWS_AT_ONCE = 16
_VOCABULARIES = ("tokenizer.json", "vocab*", "*.model", "*.model.v*")


def read_documents(path: str | Path, checkpoint: Checkpoint | None = None) -> tuple[str, ...]:
    """Documents of a UTF-8 file: every line's `text` or `messages` for `.jsonl`, else the file as one document.

    Messages go through the chat template of `checkpoint`.

    Raises:
        UsageError: no such file.
        Malformed: not UTF-8, or a line of JSON with neither; or nothing but white space.
        Unsupported: messages, and the checkpoint (or there is none) has no chat template.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"text file {file} does not exist")
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Malformed(f"{file.name} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    documents = _json_lines(file.name, content, checkpoint) if file.suffix == ".jsonl" else [content]
    found = tuple(d for d in documents if d.strip())
    if not found:
        raise Malformed(f"{file.name} holds no text")
    return found


def _json_lines(name: str, content: str, checkpoint: Checkpoint | None) -> list[str]:
    documents = []
    render = None
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            text, messages = entry.get("text"), entry.get("messages")
        except (ValueError, AttributeError) as error:
            raise Malformed(f"{name}, line {number}: not a JSON object") from error
        if text is None and isinstance(messages, list):
            render = render or _renderer(name, checkpoint)
            text = render(messages)
        if not isinstance(text, str):
            raise Malformed(
                f"{name}, line {number}: needs a string under `text` or a list under `messages`, "
                f"found {', '.join(entry) or 'nothing'}"
            )
        documents.append(text)
    return documents


def _renderer(name: str, checkpoint: Checkpoint | None) -> Callable[[list[Any]], str]:
    if checkpoint is None:
        raise Unsupported(f"{name} holds `messages`, and here is no model whose chat template could be applied")
    from tightship.chat import chat_renderer

    return chat_renderer(checkpoint)


def token_windows(
    checkpoint: Checkpoint, documents: Iterable[str], *, tokens: int, sequence: int
) -> tuple[np.ndarray, ...]:
    """Windows of at most `sequence` tokens (and the model's context), in document order, `tokens` in all at most.

    Raises:
        Unsupported: the checkpoint has no tokenizer that can be read.
        Malformed: the documents hold no window of at least 8 tokens, or the tokenizer gives ids that the model lacks.
    """
    codec = codec_of(checkpoint)
    encode, before, after = codec.encode, codec.before, codec.after
    length = min(sequence, int(checkpoint.hyper.get("context", sequence)))
    room = length - len(before) - len(after)
    windows: list[np.ndarray] = []
    left = tokens
    for document in documents:
        ids = encode(document)
        for start in range(0, len(ids), room):
            piece = ids[start : start + min(room, left - len(before) - len(after))]
            if len(piece) < SHORTEST:
                break
            windows.append(np.array([*before, *piece, *after], np.int64))
            left -= len(windows[-1])
        if left < SHORTEST + len(before) + len(after):
            break
    if not windows:
        raise Malformed(f"the text has no document of at least {SHORTEST} tokens", hint="give a longer text")
    vocabulary, highest = int(checkpoint.hyper["vocab"]), max(int(ids.max()) for ids in windows)
    if highest >= vocabulary:
        raise Malformed(
            f"the tokenizer gives token {highest}, the model's embedding has {vocabulary} rows",
            hint="the tokenizer belongs to another model, or lost its added tokens' rows",
        )
    return tuple(windows)


def generated_windows(view: ModelView, *, tokens: int, sequence: int, seed: int) -> tuple[np.ndarray, ...]:
    """Text that the model makes: sampled at temperature 1 from its beginning-of-text token, as ids.

    Raises:
        Unsupported: not a text-generation model.
        Malformed: its beginning-of-text token is no token.
    """
    checkpoint = view.checkpoint
    if checkpoint.architecture.task != "text-generation":
        raise Unsupported(
            f"a {checkpoint.architecture.family} model ({checkpoint.architecture.task}) cannot write its own text",
            hint="give a text file",
        )
    length = min(sequence, tokens, int(checkpoint.hyper.get("context", sequence)))
    rng = np.random.default_rng(seed)
    rows = max(1, tokens // length)
    vocabulary = int(checkpoint.hyper["vocab"])
    first = _first_token(checkpoint, vocabulary)
    starts = rng.integers(0, vocabulary, rows) if first is None else np.full(rows, int(first))
    parts = [_sample(view, starts[i : i + _ROWS_AT_ONCE], length, rng) for i in range(0, rows, _ROWS_AT_ONCE)]
    return tuple(np.concatenate(parts))


def _first_token(checkpoint: Checkpoint, vocabulary: int) -> int | None:
    said = checkpoint.config.get("bos_token_id")
    first = said[0] if isinstance(said, list) and said else said
    if first is None or (isinstance(first, int) and 0 <= first < vocabulary):
        return first
    raise Malformed(
        f"config.json: bos_token_id is {said!r}, the vocabulary has {vocabulary} tokens",
        hint="give the token that texts begin with, or null; or a text file",
    )


def generated_targets(view: ModelView, ids: np.ndarray, mask: np.ndarray, *, seed: int) -> np.ndarray:
    """(rows, length) int64: what a model of two stacks writes to sources `ids`, after the token it starts with.

    Args:
        ids, mask: (rows, length) int64, sources and where they are not padding; what is written is as long.
    """
    rng = np.random.default_rng(seed)
    start = start_token(view.checkpoint.config)
    parts = []
    for row in range(0, len(ids), _ROWS_AT_ONCE):
        source = (ids[row : row + _ROWS_AT_ONCE], mask[row : row + _ROWS_AT_ONCE])
        parts.append(_sample(view, np.full(len(source[0]), start), ids.shape[1], rng, source))
    return np.concatenate(parts)


def _sample(
    view: ModelView,
    starts: np.ndarray,
    length: int,
    rng: np.random.Generator,
    source: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """(rows, length) int64. Probabilities and sums are float64, so that a draw does not hang on float32 noise."""
    import torch

    module = view.module()
    past = "cache_params" if "cache_params" in inspect.signature(module.forward).parameters else "past_key_values"
    ids = np.asarray(starts, np.int64).reshape(-1, 1)
    cache: Any = None
    with view.computing():
        behind = _encoded(view, module, *source) if source else {}
        while ids.shape[1] < length:
            read = torch.from_numpy(ids if cache is None else ids[:, -1:]).to(view.device)
            given = {"decoder_input_ids": read, **behind} if behind else {"input_ids": read}
            found = module(**given, use_cache=True, **{past: cache})
            cache = found.get(past)
            logits = found.logits[:, -1].double().cpu().numpy()
            weights = np.cumsum(np.exp(logits - logits.max(axis=1, keepdims=True)), axis=1)
            draws = rng.random(len(ids)) * weights[:, -1]
            chosen = [np.searchsorted(row, draw, side="right") for row, draw in zip(weights, draws, strict=True)]
            following = np.minimum(chosen, weights.shape[1] - 1)
            ids = np.concatenate([ids, following[:, None].astype(np.int64)], axis=1)
    return ids


def _encoded(view: ModelView, module: Any, ids: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
    """What every step of a decoder is given of its source."""
    import torch

    read, seen = (torch.from_numpy(np.asarray(array, np.int64)).to(view.device) for array in (ids, mask))
    states = module.get_encoder()(input_ids=read, attention_mask=seen, return_dict=True)
    return {"encoder_outputs": states, "attention_mask": seen}


@dataclass(frozen=True)
class Codec:
    """A checkpoint's tokenizer: text to ids and back, without truncation or padding.

    Attributes:
        encode: text -> ids, without special tokens.
        decode: ids -> text, without special tokens.
        before, after: the special tokens that the tokenizer itself puts around a text.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    before: tuple[int, ...]
    after: tuple[int, ...]


def codec_of(checkpoint: Checkpoint) -> Codec:
    """The tokenizer among a checkpoint's small files.

    Raises:
        Unsupported: there is none that can be read, or it changes a text's tokens when it adds its special ones.
        Malformed: tokenizer.json is broken.
    """
    raw = checkpoint.files.get("tokenizer.json")
    if raw is not None:
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_buffer(raw)
        except ValueError as error:
            raise Malformed(f"tokenizer.json cannot be read: {str(error)[:200]}") from error
        tokenizer.no_padding()
        tokenizer.no_truncation()

        def encode(text: str, special: bool = False) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=special).ids)
    else:
        tokenizer = library_tokenizer(checkpoint)

        def encode(text: str, special: bool = False) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=special))

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    probe = "a"
    plain, wrapped = encode(probe), encode(probe, True)
    for start in range(len(wrapped) - len(plain) + 1):
        if wrapped[start : start + len(plain)] == plain:
            return Codec(encode, decode, tuple(wrapped[:start]), tuple(wrapped[start + len(plain) :]))
    raise Unsupported("the tokenizer changes a text's tokens when it adds its special ones")


def library_tokenizer(checkpoint: Checkpoint) -> Any:
    """transformers' tokenizer from a checkpoint's small files: for models without tokenizer.json, and for templates.

    Raises:
        Unsupported: there is none that can be read.
    """
    from transformers import AutoTokenizer

    # Without any vocabulary, transformers makes up an empty one and says nothing.
    if not any(fnmatch(name, pattern) for name in checkpoint.files for pattern in _VOCABULARIES):
        raise Unsupported(f"{checkpoint.name} has no tokenizer", hint="put tokenizer.json beside the weights")
    with tempfile.TemporaryDirectory() as folder:
        for name, data in checkpoint.files.items():
            target = Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        (Path(folder) / "config.json").write_text(json.dumps({"model_type": checkpoint.config.get("model_type")}))
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise Unsupported(
                f"{checkpoint.name} has no tokenizer that can be read: {str(error).splitlines()[0][:200]}",
                hint="put tokenizer.json beside the weights",
            ) from error
