"""llama.cpp as a judge, through the cyllama wheel.

Job: `artifact` and `main` (the GGUF file), `threads`, `mode`, `want`:

| mode    | computed with                                                                                           |
|---------|---------------------------------------------------------------------------------------------------------|
| graph   | weights widened to float32, float32 KV cache, no flash attention, no repacking: the graph's own error   |
| shipped | the file as it is and the library's defaults: its activation quantization and float16 cache included    |

| want     | arrays in                              | answer                                                           |
|----------|----------------------------------------|------------------------------------------------------------------|
| outputs  | input_ids (b, s), attention_mask,      | logits (b, s, vocab); encoders: last_hidden_state (b, s, hidden) |
|          | decoder_input_ids (b, t) or none       | logits (b, t, vocab) of a decoder behind an encoder              |
| generate | input_ids (b, s)                       | tokens (b, `tokens`), greedy                                     |
| tokenize | -- (`texts`, `parse_special`)          | ids: one list a text                                             |
| vocab    | --                                     | pieces, types, scores, merges, special ids                       |

`decode` (default 0): the last so many positions come from single-token steps through the cache. `pooling: mean | cls`
(encoders) adds sentence_embedding (b, hidden); it is pooled here, since the wheel does not hand out llama.cpp's pooled
row. Positions that the mask leaves out are zero. Without `decoder_input_ids` a decoder is given the source, shifted.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tightship.errors import GateFailed
from tightship.formats.gguf_file import read_gguf
from tightship.validators.gguf_float32 import as_float32

if TYPE_CHECKING:
    from cyllama.llama.llama_cpp import LlamaBatch, LlamaContext, LlamaModel

Arrays = dict[str, np.ndarray]

_F32 = 0  # ggml.h: GGML_TYPE_F32
_FLASH_ATTENTION_OFF = 0  # llama.h: LLAMA_FLASH_ATTN_TYPE_DISABLED
_POOLING_NONE = 0  # llama.h: LLAMA_POOLING_TYPE_NONE
_CHUNK = 512


def run(job: dict[str, Any], arrays: Arrays) -> tuple[dict[str, Any], Arrays]:
    """Answer one job; see the module's tables.

    Raises:
        ImportError: cyllama is not installed.
        GateFailed: the library refuses the file or a step.
    """
    import cyllama.llama.llama_cpp as library

    path = Path(job["artifact"]) / job["main"]
    want = job.get("want", "outputs")
    about = {"version": f"cyllama {version()}, ggml {library.ggml_version()}"}
    if want in ("tokenize", "vocab"):
        model = load(path)  # whole: with vocab_only, llama.cpp aborts on its own missing hyper-parameters
        return about | (_tokenize(model, job) if want == "tokenize" else _vocabulary(model, path)), {}
    widen = job.get("mode", "shipped") == "graph"
    with tempfile.TemporaryDirectory() if widen else nullcontext("") as directory:
        model = load(as_float32(path, Path(directory)) if widen else path)
        about["description"] = str(model.desc)
        if is_encoder(model):
            return about, _encode(model, job, arrays)
        if want == "generate":
            return about, {"tokens": np.stack([_greedy(model, job, row) for row in arrays["input_ids"]])}
        return about, {"logits": _logits(model, job, arrays)}


def version() -> str:
    """Of the wheel."""
    from importlib.metadata import version as of

    return of("cyllama")


def load(path: Path) -> LlamaModel:
    """A GGUF file in memory.

    Raises:
        GateFailed: the library refuses it.
    """
    import cyllama.llama.llama_cpp as library

    class Model(library.LlamaModel):
        """`get_logits_ith` asks its model for `n_vocab`, which the wheel's class lacks."""

        @property
        def n_vocab(self) -> int:
            return self.get_vocab().n_vocab

    params = library.LlamaModelParams()
    params.n_gpu_layers = 0
    params.use_extra_bufts = False
    params.check_tensors = True
    library.ggml_backend_load_all()
    library.llama_backend_init()
    try:
        return Model(path_model=os.fspath(path), params=params)
    except (ValueError, RuntimeError) as error:
        raise GateFailed(f"llama.cpp does not load {path.name}: {error}") from error


def is_encoder(model: LlamaModel) -> bool:
    """Whether attention is bidirectional."""
    architecture = model.meta_val_str("general.architecture")
    try:
        return model.meta_val_str(f"{architecture}.attention.causal") == "false"
    except ValueError:
        return False


def new_context(model: LlamaModel, job: dict[str, Any], length: int, *, encoder: bool = False) -> LlamaContext:
    """A context of `length` tokens; `threads` and `mode` of the job as in the module docstring."""
    import cyllama.llama.llama_cpp as library

    params = library.LlamaContextParams()
    params.n_ctx = length
    params.n_batch = params.n_ubatch = length if encoder or model.has_encoder() else min(length, _CHUNK)
    params.n_threads = params.n_threads_batch = int(job.get("threads", 1))
    if job.get("mode", "shipped") == "graph":
        params.flash_attn_type = _FLASH_ATTENTION_OFF
        params.type_k = params.type_v = _F32
    if encoder:
        params.embeddings = True
        params.pooling_type = _POOLING_NONE
    return library.LlamaContext(model=model, params=params)


