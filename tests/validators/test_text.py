"""Windows for proofs, on the embedded decoder and encoder."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer

from tightship.checkpoint import Checkpoint
from tightship.errors import Malformed, Unsupported, UsageError
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.validators.metrics import log_softmax
from tightship.validators.text import mask_token, next_tokens, padded, proof_windows, random_windows

EXAMPLES = Path(__file__).parents[2] / "examples"
PROSE = (
    "The old man came down to the river in the morning, and the boy went with him as far as the bridge. "
    "There they stood and looked at the water, and neither of them said a word until the sun was high. "
) * 8


@pytest.fixture(scope="module")
def ember() -> ModelView:
    return ModelView(open_checkpoint(EXAMPLES / "ember"))


@pytest.fixture(scope="module")
def bert() -> ModelView:
    return ModelView(open_checkpoint(EXAMPLES / "ember-bert"))


def without_tokenizer(view: ModelView) -> ModelView:
    kept = {name: data for name, data in view.checkpoint.files.items() if not name.startswith("tokenizer")}
    return ModelView(view.checkpoint.replace(files=kept))


def test_a_decoder_writes_its_own_text(ember: ModelView) -> None:
    windows = proof_windows(ember, windows=3, length=24, seed=5)
    assert windows.ids.shape == windows.mask.shape == (3, 24)
    assert (windows.origin, windows.shipped, windows.has_real_text) == ("self", False, False)
    assert "self-generated" in windows.note
    assert windows.mask.all()
    assert windows.scored.all()
    np.testing.assert_array_equal(windows.targets[:, :-1], windows.ids[:, 1:])
    assert (windows.targets[:, -1] == -1).all()
    again, other = (proof_windows(ember, windows=3, length=24, seed=seed) for seed in (5, 6))
    np.testing.assert_array_equal(again.ids, windows.ids)
    assert (other.ids != windows.ids).any()


def test_what_it_wrote_it_finds_likely(ember: ModelView) -> None:
    """Sampling at temperature 1: the mean surprise is the model's own entropy, not that of random tokens."""
    surprise = []
    for windows in (proof_windows(ember, windows=8, length=48), random_windows(ember.checkpoint, length=48)):
        logs = log_softmax(ember.outputs(windows.ids)["logits"].astype(np.float64))[:, :-1]
        surprise.append(-np.take_along_axis(logs, windows.ids[:, 1:, None], -1).mean())
        entropy = -(np.exp(logs) * logs).sum(-1).mean()
        if windows.origin == "self":
            assert surprise[0] == pytest.approx(entropy, rel=0.1)
    assert surprise[1] > math.log(1024)


