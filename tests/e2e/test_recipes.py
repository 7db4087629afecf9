"""The recipes of `examples/recipes`: every one plans, builds offline and passes its gates."""

from __future__ import annotations

from pathlib import Path

import pytest

import tightship
from tightship.planning import make_plan
from tightship.recipe import Recipe
from tightship.settings import Settings

RECIPES = Path(__file__).resolve().parents[2] / "examples" / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_plans(name: str, tmp_path: Path) -> None:
    plan = make_plan(Recipe.from_file(RECIPES / f"{name}.yaml"), Settings(work=tmp_path))
    assert plan.stages
    assert all(target.plan.file_bytes > 0 for target in plan.targets)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_builds_and_passes_its_gates(name: str, tmp_path: Path) -> None:
    built = tightship.build(recipe=RECIPES / f"{name}.yaml", output=tmp_path / "out", work=tmp_path / "work", threads=1)
    assert built.report["verdict"] == "pass"
