"""item_vision: a picture becomes one paragraph, written by any image-text-to-text model.

The first stage of MLLM-MSR (Ye et al., AAAI 2025): an untuned multimodal model is asked, once per item, for a single
paragraph about subject, colours, objects and lettering; at most 200 new tokens, greedy. As published, the title is not
shown to the model: title and paragraph meet later, in a user's prompt.

Ours, not the paper's: the wording; `noun` in place of a fixed "video cover"; `known`, catalogue words shown beside the
picture, off by default; pictures are decoded before a model sees them, so that a damaged one is a status of its item
and not a failed batch; an item without a usable
answer is asked about once more; a text that is too long is cut after a sentence, and
counted. Pictures are not padded here (the release pads those of a batch with black, which makes a text depend on its
neighbours): each goes to the model's own processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llmrec.data.prompts import PromptTemplate, plain_text
from llmrec.errors import DataError, RecipeError
from llmrec.paper import Paper
from llmrec.summarizers.base import (
    BROKEN,
    FAILED,
    MISSING,
    OK,
    UNFINISHED,
    ItemContent,
    Summarizer,
    Written,
    ask,
    check_at_least,
    hash_of,
)
from llmrec.summarizers.budgets import cut_to_tokens, whole_sentences

if TYPE_CHECKING:
    from llmrec.data.dataset import InteractionDataset
    from llmrec.llm.generating import Failure, Generator, Reply, Request

PAPER = Paper(
    title="Harnessing Multimodal Large Language Models for Multimodal Sequential Recommendation",
    venue="AAAI 2025",
    url_id="2408.09698",
    system="MLLM-MSR",
)


@dataclass
class ItemVision(Summarizer):
    """Options of the item texts.

    Args:
        noun: What the items are called in the prompt ("film poster", "product").
        known: Template of catalogue words shown beside the picture, such as "{title}"; empty shows none, as published.
        known_chars: Longest such words.
        max_text_tokens: Most tokens of a text; a longer one is cut after a sentence.
        prompt: Prompt file (variables noun, known, again).

    Raises:
        RecipeError: An option is out of range, or the prompt file cannot be used.
    """

    noun: str = "item"
    known: str = ""
    known_chars: int = 500
    max_text_tokens: int = 200
    prompt: str = "summarize/item_image"

    summarises: ClassVar[frozenset[str]] = frozenset({"items"})
    reads_images: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_at_least(self, known_chars=8, max_text_tokens=8)
        self._template = PromptTemplate.load(self.prompt)
        wanted = {"noun", "known", "again"}
        if self._template.variables != wanted:
            found = ", ".join(sorted(self._template.variables))
            raise RecipeError(
                f"item_vision.prompt: {self.prompt} declares {found}; expected {', '.join(sorted(wanted))}"
            )

    def version(self, generator: Generator | None) -> str:
        """Hash of prompt, options and generator."""
        identity = generator.identity if generator else ""
        return hash_of("item_vision", self._template.source, self.noun, self.max_text_tokens, identity)

    def item_words(self, dataset: InteractionDataset) -> list[str]:
        """The words of `known` for every item."""
        from llmrec.data.item_text import level_texts

        return level_texts(dataset, self.known, self.known_chars) if self.known else super().item_words(dataset)

    def write_items(self, items: Sequence[ItemContent], generator: Generator | None) -> list[Written]:
        """One paragraph per picture; see the base class."""
        from llmrec.llm.generating import Reply

        if generator is None:
            raise RecipeError("item_vision needs a model: name one with --model")
        outcomes = [_without_asking(item) for item in items]
        spent = {row: (0, 0) for row, done in enumerate(outcomes) if done is None}
        for again in (False, True):
            rows = [row for row in spent if outcomes[row] is None]
            replies = ask(generator, [self._request(items[row], again) for row in rows], again=again)
            for row, reply in zip(rows, replies, strict=True):
                if isinstance(reply, Reply):
                    spent[row] = (spent[row][0] + reply.prompt_tokens, spent[row][1] + reply.new_tokens)
                outcomes[row] = self._outcome(reply, generator, again, spent[row])
        return [done for done in outcomes if done is not None]

    def _outcome(
        self, reply: Reply | Failure, generator: Generator, again: bool, spent: tuple[int, int]
    ) -> Written | None:
        """What an answer comes to; None where the model is to be asked once more."""
        from llmrec.llm.generating import Reply

        retried = ("retried",) if again else ()
        if not isinstance(reply, Reply):
            if reply.transient:
                return Written("", UNFINISHED, reply.reason, *spent, retried)
            return Written("", FAILED, reply.reason, *spent, retried) if again else None
        text, marks = plain_text(reply.text), [*retried]
        if not text:
            return Written("", FAILED, "empty answer", *spent, retried) if again else None
        if reply.finish == "length":
            text = whole_sentences(text)
            marks.append("cut_by_model")
        short = cut_to_tokens(text, self.max_text_tokens, generator.count_tokens)
        return Written(short, OK, "", *spent, (*marks, *(() if short == text else ("text_shortened",))))

    def _request(self, item: ItemContent, again: bool) -> Request:
        from llmrec.llm.generating import Request

        assert item.image is not None
        text = self._template.render(1, noun=self.noun, known=plain_text(item.words), again=again)
        return Request(text=text, images=(item.image,))


def _without_asking(item: ItemContent) -> Written | None:
    """The outcome of an item no model need see: no picture, or one that cannot be decoded."""
    from llmrec.data.item_images import decode_image

    if item.image is None:
        return Written("", BROKEN if item.problem else MISSING, item.problem or "no picture")
    try:
        decode_image(item.image, name="the picture")
    except DataError as error:
        return Written("", BROKEN, str(error).splitlines()[0])
    return None
