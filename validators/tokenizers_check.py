"""Does the artifact cut text into the same ids? Metadata id by id, then real strings through both tokenizers."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from tightship.checkpoint import Checkpoint
from tightship.report import Check, judge, not_run
from tightship.validators.runtimes.child import Limits, RuntimeDied, RuntimeMissing, run_child
from tightship.validators.tokenizer_vocabulary import (
    UNUSED,
    WORD_START,
    Vocabulary,
    expected_vocabulary,
    read_gguf_vocabulary,
)

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip

_LONGEST_WORD = 100
# GGUF model -> strings that llama.cpp's own code cuts in another way, whatever a file says: reported, not judged.
LIMITS: Mapping[str, Mapping[str, Callable[[str, Vocabulary], bool]]] = {
    "bert": {
        "combining marks": lambda text, _: any(unicodedata.combining(c) for c in text),
        "Hangul": lambda text, _: any("HANGUL" in unicodedata.name(c, "") for c in text),
        "U+2581": lambda text, _: WORD_START in text,
        "words of more than 100 characters": lambda text, _: any(len(w) > _LONGEST_WORD for w in text.split()),
    },
    "llama": {
        "a space in front": lambda text, _: text[:1] in (" ", WORD_START),
        "special tokens in the text": lambda text, vocabulary: any(word in text for word in vocabulary.special),
    },
    "t5": {"U+2581 at the start of a word": lambda text, _: any(word[0] == WORD_START for word in text.split())},
}
_SHOWN = 60


def file_checks(checkpoint: Checkpoint, target: str, directory: Path) -> list[Check]:
    """Tokenizer files beside ONNX and safetensors must be the source's, byte for byte."""
    names = [name for name in FILES if name in checkpoint.files]
    if not names:
        return [_no_tokenizer(target)]
    wrong = [n for n in names if not _same_bytes(directory / n, checkpoint.files[n])]
    reason = f"{wrong[0]} is missing or differs from the source's" if wrong else None
    return [_count(target, "reader", "changed_files", len(wrong), reason, {"files": len(names)})]


def gguf_checks(
    checkpoint: Checkpoint, target: str, artifact: Path, texts: Sequence[str], limits: Limits
) -> list[Check]:
    """Vocabulary, merges and encodings of a GGUF file against the source's tokenizer.json.

    `texts` are encoded besides the shipped probe strings.
    """
    raw = checkpoint.files.get("tokenizer.json")
    if raw is None:
        if any(name in checkpoint.files for name in FILES):
            return [_not_run(target, "the source has no tokenizer.json to compare with")]
        return [_no_tokenizer(target)]
    source = json.loads(raw)
    stored = read_gguf_vocabulary(artifact)
    expected = expected_vocabulary(source, stored.model, len(stored.pieces))
    checks = list(_vocabulary_checks(target, expected, stored))
    strings = list(dict.fromkeys([*probe_strings(), *texts]))
    beyond = {text: limit for text in strings if (limit := limit_of(expected, text))}
    judged = [text for text in strings if text not in beyond]
    checks += encoding_checks(target, artifact, raw, judged, limits)
    return [*checks, *_limit_checks(target, artifact, raw, beyond, limits)]


def limit_of(vocabulary: Vocabulary, text: str) -> str | None:
    """Which limit of llama.cpp's tokenizer a text runs into, None if none."""
    limits = LIMITS.get(vocabulary.model, {})
    return next((name for name, applies in limits.items() if applies(text, vocabulary)), None)


def probe_strings() -> list[str]:
    """Strings of many scripts, whitespace, code, emoji and special tokens, as shipped."""
    groups = json.loads((resources.files("tightship.validators") / "probe_strings.json").read_text("utf-8"))
    return [text for group in groups.values() for text in group]


def encoding_checks(
    target: str, artifact: Path, tokenizer_json: bytes, texts: Sequence[str], limits: Limits
) -> list[Check]:
    """Ids of `texts` by tokenizers and by llama.cpp, with and without the special tokens that frame a text."""
    checks: list[Check] = []
    for framed in (True, False):
        metric = "encoding_mismatches" if framed else "encoding_mismatches_unframed"
        try:
            expected, found = _both(artifact, tokenizer_json, texts, framed, limits)
        except RuntimeMissing as error:
            return [*checks, _not_run(target, str(error), metric)]
        except RuntimeDied as error:
            return [*checks, _count(target, "llama.cpp", metric, None, str(error))]
        checks.append(_compare_ids(target, metric, texts, expected, found))
    return checks


