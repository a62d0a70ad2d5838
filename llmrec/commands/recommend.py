"""Recommend with a trained run: for a history, for users of the data set, or for a file of them."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.commands.questions import Question, parse_time
from llmrec.errors import RecipeError

if TYPE_CHECKING:
    from llmrec.recommender import Recommender

EXAMPLE = 'llmrec recommend runs/smoke-ilora --history "1,2,3" -k 5'


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("run", metavar="RUN", help="run folder, or the Hub id of a published run")
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--history", metavar="ID,ID,..", help="original item ids, oldest first; empty for somebody new")
    who.add_argument("--user", help="a user of the data set, by original id")
    who.add_argument("--users", metavar="FILE", help="file with one original user id a line")
    parser.add_argument("-k", type=int, default=10, help="how many (default: 10)")
    parser.add_argument("--candidates", metavar="ID,ID,..", help="rank these items only, by original id")
    parser.add_argument(
        "--at", metavar="TIME", help="time of the question, for encoders that read it: seconds or an ISO date (UTC)"
    )
    parser.add_argument(
        "--times", metavar="S,S,..", help="seconds of the events of --history, for encoders that read them"
    )
    parser.add_argument("--system", choices=("auto", "model", "encoder"), default="auto")
    parser.add_argument("--on-empty", choices=("error", "popular"), default="error", help="what an empty history means")
    parser.add_argument("--on-unknown", choices=("error", "skip"), default="error", help="ids outside the catalogue")
    parser.add_argument("--reasons", type=int, default=2, metavar="N", help="nearest history items shown (default: 2)")
    parser.add_argument(
        "--out",
        metavar="FILE.parquet",
        help="write the answers there instead of printing them all; a job for --users that was stopped goes on",
    )
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="who answers --users")
    parser.add_argument("--actors", type=int, default=2, metavar="N", help="loaded runs with --engine ray (default: 2)")
    parser.add_argument("--launcher", metavar="NAME", help="divide --users over processes, by accelerate launch")


def run(args: Namespace) -> int:
    """Recommend and print, or write a Parquet file.

    Raises:
        LlmrecError: No such user, an unknown item, an empty history, or a question the run cannot answer.
    """
    if args.launcher is not None:
        from llmrec.commands.launch import relaunch

        relaunch(args.argv, args.launcher)
    from llmrec.commands.output import emit
    from llmrec.evaluation.shards import joined

    _check_engine(args)
    question = _question(args)
    with joined() as here:
        if args.users is not None and args.out:
            return _answer_file(args, question)
        if args.users is not None and here.count > 1:
            raise RecipeError(f"{here.count} processes answer --users together: give the file they write with --out")
        recommender = question.open()
        rows = question.answer(recommender, *_histories(args, recommender))
        if args.out and here.is_first:
            _write(rows, Path(args.out))
    record = {"run": args.run, "system": recommender.name, "out": args.out, "recommendations": [] if args.out else rows}
    emit(record, lambda: _table(rows if not args.out else rows[: args.k], recommender.name), args.as_json)
    return 0


def _question(args: Namespace) -> Question:
    return Question(
        run=args.run,
        system=args.system,
        k=args.k,
        on_empty=args.on_empty,
        on_unknown=args.on_unknown,
        reasons=args.reasons,
        candidates=None if args.candidates is None else tuple(_ids(args.candidates)),
        at=None if args.at is None else parse_time(args.at),
    )


def _check_engine(args: Namespace) -> None:
    if args.actors < 1:
        raise RecipeError(f"--actors is {args.actors}; expected 1 or more")
    if args.engine == "ray":
        from llmrec.commands.ray_actors import require_ray

        if args.users is None or not args.out:
            raise RecipeError("--engine ray answers many users: give --users FILE and --out FILE.parquet")
        require_ray()


def _answer_file(args: Namespace, question: Question) -> int:
    from llmrec.commands.output import emit, tabulate
    from llmrec.commands.user_shards import read_users, recommend_users

    done = recommend_users(
        question, read_users(Path(args.users)), Path(args.out), engine=args.engine, actors=args.actors
    )
    record = {"run": args.run, "out": args.out, "recommendations": [], **done}
    emit(
        record, lambda: tabulate(["users", "system", "file"], [[done["users"], done["system"], args.out]]), args.as_json
    )
    return 0


def _histories(args: Namespace, recommender: Recommender) -> tuple[list[str], list[list[str]], list[list[int]] | None]:
    """Names, histories and, where the system reads them, their times."""
    if args.times is not None and args.history is None:
        raise RecipeError("--times belongs to --history; the times of users of the data set are known")
    if args.history is not None:
        return ["history"], [_ids(args.history)], None if args.times is None else [_seconds(args.times)]
    from llmrec.commands.user_shards import read_users, times_of

    users = [args.user] if args.user is not None else read_users(Path(args.users))
    return users, [recommender.history_of(user) for user in users], times_of(recommender, users)


def _seconds(text: str) -> list[int]:
    parts = _ids(text)
    if wrong := [part for part in parts if not part.lstrip("-").isdigit()]:
        raise RecipeError(f"--times: found {wrong[0]!r}, expected whole seconds, one for each event")
    return [int(part) for part in parts]


def _ids(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _table(rows: list[dict[str, Any]], system: str) -> Any:
    from llmrec.commands.output import tabulate

    headings = ["user", "rank", "item", "title", "score", "because"]
    return tabulate(headings, [[row[name] for name in headings] for row in rows], title=f"recommended by {system}")


def _write(rows: list[dict[str, Any]], path: Path) -> None:
    import os

    import pyarrow as pa
    import pyarrow.parquet as pq

    from llmrec.commands.user_shards import row_schema

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    pq.write_table(pa.Table.from_pylist(rows, schema=row_schema()), partial)
    os.replace(partial, path)
