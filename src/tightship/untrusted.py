"""Bytes that we did not write: strict JSON, files that are not what their name says, paths that stay inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tightship.errors import Malformed

_IMPOSTORS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch the data with `git lfs pull`"),
    (b"<", "an HTML or XML page, not the file itself", "the download was refused or redirected; fetch the file again"),
    (b"PK\x03\x04", "a zip archive (a PyTorch pickle checkpoint has this form)", "name it pytorch_model.bin"),
    (b"GGUF", "a GGUF file", "give the file with the ending .gguf as the source"),
)


def refuse_impostor(name: str, head: bytes) -> None:
    """Recognise what is often found where a weight or config file should be.

    `head` is the beginning of the file; 64 bytes are enough.

    Raises:
        Malformed: the file is an LFS pointer, a web page, an archive or another container.
    """
    for magic, what, hint in _IMPOSTORS:
        if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(magic):
            raise Malformed(f"{name} is {what}", hint=hint)


def strict_json(data: bytes, name: str) -> Any:
    """Parse JSON with one meaning only.

    Raises:
        Malformed: not UTF-8, not JSON, nested too deep, a duplicate key, or NaN or Infinity.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise Malformed(f"{name}: the key {key[:80]!r} occurs twice", hint="two readers would see two files")
            found[key] = value
        return found

    def no_constant(word: str) -> Any:
        raise Malformed(f"{name}: {word} is not a JSON number")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        refuse_impostor(name, data[:64])
        raise Malformed(f"{name} is not valid JSON: {error}", hint="the file is damaged; fetch it again") from error


def inside(root: Path, path: Path, *, also: Path | None = None) -> Path:
    """The real path of a regular file that lies inside `root`, or inside `also`, after symbolic links.

    Raises:
        Malformed: the path leaves both, or is not a regular file.
    """
    real = path.resolve()
    allowed = [root.resolve(), *([also.resolve()] if also else [])]
    if not any(real.is_relative_to(folder) for folder in allowed):
        raise Malformed(f"{path.name} points outside its directory", hint="copy the file to where the link stands")
    if not real.is_file():
        raise Malformed(f"{path.name} is not a regular file")
    return real
