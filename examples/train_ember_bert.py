"""Train `ember-bert`, the embedded masked-language-model demo, from a plain text file.

    python examples/train_ember_bert.py train.txt --held-out test.txt --output examples/ember-bert

The text should hold one paragraph a line. Everything is derived from the text and the seed: a lower-casing WordPiece
vocabulary, then a two-layer BERT trained on windows of the concatenated paragraphs with part of the tokens hidden.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForMaskedLM

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, UNK, CLS, SEP, MASK = range(5)
LENGTH = 128
SHORT = 64


@dataclass(frozen=True)
class Settings:
    """How long and how fast to train."""

    vocabulary: int = 2048
    tokens: int = 2048
    hidden_share: float = 0.2
    minutes: float = 8.0
    peak_rate: float = 2e-3
    seed: int = 0


def train_tokenizer(lines: list[str], size: int) -> Tokenizer:
    """A BERT-style WordPiece tokenizer: lower case, accents stripped, punctuation apart."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    # The trainer numbers single letters in the order of a hash map, anew at each run.
    ordered = SPECIAL + sorted(set(tokenizer.get_vocab()) - set(SPECIAL))
    tokenizer.model = models.WordPiece({token: i for i, token in enumerate(ordered)}, unk_token="[UNK]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    return tokenizer


def token_stream(tokenizer: Tokenizer, lines: list[str]) -> torch.Tensor:
    """All token ids of the text in one row, (n,) int64, without [CLS] and [SEP]."""
    encodings = tokenizer.encode_batch(lines, add_special_tokens=False)
    return torch.tensor([token for encoding in encodings for token in encoding.ids], dtype=torch.int64)


def windows(stream: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
    """(batch, length) int64: [CLS], length - 2 tokens from each start, [SEP]."""
    body = stream[starts[:, None] + torch.arange(length - 2)]
    rows = len(starts)
    return torch.cat([torch.full((rows, 1), CLS), body, torch.full((rows, 1), SEP)], dim=1)


@torch.no_grad()
def initialise_locally(model: BertForMaskedLM) -> None:
    """Let attention look at neighbours from the start, or minutes of training never leave the word frequencies.

    Sinusoidal positions (Vaswani et al. 2017, section 3.5) louder than the token embeddings, and equal query and key
    projections (mimetic initialisation, Trockman and Kolter 2023, arXiv:2305.09828): near positions attend most.
    """
    waves = torch.exp(-math.log(200) * torch.arange(0, 1, 2 / model.config.hidden_size))
    angles = torch.arange(LENGTH)[:, None] * waves
    model.bert.embeddings.position_embeddings.weight.copy_(0.15 * torch.cat([angles.sin(), angles.cos()], dim=1))
    for layer in model.bert.encoder.layer:
        attention = layer.attention.self
        attention.query.weight.normal_(0, 0.1)
        attention.key.weight.copy_(attention.query.weight)


def choose(ids: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    """(batch, length) bool: a random share of the ordinary tokens."""
    return (torch.rand(ids.shape, generator=generator) < share) & (ids >= len(SPECIAL))


def hide(ids: torch.Tensor, share: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked-LM corruption (Devlin et al. 2018, section 3.1): of the chosen tokens 80 % [MASK], 10 % random, 10 % kept.

    Returns:
        The corrupted ids, (batch, length) int64, and the chosen positions, (batch, length) bool.
    """
    chosen = choose(ids, share, generator)
    fate = torch.rand(ids.shape, generator=generator)
    random_ids = torch.randint(len(SPECIAL), int(ids.max()) + 1, ids.shape, generator=generator)
    corrupted = torch.where(chosen & (fate < 0.8), MASK, ids)
    return torch.where(chosen & (fate >= 0.9), random_ids, corrupted), chosen


def loss_of(model: BertForMaskedLM, ids: torch.Tensor, chosen: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over the chosen positions; the vocabulary head runs only there."""
    hidden = model.bert(corrupted).last_hidden_state
    return cross_entropy(model.cls(hidden[chosen]), ids[chosen])


def train(model: BertForMaskedLM, stream: torch.Tensor, settings: Settings) -> int:
    """AdamW, warm-up over 5 % of the time, then a cosine to zero; short windows first. Returns the number of steps."""
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.peak_rate, betas=(0.9, 0.98), weight_decay=0.01)
    start, step = time.monotonic(), 0
    model.train()
    while (share := (time.monotonic() - start) / (60 * settings.minutes)) < 1:
        rate = settings.peak_rate * min(share / 0.05, 0.5 + 0.5 * math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = rate
        length = SHORT if share < 0.6 else LENGTH
        starts = torch.randint(0, len(stream) - length + 2, (settings.tokens // length,), generator=generator)
        ids = windows(stream, starts, length)
        corrupted, chosen = hide(ids, settings.hidden_share, generator)
        loss = loss_of(model, ids, chosen, corrupted)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 200 == 1:
            print(f"step {step:5d}  {100 * share:5.1f} %  loss {loss.item():.3f}", flush=True)
    return step


@torch.no_grad()
def masked_accuracy(model: BertForMaskedLM, stream: torch.Tensor, seed: int) -> tuple[float, float, int]:
    """Top-1 accuracy, mean loss in nats and number of [MASK] positions over consecutive windows."""
    generator = torch.Generator().manual_seed(seed + 1)
    model.eval()
    hits, total, loss = 0, 0, 0.0
    for batch in torch.arange(0, len(stream) - LENGTH + 2, LENGTH - 2).split(32):
        ids = windows(stream, batch, LENGTH)
        chosen = choose(ids, 0.15, generator)
        logits = model(torch.where(chosen, MASK, ids)).logits[chosen]
        hits += int((logits.argmax(-1) == ids[chosen]).sum())
        loss += float(cross_entropy(logits, ids[chosen], reduction="sum"))
        total += int(chosen.sum())
    return hits / total, loss / total, total


def write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """tokenizer.json, and a tokenizer_config.json that every transformers since 4 understands."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {f"{token.strip('[]').lower()}_token": token for token in SPECIAL} | {
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "model_max_length": LENGTH,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="training text, one paragraph a line")
    parser.add_argument("--held-out", type=Path, help="text to measure on")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--minutes", type=float, default=Settings.minutes)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    arguments = parser.parse_args()
    settings = Settings(minutes=arguments.minutes, seed=arguments.seed)

    lines = arguments.text.read_text(encoding="utf-8").splitlines()
    tokenizer = train_tokenizer(lines, settings.vocabulary)
    stream = token_stream(tokenizer, lines)
    torch.manual_seed(settings.seed)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=LENGTH,
        initializer_range=0.08,
        pad_token_id=PAD,
    )
    model = BertForMaskedLM(config)
    initialise_locally(model)
    print(f"{len(stream)} tokens, {sum(p.numel() for p in model.parameters())} parameters")
    print(f"{train(model, stream, settings)} steps")
    if arguments.held_out:
        held_out = token_stream(tokenizer, arguments.held_out.read_text(encoding="utf-8").splitlines())
        accuracy, loss, total = masked_accuracy(model, held_out, settings.seed)
        common = float(torch.bincount(held_out).max() / len(held_out))
        print(f"held out: accuracy {accuracy:.4f}, loss {loss:.3f}, {total} tokens; most common token {common:.4f}")
    model.save_pretrained(arguments.output)
    write_tokenizer(tokenizer, arguments.output)


if __name__ == "__main__":
    main()
