"""Run mypy over the package as it is laid out: root folders linked under one `tightship` in a temporary tree."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """mypy's exit code, its paths turned back into the checkout's."""
    mapping = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    with tempfile.TemporaryDirectory() as name:
        package = Path(name) / "tightship"
        package.mkdir()
        for entry in (ROOT / mapping["tightship"]).iterdir():
            (package / entry.name).symlink_to(entry)
        for dotted, folder in mapping.items():
            if "." in dotted:
                (package / dotted.split(".", 1)[1]).symlink_to(ROOT / folder)
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
        command += ["--cache-dir", str(ROOT / ".mypy_cache"), str(package)]
        done = subprocess.run(command, cwd=name, capture_output=True, text=True, check=False)
    print(done.stdout.replace("tightship/", "") or done.stderr, end="")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
