"""From a recipe's prompt section to prompts: what the styles in words train on and are asked with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from llmrec.data.instructions import InstructionCollator, InstructionExamples
from llmrec.data.item_text import ItemTextSpec, level_texts, title_texts
from llmrec.data.pairs import PairEncoder, PairOptions
from llmrec.data.prompt_encoder import PromptEncoder, PromptOptions
from llmrec.errors import RecipeError

if TYPE_CHECKING:
    from llmrec.data.dataset import InteractionDataset
    from llmrec.recipe import Recipe, StageSpec


class PromptRenderer(PromptEncoder):
    """A `PromptEncoder` that also makes training data, so that training and asking use the same prompts.

    Args:
        titles: Text of every item, index = item id.
        options: What a prompt shows.
        tokenizer: The base model's tokenizer.
    """

    def __init__(self, titles: Sequence[str], options: PromptOptions, tokenizer: Any) -> None:
        super().__init__(titles, options, tokenizer)
        self.full_titles, self.tokenizer = list(titles), tokenizer

    @classmethod
    def from_recipe(cls, recipe: Recipe, dataset: InteractionDataset, tokenizer: Any) -> Self:
        """The prompts of a recipe over a data set.

        Raises:
            RecipeError: The prompt section is missing or names no template.
        """
        prompt = recipe.prompt
        if prompt is None or prompt.template is None or prompt.style not in ("text", "hybrid"):
            raise RecipeError("prompt: the styles text and hybrid need a template, such as next_item/movie")
        options = PromptOptions(
            template=prompt.template,
            style=prompt.style,
            variants=prompt.variants,
            candidates=prompt.candidates,
            slots=tuple(prompt.slots),
            slot_position=prompt.slot_position,
            chat_template=prompt.chat_template,
            max_history=recipe.dataset.max_history,
            max_title_tokens=prompt.max_title_tokens,
            max_length=prompt.max_length,
        )
        return cls(title_texts(dataset), options, tokenizer)

    def training_data(self, dataset: InteractionDataset, stage: StageSpec, seed: int) -> tuple[Any, Any]:
        """Examples and collator of a stage: one prompt per training event, or `max_examples` of them drawn by seed.

        Batches are padded on the right: the loss is the same on either side, and causal attention then needs no mask.
        """
        histories = dataset.histories("train", self.options.max_history)
        if stage.max_examples is not None and stage.max_examples < len(histories):
            chosen = np.random.default_rng(seed).permutation(len(histories))[: stage.max_examples]
            histories = histories.subset(np.sort(chosen))
        examples = InstructionExamples(
            dataset, histories, self.options, titles=self.full_titles, tokenizer=self.tokenizer, seed=seed
        )
        return examples, InstructionCollator(self.tokenizer, padding_side="right")


def pair_encoder(
    recipe: Recipe,
    dataset: InteractionDataset,
    tokenizer: Any,
    *,
    item_texts: Mapping[int, str] | None = None,
    preferences: Mapping[tuple[int, int], str] | None = None,
    image_ids: Callable[[int], list[int]] | None = None,
) -> PairEncoder:
    """The questions of a recipe of style yes_no over a data set.

    Args:
        recipe: With a prompt section.
        dataset: Supplies titles and item columns.
        tokenizer: The base model's.
        item_texts: Summaries of items, where the recipe says `item_text: summary`.
        preferences: Summaries of users (`PairEncoder`), where the recipe names some.
        image_ids: Tokens of pictures, where the recipe shows them.

    Raises:
        RecipeError: A template names what there is not.
    """
    from llmrec.recipe import PairSpec

    prompt = recipe.prompt
    assert prompt is not None and prompt.template is not None
    pairs = prompt.pairs or PairSpec()
    names = ("show_history", "max_text_tokens", "max_preference_tokens", "negatives", "negative_kind", "loss_on_prompt")
    options = PairOptions(
        template=prompt.template,
        variants=prompt.variants,
        max_title_tokens=24 if prompt.max_title_tokens is None else prompt.max_title_tokens,
        max_length=prompt.max_length,
        chat_template=prompt.chat_template,
        **{name: getattr(pairs, name) for name in names},
    )
    texts: Sequence[str] | None = None
    if pairs.item_text == "summary":
        texts = [(item_texts or {}).get(item, "") for item in range(dataset.num_items + 1)]
    elif pairs.item_text is not None:
        texts = level_texts(dataset, pairs.item_text)
    titles = title_texts(dataset, ItemTextSpec(template=pairs.item_title))
    return PairEncoder(titles, options, tokenizer, texts=texts, preferences=preferences, image_ids=image_ids)
