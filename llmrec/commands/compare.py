"""`llmrec compare`: is the difference between two systems more than noise?

Reads the per-user tables of two evaluations of the same question, or one of them and anybody's predictions file, and
compares them on all examples, on a slice of them, or on given users.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.errors import CheckFailed, DataError, RecipeError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from rich.console import RenderableType

    from llmrec.data.dataset import InteractionDataset
    from llmrec.evaluation.results import EvalResult

EXAMPLE = "llmrec compare runs/quickstart:sasrec runs/quickstart:popularity --metric ndcg@10"


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folder, folder:system, or a .parquet of predictions"
    )
    parser.add_argument("--metric", help="per-user metric: hr@K, ndcg@K, mrr@K, auc or valid_ratio (default: ndcg@10)")
    parser.add_argument("--evaluation", metavar="NAME", help="which evaluation of a run (default: its main one)")
    parser.add_argument("--predictions", metavar="FILE", help="compare one run with this file instead of a second run")
    parser.add_argument(
        "--slice",
        dest="slices",
        action="append",
        default=[],
        metavar="TEXT",
        help='only these examples, as `llmrec evaluate` counts them: "history<=5", "target_events<=3"; repeatable: '
        "all must hold",
    )
    parser.add_argument("--users", metavar="FILE", help="only these users: a text file with one original id a line")
    parser.add_argument(
        "--dataset",
        metavar="DIR",
        help="prepared data set that --predictions is scored against and --slice counts in (default: the first run's)",
    )
    parser.add_argument(
        "--on-bad-rows", choices=("stop", "quarantine"), default="stop", help="what to do with rows that do not fit"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of resampling and sign flips (default: 0)")


def run(args: Namespace) -> int:
    """Compare; exit status 0 whether or not the systems differ.

    Raises:
        RecipeError: The wrong number of runs, an unknown system, metric or slice, or no data set where one is needed.
        DataError: A file cannot be read, an id is unknown, or no example is left.
        CheckFailed: The two evaluations answer different questions, or the data set is another one.
    """
    from llmrec.commands.output import emit
    from llmrec.evaluation.predictions import score_predictions

    results = _load_runs(args)
    dataset = _load_dataset(args, results[0]) if args.predictions or args.slices else None
    if dataset is not None and args.predictions:
        protocol = results[0].protocol
        results.append(score_predictions(args.predictions, dataset, protocol, on_bad_rows=args.on_bad_rows))
    part = _part(args, results[0], dataset)
    record = compare(results[0], results[1], metric=args.metric, seed=args.seed, part=part)
    emit(record, lambda: _tables(record), args.as_json)
    return 0


@dataclass(frozen=True)
class Part:
    """A part of the examples.

    Args:
        name: What people call it, such as "history<=5".
        rows: Per-user table -> [n] bool, its rows inside.
    """

    name: str
    rows: Callable[[pa.Table], np.ndarray]


def compare(
    a: EvalResult, b: EvalResult, *, metric: str | None = None, seed: int = 0, part: Part | None = None
) -> dict[str, Any]:
    """Paired test of two results on per-user values.

    Args:
        a, b: Results of one protocol on one data set.
        metric: Per-user metric; by default ndcg@10, or hr@1 where that cut says nothing.
        seed: Seed of resampling and sign flips.
        part: Compare on these examples only.

    Returns:
        JSON-ready record: means, difference a - b with its interval, p-values; "slice" is the name of the part, or
        null, and "users" and "examples" are those inside.

    Raises:
        CheckFailed: Fingerprints or users differ.
        DataError: The part holds no example.
        RecipeError: The metric is not defined for these results.
    """
    from llmrec.evaluation.intervals import bootstrap_mean, paired_test
    from llmrec.evaluation.results import check_metric
    from llmrec.evaluation.tables import per_user

    if a.fingerprint != b.fingerprint:
        raise CheckFailed(
            "these evaluations answer different questions and cannot be compared:\n"
            f"  {a.name}: {a.label}, data set {a.dataset} [{a.fingerprint}]\n"
            f"  {b.name}: {b.label}, data set {b.dataset} [{b.fingerprint}]\n"
            "  remedy: evaluate both with the same --split and --protocol on the same data set"
        )
    metric = metric or _default_metric(a)
    for result in (a, b):
        check_metric(result, metric)
    if part is not None:
        a, b = (replace(one, predictions=one.predictions.filter(part.rows(one.predictions))) for one in (a, b))
        if not a.predictions.num_rows and not b.predictions.num_rows:
            raise DataError(f"no example lies in {part.name}", expected="a part with at least one example")
    (users_a, values_a), (users_b, values_b) = per_user(a.predictions, metric), per_user(b.predictions, metric)
    if users_a != users_b or _examples_of(a) != _examples_of(b):
        raise CheckFailed(
            f"the tables cover different users or targets: {a.name} {len(users_a)} users and {a.predictions.num_rows} "
            f"rows, {b.name} {len(users_b)} and {b.predictions.num_rows}; evaluate both on the whole split"
        )
    test = paired_test(values_a, values_b, seed=seed)
    return {
        "metric": metric,
        "protocol": a.protocol.label(),
        "fingerprint": a.fingerprint,
        "slice": None if part is None else part.name,
        "users": test.users,
        "examples": a.predictions.num_rows,
        "systems": [
            {"name": r.name, "measured": r.measured, "notes": list(r.notes), **bootstrap_mean(values, seed).to_dict()}
            for r, values in ((a, values_a), (b, values_b))
        ],
        "difference": test.difference.to_dict(),
        "p_value": test.p_value,
        "p_value_mcnemar": test.mcnemar,
    }


def _examples_of(result: EvalResult) -> list[tuple[int, int]]:
    columns = (result.predictions.column(name).to_pylist() for name in ("example_id", "seed"))
    return sorted(zip(*columns, strict=True))


def _default_metric(result: EvalResult) -> str:
    size = result.protocol.num_candidates
    return "hr@1" if result.protocol.mode == "generate" or (size is not None and size <= 10) else "ndcg@10"


def _load_runs(args: Namespace) -> list[EvalResult]:
    from llmrec.evaluation.predictions import load_predictions

    wanted = 1 if args.predictions else 2
    if len(args.runs) != wanted:
        raise RecipeError(
            f"compare takes two runs, or one run and --predictions FILE; found {len(args.runs)} run(s)"
            + (" and --predictions" if args.predictions else "")
        )
    results = [load_predictions(find_predictions(run, args.evaluation)) for run in args.runs]
    if len({result.name for result in results}) < wanted:  # two runs of one kind: the folders tell them apart
        return [replace(r, name=f"{r.name} ({run})") for r, run in zip(results, args.runs, strict=True)]
    return results


def _load_dataset(args: Namespace, first: EvalResult) -> InteractionDataset:
    """The data set `first` was evaluated on: of --dataset, or of the run folder it comes from."""
    from llmrec.data.dataset import InteractionDataset
    from llmrec.run_dir import RunDir

    run = _run_and_system(args.runs[0])[0]
    folder = Path(args.dataset) if args.dataset else RunDir(run).dataset
    if not args.dataset and not (folder / "meta.json").is_file():
        raise RecipeError(
            f"{'--predictions' if args.predictions else '--slice'} needs --dataset DIR, the prepared data set that was "
            f"evaluated: {run} is no run folder that holds one"
        )
    dataset = InteractionDataset.load(folder)
    if dataset.fingerprint != first.dataset:
        raise CheckFailed(
            f"{folder} is data set {dataset.fingerprint}, but {first.name} was evaluated on {first.dataset}; "
            "give the data set of the run, evaluated without --max-users"
        )
    return dataset


def _part(args: Namespace, first: EvalResult, dataset: InteractionDataset | None) -> Part | None:
    """What --slice and --users say together; None where neither is given."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    from llmrec.evaluation.slices import parse_slice, row_counts

    parts = []
    if args.slices and dataset is not None:
        wanted = parse_slice(" and ".join(str(parse_slice(text)) for text in args.slices))
        examples, counts = dataset.histories(first.protocol.split, 1), dataset.context().train_counts  # type: ignore[arg-type]
        parts.append(Part(str(wanted), lambda table: wanted.holds(row_counts(table, examples, counts))))
    if args.users:
        keys = pa.array(read_users(Path(args.users), first), pa.string())
        name = f"users of {args.users}"
        parts.append(Part(name, lambda table: pc.is_in(table.column("user_key"), keys).to_numpy()))
    if not parts:
        return None
    return Part(" and ".join(p.name for p in parts), lambda table: np.all([p.rows(table) for p in parts], axis=0))


