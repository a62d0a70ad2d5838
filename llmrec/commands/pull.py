"""Fetch a named model or data set into the cache."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

EXAMPLE = "llmrec pull movielens-100k"


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of the verb."""
    from llmrec.downloads import NAMES

    parser.add_argument("name", metavar="NAME", help="one of: " + ", ".join(NAMES))


def run(args: Namespace) -> int:
    """Fetch, or find what was fetched before.

    Raises:
        LlmrecError: Unknown name, or no source could be reached.
    """
    from llmrec.commands.output import emit, note, tabulate
    from llmrec.downloads import NAMES, pull

    folder = pull(args.name, report=note)
    entry = NAMES[args.name]
    record = {"name": args.name, "path": str(folder), "summary": entry.summary, "licence": entry.licence}
    emit(record, lambda: tabulate(["", ""], list(record.items())), args.as_json)
    return 0
