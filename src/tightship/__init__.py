"""One checkpoint in; small, runnable, proven artifacts out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tightship.api import build, plan, verify
    from tightship.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["Recipe", "__version__", "build", "plan", "verify"]

_LATE = {
    "Recipe": "tightship.recipe",
    "build": "tightship.api",
    "plan": "tightship.api",
    "verify": "tightship.api",
}


def __getattr__(name: str) -> Any:
    """The library's functions, imported when first used: `import tightship` costs nothing."""
    import importlib

    if name not in _LATE:
        raise AttributeError(f"module 'tightship' has no attribute {name!r}")
    return getattr(importlib.import_module(_LATE[name]), name)
