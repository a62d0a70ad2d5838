"""List what recipes and verbs can name: types of a kind, systems, downloads, recipes, prompts, launcher profiles."""

from __future__ import annotations

import argparse
from typing import Any

EXAMPLE = "llmrec list encoders"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `llmrec list`."""
    parser.add_argument("kind", nargs="?", metavar="KIND", help="leave it out to see the kinds there are")


def run(args: argparse.Namespace) -> None:
    """Print one kind, or the kinds."""
    from llmrec.commands.output import emit, tabulate

    title, columns, rows = _rows(args.kind)
    entries = [dict(zip(columns, row, strict=True)) for row in rows]
    emit({"kind": args.kind, "entries": entries}, lambda: tabulate(columns, rows, title=title), args.as_json)


def find_kind(word: str) -> str:
    """The kind a word means, in singular or as the name of its folder ("encoder", "encoders").

    Raises:
        RecipeError: There is no such kind.
    """
    from llmrec import discovery
    from llmrec.errors import RecipeError

    for kind, folder in discovery.KINDS.items():
        if word in (kind, _plural(folder)):
            return kind
    known = ", ".join([*map(_plural, discovery.KINDS.values()), "systems", "downloads", *_asset_kinds()])
    raise RecipeError(f"found the kind {word!r}; expected one of: {known}")


def _rows(kind: str | None) -> tuple[str, list[str], list[list[Any]]]:
    from llmrec import discovery, downloads
    from llmrec.assets import asset_names

    if kind is None:
        counts = [[_plural(folder), len(discovery.names(name))] for name, folder in discovery.KINDS.items()]
        counts += [["systems", len(discovery.papers())], ["downloads", len(downloads.NAMES)]]
        counts += [[asset, len(asset_names(asset))] for asset in _asset_kinds()]
        return "kinds (llmrec list KIND)", ["kind", "entries"], counts
    if kind in ("system", "systems"):
        return "systems", ["system", "paper", "files"], _system_rows()
    if kind == "downloads":
        named = [[name, entry.summary, entry.licence] for name, entry in downloads.NAMES.items()]
        return "downloads (llmrec pull NAME)", ["name", "summary", "licence"], named
    if kind in _asset_kinds():
        return kind, ["name", "summary"], [[name, _first_comment(kind, name)] for name in asset_names(kind)]
    found = find_kind(kind)
    return kind, ["name", "summary"], [[name, line] for name, line in discovery.names(found).items()]


def _plural(folder: str) -> str:
    """A folder as people name it: "data/sources" is "sources"."""
    return folder.rsplit("/", 1)[-1]


def _asset_kinds() -> tuple[str, ...]:
    from llmrec.assets import SUFFIXES

    return tuple(SUFFIXES)


def _system_rows() -> list[list[Any]]:
    from llmrec import discovery

    rows = []
    for system, entries in sorted(discovery.papers().items(), key=lambda entry: entry[0].lower()):
        rows.append([system, entries[0][1].citation(), ", ".join(str(file) for file, _ in entries)])
    return rows


def _first_comment(kind: str, name: str) -> str:
    """The first line of the header comment of a recipe, profile (`#`) or prompt (`{# ... #}`)."""
    from llmrec.assets import find_asset

    with find_asset(kind, name).open(encoding="utf-8") as lines:
        for line in lines:
            text = line.strip().removeprefix("{#").removesuffix("#}").strip("#- ").strip()
            if text:
                return text
    return ""
