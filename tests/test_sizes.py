"""The tail is held: no file over 400 lines, no function over 60 without a reason, most functions short."""

from __future__ import annotations

import ast
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("src", "formats", "passes", "exporters", "validators")
FILES = sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))


def lengths() -> dict[str, int]:
    found: dict[str, int] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{path.relative_to(ROOT)}:{node.name}:{node.lineno}"
                found[name] = (node.end_lineno or node.lineno) - node.lineno + 1
    return found


def test_files_are_short() -> None:
    long = {str(p.relative_to(ROOT)): n for p in FILES if (n := p.read_text().count("\n")) > 400}
    assert not long


def test_functions_are_short() -> None:
    found = lengths()
    assert not {name: n for name, n in found.items() if n > 60}
    assert statistics.quantiles(found.values(), n=10)[-1] <= 40


def test_nothing_says_where_it_was_built() -> None:
    """No absolute path of a machine in any text of the project."""
    import subprocess

    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    for name in tracked:
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".yaml", ".yml", ".sh", ".json"} and path != Path(__file__):
            text = path.read_text(errors="replace")
            for word in ("/work/", "/opt/", "/root/"):
                assert word not in text, f"{name} holds {word}"
