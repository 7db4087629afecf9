"""From a directory, a hub id or a GGUF file to a `Checkpoint`: everything checked, no weight read."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tightship.activations import Activations
from tightship.architecture import Architecture, TensorInfo, architecture_for
from tightship.checkpoint import Checkpoint, Source, check_tensors
from tightship.errors import Malformed, Unsupported, UsageError
from tightship.low_rank_files import adapter_files, corrected, joined, take_ranks
from tightship.sidecars import Folder, read_config, take_quantization
from tightship.target import Progress, no_progress
from tightship.weights import Alias, Dense, Quantized, Stored, Weight

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]+)?")
_CHUNK = 1 << 24


def open_checkpoint(
    source: str | Path, *, revision: str | None = None, hashed: bool = True, progress: Progress = no_progress
) -> Checkpoint:
    """Open a Hugging Face directory, a hub id (`org/name`, `org/name@revision`) or a .gguf file.

    Weights are lazy: names, dtypes and shapes are known and checked, data are read on request. The network is used for
    a hub id alone. Without `hashed`, `Checkpoint.source` has no digests yet, and opening takes no longer than reading
    headers.

    Raises:
        UsageError: no such path, and not a hub id; a directory without weights or config; no such repository.
        Unsupported: an architecture, config feature or quantization that we do not map.
        Malformed: any file breaks its format's rules, or weights and config do not belong together.
        EnvironmentFailure: the hub cannot be reached, refuses, or breaks off.
    """
    path = Path(source)
    if path.is_dir():
        _no_revision(path, revision)
        name = path.resolve().name
        return open_directory(path, name=name, identity=name, hashed=hashed, progress=progress)
    if path.is_file():
        _no_revision(path, revision)
        return _open_file(path, hashed, progress)
    text = str(source)
    if not _HUB_ID.fullmatch(text) or Path(text.partition("/")[0]).exists():
        raise UsageError(
            f"{text!r} is neither a directory, nor a file, nor a hub id (org/name)",
            hint="check the path; a hub model is written with its organisation, such as openai-community/gpt2",
        )
    from tightship.hub import download

    repository, _, tag = text.partition("@")
    folder, commit = download(repository, revision or tag or None, progress)
    name = repository.split("/")[1]
    return open_directory(folder, name=name, identity=repository, commit=commit, hashed=hashed, progress=progress)


def open_directory(
    path: Path,
    *,
    name: str,
    identity: str,
    commit: str | None = None,
    hashed: bool = True,
    progress: Progress = no_progress,
) -> Checkpoint:
    """Open a directory in the form that transformers saves. Raises as `open_checkpoint`."""
    from tightship.formats.weight_files import read_weights

    folder = Folder(path)
    config = read_config(folder)
    section, ranks = take_quantization(config), take_ranks(config, folder)
    architecture = architecture_for(config)
    architecture.check_supported(config)
    stored = read_weights(folder.names, folder.resolve)
    tensors, activations = _decoded(section, stored.tensors)
    whole = corrected(joined(tensors, ranks), folder)
    weights = _tie(_known(whole, architecture, config), architecture, config)
    files = folder.small_files()
    read = ("config.json", *stored.files, *adapter_files(folder), *files)
    checkpoint = Checkpoint(
        name=name,
        config=config,
        weights=weights,
        files=files,
        architecture=architecture,
        activations=_placed(activations, architecture, config),
        source=Source(identity, commit, (), {n: folder.resolve(n) for n in read}),
    )
    check_tensors(checkpoint)
    return checkpoint.replace(source=checkpoint.source.hashed(progress)) if hashed else checkpoint


def open_small_files(path: Path) -> Checkpoint:
    """A directory's config.json and tokenizer as a checkpoint without weights: an artifact that a runtime will run."""
    folder = Folder(path)
    config = read_config(folder)
    return Checkpoint(
        path.name, config, {}, folder.small_files(), architecture_for(config), Source(path.name, None, ())
    )


def _open_file(path: Path, hashed: bool, progress: Progress) -> Checkpoint:
    if path.suffix.lower() != ".gguf":
        raise UsageError(
            f"{path.name} is a single file; the source is a directory, a hub id or a .gguf file",
            hint=f"give its directory: {path.parent}",
        )
    try:
        from tightship.gguf_source import open_gguf
    except ModuleNotFoundError as error:
        raise Unsupported("GGUF files cannot be opened as a source yet", hint="start from the original") from error
    checkpoint: Checkpoint = open_gguf(path, hashed=hashed, progress=progress)
    return checkpoint


