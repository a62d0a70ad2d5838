"""`llmrec report`: runs as one HTML page with tables, intervals, drawings and sample recommendations.

The page is self-contained: it can be mailed, archived or opened without a network. Runs that answered the same question
share a table; every other question gets a section of its own.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.errors import RecipeError

if TYPE_CHECKING:
    from rich.console import RenderableType

EXAMPLE = "llmrec report runs/quickstart --out report.html"


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--out", metavar="FILE", help="the page (default: RUN/report.html of a single run)")
    parser.add_argument("--title", help="headline (default: the names of the runs)")


def run(args: Namespace) -> int:
    """Write the page.

    Raises:
        RecipeError: Several runs and no `--out`.
        DataError: A folder is no run, or nothing has been evaluated.
        DependencyError: Matplotlib is missing.
    """
    from llmrec.commands.output import emit
    from llmrec.reporting.report import write_report
    from llmrec.run_dir import RunDir

    if args.out is None and len(args.runs) > 1:
        raise RecipeError(f"report of {len(args.runs)} runs needs --out FILE, such as --out report.html")
    out = Path(args.out) if args.out is not None else RunDir(Path(args.runs[0])).report
    record = write_report([Path(folder) for folder in args.runs], out, title=args.title)
    emit(record, lambda: _table(record), args.as_json)
    return 0


def _table(record: dict[str, Any]) -> list[RenderableType]:
    from rich.text import Text

    from llmrec.commands.output import tabulate

    rows = [(s["protocol"], s["fingerprint"], s["users"], ", ".join(s["metrics"])) for s in record["sections"]]
    table = tabulate(("protocol", "fingerprint", "users", "systems"), rows, title=record["title"])
    notices = [f"{name}: {text}" for name, texts in record["notices"].items() for text in texts]
    return [table, *map(Text, notices), Text(f"{record['report']}: {record['bytes'] / 1000:,.0f} kB")]
