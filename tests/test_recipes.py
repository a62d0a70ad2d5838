"""Every recipe that comes with the package can be read, resolved and started."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from llmrec.assets import asset_names, find_asset
from llmrec.cli import build_verb_parser, import_verb
from llmrec.data.prompts import PromptTemplate
from llmrec.recipe import Recipe, load_recipe
from llmrec.sweeps import is_sweep, load_sweep
from llmrec.training.arguments import build_arguments

RECIPES = asset_names("recipes")


def runs_of(name: str) -> list[Recipe]:
    """The recipe itself, or the recipes a sweep stands for."""
    path = find_asset("recipes", name)
    return [point.recipe for point in load_sweep(path).points] if is_sweep(path) else [load_recipe(path)]


def test_there_are_recipes_of_every_shipped_kind() -> None:
    assert {"smoke/sasrec", "smoke/lora", "smoke/ilora"} <= set(RECIPES)
    assert {name.partition("/")[0] for name in RECIPES} >= {"sasrec", "lora", "ilora"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_resolves_and_its_arguments_build(name: str, tmp_path: Path) -> None:
    for recipe in runs_of(name):
        recipe.resolve(name)
        for stage in recipe.stages:
            arguments = build_arguments(stage, tmp_path, recipe.seed, evaluates=True)
            assert arguments.seed == recipe.seed
        if recipe.prompt is not None and recipe.prompt.template is not None:
            assert PromptTemplate.load(recipe.prompt.template).variants


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_how_it_is_run(name: str) -> None:
    path = find_asset("recipes", name)
    header = re.match(r"(?:#.*\n)+", path.read_text(encoding="utf-8"))
    assert header, f"{name} starts without a comment"
    lines = re.findall(r"^# run: llmrec (.+)$", header.group(), re.MULTILINE)
    assert len(lines) == 1, f"{name}: one '# run: llmrec ...' line in the header, found {lines}"
    verb, *words = shlex.split(lines[0])
    args = build_verb_parser(verb, import_verb(verb)).parse_args(words)
    assert verb == ("plan" if is_sweep(path) else "train")
    assert find_asset("recipes", args.sweep if verb == "plan" else args.recipe).samefile(path)


def test_names_of_recipes_are_distinct() -> None:
    names = [recipe.name for name in RECIPES for recipe in runs_of(name)]
    assert len(set(names)) == len(names), "two recipes would write to one default folder"