def _no_revision(path: Path, revision: str | None) -> None:
    if revision is not None:
        raise UsageError(f"--revision {revision} is for hub ids; {path.name} is here on disk")


def _decoded(
    section: Mapping[str, Any] | None, tensors: Mapping[str, Dense]
) -> tuple[Mapping[str, Any], Mapping[str, Activations]]:
    """Tensors of a checkpoint that is quantized already as weights of this kind; those of a float one as they are."""
    if section is None:
        return tensors, {}
    from tightship.formats.quantized import read_quantized

    return read_quantized(section, tensors)


def _placed(
    activations: Mapping[str, Activations], architecture: Architecture, config: Mapping[str, Any]
) -> dict[str, Activations]:
    """Activations under the module names of the family's table."""
    infos = architecture.lookup(config)
    return {
        table_name(f"{module}.weight", infos, architecture).removesuffix(".weight"): inputs
        for module, inputs in activations.items()
    }


def _known(tensors: Mapping[str, Stored], architecture: Architecture, config: Mapping[str, Any]) -> dict[str, Weight]:
    """Tensors under the names of the family's table: variants mapped, buffers dropped, Conv1D turned.

    Raises:
        Malformed: two tensors mean the same name.
    """
    infos = architecture.lookup(config)
    found: dict[str, Weight] = {}
    for name, weight in tensors.items():
        if architecture.ignores(name):
            continue
        known = table_name(name, infos, architecture)
        if known in found:
            raise Malformed(f"two tensors of the checkpoint mean {known}", tensor=name)
        found[known] = _upright(weight, infos.get(known))
    return found


def table_name(name: str, infos: Mapping[str, TensorInfo], architecture: Architecture) -> str:
    """The name of the family's table that an on-disk name means: with or without the base prefix, old parts renamed.

    A name that the table does not have is returned as it is.
    """
    prefix = architecture.base_prefix
    renamed = functools.reduce(lambda text, pair: text.replace(*pair), architecture.renames, name)
    for form in (name, renamed):
        for candidate in (form, prefix + form, form.removeprefix(prefix)):
            if candidate in infos:
                return candidate
    return name


def _upright(weight: Stored, info: TensorInfo | None) -> Stored:
    """A Conv1D's (in, out) matrix as (out, in); others, and factors, which are never turned, as they are.

    Raises:
        Unsupported: it is quantized along the wrong axis.
    """
    if info is None or not info.rule.transposed or not isinstance(weight, Dense | Quantized):
        return weight
    if isinstance(weight, Quantized):
        raise Unsupported("quantized matrices of a Conv1D are not read", hint="start from the original")
    return Dense(weight.shape[::-1], weight.dtype, lambda: np.ascontiguousarray(weight.read().T))


def _tie(weights: dict[str, Weight], architecture: Architecture, config: Mapping[str, Any]) -> dict[str, Weight]:
    """Borrowers of a tied model as aliases of their owners.

    Raises:
        Malformed: config.json ties two tensors that are both there and differ.
    """
    if not architecture.hyper(config)["tied"]:
        return weights
    tied = dict(weights)
    for borrower, owner in architecture.ties:
        first, second = weights.get(owner), weights.get(borrower)
        if isinstance(first, Dense) and isinstance(second, Dense) and not same_data(first, second):
            raise Malformed(
                f"config.json ties it to {owner}, but the two differ; runtimes disagree which one counts",
                tensor=borrower,
                hint="set tie_word_embeddings to false in config.json if both are meant, or delete one",
            )
        if isinstance(second, Quantized):
            raise Malformed(
                f"config.json ties it to {owner}, and it is quantized apart; runtimes disagree which one counts",
                tensor=borrower,
                hint="set tie_word_embeddings to false in config.json",
            )
        if first is None and second is not None:
            tied[owner] = second
        if owner in tied:
            tied[borrower] = Alias(owner)
    return tied


def same_data(first: Dense, second: Dense) -> bool:
    """Whether two tensors hold the same bytes."""
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    a, b = (w.read().reshape(-1).view(np.uint8) for w in (first, second))
    return all(np.array_equal(a[i : i + _CHUNK], b[i : i + _CHUNK]) for i in range(0, a.size, _CHUNK))