def read_users(path: Path, result: EvalResult) -> list[str]:
    """Original user ids of a text file, one a line; empty lines are passed over.

    Raises:
        DataError: An id is of no evaluated user, or there are none.
    """
    # Bytes that are no text become an unknown id, which is refused with its line.
    lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    keys = {number: line.strip() for number, line in enumerate(lines, start=1) if line.strip()}
    known = set(result.predictions.column("user_key").to_pylist())
    for number, key in keys.items():
        if key not in known:
            raise DataError(
                "no user of this id was evaluated",
                file=path,
                line=number,
                found=key,
                expected=f"original ids of users with a target in {result.protocol.label()}, one a line",
            )
    if not keys:
        raise DataError("names no user", file=path, expected="one original user id a line")
    return list(keys.values())


def find_predictions(run: str, evaluation: str | None = None) -> Path:
    """Path of a per-user table named by "folder" (the system it trained), "folder:system" or "file.parquet".

    Args:
        run: What the user wrote.
        evaluation: Name of the evaluation; by default the run's main one, or its only one.

    Raises:
        DataError: No such run, evaluation or system.
        RecipeError: The run holds several and none is named.
    """
    folder, system = _run_and_system(run)
    if folder.is_file():
        return folder
    if not folder.is_dir():
        raise DataError("no such run", file=run, expected="a run folder, written by `llmrec train` or `quickstart`")
    tables = folder / "evaluations" / _evaluation_of(folder, evaluation) / "predictions"
    systems = {path.stem: path for path in sorted(tables.glob("*.parquet"))}
    if system is None and len(systems) > 1:
        system = _own_system(folder)  # the others are baselines beside it
    if system is not None and system not in systems:
        raise DataError(f"no system {system!r} in this evaluation", file=tables, expected=", ".join(systems) or "none")
    if system is None and len(systems) != 1:
        raise RecipeError(
            f"{tables} holds {len(systems)} systems ({', '.join(systems) or 'none'}); name one, such as {run}:NAME"
        )
    return systems[system] if system is not None else next(iter(systems.values()))


