"""Save a trained recommender as a plain language model: its adapter merged into the base, and the result checked."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    from llmrec.recipe import Recipe
    from llmrec.run_dir import RunDir

EXAMPLE = "llmrec export runs/smoke-ilora --for merged --gate uniform --out exported"


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("run", metavar="RUN", help="run folder, or the Hub id of a published run")
    parser.add_argument(
        "--for",
        dest="target",
        required=True,
        choices=("merged", "vllm"),
        help="merged: any run with a language model; vllm: a plain model for a server, styles text and item_codes",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--gate",
        metavar="uniform|FILE.json|W1,W2,..",
        help="one mixture of experts for everybody, for adapters whose weights differ from user to user",
    )
    parser.add_argument(
        "--unquantised",
        action="store_true",
        help="merge into the base's own weights where the adapter was trained over quantised ones",
    )
    parser.add_argument(
        "--histories", type=int, default=32, metavar="N", help="real histories scores are compared on (default: 32)"
    )


def run(args: Namespace) -> int:
    """Refuse what cannot be merged, then merge and check.

    Raises:
        LlmrecError: The run cannot be exported like this.
        CheckFailed: The merged model is not the trained one; nothing is written.
    """
    from llmrec.commands.output import emit, tabulate
    from llmrec.llm.export import export_recommender, parse_gate
    from llmrec.recommender import load_run_recipe, system_name
    from llmrec.run_dir import RunDir
    from llmrec.run_loading import find_run, load_dataset, refuse_code

    gate = parse_gate(args.gate)
    if args.histories < 1:
        raise RecipeError(f"--histories is {args.histories}; expected 1 or more")
    folder = RunDir(find_run(args.run))
    recipe = load_run_recipe(folder)
    if not Path(args.run).is_dir():
        refuse_code(recipe, args.run)
    _refuse(args, folder, recipe, gate)
    dataset = load_dataset(folder)
    recommender, rows, trained = _load(folder, recipe, dataset, args)
    assert recipe.llm is not None
    facts: dict[str, Any] = {
        "system": system_name(recipe),
        "base_model": Path(recipe.llm.model).name if Path(recipe.llm.model).is_dir() else recipe.llm.model,
        "revision": recipe.llm.revision,
        "num_layers": recipe.llm.num_layers,
        "dataset": dataset.fingerprint,
        "target": args.target,
        "quantised": _quantised_note(args, trained),
    }
    done = export_recommender(
        recommender, Path(args.out), facts=facts, rows=rows, trained_scores=trained, gate=gate,
        item_keys=dataset.item_keys,
    )  # fmt: skip
    emit({**done.record, "out": args.out}, lambda: tabulate(["", "value"], _summary(done, args.out)), args.as_json)
    return 0


def _refuse(args: Namespace, folder: RunDir, recipe: Recipe, gate: Any) -> None:
    """Everything that can be refused before weights are read."""
    from llmrec.llm.export import refuse_gate

    if recipe.llm is None or recipe.prompt is None:
        raise RecipeError(
            f"{args.run} has no language model: it is an encoder, already stored as plain safetensors in encoder/ "
            "(AutoModel.from_pretrained reads it once llmrec is imported); there is nothing to merge"
        )
    if recipe.llm.quantize is not None and not args.unquantised:
        raise RecipeError(
            f"the adapter was trained over {recipe.llm.quantize} weights. Merged into those it would be rounded away "
            "again, since each quantised weight is one of few values; --unquantised merges it into the base's own "
            "weights, and the export states how far scores move"
        )
    if recipe.llm.quantize is None and args.unquantised:
        raise RecipeError("--unquantised: the base of this run is not quantised; leave it out")
    if args.target == "vllm" and recipe.prompt.style not in ("text", "item_codes"):
        raise RecipeError(
            f"--for vllm: the run has style {recipe.prompt.style}, whose inputs hold projected item vectors; a server "
            "of plain language models takes tokens only. Train with prompt.style: text or item_codes, or use --for "
            "merged and run it with llmrec"
        )
    adapter = folder.model / "adapter" / "adapter_config.json"
    config = json.loads(adapter.read_text(encoding="utf-8")) if adapter.is_file() else {}
    if not (folder.model / "recommender.json").is_file():
        raise CheckpointError(
            f"{args.run}: no trained model in {folder.model.name}/; train the recipe to its end first"
        )
    refuse_gate(config.get("num_experts"), "router" in config, gate)


def _load(folder: RunDir, recipe: Recipe, dataset: Any, args: Namespace) -> tuple[Any, list[dict[str, Any]], Any]:
    """The recommender to merge, real questions, and the scores of the quantised model where that was trained."""
    from llmrec.llm.parity import history_rows, history_scores
    from llmrec.recommender import load_system

    recommender, _, _ = load_system(folder, recipe, dataset, "model")
    rows = history_rows(recommender, dataset, args.histories)
    assert recipe.llm is not None
    if recipe.llm.quantize is None:
        return recommender, rows, None
    trained = history_scores(recommender, rows) if rows else None
    recipe.llm.quantize, recommender = None, None
    return load_system(folder, recipe, dataset, "model")[0], rows, trained


def _quantised_note(args: Namespace, trained: Any) -> str | None:
    if not args.unquantised:
        return None
    measured = "" if trained is None else "; `scores` compares with the quantised run"
    return f"the adapter was trained over quantised weights and is merged into unquantised ones{measured}"


def _summary(done: Any, out: str) -> list[tuple[str, Any]]:
    parity, scores = done.parity, done.scores
    rows: list[tuple[str, Any]] = [
        ("folder", out),
        ("parity", f"logits within {parity.max_abs_diff:.2g} of base and adapter ({parity.dtype}, {parity.tolerance:g} "
                   f"allowed), top-{parity.top_k} overlap {parity.top_k_overlap:.1%}"),
        ("runs on a plain server",
         "yes" if done.record["style"] in ("text", "item_codes") else "no: " + done.record["plain_server"]),
    ]  # fmt: skip
    if codes := done.record.get("item_codes"):
        found = f"log-probabilities within {codes['parity']['max_abs_diff']:.2g}; tokens from "
        found += f"{codes['first_token_id']} on, {codes['filler_tokens']} filler tokens before them"
        rows.insert(2, ("item codes", found))
    if done.record["lost"]:
        rows.append(("lost", done.record["lost"]))
    if scores is not None:
        rows.append(
            ("against the run", f"{scores.histories} histories: mean score difference {scores.mean_abs_diff:.2g}, same "
             f"best item {scores.top_1_same:.1%}, top-{scores.top_k} overlap {scores.top_k_overlap:.1%}")
        )  # fmt: skip
    return rows
