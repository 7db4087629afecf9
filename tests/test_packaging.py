"""The wheel holds every package and every data file, and nothing but `tightship`."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_package_directory_is_listed() -> None:
    found = {
        ".".join((package, *init.parent.relative_to(ROOT / directory).parts))
        for package, directory in SETUPTOOLS["package-dir"].items()
        for init in (ROOT / directory).rglob("__init__.py")
    }
    assert set(SETUPTOOLS["packages"]) == found


def test_only_our_name_is_installed() -> None:
    assert {name.split(".")[0] for name in SETUPTOOLS["packages"]} == {"tightship"}


def test_every_data_file_is_packaged() -> None:
    """A data file beside the code that no package-data pattern takes would be missing from the wheel."""
    patterns = SETUPTOOLS["package-data"]
    for package, directory in SETUPTOOLS["package-dir"].items():
        base = ROOT / directory
        taken = {path for pattern in patterns.get(package, []) for path in base.glob(pattern)}
        data = {p for p in base.rglob("*") if p.is_file() and p.suffix in {".json", ".toml", ".yaml", ".typed", ".txt"}}
        assert data <= taken, f"{package}: {sorted(str(p.relative_to(ROOT)) for p in data - taken)} not in package-data"