def _run_and_system(run: str) -> tuple[Path, str | None]:
    """The path a user named, and the system where "folder:system" names one."""
    if Path(run).exists() or ":" not in run:
        return Path(run), None
    head, _, system = run.rpartition(":")
    return Path(head), system


def _own_system(folder: Path) -> str | None:
    """The system a run trained; None where the folder does not say."""
    from llmrec.recommender import load_run_recipe, system_name
    from llmrec.run_dir import RunDir

    run = RunDir(folder)
    return system_name(load_run_recipe(run)) if run.recipe.is_file() else None


def _evaluation_of(folder: Path, wanted: str | None) -> str:
    present = sorted(path.name for path in (folder / "evaluations").glob("*") if (path / "predictions").is_dir())
    main = None
    if (folder / "metrics.json").is_file():
        main = json.loads((folder / "metrics.json").read_text(encoding="utf-8")).get("evaluation")
    chosen = wanted or main or (present[0] if len(present) == 1 else None)
    if chosen is None and present:
        raise RecipeError(f"{folder} holds several evaluations; choose one with --evaluation: {', '.join(present)}")
    if chosen not in present:
        raise DataError(
            "the run has no such evaluation" if chosen else "the run has no evaluation",
            file=folder,
            found=", ".join(present) or "none",
            expected=chosen,
            remedy="run: llmrec evaluate RUN",
        )
    return str(chosen)


def _tables(record: dict[str, Any]) -> list[RenderableType]:
    from rich.text import Text

    from llmrec.commands.output import tabulate

    rows = [(system["name"], system) for system in record["systems"]] + [("difference", record["difference"])]
    inside = "" if record["slice"] is None else f"{record['slice']}: "
    table = tabulate(
        ("system", record["metric"], "95% interval"),
        [(name, f"{value['mean']:.4f}", f"{value['low']:.4f} .. {value['high']:.4f}") for name, value in rows],
        title=f"{record['protocol']}; {inside}{record['users']} users; fingerprint {record['fingerprint']}",
    )
    lines = [f"paired sign-flip test: p = {record['p_value']:.4g}"]
    if record["p_value_mcnemar"] is not None:
        lines.append(f"exact McNemar test: p = {record['p_value_mcnemar']:.4g}")
    lines += [f"note, {system['name']}: {note}" for system in record["systems"] for note in system["notes"]]
    return [table, *map(Text, lines)]
