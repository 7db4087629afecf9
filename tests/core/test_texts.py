"""Documents, windows, and text that a model makes, on the embedded demo checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from tightship.checkpoint import Checkpoint
from tightship.errors import Malformed, Unsupported, UsageError
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.texts import codec_of, generated_windows, read_documents, token_windows

EXAMPLES = Path(__file__).parents[2] / "examples"
EMBER = EXAMPLES / "ember"


@pytest.fixture(scope="module")
def ember() -> Checkpoint:
    return open_checkpoint(EMBER)


def test_documents_of_a_text_file_and_of_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"text": "one", "id": 1}\n\n{"text": "two"}\n')
    assert read_documents(tmp_path / "a.txt") == ("one\n\ntwo\n",)
    assert read_documents(tmp_path / "b.jsonl") == ("one", "two")


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.jsonl", b'{"text": 3}\n', Malformed),
        ("a.jsonl", b'["text"]\n', Malformed),
        ("a.txt", b"\xff\xfe", Malformed),
        ("a.txt", b" \n", Malformed),
        ("missing.txt", None, UsageError),
    ],
)
def test_bad_text_files(tmp_path: Path, name: str, content: bytes | None, error: type[Exception]) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error):
        read_documents(tmp_path / name)


def test_windows_are_the_tokenizers_ids_and_documents_stay_apart(ember: Checkpoint) -> None:
    texts = ["The quick brown fox jumps over the lazy dog. " * 20, "It was a dark and stormy night. " * 20]
    windows = token_windows(ember, texts, tokens=10_000, sequence=64)
    tokenizer = Tokenizer.from_file(str(EMBER / "tokenizer.json"))
    expected = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        pieces = [ids[i : i + 64] for i in range(0, len(ids), 64)]
        expected += [piece for piece in pieces if len(piece) >= 8]
    assert [w.tolist() for w in windows] == expected


def test_no_more_tokens_than_asked_for(ember: Checkpoint) -> None:
    windows = token_windows(ember, ["The quick brown fox jumps over the lazy dog. " * 50], tokens=150, sequence=64)
    assert [len(w) for w in windows] == [64, 64, 22]


def test_a_text_without_a_window_is_an_error(ember: Checkpoint) -> None:
    with pytest.raises(Malformed, match="8 tokens"):
        token_windows(ember, ["ab"], tokens=100, sequence=64)


def test_a_tokenizer_of_a_larger_vocabulary_is_named(ember: Checkpoint) -> None:
    narrow = ember.replace(config={**ember.config, "vocab_size": 300})  # what it was made with: 1024
    with pytest.raises(Malformed, match="embedding has 300 rows"):
        token_windows(narrow, ["The quick brown fox jumps over the lazy dog. " * 4], tokens=64, sequence=32)


def test_no_tokenizer_is_unsupported(ember: Checkpoint) -> None:
    with pytest.raises(Unsupported, match="tokenizer"):
        token_windows(ember.replace(files={}), ["some text"], tokens=100, sequence=64)


def test_generated_text_follows_the_model_and_the_seed(ember: Checkpoint) -> None:
    view = ModelView(ember, threads=1)
    windows = generated_windows(view, tokens=32 * 48, sequence=48, seed=3)
    again = generated_windows(view, tokens=32 * 48, sequence=48, seed=3)
    other = generated_windows(view, tokens=32 * 48, sequence=48, seed=4)
    np.testing.assert_array_equal(windows, again)
    assert not np.array_equal(windows, other)
    assert {len(w) for w in windows} == {48}
    assert {int(w[0]) for w in windows} == {ember.config["bos_token_id"]}
    # Sampled from the model itself, the mean surprise must be near the model's own entropy; chance would be log(1024).
    logits = view.outputs(np.stack(windows))["logits"][:, :-1].astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    surprise = -np.take_along_axis(log_p, np.stack(windows)[:, 1:, None], axis=-1)[..., 0]
    entropy = -(np.exp(log_p) * log_p).sum(axis=-1)
    spread = (surprise - entropy).std() / np.sqrt(surprise.size)
    assert abs((surprise - entropy).mean()) < 5 * spread


@pytest.mark.parametrize("first", [1024, 128000, -1, "<s>", []])
def test_a_first_token_that_is_no_token_is_named(ember: Checkpoint, first: object) -> None:
    broken = ember.replace(config={**ember.config, "bos_token_id": first})
    with pytest.raises(Malformed, match="bos_token_id"):
        generated_windows(ModelView(broken, threads=1), tokens=16, sequence=8, seed=0)


TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
TALK = [{"role": "user", "content": "Where is the ship?"}, {"role": "assistant", "content": "In the bay."}]


def _with_template(checkpoint: Checkpoint, template: str) -> Checkpoint:
    return checkpoint.replace(files={**checkpoint.files, "chat_template.jinja": template.encode()})


def _jsonl(folder: Path, *lines: object) -> Path:
    path = folder / "talks.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def test_conversations_go_through_the_chat_template(tmp_path: Path) -> None:
    """By hand; the bert tokenizer puts [CLS] in front by itself, so the template's own is left out."""
    bert = open_checkpoint(EXAMPLES / "ember-bert")
    settings = json.dumps({"bos_token": "[CLS]", "eos_token": "[SEP]"}).encode()
    speaking = _with_template(bert.replace(files={**bert.files, "tokenizer_config.json": settings}), TEMPLATE)
    path = _jsonl(tmp_path, {"messages": TALK}, {"text": "A plain line."})
    expected = "[user] Where is the ship?[SEP][assistant] In the bay.[SEP]"
    assert read_documents(path, speaking) == (expected, "A plain line.")
    (window, *_) = token_windows(speaking, read_documents(path, speaking), tokens=100, sequence=64)
    assert [int(i) for i in window[:2]].count(2) == 1
    assert (window == 3).sum() == 3  # [SEP] of two turns and the tokenizer's own, each one token


def test_conversations_without_a_template_are_refused(ember: Checkpoint, tmp_path: Path) -> None:
    path = _jsonl(tmp_path, {"messages": TALK})
    for checkpoint in (None, ember):
        with pytest.raises(Unsupported, match="chat template"):
            read_documents(path, checkpoint)


@pytest.mark.parametrize("template", ["{{ raise_exception('no such role') }}", "{{ ''.__class__.__mro__ }}{{ x.y.z }}"])
def test_a_template_that_refuses_is_named(ember: Checkpoint, tmp_path: Path, template: str) -> None:
    with pytest.raises(Malformed, match="refuses a conversation"):
        read_documents(_jsonl(tmp_path, {"messages": TALK}), _with_template(ember, template))


def test_a_codec_reads_back_what_it_wrote() -> None:
    codec = codec_of(open_checkpoint(EXAMPLES / "ember-bert"))
    assert (codec.before, codec.after) == ((2,), (3,))
    assert codec.decode([*codec.before, *codec.encode("The river ran dry."), *codec.after]) == "the river ran dry."


@pytest.mark.parametrize("raw", [b"", b"{}", b'{"version": "1.0", "model": {"type": "BPE"}}'])
def test_a_broken_tokenizer_is_named(raw: bytes) -> None:
    checkpoint = open_checkpoint(EXAMPLES / "ember-bert")
    with pytest.raises(Malformed, match=r"tokenizer\.json"):
        codec_of(checkpoint.replace(files={"tokenizer.json": raw}))