def _both(
    artifact: Path, tokenizer_json: bytes, texts: Sequence[str], framed: bool, limits: Limits
) -> tuple[list[list[int]], list[list[int]]]:
    """Ids by tokenizers, and by llama.cpp."""
    from tokenizers import Tokenizer

    reference = Tokenizer.from_buffer(tokenizer_json)
    reference.no_truncation()
    reference.no_padding()
    where = {"artifact": str(artifact.parent), "main": artifact.name, "want": "tokenize", "texts": list(texts)}
    answer, _ = run_child("llama_cpp", {**where, "add_special": framed, "parse_special": True}, {}, limits=limits)
    encoded = reference.encode_batch(list(texts), add_special_tokens=framed)
    return [e.ids for e in encoded], answer["ids"]


def _limit_checks(
    target: str, artifact: Path, tokenizer_json: bytes, beyond: Mapping[str, str], limits: Limits
) -> Iterator[Check]:
    """One figure for the strings that llama.cpp cannot cut as the source does: for the user's eyes."""
    if not beyond:
        return
    try:
        expected, found = _both(artifact, tokenizer_json, list(beyond), True, limits)
    except (RuntimeMissing, RuntimeDied):  # the judged strings have said so already
        return
    hit = [limit for limit, want, got in zip(beyond.values(), expected, found, strict=True) if want != got]
    yield judge(
        target=target, runtime="llama.cpp", kind="tokenizer", metric="encoding_mismatches_by_its_limits",
        value=len(hit), extra={"strings": len(beyond), "limits": sorted(set(hit))},
    )  # fmt: skip


def _compare_ids(
    target: str, metric: str, texts: Sequence[str], expected: Sequence[list[int]], found: Sequence[list[int]]
) -> Check:
    pairs = zip(texts, expected, found, strict=True)
    wrong = [(text, want, got) for text, want, got in pairs if list(want) != list(got)]
    reason = None
    if wrong:
        text, want, got = wrong[0]
        at = next((i for i, (a, b) in enumerate(zip(want, got, strict=False)) if a != b), min(len(want), len(got)))
        start = max(at - 2, 0)
        reason = (
            f"{text[:_SHOWN]!r}: from token {start}, tokenizers says {want[start : at + 4]}, "
            f"llama.cpp {list(got[start : at + 4])}"
        )
    return _count(target, "llama.cpp", metric, len(wrong), reason, {"strings": len(texts)})


def _vocabulary_checks(target: str, expected: Vocabulary, stored: Vocabulary) -> Iterator[Check]:
    reasons = []
    if len(stored.types) != len(stored.pieces):
        reasons.append(f"{len(stored.pieces)} pieces but {len(stored.types)} token types")
    for index, (want, kind) in enumerate(zip(expected.pieces, expected.types, strict=True)):
        piece = stored.pieces[index]
        found = stored.types[index] if index < len(stored.types) else None
        if kind != UNUSED and piece != want:
            reasons.append(f"id {index}: tokenizer.json says {want!r}, the GGUF {piece!r}")
        elif found != kind:
            reasons.append(f"id {index} ({piece!r}): token type {found}, expected {kind}")
        elif expected.scores and index < len(expected.scores):
            score = stored.scores[index] if stored.scores else None
            if score is None or abs(score - expected.scores[index]) > 1e-6 * abs(expected.scores[index]):
                reasons.append(f"id {index} ({piece!r}): score {score}, expected {expected.scores[index]}")
    yield _count(target, "reader", "vocabulary_mismatches", len(reasons), next(iter(reasons), None))
    if expected.merges is not None:
        wrong = _list_differences(expected.merges, stored.merges or [])
        reason = f"merge of rank {wrong[0]} differs" if wrong else None
        yield _count(target, "reader", "merge_mismatches", len(wrong), reason, {"merges": len(expected.merges)})


def _list_differences(expected: Sequence[str], found: Sequence[str]) -> list[int]:
    shared = min(len(expected), len(found))
    wrong = [i for i in range(shared) if expected[i] != found[i]]
    return wrong + list(range(shared, max(len(expected), len(found))))


def _same_bytes(path: Path, expected: bytes) -> bool:
    return path.is_file() and path.read_bytes() == expected


def _no_tokenizer(target: str) -> Check:
    note = {"note": "the source has no tokenizer; the proof runs on random ids"}
    return judge(target=target, runtime="reader", kind="tokenizer", metric="tokenizer_files", value=0, extra=note)


def _not_run(target: str, reason: str, metric: str = "encoding_mismatches") -> Check:
    return not_run(target=target, runtime="llama.cpp", kind="tokenizer", metric=metric, reason=reason)


def _count(  # noqa: PLR0917 - a row of the report
    target: str, runtime: str, metric: str, value: int | None, reason: str | None, extra: dict[str, Any] | None = None
) -> Check:
    return judge(
        target=target, runtime=runtime, kind="tokenizer", metric=metric, value=value, op="==", threshold=0,
        source="contract", reason=reason, extra=extra,
    )  # fmt: skip
