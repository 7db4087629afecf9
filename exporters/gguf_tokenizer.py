"""The tokenizer of a checkpoint as GGUF metadata, read from the structure of tokenizer.json.

llama.cpp has its own tokenizers and is told which one by `tokenizer.ggml.model`:

| model  | kind                                     | module                |
|--------|------------------------------------------|-----------------------|
| gpt2   | byte-level BPE                           | gguf_vocab_bpe        |
| llama  | BPE over characters with byte fallback   | gguf_vocab_spm        |
| t5     | unigram                                  | gguf_vocab_unigram    |
| bert   | WordPiece                                | gguf_vocab_wordpiece  |

Every optional key is written, since the loader's defaults differ from model to model. What the loader cannot say is
Unsupported where it changes ordinary text, and a note where it changes only text around a few special tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tightship.checkpoint import Checkpoint
from tightship.errors import Malformed, Unsupported
from tightship.formats.gguf_file import Field
from tightship.untrusted import strict_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True)
class TokenizerFiles:
    """What the checkpoint says about its tokenizer.

    Attributes:
        table: tokenizer.json.
        settings: tokenizer_config.json.
        config: config.json, asked where the two above are silent.
        generation: generation_config.json.
        rows: rows of the embedding; the token list is padded to it.
    """

    table: Mapping[str, Any]
    settings: Mapping[str, Any]
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    rows: int

    @cached_property
    def added(self) -> dict[int, Mapping[str, Any]]:
        """Added tokens by id."""
        return {int(token["id"]): token for token in self.table.get("added_tokens") or ()}

    @cached_property
    def ids(self) -> dict[str, int]:
        """Every token's id by its text, added tokens included."""
        model = self.table["model"]
        vocab = model["vocab"]
        pairs = vocab if isinstance(vocab, Mapping) else {piece: i for i, (piece, _) in enumerate(vocab)}
        return dict(pairs) | {token["content"]: i for i, token in self.added.items()}

    @cached_property
    def texts(self) -> dict[int, str]:
        """Every token's text by its id.

        Raises:
            Malformed: an id outside the embedding, or two texts for one id.
        """
        found: dict[int, str] = {}
        for text, number in self.ids.items():
            if number in found or not 0 <= number < self.rows:
                why = "is taken twice" if number in found else f"lies outside the embedding of {self.rows} rows"
                raise Malformed(f"tokenizer.json: id {number} of token {text!r} {why}")
            found[number] = text
        return found

    def special(self, kind: str) -> int | None:
        """Id of the `bos`, `eos`, ... token: tokenizer_config.json first, config.json second.

        Raises:
            Malformed: it names a token that the vocabulary lacks.
        """
        named = self.settings.get(f"{kind}_token")
        text = named.get("content") if isinstance(named, Mapping) else named
        if text is not None:
            if text not in self.ids:
                raise Malformed(f"tokenizer_config.json: {kind}_token {text!r} is not in the vocabulary")
            return self.ids[text]
        number = self.config.get(f"{kind}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        return number if isinstance(number, int) and 0 <= number < self.rows else None


@dataclass
class Vocabulary:
    """What one kind of tokenizer contributes: the model's name, tokens, types and keys of its own."""

    model: str
    tokens: list[str]
    types: list[int]
    fields: dict[str, Field] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def tokenizer_fields(checkpoint: Checkpoint) -> tuple[dict[str, Field], list[str]]:
    """Metadata of the tokenizer in a fixed order, and notes for the user.

    Raises:
        Unsupported: no tokenizer.json, or a structure that llama.cpp has no twin of; the message shows it.
        Malformed: the tokenizer's files contradict each other or the embedding.
    """
    files = read_files(checkpoint)
    vocabulary = _vocabulary(files)
    pad(vocabulary, files.rows)
    notes = vocabulary.notes + _added_token_notes(files)
    fields = {
        "tokenizer.ggml.model": Field("str", vocabulary.model),
        "tokenizer.ggml.tokens": Field("[str]", vocabulary.tokens),
        "tokenizer.ggml.token_type": Field("[i32]", vocabulary.types),
        **vocabulary.fields,
        **_special_ids(files, vocabulary.model),
        **_chat_templates(checkpoint.files, files.settings),
    }
    return fields, notes


def read_files(checkpoint: Checkpoint) -> TokenizerFiles:
    """Parse what is there.

    Raises:
        Unsupported: there is no tokenizer.json.
    """
    if "tokenizer.json" not in checkpoint.files:
        raise Unsupported(
            "GGUF needs a tokenizer, and the checkpoint has no tokenizer.json",
            hint="save the tokenizer next to the model with transformers' save_pretrained",
        )

    def parsed(name: str) -> Any:
        return strict_json(checkpoint.files[name], name) if name in checkpoint.files else {}

    table = parsed("tokenizer.json")
    if not isinstance(table.get("model"), Mapping) or "vocab" not in table["model"]:
        raise Malformed("tokenizer.json has no model.vocab")
    return TokenizerFiles(
        table,
        parsed("tokenizer_config.json"),
        checkpoint.config,
        parsed("generation_config.json"),
        int(checkpoint.hyper["vocab"]),
    )


def _vocabulary(files: TokenizerFiles) -> Vocabulary:
    from tightship.exporters import gguf_vocab_bpe, gguf_vocab_spm, gguf_vocab_unigram, gguf_vocab_wordpiece

    model = files.table["model"]
    kind = model.get("type") or ("BPE" if "merges" in model else None)
    if kind == "WordPiece":
        return gguf_vocab_wordpiece.vocabulary(files)
    if kind == "BPE":
        return (gguf_vocab_spm if model.get("byte_fallback") else gguf_vocab_bpe).vocabulary(files)
    if kind == "Unigram":
        return gguf_vocab_unigram.vocabulary(files)
    raise Unsupported(
        f"tokenizer model {kind!r} has no mapping to llama.cpp", hint="BPE, WordPiece and Unigram tokenizers are mapped"
    )


def token_types(files: TokenizerFiles) -> list[int]:
    """Type of each id that has a text: added tokens are CONTROL where special, else USER_DEFINED."""
    types = [NORMAL] * (max(files.texts) + 1)
    for number, token in files.added.items():
        types[number] = CONTROL if token.get("special") else USER_DEFINED
    return types


def token_list(files: TokenizerFiles) -> list[str | None]:
    """Text of each id up to the largest, None in holes."""
    return [files.texts.get(i) for i in range(max(files.texts) + 1)]


def pad(vocabulary: Vocabulary, rows: int) -> None:
    """Fill holes and the rows after the last token with unused tokens of unique text, as the loader demands."""
    taken = set(vocabulary.tokens)
    vocabulary.tokens += [""] * (rows - len(vocabulary.tokens))
    vocabulary.types += [UNUSED] * (rows - len(vocabulary.types))
    for i, text in enumerate(vocabulary.tokens):
        if text == "":
            name = f"[PAD{i}]"
            while name in taken:
                name = f"[{name}]"
            taken.add(name)
            vocabulary.tokens[i], vocabulary.types[i] = name, UNUSED
    if len(set(vocabulary.tokens)) != rows:
        twice = next(t for t in vocabulary.tokens if vocabulary.tokens.count(t) > 1)
        raise Unsupported(f"two tokens would both be written as {twice!r}, which llama.cpp refuses")


def require(found: Any, allowed: tuple[Any, ...], what: str) -> None:
    """Refuse a setting of tokenizer.json that llama.cpp has no twin of.

    Raises:
        Unsupported: naming the setting and what was found.
    """
    if found not in allowed:
        raise Unsupported(f"tokenizer.json: {what} is {found!r}, and llama.cpp only does {allowed[0]!r}")


def adds(files: TokenizerFiles) -> tuple[bool, bool]:
    """Whether encoding puts the bos token in front and the eos token at the end.

    Flags in tokenizer_config.json win, as in transformers; else the post-processor's template speaks.

    Raises:
        Unsupported: the template adds anything else.
    """
    if "add_bos_token" in files.settings or "add_eos_token" in files.settings:
        flags = (files.settings.get("add_bos_token"), files.settings.get("add_eos_token"))
        return bool(flags[0]) and files.special("bos") is not None, bool(flags[1]) and files.special("eos") is not None
    before, after = template(files.table.get("post_processor"))
    number = files.ids.get
    if [number(t) for t in before] not in ([], [files.special("bos")]):
        raise Unsupported(f"the tokenizer puts {before} in front of a text, and llama.cpp only the bos token")
    if [number(t) for t in after] not in ([], [files.special("eos")]):
        raise Unsupported(f"the tokenizer puts {after} behind a text, and llama.cpp only the eos token")
    return bool(before), bool(after)


def template(processor: Mapping[str, Any] | None) -> tuple[list[str], list[str]]:
    """Special tokens that a post-processor puts before and after a single text.

    Raises:
        Unsupported: an unknown kind of post-processor.
    """
    if processor is None:
        return [], []
    kind = processor["type"]
    if kind == "Sequence":
        parts = [template(p) for p in processor["processors"]]
        return [t for before, _ in parts for t in before], [t for _, after in parts for t in after]
    if kind in ("ByteLevel",):
        return [], []
    if kind in ("BertProcessing", "RobertaProcessing"):
        return [processor["cls"][0]], [processor["sep"][0]]
    if kind != "TemplateProcessing":
        raise Unsupported(f"tokenizer.json: post-processor {kind!r} is not mapped to llama.cpp")
    words = [next(iter(piece.items())) for piece in processor["single"]]
    text = next((i for i, (what, _) in enumerate(words) if what == "Sequence"), len(words))
    names = [body["id"] for _, body in words]
    return names[:text], names[text + 1 :]


def _special_ids(files: TokenizerFiles, model: str) -> dict[str, Field]:
    found = {kind: files.special(kind) for kind in _SPECIAL}
    if model == "bert":  # the loader says bos where BERT says cls
        found["bos"], found["eos"] = found["cls"], found["sep"]
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
    fields = {
        f"tokenizer.ggml.{name}_token_id": Field("u32", found[kind])
        for kind, name in names.items()
        if found[kind] is not None
    }
    ends = files.generation.get("eos_token_id")
    others = [i for i in ends if i != found["eos"] and i < files.rows] if isinstance(ends, list) else []
    if others:
        fields["tokenizer.ggml.eot_token_id"] = Field("u32", others[0])
    return fields


def _chat_templates(files: Mapping[str, bytes], settings: Mapping[str, Any]) -> dict[str, Field]:
    """Templates as transformers chooses them: .jinja files before tokenizer_config.json; named ones sorted."""
    found: dict[str, str] = {}
    for name, data in files.items():
        if name == "chat_template.jinja":
            found["default"] = data.decode("utf-8")
        elif name.startswith("additional_chat_templates/") and name.endswith(".jinja"):
            found[name.split("/")[-1].removesuffix(".jinja")] = data.decode("utf-8")
    if not found:
        given = settings.get("chat_template")
        if isinstance(given, list):
            found = {entry["name"]: entry["template"] for entry in given}
        elif isinstance(given, str):
            found = {"default": given}
    fields = {}
    if "default" in found:
        fields["tokenizer.chat_template"] = Field("str", found.pop("default"))
    for name in sorted(found):
        fields[f"tokenizer.chat_template.{name}"] = Field("str", found[name])
    if found:
        fields["tokenizer.chat_templates"] = Field("[str]", sorted(found))
    return fields


def _added_token_notes(files: TokenizerFiles) -> list[str]:
    notes = []
    for flag, what in (("lstrip", "left"), ("rstrip", "right")):
        names = [t["content"] for t in files.added.values() if t.get(flag)]
        if names:
            notes.append(
                f"{', '.join(names[:4])}{' ...' if len(names) > 4 else ''}: transformers strips white space on the "
                f"{what} of these tokens, llama.cpp does not"
            )
    whole = [t["content"] for t in files.added.values() if t.get("single_word")]
    if whole:
        notes.append(f"{', '.join(whole[:4])}: found inside words by llama.cpp, by transformers only as words")
    return notes