def test_a_users_text_is_read_in_order(ember: ModelView, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(PROSE)
    windows = proof_windows(ember, text=tmp_path / "a.txt", windows=4, length=32)
    expected = Tokenizer.from_file(str(EXAMPLES / "ember" / "tokenizer.json")).encode(PROSE).ids[: 4 * 32]
    assert windows.ids.flatten().tolist() == expected
    assert (windows.origin, windows.has_real_text) == ("file", True)


def test_a_short_rest_makes_no_padded_window_for_a_decoder(ember: ModelView, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(PROSE)
    whole = len(Tokenizer.from_file(str(EXAMPLES / "ember" / "tokenizer.json")).encode(PROSE).ids)
    length = whole // 3 - 10
    assert whole - 3 * length >= 30
    windows = proof_windows(ember, text=tmp_path / "a.txt", windows=10**3, length=length)
    assert windows.ids.shape == (3, length)
    assert windows.mask.all()


def test_an_encoder_gets_shipped_sentences_with_hidden_words(bert: ModelView) -> None:
    windows = proof_windows(bert)
    assert (windows.origin, windows.shipped, windows.has_real_text) == ("shipped", True, True)
    hidden = windows.targets >= 0
    np.testing.assert_array_equal(windows.scored, hidden)
    assert 40 < hidden.sum() < windows.mask.sum() / 5
    assert (windows.ids[hidden] == 4).all()
    assert not np.isin(windows.targets[hidden], range(5)).any()
    assert (windows.ids[:, 0] == 2).all()
    lengths = windows.mask.sum(1)
    assert lengths.min() < lengths.max() == windows.ids.shape[1]
    restored = np.where(hidden, windows.targets, windows.ids)[0][windows.mask[0] == 1]
    words = Tokenizer.from_file(str(EXAMPLES / "ember-bert" / "tokenizer.json")).decode(restored.tolist())
    assert words == "the river runs past the old mill and under the bridge before it reaches the sea."


def test_without_a_tokenizer_an_encoder_gets_noise_and_says_so(bert: ModelView) -> None:
    windows = proof_windows(without_tokenizer(bert), windows=2, length=10)
    assert (windows.origin, windows.ids.shape) == ("random", (2, 10))
    assert "random tokens" in windows.note
    assert windows.scored.all()
    assert (windows.targets == -1).all()


def test_text_needs_a_tokenizer_and_a_file_with_words(bert: ModelView, ember: ModelView, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(PROSE)
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(Unsupported, match="no tokenizer"):
        proof_windows(without_tokenizer(bert), text=tmp_path / "a.txt")
    with pytest.raises(Malformed, match="at least 8 tokens"):
        proof_windows(ember, text=tmp_path / "short.txt")
    with pytest.raises(UsageError, match="does not exist"):
        proof_windows(ember, text=tmp_path / "missing.txt")


def test_windows_stay_within_the_context(bert: ModelView, ember: ModelView) -> None:
    assert random_windows(bert.checkpoint, windows=1, length=4096).ids.shape == (1, 128)
    shrunk = ember.checkpoint.replace(config={**ember.checkpoint.config, "max_position_embeddings": 16})
    assert proof_windows(ModelView(shrunk), windows=2).ids.shape == (2, 16)


def test_next_tokens_stop_at_padding() -> None:
    ids, mask = padded([[5, 6, 7], [8]], pad=0)
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert next_tokens(ids, mask).tolist() == [[6, 7, -1], [-1, -1, -1]]


def test_mask_token(bert: ModelView, ember: ModelView) -> None:
    checkpoint: Checkpoint = bert.checkpoint
    assert mask_token(checkpoint) == 4
    assert mask_token(ember.checkpoint) is None
    spelt_out = b'{"mask_token": {"content": "[MASK]", "lstrip": true}}'
    assert mask_token(checkpoint.replace(files={**checkpoint.files, "tokenizer_config.json": spelt_out})) == 4


def test_a_decoder_behind_an_encoder_is_given_what_the_original_wrote(tmp_path: Path) -> None:
    """What it wrote it finds likely, what follows an end token does not count, and nothing is written if not asked."""
    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 7}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=24, **sizes))
    model.save_pretrained(tmp_path)
    view = ModelView(open_checkpoint(tmp_path))
    windows = proof_windows(view, windows=4, length=40)
    assert windows.origin == "random"
    assert windows.decoder_ids is not None
    assert (windows.decoder_ids[:, 0] == 7).all()
    np.testing.assert_array_equal(windows.targets[:, :-1], windows.decoder_ids[:, 1:])
    for ids, scored in zip(windows.decoder_ids, windows.scored, strict=True):
        ends = np.flatnonzero(ids == 1)
        assert scored.sum() == (ends[0] if len(ends) else 40)
    assert not windows.scored.all()  # a vocabulary of 24 ends soon
    assert set(windows.feeds(slice(None))) == {"input_ids", "attention_mask", "decoder_input_ids"}
    assert not windows.has_real_text
    assert "which the original wrote to it" in windows.note
    logs = log_softmax(view.outputs(windows.ids, windows.mask, None, windows.decoder_ids)["logits"].astype(np.float64))
    own = -np.take_along_axis(logs, np.maximum(windows.targets, 0)[..., None], -1)[..., 0][:, :-1]
    foreign = -np.take_along_axis(logs, windows.ids[..., None], -1)[..., 0][:, :-1]
    assert own.mean() < foreign.mean()
    plain = proof_windows(view, windows=4, length=40, write=False)
    assert plain.decoder_ids is not None
    np.testing.assert_array_equal(plain.decoder_ids[:, 1:], plain.ids[:, :-1])
    assert "the source once more" in plain.note
