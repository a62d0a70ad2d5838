"""attributes: texts without a model; items by the words of their columns, users by decayed counts of those words.

Ours, from no paper: the simplest summarizer that can be right. An item is described by its columns ("Kitchen, Alder &
Co"). A user's text is the list of attributes met most often, with weights,

    weight_t(a) = decay * weight_{t-1}(a) + number of items of block t that have a

written out and read back as text, so it obeys the same rules as a language model's: the next text comes from the
previous one and the new block, from nothing else. `decay: 1` weighs everything alike, `decay: 0` knows the last block
alone. Equal input gives equal bytes on every machine. For tests, for data sets with good columns, and as the honest
opponent of a language model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llmrec.data.item_text import ItemTextSpec, level_texts, title_texts
from llmrec.data.prompts import plain_text
from llmrec.data.schema import BRAND, CATEGORIES, DESCRIPTION, TITLE
from llmrec.errors import RecipeError
from llmrec.summarizers.base import (
    FAILED,
    KEPT,
    MISSING,
    OK,
    ItemContent,
    ItemLine,
    Mode,
    Summarizer,
    UserStep,
    Written,
    check_at_least,
    check_mode,
    hash_of,
)

if TYPE_CHECKING:
    from llmrec.data.dataset import InteractionDataset
    from llmrec.llm.generating import Generator

OPENING = "Likes, most first: "
_WEIGHTED = re.compile(r"([^,;()]+) \(([0-9]+(?:\.[0-9]+)?)\)")
_PIECES = re.compile(r"[,;.!?:()|/]+")
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_EMPTY_WORDS = frozenset(
    "a an and are as at be been but by for from had has have her his if in into is it its more most no not of on or "
    "our out over she that the their them then there these they this to under up was were what when which who will "
    "with you your".split()
)


@dataclass
class Attributes(Summarizer):
    """Options of both texts.

    Args:
        columns: Item columns to describe an item by; empty takes those of categories, brand and description that the
            data set has, or else the title.
        item_chars: Longest text of an item.
        block_size: Items of a block.
        mode: "recurrent", "direct" or "last_block", as in `recurrent`.
        decay: What is left of a weight after a block, 0 to 1.
        top: Attributes a user's text names at most.
        phrase: A piece of text of at most so many words is one attribute; the words of a longer one count one by one.

    Raises:
        RecipeError: An option is out of range.
    """

    columns: tuple[str, ...] = ()
    item_chars: int = 500
    block_size: int = 3
    mode: Mode = "recurrent"
    decay: float = 0.7
    top: int = 16
    phrase: int = 3

    summarises: ClassVar[frozenset[str]] = frozenset({"items", "users"})
    needs_generator: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_at_least(self, block_size=1, item_chars=8, top=1, phrase=1)
        if not 0 <= self.decay <= 1:
            raise RecipeError(f"attributes.decay: found {self.decay}, expected 0 to 1")
        check_mode(self)

    def version(self, generator: Generator | None) -> str:
        """Hash of the options; there is no generator."""
        return hash_of("attributes 1", list(self.columns), self.item_chars, self.decay, self.top, self.phrase)

    def item_words(self, dataset: InteractionDataset) -> list[str]:
        """The columns of every item, joined by semicolons."""
        found = [name for name in (CATEGORIES, BRAND, DESCRIPTION) if name in dataset.fields]
        columns = list(self.columns) or found or [TITLE]
        texts = [level_texts(dataset, f"{{{name}}}", self.item_chars) for name in columns]
        return ["; ".join(text for text in row if text) for row in zip(*texts, strict=True)]

    def write_items(self, items: Sequence[ItemContent], generator: Generator | None) -> list[Written]:
        """The columns' words as they are; see the base class."""
        texts = [plain_text(item.words) for item in items]
        return [Written(text) if text else Written("", MISSING, "no words in these columns") for text in texts]

    def lines(self, dataset: InteractionDataset, texts: Mapping[int, str]) -> list[ItemLine]:
        """Titles with the items' texts, or with the columns' words where an item has none."""
        titles, words = title_texts(dataset, ItemTextSpec()), self.item_words(dataset)
        return [ItemLine(title, texts.get(item) or words[item]) for item, title in enumerate(titles)]

    def write_users(self, steps: Sequence[UserStep], generator: Generator | None) -> list[Written]:
        """Counts after each step; see the base class."""
        return [self._step(step) for step in steps]

    def _step(self, step: UserStep) -> Written:
        weights = {name: self.decay * weight for name, weight in weights_of(step.previous).items()}
        met = Counter(name for line in step.lines for name in attributes_of(line.text, self.phrase))
        for name, count in met.items():
            weights[name] = weights.get(name, 0.0) + count
        ranked = sorted(((name, round(weight, 2)) for name, weight in weights.items()), key=lambda e: (-e[1], e[0]))
        shown = [(name, weight) for name, weight in ranked[: self.top] if weight > 0]
        if not met:
            return Written(step.previous, KEPT if step.previous else FAILED, "no item of the block has an attribute")
        return Written(OPENING + ", ".join(f"{name} ({weight:.2f})" for name, weight in shown), OK)


def attributes_of(text: str, phrase: int = 3) -> list[str]:
    """The attributes in an item's text, each once, in lower case: short pieces whole, sentences word by word."""
    found: dict[str, None] = {}
    for piece in _PIECES.split(plain_text(text).casefold()):
        words = [word for word in _WORD.findall(piece) if word not in _EMPTY_WORDS]
        short = len(piece.split()) <= phrase
        for name in [" ".join(words)] if short else words:
            if name:
                found[name] = None
    return list(found)


def weights_of(text: str) -> dict[str, float]:
    """The weights in a user's text; the inverse of how it is written."""
    return {name.strip(): float(weight) for name, weight in _WEIGHTED.findall(text.removeprefix(OPENING))}
