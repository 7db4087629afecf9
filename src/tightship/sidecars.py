"""The small files beside the weights: config.json, made safe, and the tokenizer's files, copied as bytes."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tightship.errors import Malformed, Unsupported, UsageError
from tightship.untrusted import inside, refuse_impostor, strict_json

MAX_CONFIG = 10_000_000
MAX_FILE = 256_000_000
ALLOWED = (
    "tokenizer*.json",
    "tokenizer.model",
    "tokenizer*.model*",
    "spiece.model",
    "sentencepiece*.model",
    "vocab*.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template*.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
    "LICENSE*",
    "NOTICE*",
)
# Keys by which a data file has made libraries fetch or run code, and what only the library's own memory means.
_CODE_KEYS = {"auto_map", "trust_remote_code", "attn_implementation", "experts_implementation", "custom_pipelines"}


class Folder:
    """A checkpoint's directory, every access checked: links may lead inside it, or into its hub cache's `blobs`."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        blobs = self.root.parent.parent / "blobs"
        self._blobs = blobs if self.root.parent.name == "snapshots" and blobs.is_dir() else None
        self.names = {p.name for p in self.root.iterdir() if not p.is_dir()}

    def resolve(self, name: str) -> Path:
        """The checked real path of a file named relative to the directory.

        Raises:
            Malformed: it leads outside, or is not a regular file.
        """
        return inside(self.root, self.root / name, also=self._blobs)

    def read(self, name: str, limit: int) -> bytes:
        """The bytes of a small file.

        Raises:
            Malformed: larger than `limit`, or not what its name says.
        """
        path = self.resolve(name)
        size = path.stat().st_size
        if size > limit:
            raise Malformed(f"{name} has {size} bytes; the limit is {limit}")
        data = path.read_bytes()
        if name.endswith(".json") or data.startswith(b"version https://git-lfs"):
            refuse_impostor(name, data[:64])
        return data

    def small_files(self) -> dict[str, bytes]:
        """The tokenizer's and other small files, by relative name; what is not on the list is left behind."""
        below = [p.relative_to(self.root).as_posix() for p in self.root.glob("1_Pooling/config.json")]
        names = sorted(n for n in [*self.names, *below] if any(fnmatch.fnmatchcase(n, p) for p in ALLOWED))
        return {name: self.read(name, MAX_FILE) for name in names}


def read_config(folder: Folder) -> dict[str, Any]:
    """config.json as parsed, without the keys that could make a library run code or that hold paths.

    Raises:
        UsageError: there is none.
        Malformed: not a JSON object with unique keys.
        Unsupported: a model compiled for MLC.
    """
    if "mlc-chat-config.json" in folder.names:
        raise Unsupported(
            "this is a model compiled for MLC, which is not read", hint="start from the original, or an AWQ of it"
        )
    if "config.json" not in folder.names:
        raise UsageError(
            f"{folder.root.name} has no config.json", hint="the source is a directory saved by transformers"
        )
    config = strict_json(folder.read("config.json", MAX_CONFIG), "config.json")
    if not isinstance(config, dict):
        raise Malformed("config.json is not a JSON object")
    return scrubbed(config)


def take_quantization(config: dict[str, Any]) -> Mapping[str, Any] | None:
    """The quantization section, taken out of the config; None for float checkpoints.

    Raises:
        Malformed: it is not a JSON object.
    """
    found = [config.pop(key, None) for key in ("quantization_config", "compression_config")]
    section = next((value for value in found if value), None)
    if section is not None and not isinstance(section, dict):
        raise Malformed("quantization_config of config.json is not a JSON object")
    return section


def scrubbed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without private keys (leading underscore) and code-bearing ones, at every depth; order kept."""
    return {key: _scrub_value(value) for key, value in config.items() if not _is_private(key)}


def _scrub_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return scrubbed(value)
    return [_scrub_value(v) for v in value] if isinstance(value, list) else value


def _is_private(key: str) -> bool:
    return key.startswith("_") or key in _CODE_KEYS


def listed(names: Iterable[str]) -> list[str]:
    """Those of a repository's file names that a checkpoint is made of, weights left aside."""
    return sorted(n for n in names if n == "config.json" or any(fnmatch.fnmatchcase(n, p) for p in ALLOWED))
