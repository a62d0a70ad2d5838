"""Show what one name stands for: its summary, paper and options, or the files and recipes of a system."""

from __future__ import annotations

import argparse
import inspect
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmrec.paper import Paper

EXAMPLE = "llmrec explain encoder sasrec"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `llmrec explain`."""
    parser.add_argument("kind", metavar="KIND", help="what `llmrec list` shows, in singular or plural; or: system")
    parser.add_argument("name", metavar="NAME", help="a name as `llmrec list KIND` shows it")


def run(args: argparse.Namespace) -> None:
    """Print one type, or one system."""
    if args.kind in ("system", "systems"):
        _explain_system(args.name, args.as_json)
    else:
        _explain_type(args.kind, args.name, args.as_json)


def _explain_type(kind_word: str, name: str, as_json: bool) -> None:
    from llmrec import discovery
    from llmrec.commands.list import find_kind
    from llmrec.commands.output import emit, tabulate

    kind = find_kind(kind_word)
    found = discovery.resolve(kind, name)
    module = inspect.getmodule(found)
    paper = getattr(module, "PAPER", None)
    summary = inspect.cleandoc(found.__doc__ or "")
    options = [
        {"name": option.name, "type": str(option.annotation), "default": _default(option.default), "help": option.help}
        for option in discovery.options(kind, name)
    ]
    result = {
        "kind": kind,
        "name": name,
        "class": f"{found.__module__}.{found.__qualname__}",
        "summary": summary,
        "paper": _paper(paper),
        "options": options,
    }

    def table() -> list[Any]:
        lines = [f"{result['class']}\n", summary]
        if paper is not None:
            lines.append(f"\npaper: {paper.citation()}")
        shown = [column for column in ("name", "type", "default", "help") if any(option[column] for option in options)]
        rows = [[_cell(option[column]) for column in shown] for option in options]
        return ["\n".join(lines) + "\n", tabulate(shown, rows)]

    emit(result, table, as_json)


def _explain_system(name: str, as_json: bool) -> None:
    from llmrec import discovery
    from llmrec.commands.output import emit, tabulate
    from llmrec.errors import RecipeError

    systems = {_plain(system): (system, entries) for system, entries in discovery.papers().items()}
    if _plain(name) not in systems:
        known = ", ".join(sorted(system for system, _ in systems.values()))
        raise RecipeError(f"found the system {name!r}; expected one of: {known}")
    system, entries = systems[_plain(name)]
    paper = entries[0][1]
    recipes = _recipes_of(system)
    result = {
        "system": system,
        "paper": _paper(paper),
        "files": [str(file) for file, _ in entries],
        "recipes": recipes,
    }
    rows = [["file", str(file)] for file, _ in entries] + [["recipe", recipe] for recipe in recipes]
    emit(result, lambda: [f"{system}: {paper.citation()}\n", tabulate(["", "path"], rows)], as_json)


def _recipes_of(system: str) -> list[str]:
    """Recipes lie in a folder that is called as the system, spelled in small letters."""
    from llmrec.assets import asset_names

    return [f"recipes/{name}.yaml" for name in asset_names("recipes") if _plain(name.split("/")[0]) == _plain(system)]


def _plain(name: str) -> str:
    """A name without case and punctuation: "FuXi-alpha" and "fuxi_alpha" are the same."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _paper(paper: Paper | None) -> dict[str, str] | None:
    if paper is None:
        return None
    return {"title": paper.title, "venue": paper.venue, "url_id": paper.url_id, "system": paper.system}


def _cell(value: Any) -> str:
    """An option as it is written in a recipe."""
    return value if isinstance(value, str) else json.dumps(value)


def _default(value: Any) -> Any:
    """A default as JSON can hold it."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
