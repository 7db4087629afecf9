"""Typed failures. Each class owns one exit code of docs/contract.md; nothing else decides it.

A message says what was asked, what was found and what to do; `tensor` names the culprit.
"""

from __future__ import annotations


class TightshipError(Exception):
    """Base of every failure we raise on purpose.

    Attributes:
        exit_code: the process exit code of the contract.
        code: a stable machine-readable word for `--json`.
        tensor: the on-disk name of the tensor at fault, if there is one.
        hint: what the user can do about it.
    """

    exit_code = 1
    code = "error"

    def __init__(self, message: str, *, tensor: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.tensor = tensor
        self.hint = hint

    def __str__(self) -> str:
        where = f"{self.tensor}: " if self.tensor and self.tensor not in self.message else ""
        return f"{where}{self.message}"

    def to_json(self) -> dict[str, str | None]:
        return {"code": self.code, "message": str(self), "tensor": self.tensor, "hint": self.hint}


class GateFailed(TightshipError):
    """A proof ran and failed, or could not run and was not accepted unproven."""

    exit_code = 1
    code = "gate_failed"


class UsageError(TightshipError):
    """Bad flag, recipe, order; missing path; output exists."""

    exit_code = 2
    code = "usage"


class Unsupported(TightshipError):
    """An architecture, a layout in a container, or a feature that we do not map."""

    exit_code = 3
    code = "unsupported"


class EnvironmentFailure(TightshipError):
    """Disk, memory, a missing runtime, the network."""

    exit_code = 4
    code = "environment"


class Malformed(TightshipError):
    """Input that is truncated, contradictory, unsafe, or holds NaN/Inf."""

    exit_code = 5
    code = "malformed"
