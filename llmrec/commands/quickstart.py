"""From nothing to a measured LLM recommender: data, SASRec, LoRA and iLoRA on one language model, a table, a report."""

from __future__ import annotations

import os
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmrec.recipe import Recipe

EXAMPLE = "llmrec quickstart --smoke --out runs/smoke"
RECIPES = {
    "sasrec": "sasrec/movielens",
    "lora": "lora/movielens_item_slots",
    "ilora": "ilora/movielens_item_slots",
}
SMOKE_RECIPES = {"sasrec": "smoke/sasrec", "lora": "smoke/lora", "ilora": "smoke/ilora"}
METRICS = ["ndcg@10", "hr@10", "mrr@10"]
TESTED = [("ilora", "lora"), ("ilora", "sasrec"), ("lora", "sasrec"), ("ilora", "popularity")]


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("--out", default="runs/quickstart", metavar="DIR", help="where everything goes")
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes: made-up data, a tiny model")
    parser.add_argument("--seed", type=int, default=42, help="seed of all parts (default: 42)")


def run(args: Namespace) -> int:
    """Run the whole path; rerunning goes on where it stopped.

    Raises:
        LlmrecError: A part could not be fetched, or the folder holds something else.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from llmrec.commands.output import emit, note
    from llmrec.evaluation.results import results_table
    from llmrec.run_dir import write_json

    started = time.monotonic()
    out = Path(args.out)
    note(f"quick start -> {out}" + (" (smoke: synthetic data, tiny model)" if args.smoke else ""))
    records: dict[str, dict[str, Any]] = {}
    for name, recipe_name in (SMOKE_RECIPES if args.smoke else RECIPES).items():
        began = time.monotonic()
        note(f"\n[{name}]")
        records[name] = _train(_recipe(name, recipe_name, out, args), out / name, note)
        note(f"[{name}] {time.monotonic() - began:.0f} s")
    record = _merge(records)
    record["minutes"] = round((time.monotonic() - started) / 60, 2)
    record["tests"] = _paired_tests(out, record["evaluation"])
    report = _report(out, args.smoke)
    record["report"] = str(report) if report else None
    write_json(out / "metrics.json", record)
    example = _example(out)
    emit(
        {**record, "example": example},
        lambda: [results_table(record, METRICS), *_tables(record, example)],
        args.as_json,
    )
    return 0


def _recipe(name: str, recipe_name: str, out: Path, args: Namespace) -> Recipe:
    """The recipe, on the shared data set, with the shared encoder."""
    from llmrec.assets import find_asset
    from llmrec.recipe import load_recipe, parse_recipe

    raw = load_recipe(find_asset("recipes", recipe_name)).model_dump(mode="json")
    raw["seed"] = args.seed
    if name != "sasrec":
        raw["dataset"]["source"] = str(out / "sasrec" / "dataset")
        raw["dataset"]["options"] = {}
        raw["encoder"] = {"type": raw["encoder"]["type"], "pretrained": str(out / "sasrec")}
        raw["stages"] = [stage for stage in raw["stages"] if stage["train"] != "encoder"]
        raw["evaluate"]["baselines"] = []
    return parse_recipe(raw, where=recipe_name)


def _train(recipe: Recipe, folder: Path, say: Any) -> dict[str, Any]:
    from llmrec.training.stages import run_recipe

    return run_recipe(recipe, folder, say=say)


def _merge(records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One record of all systems; they were measured under one protocol on one data set, or this fails."""
    from llmrec.errors import CheckFailed

    first = next(iter(records.values()))
    models: dict[str, Any] = {}
    for name, record in records.items():
        if record["fingerprint"] != first["fingerprint"]:
            raise CheckFailed(f"{name} was measured under {record['fingerprint']}, the others {first['fingerprint']}")
        models.update(record["models"])
    return {**first, "models": models}


def _paired_tests(out: Path, slug: str) -> list[dict[str, Any]]:
    from llmrec.commands.compare import compare
    from llmrec.evaluation.predictions import load_predictions

    home = {"sasrec": "sasrec", "popularity": "sasrec", "itemknn": "sasrec", "lora": "lora", "ilora": "ilora"}

    def load(name: str) -> Any:
        return load_predictions(out / home[name] / "evaluations" / slug / "predictions" / f"{name}.parquet")

    return [{"a": a, "b": b, **compare(load(a), load(b), metric="ndcg@10")} for a, b in TESTED]


def _report(out: Path, smoke: bool) -> Path | None:
    from llmrec.reporting.report import write_report

    title = "Quick start (smoke)" if smoke else "Quick start: MovieLens-100K with SmolLM2-135M"
    write_report([out / name for name in RECIPES], out / "report.html", title=title)
    return out / "report.html"


def _example(out: Path) -> dict[str, Any]:
    """Recommendations for one user, with reasons that can be checked."""
    from llmrec.recommender import Recommender

    recommender = Recommender.from_pretrained(out / "ilora")
    user = recommender.dataset.user_keys[1]
    history = recommender.history_of(user)
    items = recommender.recommend([history], 5, reasons=2)[0]
    titles = dict(zip(recommender.dataset.item_keys, recommender.dataset.item_titles, strict=True))
    return {
        "user": user,
        "latest": [titles[key] for key in history[-5:]],
        "recommended": [
            {
                "item": item.item,
                "title": item.title,
                "score": item.score,
                "because": [str(reason) for reason in item.reasons],
            }
            for item in items
        ],
    }


def _tables(record: dict[str, Any], example: dict[str, Any]) -> list[Any]:
    from llmrec.commands.output import tabulate

    tests = tabulate(
        ["paired test, ndcg@10", "difference", "low", "high", "p"],
        [
            [
                f"{test['a']} - {test['b']}",
                *(test["difference"][part] for part in ("mean", "low", "high")),
                test["p_value"],
            ]
            for test in record["tests"]
        ],
    )
    shown = tabulate(
        ["recommended by ilora", "nearest films of the history"],
        [[item["title"], "; ".join(item["because"])] for item in example["recommended"]],
        title=f"user {example['user']}, latest: {', '.join(example['latest'])}",
    )
    return [tests, shown, f"report: {record['report']}   ({record['minutes']} minutes)"]
