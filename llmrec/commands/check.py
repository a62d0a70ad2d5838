"""Check a recipe without training: every name, option and combination, one rendered prompt, parameter counts."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.errors import RecipeError

if TYPE_CHECKING:
    from llmrec.recipe import Recipe

EXAMPLE = "llmrec check recipes/smoke/ilora.yaml"


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("recipe", metavar="RECIPE", help="recipe file, or a name of `llmrec list recipes`")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override one value")


def run(args: Namespace) -> int:
    """Check and describe.

    Raises:
        RecipeError: Something in the recipe cannot be.
    """
    from llmrec.assets import find_asset
    from llmrec.commands.output import emit, tabulate
    from llmrec.recipe import load_recipe

    path = find_asset("recipes", args.recipe)
    recipe = load_recipe(path, args.set)
    recipe.resolve(str(path))
    _check_arguments(recipe)
    record: dict[str, Any] = {"recipe": str(path), "name": recipe.name, **_parameters(recipe)}
    prompt = _prompt(recipe)
    if prompt is not None:
        record["prompt"] = prompt
    emit(record, lambda: tabulate(["", ""], [[key, str(value)] for key, value in record.items()]), args.as_json)
    return 0


def _check_arguments(recipe: Recipe) -> None:
    from llmrec.training.arguments import build_arguments

    for number, stage in enumerate(recipe.stages, start=1):
        try:
            build_arguments(stage, Path("unused"), recipe.seed, evaluates=True)
        except RecipeError as error:
            raise RecipeError(f"stages.{number - 1}: {error}") from error


def _parameters(recipe: Recipe) -> dict[str, Any]:
    """Parameter counts, built on the meta device: no weights are read or drawn."""
    import torch

    from llmrec import discovery

    found: dict[str, Any] = {}
    items = _items(recipe)
    if recipe.encoder is not None and items is not None:
        encoder: Any = discovery.resolve("encoder", recipe.encoder.type)
        if encoder.trainable:
            config = encoder.config_class(
                num_items=items, max_history=recipe.dataset.max_history, **recipe.encoder.options
            )
            with torch.device("meta"):
                found["encoder parameters"] = sum(p.numel() for p in encoder(config).parameters())
    if recipe.llm is not None:
        folder = _local_model(recipe.llm.model)
        if folder is None:
            found["llm parameters"] = "unknown until the model is fetched"
            return found
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(folder)
        if recipe.llm.num_layers is not None:
            config.num_hidden_layers = min(config.num_hidden_layers, recipe.llm.num_layers)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
            found["llm parameters"] = sum(p.numel() for p in model.parameters())
            if recipe.tuner is not None:
                from llmrec.tuners.base import trainable_report

                tuner: Any = discovery.resolve("tuner", recipe.tuner.type)
                width = int(recipe.encoder.options.get("hidden_size", 64)) if recipe.encoder is not None else None
                report = trainable_report(tuner.attach(model, tuner.configure(recipe.tuner.options, gate_dim=width)))
                found["trainable in the LLM"] = report.trainable
                found.update({f"  {part}": count for part, count in report.parts.items() if count})
    return found


def _items(recipe: Recipe) -> int | None:
    """Size of the catalogue, where the data set is prepared already or made up."""
    from llmrec.data.dataset import InteractionDataset

    source = Path(recipe.dataset.source)
    if (source / "meta.json").is_file():
        return InteractionDataset.load(source).num_items
    return int(recipe.dataset.options.get("items", 200)) if recipe.dataset.source == "synthetic" else None


def _local_model(name: str) -> Path | None:
    from llmrec.downloads import NAMES, cache_root

    folder = cache_root() / name if name in NAMES else Path(name)
    return folder if (folder / "config.json").is_file() else None


def _prompt(recipe: Recipe) -> str | None:
    """One rendered prompt, with made-up titles; vectors are shown in brackets."""
    if recipe.prompt is None or recipe.prompt.template is None:
        return None
    from llmrec.data.prompts import PromptTemplate, SlotRef, render_next_item

    prompt = recipe.prompt
    template = PromptTemplate.load(str(prompt.template))
    wanted = {"history": "history", "candidates": "candidate", "user": "user"}
    shown = {wanted[name] for name in prompt.slots} if prompt.style == "hybrid" else set()
    segments = render_next_item(
        template,
        template.variants[0],
        [(n, f"title {n}") for n in range(1, 4)],
        [(n, f"title {n}") for n in range(4, 4 + (prompt.candidates or 0))],
        user_slot="user" in shown,
    )
    texts = [f"[{part.kind} vector]" if isinstance(part, SlotRef) else part for part in segments
             if not isinstance(part, SlotRef) or part.kind in shown]  # fmt: skip
    return "".join(texts)
