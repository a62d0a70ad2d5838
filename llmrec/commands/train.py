"""Do everything a recipe says: prepare what is missing, train its stages, evaluate."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

EXAMPLE = "llmrec train recipes/smoke/ilora.yaml --out runs/smoke-ilora"


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("recipe", metavar="RECIPE", help="recipe file, or a name of `llmrec list recipes`")
    parser.add_argument("--out", metavar="RUN", help="run folder (default: runs/<name of the recipe>)")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override one value")
    parser.add_argument("--launcher", metavar="NAME", help="start under accelerate launch with this profile")
    parser.add_argument(
        "--resume", choices=("auto", "never"), default="auto", help="go on where a run stopped, or train anew"
    )
    parser.add_argument("--force", action="store_true", help="go on although checkpoints belong to something else")


def run(args: Namespace) -> int:
    """Train and evaluate.

    Raises:
        LlmrecError: The recipe, the data or a checkpoint is not what it should be.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from llmrec.assets import find_asset
    from llmrec.commands.output import emit, note
    from llmrec.recipe import load_recipe

    recipe = load_recipe(find_asset("recipes", args.recipe), args.set)
    if args.launcher is not None:
        from llmrec.commands.launch import relaunch

        relaunch(args.argv, args.launcher, recipe)
    folder = Path(args.out or Path("runs") / recipe.name)
    note(f"recipe {recipe.name} -> {folder}")
    from llmrec.training.stages import run_recipe

    if recipe.describes:
        from llmrec.training.describing import descriptions_table as table_of
    else:
        from llmrec.evaluation.results import results_tables as table_of

    record = run_recipe(
        recipe, folder, say=note, resume=args.resume, force=args.force, publish=_publisher(recipe.report.push_to)
    )
    emit({**record, "run": str(folder)}, lambda: table_of(record, recipe.evaluate.metrics), args.as_json)
    return 0


def _publisher(repo: str | None) -> Callable[[Path], object] | None:
    """What publishes the run at the end; it is refused now, not after hours of training, where nobody may publish."""
    if repo is None:
        return None
    from llmrec.commands.output import note
    from llmrec.reporting import hub

    hub.check_ready(repo)

    def publish(folder: Path) -> None:
        record = hub.push(folder, repo, private=None)
        note(f"published {record['url']} ({len(record['files'])} files, private if it is new)")

    return publish
