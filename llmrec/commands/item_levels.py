"""What an item tokenizer is to know of the items, from the flags of `llmrec tokenize` and the columns there are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.errors import DataError, RecipeError

if TYPE_CHECKING:
    from llmrec.data.dataset import InteractionDataset
    from llmrec.recipe import EncoderSpec, ItemFeaturesSpec

COARSE_TO_FINE = {"category": "{categories}", "title": "{title}", "description": "{description}"}
"""Levels of CoFiRec where the items have the columns."""
SIDE_BY_SIDE = {"title": "{title}", "categories": "[, {categories}]", "brand": "[, {brand}]",
                "description": "[. {description}]"}  # fmt: skip
"""Pieces of the one text of the other tokenizers, where the items have the columns."""


def features_spec(
    dataset: InteractionDataset, *, type_name: str, text: str, templates: Sequence[str], collaborative: str | None
) -> ItemFeaturesSpec:
    """The recipe section `item_features` that flags ask for, checked against the items.

    Args:
        dataset: Whose items are coded.
        type_name: Type of the item tokenizer; it decides the levels where no template is given.
        text: Model of the texts, or "none".
        templates: NAME=TEMPLATE of each text level; none gives the levels the items have columns for.
        collaborative: "als", the folder of a run, a section of a recipe as text, or None.

    Raises:
        RecipeError: A flag cannot mean what it says, or nothing is left to code.
        DataError: The items have no texts at a level.
    """
    from llmrec.recipe import ItemFeaturesSpec

    levels = _levels(dataset, type_name, text, templates)
    encoder = _collaborative(collaborative)
    if not levels and encoder is None:
        raise RecipeError("--text none leaves nothing to code; expected --collaborative als or RUN, or a text model")
    return ItemFeaturesSpec(text="minilm" if text == "none" else text, levels=levels, collaborative=encoder)


def _levels(dataset: InteractionDataset, type_name: str, text: str, templates: Sequence[str]) -> dict[str, str]:
    """Template of each text level."""
    from llmrec.data.item_text import level_texts

    if text == "none":
        if templates:
            raise RecipeError(f"--level {templates[0]}: a text level needs a text model, found --text none")
        return {}
    if not templates:
        return _default_levels(dataset, type_name)
    levels = dict(_level(template) for template in templates)
    if len(levels) < len(templates):
        raise RecipeError(f"--level: a name is given twice among {', '.join(templates)}; expected each name once")
    unread = sorted(set(levels) - set(COARSE_TO_FINE)) if type_name == "cofirec" else []
    if unread:
        raise RecipeError(
            f"--level {', '.join(unread)}: cofirec reads the text levels {', '.join(COARSE_TO_FINE)} only"
        )
    for name, template in levels.items():
        if not any(level_texts(dataset, template)):
            raise DataError(f"no item has a text at level {name!r}", found=template, expected="a column with texts")
    return levels


def _level(text: str) -> tuple[str, str]:
    name, sign, template = (part.strip() for part in text.partition("="))
    if not (name and sign and template):
        raise RecipeError(f"--level {text}: expected NAME=TEMPLATE, as in title={{title}}")
    if name in ("collaborative", "text_tokens"):
        raise RecipeError(f"--level {text}: the name {name!r} is taken; item vectors come by --collaborative")
    return name, template


def _default_levels(dataset: InteractionDataset, type_name: str) -> dict[str, str]:
    from llmrec.data.item_text import level_texts

    pieces = COARSE_TO_FINE if type_name == "cofirec" else SIDE_BY_SIDE
    columns = {"category": "categories"}
    have = {
        name: piece
        for name, piece in pieces.items()
        if (column := columns.get(name, name)) in dataset.items.column_names
        and any(level_texts(dataset, f"{{{column}}}"))
    }
    if not have:
        raise DataError(
            f"the items of {dataset.meta.name!r} have no texts this type reads by default",
            found=f"columns {', '.join(dataset.items.column_names)}",
            expected=f"one of {', '.join(columns.get(name, name) for name in pieces)}",
            remedy="name columns with --level NAME=TEMPLATE, or code interactions: --text none --collaborative als",
        )
    if type_name == "cofirec":
        return have
    first, *others = have
    return {"text": "".join([f"{{{first}}}", *(have[name] for name in others)])}


def _collaborative(text: str | None) -> EncoderSpec | None:
    """The encoder of --collaborative: a counting one by name or as in a recipe, or the trained one of a run."""
    from llmrec import discovery
    from llmrec.recipe import EncoderSpec, apply_override

    if text is None:
        return None
    given: dict[str, Any] = {"collaborative": {"type": text}}
    if text.lstrip().startswith("{"):
        apply_override(given, f"collaborative={text}")
    elif (Path(text) / "recipe.yaml").is_file():
        from llmrec.recommender import load_run_recipe
        from llmrec.run_dir import RunDir

        encoder = load_run_recipe(RunDir(Path(text))).encoder
        if encoder is None:
            raise RecipeError(f"--collaborative {text}: this run has no encoder; expected a run with an `encoder`")
        given["collaborative"] = {"type": encoder.type, "pretrained": text}
    elif "/" in text and ":" not in text:
        raise RecipeError(f"--collaborative {text}: found no run there (no recipe.yaml); expected als, or a run folder")
    value = given["collaborative"]
    if not isinstance(value.get("type"), str) or not isinstance(value.get("pretrained", ""), str):
        raise RecipeError(f"--collaborative {text}: expected als, a run, or {{type: als, factors: 32}}")
    spec = EncoderSpec(**value)
    discovery.check_options("encoder", spec.type, spec.options, where="--collaborative: ")
    kind: Any = discovery.resolve("encoder", spec.type)
    if kind.trainable and spec.pretrained is None:
        raise RecipeError(
            f"--collaborative {text}: encoder {spec.type!r} has to be trained; expected als, or the folder of a run"
        )
    return spec
