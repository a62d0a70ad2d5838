"""Measure a trained run again: another split, another protocol, or somebody's predictions file."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

EXAMPLE = "llmrec evaluate runs/smoke-ilora --protocol candidates-20"


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument(
        "--split", choices=("valid", "test", "test_lapse"), help="which targets (default: the recipe's)"
    )
    parser.add_argument(
        "--protocol",
        metavar="full|candidates-C",
        help="default: the recipe's; candidates-C-popularity (or -uniform) also says how they are drawn",
    )
    parser.add_argument("--mode", choices=("score", "generate"), help="default: the recipe's")
    parser.add_argument("--seeds", help="draws of candidates, such as 42,43,44")
    parser.add_argument("--baselines", help="measured beside the system, such as popularity,itemknn,encoder")
    parser.add_argument("--max-users", type=int, help="measure this many users only; the data fingerprint then differs")
    parser.add_argument(
        "--slice",
        dest="slices",
        action="append",
        metavar="TEXT",
        help='measure a part of the examples as well: "history<=5" (events of the user before the target), '
        '"target_events<=3" (training events of the target), joined by " and "; repeatable (default: the recipe\'s)',
    )
    parser.add_argument("--launcher", metavar="NAME", help="divide the users over processes, by accelerate launch")


def run(args: Namespace) -> int:
    """Measure and print.

    Raises:
        LlmrecError: The run is not finished, or the protocol cannot be.
    """
    if args.launcher is not None:
        from llmrec.commands.launch import relaunch

        relaunch(args.argv, args.launcher)
    from llmrec.commands.output import emit, note
    from llmrec.evaluation.protocol import KINDS
    from llmrec.evaluation.results import results_tables
    from llmrec.evaluation.shards import joined
    from llmrec.recipe import parse_recipe
    from llmrec.training.stages import evaluate_run, open_run

    kind = (args.protocol or "").rpartition("-")[2]
    changes: dict[str, Any] = {
        "split": args.split,
        "protocol": args.protocol,
        "candidate_kind": kind if kind in KINDS else None,  # what is asked for here wins over the recipe
        "mode": args.mode,
        "seeds": [int(seed) for seed in args.seeds.split(",")] if args.seeds else None,
        "baselines": args.baselines.split(",") if args.baselines else None,
        "max_users": args.max_users,
        "slices": args.slices,
    }
    with joined():
        opened = open_run(Path(args.run), say=note)
        recipe = opened.recipe.model_dump(mode="json")
        recipe["evaluate"] |= {name: value for name, value in changes.items() if value is not None}
        spec = parse_recipe(recipe, where=args.run).evaluate
        record = evaluate_run(opened, spec, primary=False)
    emit({**record, "run": args.run}, lambda: results_tables(record, spec.metrics), args.as_json)
    return 0
