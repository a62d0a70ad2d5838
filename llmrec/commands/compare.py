"""`llmrec compare`: is the difference between two systems more than noise?

Reads the per-user tables of two evaluations of the same question, or one of them and anybody's predictions file.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.errors import CheckFailed, DataError, RecipeError

if TYPE_CHECKING:
    from rich.console import RenderableType

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
    parser.add_argument("--dataset", metavar="DIR", help="prepared data set that --predictions is scored against")
    parser.add_argument(
        "--on-bad-rows", choices=("stop", "quarantine"), default="stop", help="what to do with rows that do not fit"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of resampling and sign flips (default: 0)")


def run(args: Namespace) -> int:
    """Compare; exit status 0 whether or not the systems differ.

    Raises:
        RecipeError: The wrong number of runs, an unknown system or metric.
        CheckFailed: The two evaluations answer different questions.
    """
    from llmrec.commands.output import emit

    first, second = _load_both(args)
    record = compare(first, second, metric=args.metric, seed=args.seed)
    emit(record, lambda: _tables(record), args.as_json)
    return 0


def compare(a: EvalResult, b: EvalResult, *, metric: str | None = None, seed: int = 0) -> dict[str, Any]:
    """Paired test of two results on per-user values.

    Args:
        a, b: Results of one protocol on one data set.
        metric: Per-user metric; by default ndcg@10, or hr@1 where that cut says nothing.
        seed: Seed of resampling and sign flips.

    Returns:
        JSON-ready record: means, difference a - b with its interval, p-values.

    Raises:
        CheckFailed: Fingerprints or users differ.
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
        "users": test.users,
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


def _load_both(args: Namespace) -> tuple[EvalResult, EvalResult]:
    from llmrec.evaluation.predictions import load_predictions, score_predictions

    wanted = 1 if args.predictions else 2
    if len(args.runs) != wanted:
        raise RecipeError(
            f"compare takes two runs, or one run and --predictions FILE; found {len(args.runs)} run(s)"
            + (" and --predictions" if args.predictions else "")
        )
    results = [load_predictions(find_predictions(run, args.evaluation)) for run in args.runs]
    if not args.predictions:
        if results[0].name == results[1].name:  # two runs of one kind of system: the folders tell them apart
            first, second = (replace(r, name=f"{r.name} ({run})") for r, run in zip(results, args.runs, strict=True))
            return first, second
        return results[0], results[1]
    if not args.dataset:
        raise RecipeError("--predictions needs --dataset DIR, the prepared data set whose targets are scored")
    from llmrec.data.dataset import InteractionDataset

    dataset = InteractionDataset.load(args.dataset)
    if dataset.fingerprint != results[0].dataset:
        raise CheckFailed(
            f"{args.dataset} is data set {dataset.fingerprint}, but {results[0].name} was evaluated on "
            f"{results[0].dataset}; give the data set of the run"
        )
    theirs = score_predictions(args.predictions, dataset, results[0].protocol, on_bad_rows=args.on_bad_rows)
    return results[0], theirs


def find_predictions(run: str, evaluation: str | None = None) -> Path:
    """Path of a per-user table named by "folder" (the system it trained), "folder:system" or "file.parquet".

    Args:
        run: What the user wrote.
        evaluation: Name of the evaluation; by default the run's main one, or its only one.

    Raises:
        DataError: No such run, evaluation or system.
        RecipeError: The run holds several and none is named.
    """
    folder, system = Path(run), None
    if not folder.exists() and ":" in run:
        head, _, system = run.rpartition(":")
        folder = Path(head)
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
    table = tabulate(
        ("system", record["metric"], "95% interval"),
        [(name, f"{value['mean']:.4f}", f"{value['low']:.4f} .. {value['high']:.4f}") for name, value in rows],
        title=f"{record['protocol']}; {record['users']} users; fingerprint {record['fingerprint']}",
    )
    lines = [f"paired sign-flip test: p = {record['p_value']:.4g}"]
    if record["p_value_mcnemar"] is not None:
        lines.append(f"exact McNemar test: p = {record['p_value_mcnemar']:.4g}")
    lines += [f"note, {system['name']}: {note}" for system in record["systems"] for note in system["notes"]]
    return [table, *map(Text, lines)]
