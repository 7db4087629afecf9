"""Which room may see which: formats the core; passes and exporters also formats; validators also exporters."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("formats", "passes", "exporters", "validators")
ALLOWED = {
    "formats": {"formats"},
    "passes": {"passes", "formats"},
    "exporters": {"exporters", "formats"},
    "validators": {"validators", "formats", "exporters"},
}
# The pipeline and the skins around it know the rooms; they import them late, inside functions.
KNOWS_THE_ROOMS = {
    "pipeline",
    "planning",
    "api",
    "cli",
    "opening",
    "stages",
    "stage_codec",
    "store",
    "inspection",
    "recipe",
    "gguf_config",
    "gguf_source",
    "low_rank_files",
    "doctor",
    "logprobs",
}
HEAVY = {"torch", "transformers", "onnxruntime", "onnx", "mobius", "cyllama", "optimum", "onnxscript"}


def python_files(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    skipped: set[ast.AST] = set()
    if top_level_only:
        for node in ast.walk(tree):
            late = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
            if late or typing_only:
                skipped.update(ast.walk(node))
    names: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def rooms_seen(names: set[str]) -> set[str]:
    return {
        parts[1]
        for name in names
        if (parts := name.split("."))[0] == "tightship" and len(parts) > 1 and parts[1] in ROOMS
    }


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_see_only_what_they_may(room: str) -> None:
    for path in python_files(room):
        seen = rooms_seen(imports(path))
        assert seen <= ALLOWED[room], f"{path.relative_to(ROOT)} imports {sorted(seen - ALLOWED[room])}"
        assert "tightship.cli" not in imports(path)


def test_the_core_does_not_know_the_rooms() -> None:
    for path in python_files("src"):
        if path.stem not in KNOWS_THE_ROOMS:
            assert not rooms_seen(imports(path)), path.relative_to(ROOT)


@pytest.mark.parametrize("folder", ["src", "formats"])
def test_heavy_libraries_are_imported_late(folder: str) -> None:
    for path in python_files(folder):
        heavy = {name.split(".")[0] for name in imports(path, top_level_only=True)} & HEAVY
        assert not heavy, f"{path.relative_to(ROOT)} imports {sorted(heavy)} at module level"
