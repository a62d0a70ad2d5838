"""Turn raw interactions into a data set: filter, number, order and split them.

SOURCE is a named data set, a file (CSV, JSON Lines, Parquet), or a folder with interactions.* and items.*. Column
names are recognised and shown; --columns overrides them.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.errors import RecipeError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llmrec.data.prepare import PrepareOptions, Report

EXAMPLE = "llmrec prepare synthetic --out runs/synthetic --min-user 3"
FORMATS = ("movielens", "recbole", "amazon", "csv", "jsonl", "parquet", "table", "synthetic")


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("source", metavar="SOURCE", help="named data set, file or folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the prepared data set")
    parser.add_argument("--format", choices=FORMATS, help="layout of SOURCE (default: by file names)")
    parser.add_argument("--items", nargs="+", default=[], metavar="FILE", help="more item files, joined on the item id")
    parser.add_argument("--positive", default="all", metavar="RULE", help="events to keep, e.g. 'rating >= 4'")
    parser.add_argument(
        "--repeats", choices=("keep", "first", "last"), default="keep", help="repeated events of one user and item"
    )
    parser.add_argument(
        "--columns", action="append", default=[], metavar="OURS=THEIRS,..", help="user=..,item=..,time=..,order=.."
    )
    parser.add_argument("--min-user", type=int, default=1, metavar="N", help="fewest events of a user (default: 1)")
    parser.add_argument("--min-item", type=int, default=1, metavar="N", help="fewest events of an item (default: 1)")
    parser.add_argument(
        "--split",
        default="leave_one_out",
        metavar="RULE",
        help="leave_one_out (default), temporal_80_10_10, user_80_10_10, gap_30 (any gap_N) or given",
    )
    parser.add_argument("--on-bad-rows", choices=("stop", "quarantine"), default="stop", help="what to do with them")
    parser.add_argument(
        "--engine",
        choices=("duckdb", "spark"),
        default="duckdb",
        help="where tables are computed (spark needs Java 17)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of user_80_10_10 (default: 0)")
    parser.add_argument("--name", help="name of the data set (default: that of the source)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="option of a generated source, such as users=300 (`llmrec explain source synthetic` lists them)",
    )  # fmt: skip


def run(args: Namespace) -> int:
    """Prepare and write the folder.

    Raises:
        RecipeError: A flag cannot mean what it says.
        DataError: The source cannot be read, or nothing is left of it.
    """
    from llmrec.commands.output import emit, note
    from llmrec.data.card import REJECTED, REJECTED_IMAGES, write_folder
    from llmrec.data.prepare import prepare_source

    options = options_from(args)
    with _Progress() as tell:
        preparation = prepare_source(args.source, options, report=tell)
        tell("writing")
        folder = write_folder(preparation, args.out)
    rejected = preparation.rejected.num_rows if preparation.rejected is not None else 0
    record: dict[str, Any] = {
        **preparation.dataset.summary(),
        "folder": str(folder),
        "rejected": rejected,
        "rejected_file": str(folder / REJECTED) if rejected else None,
    }
    if preparation.rejected_images is not None:
        images = preparation.rejected_images.num_rows
        record["rejected_images"] = images
        record["rejected_images_file"] = str(folder / REJECTED_IMAGES) if images else None
    if args.as_json:
        for line in record["notes"]:
            note(f"note: {line}")
    emit(record, lambda: _tables(record), args.as_json)
    return 0


def options_from(args: Namespace) -> PrepareOptions:
    """Options of the flags.

    Raises:
        RecipeError: A rule or column mapping cannot be read.
    """
    from llmrec.data.prepare import PrepareOptions
    from llmrec.recipe import apply_override

    source_options: dict[str, Any] = {}
    for text in args.set:
        apply_override(source_options, text)
    return PrepareOptions(
        source_options=source_options,
        min_user=args.min_user,
        min_item=args.min_item,
        positive=args.positive,
        repeats=args.repeats,
        split=args.split,
        seed=args.seed,
        columns=parse_columns(args.columns),
        items=tuple(Path(path) for path in args.items),
        name=args.name,
        format=args.format,
        on_bad_rows=args.on_bad_rows,
        engine=args.engine,
    )


def parse_columns(texts: list[str]) -> dict[str, str]:
    """`user=a,item=b` (given once or several times) as a mapping, ours -> theirs.

    Raises:
        RecipeError: A part is not OURS=THEIRS, or one of ours is named twice.
    """
    columns: dict[str, str] = {}
    for part in (part for text in texts for part in text.split(",")):
        ours, sign, theirs = (piece.strip() for piece in part.partition("="))
        if not (ours and sign and theirs):
            raise RecipeError(f"--columns: found {part!r}, expected OURS=THEIRS, as in user=customer_id,item=sku")
        if ours in columns:
            raise RecipeError(f"--columns: {ours!r} is named twice ({columns[ours]!r} and {theirs!r})")
        columns[ours] = theirs
    return columns


def _tables(record: dict[str, Any]) -> list[RenderableType]:
    from llmrec.commands.output import tabulate

    lengths = record["history_length"]
    figures = [
        ("users", f"{record['users']:,}"),
        ("items", f"{record['items']:,}"),
        ("interactions", f"{record['interactions']:,}"),
        ("density", f"{record['density']:.4%}"),
        ("events per user", f"{lengths['min']} / {lengths['median']:g} / {lengths['max']} (min / median / max)"),
        *((f"split {name}", f"{count:,}") for name, count in record["splits"].items()),
        *((name.replace("_", " "), f"{count:,}") for name, count in record["counts"].items()),
        ("fingerprint", record["fingerprint"]),
    ]
    parts: list[RenderableType] = [
        tabulate(("figure", "value"), figures, title=f"{record['name']} -> {record['folder']}")
    ]
    if record["columns"]:
        parts.append(tabulate(("our column", "source column"), record["columns"].items(), title="columns recognised"))
    parts.extend(f"note: {line}" for line in record["notes"])
    if record["rejected"]:
        parts.append(f"note: {record['rejected']:,} bad rows were left out; see {record['rejected_file']}")
    if record.get("rejected_images"):
        parts.append(f"note: {record['rejected_images']:,} images were left out; see {record['rejected_images_file']}")
    return parts


class _Progress:
    """A moving line on standard error where that is a terminal; silent elsewhere."""

    def __enter__(self) -> Report:
        from rich.console import Console

        self._status = Console(file=sys.stderr).status("starting")
        self._status.start()
        return lambda line: self._status.update(line)

    def __exit__(self, *exception: object) -> None:
        self._status.stop()
