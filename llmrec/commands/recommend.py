"""Recommend with a trained run: for a history, for users of the data set, or for a file of them."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.errors import RecipeError

if TYPE_CHECKING:
    from llmrec.recommender import Recommendation, Recommender

EXAMPLE = 'llmrec recommend runs/smoke-ilora --history "1,2,3" -k 5'


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("run", metavar="RUN", help="run folder")
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--history", metavar="ID,ID,..", help="original item ids, oldest first; empty for somebody new")
    who.add_argument("--user", help="a user of the data set, by original id")
    who.add_argument("--users", metavar="FILE", help="file with one original user id a line")
    parser.add_argument("-k", type=int, default=10, help="how many (default: 10)")
    parser.add_argument("--system", choices=("auto", "model", "encoder"), default="auto")
    parser.add_argument("--on-empty", choices=("error", "popular"), default="error", help="what an empty history means")
    parser.add_argument("--on-unknown", choices=("error", "skip"), default="error", help="ids outside the catalogue")
    parser.add_argument("--reasons", type=int, default=2, metavar="N", help="nearest history items shown (default: 2)")
    parser.add_argument("--out", metavar="FILE.parquet", help="write the answers there instead of printing them all")


def run(args: Namespace) -> int:
    """Recommend and print, or write a Parquet file.

    Raises:
        LlmrecError: No such user, an unknown item, or an empty history.
    """
    from llmrec.commands.output import emit
    from llmrec.recommender import Recommender

    if args.k < 1:
        raise RecipeError(f"-k is {args.k}; expected 1 or more")
    recommender = Recommender.from_pretrained(args.run, system=args.system)
    names, histories = _histories(args, recommender)
    answers = recommender.recommend(
        histories, args.k, on_empty=args.on_empty, on_unknown=args.on_unknown, reasons=args.reasons
    )
    rows = [_row(name, rank, item) for name, items in zip(names, answers, strict=True)
            for rank, item in enumerate(items, 1)]  # fmt: skip
    if args.out:
        _write(rows, Path(args.out))
    record = {"run": args.run, "system": recommender.name, "out": args.out, "recommendations": [] if args.out else rows}
    emit(record, lambda: _table(rows if not args.out else rows[: args.k], recommender.name), args.as_json)
    return 0


def _histories(args: Namespace, recommender: Recommender) -> tuple[list[str], list[list[str]]]:
    if args.history is not None:
        return ["history"], [[part.strip() for part in args.history.split(",") if part.strip()]]
    if args.user is not None:
        return [args.user], [recommender.history_of(args.user)]
    path = Path(args.users)
    if not path.is_file():
        raise RecipeError(f"no file {path}; expected one original user id a line")
    users = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    return users, [recommender.history_of(user) for user in users]


def _row(name: str, rank: int, item: Recommendation) -> dict[str, Any]:
    because = "; ".join(
        f"{reason.title} (similarity {reason.similarity:.2f}, {reason.shared_users} users share both)"
        for reason in item.reasons
    )
    return {"user": name, "rank": rank, "item": item.item, "title": item.title, "score": item.score, "because": because}


def _table(rows: list[dict[str, Any]], system: str) -> Any:
    from llmrec.commands.output import tabulate

    headings = ["user", "rank", "item", "title", "score", "because"]
    return tabulate(headings, [[row[name] for name in headings] for row in rows], title=f"recommended by {system}")


def _write(rows: list[dict[str, Any]], path: Path) -> None:
    import os

    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    pq.write_table(pa.Table.from_pylist(rows), partial)
    os.replace(partial, path)
