"""A sweep: one recipe file that stands for many runs, one for each combination of the values it lists.

A sweep recipe is an ordinary recipe with up to three more keys:

```yaml
sweep: {encoder.num_layers: [2, 4, 8], encoder.hidden_size: [32, 64], stages.0.max_examples: [500, null]}
law: power          # what is fitted to the runs: power (default), performance, or none
corner_seeds: [43]  # the largest and smallest values of every list once more, with these seeds
```

A path is written as in `--set`. `llmrec plan --sweep RECIPE` writes each combination as an ordinary recipe and trains
it as `llmrec train` does. Options of `encoder` and other model sections are sizes; `seed` repeats a size; what stands
below `dataset` and `stages` (such as `max_history`, or `max_examples`, the amount of data) makes another series, with a
curve of its own.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from llmrec.errors import RecipeError
from llmrec.recipe import Recipe, apply_override, parse_recipe, read_recipe

Law = Literal["power", "performance", "none"]
LAWS: tuple[str, ...] = get_args(Law)
DEPTH, WIDTH = "encoder.num_layers", "encoder.hidden_size"
"""The two sizes of the performance law."""
_KEYS = ("sweep", "law", "corner_seeds")
_SERIES = ("dataset", "stages", "evaluate")


@dataclass(frozen=True)
class SweepPoint:
    """One run of a sweep.

    Args:
        name: Name of its recipe file and run folder.
        values: Option path -> value, the seed included where it is swept.
        recipe: The ordinary recipe it stands for.
    """

    name: str
    values: dict[str, Any]
    recipe: Recipe

    @property
    def series(self) -> str:
        """Values that are neither sizes nor seeds, as words; points of one series lie on one curve."""
        own = [f"{_last(path)} {_word(value)}" for path, value in self.values.items() if path.split(".")[0] in _SERIES]
        return ", ".join(own) or "all runs"


@dataclass(frozen=True)
class Sweep:
    """A validated sweep recipe.

    Args:
        name: Of the recipe.
        axes: Option path -> values.
        law: What is fitted to the runs.
        points: All runs, smallest first where the lists are sorted.
    """

    name: str
    axes: dict[str, list[Any]]
    law: Law
    points: tuple[SweepPoint, ...]


def is_sweep(path: str | os.PathLike[str]) -> bool:
    """Whether a recipe file holds a sweep."""
    return "sweep" in read_recipe(path)[0]


def load_sweep(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Sweep:
    """Read and validate a sweep recipe, every run of it included.

    Args:
        path: YAML file.
        overrides: `a.b=value` texts that change the recipe all runs share.

    Raises:
        RecipeError: With file:line where known.
    """
    raw, lines = read_recipe(path, overrides)
    where = str(Path(path))
    if "sweep" not in raw:
        raise RecipeError(f"{where}: holds no sweep; expected a key 'sweep' with option paths and lists of values")
    asked = {key: raw.pop(key) for key in _KEYS if key in raw}
    place = {key: f"{where}:{lines.get((key,), '?')}" for key in _KEYS}
    axes = _axes(asked["sweep"], place["sweep"])
    law, seeds = asked.get("law", "power"), asked.get("corner_seeds", [])
    if law not in LAWS:
        raise RecipeError(f"{place['law']}: law: found {law!r}, expected one of {', '.join(LAWS)}")
    if not isinstance(seeds, list) or not all(type(seed) is int for seed in seeds):
        raise RecipeError(f"{place['corner_seeds']}: corner_seeds: found {seeds!r}, expected a list of whole numbers")
    combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    ends = {path: (values[0], values[-1]) for path, values in axes.items() if len(values) > 1}
    corners = [point for point in combinations if all(point[path] in ends[path] for path in ends)]
    combinations += [{**corner, "seed": seed} for seed in seeds for corner in corners]
    points = tuple(_point(raw, values, where, lines, place["sweep"]) for values in combinations)
    names = [point.name for point in points]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RecipeError(f"{place['sweep']}: two runs would be called {twice[0]!r}; expected values that differ")
    sweep = Sweep(points[0].recipe.name.removesuffix(f"-{points[0].name}"), axes, law, points)
    if law == "performance":
        _check_performance(sweep, place["sweep"])
    return sweep


def _axes(found: Any, place: str) -> dict[str, list[Any]]:
    if not isinstance(found, dict) or not found:
        raise RecipeError(f"{place}: sweep: found {found!r}, expected option paths with lists of values")
    for path, values in found.items():
        if not isinstance(values, list) or not values:
            raise RecipeError(f"{place}: sweep.{path}: found {values!r}, expected a list of values")
        if path.split(".")[0] in ("name", "report"):
            raise RecipeError(f"{place}: sweep.{path}: this option changes no result; sweep another one")
    return {str(path): values for path, values in found.items()}


def _point(raw: dict[str, Any], values: dict[str, Any], where: str, lines: Any, place: str) -> SweepPoint:
    """One combination as a recipe, with the sweep's line for what it sets."""
    own = copy.deepcopy(raw)
    known = dict(lines)
    for path, value in values.items():
        try:
            keys = apply_override(own, f"{path}={json.dumps(value)}")
        except RecipeError as error:
            raise RecipeError(f"{place}: sweep: {str(error).removeprefix('--set ')}") from error
        known[keys] = f"{place}: sweep"
    name = ".".join(f"{_last(path)}-{_word(value)}" for path, value in values.items())
    own["name"] = f"{own.get('name', 'sweep')}-{name}"
    recipe = parse_recipe(own, where=where, lines=known)
    recipe.resolve(f"{where}: {name}")
    return SweepPoint(name, values, recipe)


def _last(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _word(value: Any) -> str:
    """A value as part of a file name."""
    text = "all" if value is None else value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.") or "empty"


def _check_performance(sweep: Sweep, place: str) -> None:
    """The performance law knows depth, width, repeats and the amount of data, and nothing else."""
    missing = [path for path in (DEPTH, WIDTH) if path not in sweep.axes]
    if missing:
        raise RecipeError(f"{place}: law: performance needs a list of {' and of '.join(missing)}")
    others = [
        path
        for path in sweep.axes
        if path not in (DEPTH, WIDTH, "seed") and not re.fullmatch(r"stages\.\d+\.max_examples", path)
    ]
    if others:
        raise RecipeError(
            f"{place}: sweep.{others[0]}: law: performance takes depth ({DEPTH}), width ({WIDTH}), seed and the amount "
            "of data (stages.N.max_examples); use law: power for other options"
        )
