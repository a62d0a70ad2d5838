"""Phrasings of item-code tasks as token ids around their items.

A task is a file of `prompts/item_codes/`. Each phrasing is rendered once, with a mark in place of every item, and
tokenised around the marks, where code ids or the tokens of titles come later. Titles never pass through a template. A
blank in front of a mark is left out: titles bring their own, codes need none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np

from llmrec.data.prompt_tokens import PieceTokenizer
from llmrec.data.prompts import PromptTemplate, SlotMarks, SlotRef
from llmrec.errors import RecipeError

FOLDER = "item_codes"


class Task(NamedTuple):
    """What a prompt file is about: the variable it declares, how items are shown, and what answers it."""

    variable: Literal["history", "title", "item"]
    shows: Literal["codes", "titles"]
    answers: Literal["codes", "titles"]

    @property
    def from_history(self) -> bool:
        """Whether examples come from histories, not from the catalogue."""
        return self.variable == "history"

    @property
    def needs_titles(self) -> bool:
        """Whether items without a title cannot take part."""
        return "titles" in (self.shows, self.answers)


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "history_to_item": Task("history", "codes", "codes"),
        "history_to_title": Task("history", "codes", "titles"),
        "titles_to_item": Task("history", "titles", "codes"),
        "title_to_item": Task("title", "titles", "codes"),
        "item_to_title": Task("item", "codes", "titles"),
    }
)


class Frame(NamedTuple):
    """Token ids of a phrasing around its items.

    Args:
        before: Everything in front of the first item, from BOS or the opening of a chat on.
        separator: What stands between two items.
        after: Everything behind the last item, up to the answer.
    """

    before: np.ndarray
    separator: np.ndarray
    after: np.ndarray


def chosen_phrasings(template: PromptTemplate, variants: Literal["all"] | int) -> tuple[int, ...]:
    """Numbers of the phrasings in use.

    Raises:
        RecipeError: The file has no such phrasing.
    """
    if variants == "all":
        return template.variants
    if variants not in template.variants:
        raise RecipeError(f"prompt.variants: found {variants}; {template.path} has {template.variants}")
    return (variants,)


def read_frame(template: PromptTemplate, variant: int, task: Task, pieces: PieceTokenizer) -> Frame:
    """A phrasing as what stands before, between and after its items, whatever their number.

    Args:
        template: The task's file.
        variant: Number of the phrasing.
        task: What the file is about.
        pieces: Of the tokenizer.

    Raises:
        RecipeError: The phrasing does not show its items once and in order, or a title stands behind no blank.
    """
    readings = [_reading(template, variant, task, count) for count in ((1, 2, 3) if task.from_history else (1,))]
    before, _, after = readings[0]
    between = {text for _, texts, _ in readings for text in texts}
    if len(between) > 1 or any((first, last) != (before, after) for first, _, last in readings):
        raise RecipeError(
            f"{template.path}: phrasing {variant} has to show {task.variable} once, in order, with the same text "
            "between any two items"
        )
    texts = [before, *between] if between else [before, ""]
    if task.shows == "titles" and not all(text.endswith(" ") for text in texts[: 1 + len(between)]):
        raise RecipeError(f"{template.path}: phrasing {variant} needs a blank in front of a title")
    encoded = pieces.prompt_pieces([*(text.removesuffix(" ") for text in texts), after])
    ids: Iterable[list[int]] = ([*pieces.head, *encoded[0]], encoded[1], [*encoded[2], *pieces.tail])
    return Frame(*(np.array(part, dtype=np.int64) for part in ids))


def _reading(template: PromptTemplate, variant: int, task: Task, count: int) -> tuple[str, list[str], str]:
    """Text before the first of `count` items, between neighbours, and after the last."""
    marks = SlotMarks()
    entries = [marks.mark(number, "history") for number in range(count)]
    text = template.render(variant, **{task.variable: entries if task.from_history else entries[0]})
    around, order = [""], []
    for part in marks.split(text):
        if isinstance(part, SlotRef):
            order.append(part.item_id)
            around.append("")
        else:
            around[-1] += part
    if order != list(range(count)):
        raise RecipeError(
            f"{template.path}: phrasing {variant} has to show {task.variable} once, in order; it shows "
            f"{len(order)} of {count} items"
        )
    return around[0], around[1:-1], around[-1]
