"""Environments of their own for the rivals whose pins do not fit ours: made once, then found again."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

PACKAGES = {
    "llm-compressor": ("llmcompressor==0.14.0.1",),
    "autoround": ("auto-round==0.16.1",),
}


def python_of(rival: str, folder: Path) -> Path:
    """The interpreter of a rival's environment below `folder`, installed if it is not there; torch as here."""
    home = folder / rival
    python = home / "bin" / "python"
    done = home / "installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        torch = version("torch").partition("+")[0]
        subprocess.run([str(python), "-m", "pip", "install", "-q", f"torch=={torch}", *PACKAGES[rival]], check=True)
        done.touch()
    return python
