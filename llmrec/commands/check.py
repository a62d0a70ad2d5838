"""Check a recipe without training: names, options, combinations, one rendered prompt, parameter counts, memory.

With `--launcher NAME` also the pair of recipe and launcher profile, and memory per device under that profile.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.errors import RecipeError

if TYPE_CHECKING:
    from llmrec.commands.launch import Profile
    from llmrec.data.prompts import PromptTemplate
    from llmrec.recipe import PromptSpec, Recipe

EXAMPLE = "llmrec check recipes/smoke/ilora.yaml"


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("recipe", metavar="RECIPE", help="recipe file, or a name of `llmrec list recipes`")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override one value")
    parser.add_argument("--launcher", metavar="NAME", help="check for this launcher profile; nothing is started")


def run(args: Namespace) -> int:
    """Check and describe.

    Raises:
        RecipeError: Something in the recipe cannot be, or recipe and launcher cannot work together.
        DependencyError: The launcher needs a library that is missing.
    """
    from llmrec.assets import find_asset
    from llmrec.commands.launch import check_pair, machine_problems, read_profile, require_libraries
    from llmrec.commands.output import emit, note
    from llmrec.recipe import load_recipe

    path = find_asset("recipes", args.recipe)
    recipe = load_recipe(path, args.set)
    profile = None if args.launcher is None else read_profile(args.launcher)
    if profile is not None:
        check_pair(profile, recipe)
        require_libraries(profile)
    recipe.resolve(str(path))
    record: dict[str, Any] = {"recipe": str(path), "name": recipe.name}
    record |= _sizes(recipe, _stage_arguments(recipe), profile)
    prompt = _prompt(recipe)
    if prompt is not None:
        record["prompt"] = prompt
    if profile is not None:
        record["launcher"] = {"profile": str(profile.path), "problems": machine_problems(profile)}
        for problem in record["launcher"]["problems"]:
            note(f"warning: not on this machine: {problem}")
    emit(record, lambda: _tables(record), args.as_json)
    return 0


def _tables(record: dict[str, Any]) -> list[Any]:
    from llmrec.commands.footprint import memory_rows
    from llmrec.commands.output import tabulate

    memory = record.get("memory")
    plain = {key: value for key, value in record.items() if key != "launcher" and not isinstance(value, dict)}
    tables = [tabulate(["", ""], [[key, str(value)] for key, value in plain.items()])]
    if isinstance(memory, dict):
        title = f"memory per device, stage {memory['stage']}"
        tables.append(tabulate(["part", "size", ""], memory_rows(memory), title=title))
    return tables


def _stage_arguments(recipe: Recipe) -> list[Any]:
    from llmrec.training.arguments import build_arguments

    found: list[Any] = []
    for number, stage in enumerate(recipe.stages, start=1):
        try:
            found.append(build_arguments(stage, Path("unused"), recipe.seed, evaluates=True))
        except RecipeError as error:
            raise RecipeError(f"stages.{number - 1}: {error}") from error
    return found


def _sizes(recipe: Recipe, arguments: list[Any], profile: Profile | None) -> dict[str, Any]:
    """Parameter counts and memory, from models on the meta device: no weights are read or drawn."""
    from llmrec.commands.footprint import estimate_memory, read_base_config, read_side_parts

    found: dict[str, Any] = {}
    side = read_side_parts(recipe)
    if side.encoder and side.items is not None:
        found["encoder parameters"] = side.encoder
    if recipe.llm is None:
        return found
    config, reason = read_base_config(recipe)
    if config is None:
        return found | {"llm parameters": "unknown until the model is fetched", "memory": f"not estimated: {reason}"}
    found |= _parameters(recipe, config, side.gate_dim or None)
    memory = estimate_memory(recipe, arguments, config, side, profile)
    return found | ({"memory": memory} if memory else {})


def _parameters(recipe: Recipe, config: Any, gate_dim: int | None) -> dict[str, Any]:
    import torch

    from llmrec import discovery
    from llmrec.llm.vision import auto_class
    from llmrec.recommender import tuner_options

    found: dict[str, Any] = {}
    with torch.device("meta"):
        model: Any = auto_class(config).from_config(config, trust_remote_code=False)
        found["llm parameters"] = sum(p.numel() for p in model.parameters())
        if recipe.tuner is not None:
            from llmrec.tuners.base import trainable_report

            tuner: Any = discovery.resolve("tuner", recipe.tuner.type)
            options = tuner_options(recipe, model)
            report = trainable_report(tuner.attach(model, tuner.configure(options, gate_dim=gate_dim)))
            found["trainable in the LLM"] = report.trainable
            found.update({f"  {part}": count for part, count in report.parts.items() if count})
    return found


def _prompt(recipe: Recipe) -> str | None:
    """One rendered prompt, with made-up titles; vectors are shown in brackets."""
    if recipe.prompt is None or recipe.prompt.template is None:
        return None
    from llmrec.data.prompts import PromptTemplate, SlotRef, render_next_item

    prompt = recipe.prompt
    template = PromptTemplate.load(str(prompt.template))
    if prompt.style in ("yes_no", "describe"):
        return _asked(prompt, template)
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


def _asked(prompt: PromptSpec, template: PromptTemplate) -> str:
    """A rendered question about one item: names in brackets where texts and pictures stand."""
    from llmrec.recipe import PairSpec

    pairs = prompt.pairs or PairSpec()
    values = {
        "preference": "[summary of the user]" if pairs.summaries else "",
        "history": [f"title {n}" for n in range(1, min(3, pairs.show_history) + 1)],
        "title": "title 4",
        "text": "[text of the item]" if pairs.item_text else "",
        "image": "[picture]" if pairs.pictures else "",
        "noun": "item", "known": "", "again": False,
    }  # fmt: skip
    return template.render(template.variants[0], **{n: v for n, v in values.items() if n in template.variables})
