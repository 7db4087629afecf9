"""Where and how a build runs, apart from what it does. Flags win over these variables, they over recipe and defaults.

| variable               | flag            |
|------------------------|-----------------|
| TIGHTSHIP_WORK         | --work          |
| TIGHTSHIP_THREADS      | --threads       |
| TIGHTSHIP_SEED         | --seed          |
| TIGHTSHIP_DEVICE       | --device        |
| TIGHTSHIP_MAX_MEMORY   | --max-memory    |
| TIGHTSHIP_SOLVER       | --solver        |
| TIGHTSHIP_CALIBRATION  | --calibration   |
| TIGHTSHIP_TEXT         | --text          |
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tightship.errors import UsageError
from tightship.suggest import did_you_mean

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", re.IGNORECASE)
DEVICES = ("cpu", "cuda")
RUNTIMES = ("llama.cpp", "onnxruntime", "onnxruntime-genai", "transformers")


@dataclass(frozen=True)
class Settings:
    """Attributes:
    work: directory of stages and run logs.
    threads: threads that may be used.
    device: `cpu` or `cuda`, for calibrated and trained passes.
    max_memory: bytes that the proof may take, or None.
    text: text to prove on, or None for self-generated text.
    keep_stages: protect this build's stages from `store gc`.
    force: replace an existing output.
    allow_order: let a pass undo what an earlier one made.
    accept_unproven: runtimes whose proof may be missing.
    """

    work: Path
    threads: int = 1
    device: str = "cpu"
    max_memory: int | None = None
    text: Path | None = None
    keep_stages: bool = False
    force: bool = False
    allow_order: bool = False
    accept_unproven: tuple[str, ...] = ()

    @classmethod
    def resolve(
        cls,
        *,
        work: str | Path | None = None,
        threads: int | None = None,
        device: str | None = None,
        max_memory: str | int | None = None,
        text: str | Path | None = None,
        keep_stages: bool = False,
        force: bool = False,
        allow_order: bool = False,
        accept_unproven: Sequence[str] = (),
    ) -> Settings:
        """From flags (None: not given), the environment and defaults.

        Raises:
            UsageError: a value of the wrong form, or a text that is not there.
        """
        environment = os.environ
        device = device or environment.get("TIGHTSHIP_DEVICE") or "cpu"
        if device not in DEVICES:
            raise UsageError(f"device {device!r} is unknown; known: {', '.join(DEVICES)}")
        _check_runtimes(accept_unproven)
        limit = max_memory if max_memory is not None else environment.get("TIGHTSHIP_MAX_MEMORY")
        words = text or environment.get("TIGHTSHIP_TEXT")
        if words and not Path(words).is_file():
            raise UsageError(f"there is no text file {words}")
        return cls(
            work=(Path(work) if work else default_work()).absolute(),
            threads=threads or available_threads(),
            device=device,
            max_memory=parse_size(limit) if limit is not None else None,
            text=Path(words) if words else None,
            keep_stages=keep_stages,
            force=force,
            allow_order=allow_order,
            accept_unproven=tuple(accept_unproven),
        )


def _check_runtimes(names: Sequence[str]) -> None:
    for name in names:
        if name not in RUNTIMES:
            raise UsageError(
                f"--accept-unproven {name}: no such runtime{did_you_mean(name, RUNTIMES)}",
                hint=f"runtimes: {', '.join(RUNTIMES)}",
            )


def integer(name: str, environment: Mapping[str, str] = os.environ) -> int | None:
    """The value of `TIGHTSHIP_<NAME>` as an integer, None where it is not set.

    Raises:
        UsageError: set to something else.
    """
    text = environment.get(f"TIGHTSHIP_{name}")
    if not text:
        return None
    if not text.isdigit():
        raise UsageError(f"TIGHTSHIP_{name} must be a whole number, found {text!r}")
    return int(text)


def text_setting(name: str) -> str | None:
    """The value of `TIGHTSHIP_<NAME>`, None where it is empty or not set."""
    return os.environ.get(f"TIGHTSHIP_{name}") or None


def available_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_work() -> Path:
    """`TIGHTSHIP_WORK`, or `tightship` in the XDG cache directory."""
    if os.environ.get("TIGHTSHIP_WORK"):
        return Path(os.environ["TIGHTSHIP_WORK"])
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "tightship"


def parse_size(text: str | int) -> int:
    """Bytes of `8GiB`, `8G` (both binary), `500MB` (decimal) or a plain number.

    Raises:
        UsageError: not a size.
    """
    if isinstance(text, int):
        return text
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not a size; write 8GiB, 500MB or a number of bytes")
    power = " KMGT".index(match[2].upper() or " ")
    decimal = match[2] and not match[3] and text.strip().upper().endswith("B")
    return int(float(match[1]) * (1000 if decimal else 1024) ** power)