def kept_positions(arrays: Arrays) -> list[np.ndarray]:
    """Positions of each row that the mask keeps."""
    ids = arrays["input_ids"]
    mask = arrays.get("attention_mask", np.ones_like(ids))
    return [np.flatnonzero(row) for row in mask]


def _batch(ids: np.ndarray, start: int, *, last_only: bool = False) -> LlamaBatch:
    import cyllama.llama.llama_cpp as library

    batch = library.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
    for place, token in enumerate(ids):
        batch.add(int(token), start + place, [0], not last_only or place + 1 == len(ids))
    return batch


def step(context: LlamaContext, ids: np.ndarray, start: int, *, last_only: bool = False) -> None:
    """Append tokens to sequence 0, with outputs for all of them or for the last one."""
    if code := context.decode(_batch(ids, start, last_only=last_only)):
        raise GateFailed(f"llama.cpp stops at token {start}: llama_decode returned {code}")


def _logits(model: LlamaModel, job: dict[str, Any], arrays: Arrays) -> np.ndarray:
    ids = arrays["input_ids"]
    target = arrays.get("decoder_input_ids")
    out = np.zeros((*ids.shape, model.n_vocab) if target is None else (*target.shape, model.n_vocab), np.float32)
    context = new_context(model, job, max(ids.shape[1], out.shape[1]))
    for row, kept in enumerate(kept_positions(arrays)):
        context.kv_cache_clear()
        given = encoded(model, context, ids[row, kept])
        if target is not None:
            given, kept = target[row], np.arange(target.shape[1])  # noqa: PLW2901 - the source's places are used up
        for first, last in chunks(len(kept), int(job.get("decode", 0))):
            step(context, given[first:last], first)
            for place in range(first, last):
                out[row, kept[place]] = context.get_logits_ith(place - first)
    return out


def encoded(model: LlamaModel, context: LlamaContext, ids: np.ndarray) -> np.ndarray:
    """What a decoder is given: `ids`; behind an encoder, which reads them first, a start token and all but the last."""
    if not model.has_encoder():
        return ids
    if code := context.encode(_batch(ids, 0)):
        raise GateFailed(f"llama.cpp does not encode {len(ids)} tokens: llama_encode returned {code}")
    return np.concatenate([[max(model.decoder_start_token(), 0)], ids[:-1]])


def chunks(length: int, decode: int) -> list[tuple[int, int]]:
    """Chunks of the prompt, then single tokens."""
    split = max(length - decode, min(length, 1))
    prompt = [(i, min(i + _CHUNK, split)) for i in range(0, split, _CHUNK)]
    return prompt + [(i, i + 1) for i in range(split, length)]


def _greedy(model: LlamaModel, job: dict[str, Any], prompt: np.ndarray) -> np.ndarray:
    """(tokens,) int64; no stop at an end token, so that lengths are equal."""
    count = int(job["tokens"])
    context = new_context(model, job, len(prompt) + count)
    prompt = encoded(model, context, prompt)[: 1 if model.has_encoder() else None]
    for first, last in chunks(len(prompt), 0):
        step(context, prompt[first:last], first)
    found: list[int] = []
    while True:
        found.append(int(np.argmax(context.get_logits_ith(-1))))
        if len(found) == count:
            return np.array(found, np.int64)
        step(context, np.array(found[-1:]), len(prompt) + len(found) - 1)


def _encode(model: LlamaModel, job: dict[str, Any], arrays: Arrays) -> Arrays:
    ids = arrays["input_ids"]
    out = {"last_hidden_state": np.zeros((*ids.shape, model.n_embd), np.float32)}
    context = new_context(model, job, ids.shape[1], encoder=True)
    for row, kept in enumerate(kept_positions(arrays)):
        step(context, ids[row, kept], 0)
        for place, position in enumerate(kept):
            out["last_hidden_state"][row, position] = context.get_embeddings_ith(place)
    if "pooling" in job:
        hidden = out["last_hidden_state"]
        rows = [hidden[row, kept] for row, kept in enumerate(kept_positions(arrays))]
        out["sentence_embedding"] = np.stack([r.mean(0) if job["pooling"] == "mean" else r[0] for r in rows])
    return out


def _tokenize(model: LlamaModel, job: dict[str, Any]) -> dict[str, Any]:
    vocabulary = model.get_vocab()
    special = bool(job.get("parse_special", True))
    add = bool(job.get("add_special", True))
    return {"ids": [list(vocabulary.tokenize(text, add, special)) for text in job["texts"]]}


def _vocabulary(model: LlamaModel, path: Path) -> dict[str, Any]:
    vocabulary = model.get_vocab()
    ids = range(vocabulary.n_vocab)
    return {
        "pieces": [vocabulary.get_text(i) for i in ids],
        "types": [int(vocabulary.get_attr(i)) for i in ids],
        "scores": [float(vocabulary.get_score(i)) for i in ids],
        "merges": read_gguf(path).metadata.get("tokenizer.ggml.merges", []),
        "bos": vocabulary.token_bos(),
        "eos": vocabulary.token_eos(),
        "add_bos": bool(vocabulary.get_add_bos()),
        "add_eos": bool(vocabulary.get_add_eos()),
    }
