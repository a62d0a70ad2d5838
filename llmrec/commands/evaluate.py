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
    parser.add_argument("--protocol", metavar="full|candidates-C", help="default: the recipe's")
    parser.add_argument("--mode", choices=("score", "generate"), help="default: the recipe's")
    parser.add_argument("--seeds", help="draws of candidates, such as 42,43,44")
    parser.add_argument("--baselines", help="measured beside the system, such as popularity,itemknn,encoder")
    parser.add_argument("--max-users", type=int, help="measure this many users only; the data fingerprint then differs")
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
    from llmrec.evaluation.results import results_table
    from llmrec.evaluation.shards import joined
    from llmrec.training.stages import evaluate_run, open_run

    changes: dict[str, Any] = {
        "split": args.split,
        "protocol": args.protocol,
        "mode": args.mode,
        "seeds": [int(seed) for seed in args.seeds.split(",")] if args.seeds else None,
        "baselines": args.baselines.split(",") if args.baselines else None,
        "max_users": args.max_users,
    }
    with joined():
        opened = open_run(Path(args.run), say=note)
        spec = opened.recipe.evaluate.model_copy(update={k: v for k, v in changes.items() if v is not None})
        record = evaluate_run(opened, type(spec).model_validate(spec.model_dump()), primary=False)
    emit({**record, "run": args.run}, lambda: results_table(record, spec.metrics), args.as_json)
    return 0
