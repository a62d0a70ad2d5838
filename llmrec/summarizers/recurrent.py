"""recurrent: a user's taste as a paragraph, rewritten block by block; an RNN whose state is text.

The second stage of MLLM-MSR (Ye et al., AAAI 2025):

    S = none
    for block in chunks(history, 3):  S = LLM(prompt(block, S))          # S is replaced, never appended to

A prompt numbers the items of the block from 1, each with title and picture text, states the previous paragraph
verbatim where there is one, and demands an opening phrase. `mode: direct` is the paper's ablation: the whole history in
one prompt.

Ours, not the paper's: the wording; greedy decoding as the default of the generator (published: temperature 0.6); the
bound `max_state_tokens`; an answer that does not begin with the opening, or ends there, is asked for once more, and if
that fails too the previous paragraph stands and the block is counted as kept; `mode: last_block`; items are named by
title alone and the user not at all, so that users with the same beginning share its paragraphs and no id leaves the
machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llmrec.data.item_text import ItemTextSpec, title_texts
from llmrec.data.prompts import PromptTemplate, plain_text
from llmrec.errors import RecipeError
from llmrec.paper import Paper
from llmrec.summarizers.base import (
    FAILED,
    KEPT,
    OK,
    UNFINISHED,
    ItemLine,
    Mode,
    Summarizer,
    UserStep,
    Written,
    ask,
    check_at_least,
    check_mode,
    hash_of,
)
from llmrec.summarizers.budgets import cut_to_tokens, fit_prompt, whole_sentences

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
class _Asked:
    """One step on its way: what it has cost so far, what was shortened, and its outcome once there is one."""

    step: UserStep
    spent: tuple[int, int] = (0, 0)
    marks: tuple[str, ...] = ()
    outcome: Written | None = None

    def close(self, text: str, status: str, reason: str) -> None:
        self.outcome = Written(text, status, reason, *self.spent, tuple(dict.fromkeys(self.marks)))

    def give_up(self, reason: str) -> None:
        """No usable answer: the previous text stands, where there is one."""
        self.close(self.step.previous, KEPT if self.step.previous else FAILED, reason)


@dataclass
class Recurrent(Summarizer):
    """Options of the users' texts.

    Args:
        block_size: Items of a block.
        max_state_tokens: Most tokens of a text; a longer one is cut after a sentence, and counted.
        mode: "recurrent"; "direct", everything in one prompt; "last_block", the latest `block_size` items alone.
        opening: Words every text begins with.
        item_template: How an item is titled, from the columns of the items.
        item_chars: Longest such title.
        item_summaries: Whether the items' summaries are shown behind their titles.
        prompt: Prompt file (variables items, previous, opening, again).

    Raises:
        RecipeError: An option is out of range, or the prompt file cannot be used.
    """

    block_size: int = 3
    max_state_tokens: int = 256
    mode: Mode = "recurrent"
    opening: str = "This customer likes"
    item_template: str = "{title}"
    item_chars: int = 200
    item_summaries: bool = True
    prompt: str = "summarize/user_block"

    summarises: ClassVar[frozenset[str]] = frozenset({"users"})

    def __post_init__(self) -> None:
        check_at_least(self, block_size=1, max_state_tokens=8, item_chars=8)
        check_mode(self)
        if not plain_text(self.opening):
            raise RecipeError("recurrent.opening: found nothing, expected the words every text begins with")
        self._template = PromptTemplate.load(self.prompt)
        wanted = {"items", "previous", "opening", "again"}
        if self._template.variables != wanted:
            found = ", ".join(sorted(self._template.variables))
            raise RecipeError(f"recurrent.prompt: {self.prompt} declares {found}; expected {', '.join(sorted(wanted))}")

    def version(self, generator: Generator | None) -> str:
        """Hash of prompt, options and generator; `mode` and `block_size` decide the steps, not what one says."""
        identity = [generator.identity, generator.max_prompt_tokens] if generator else []
        return hash_of("recurrent", self._template.source, self.opening, self.max_state_tokens, identity)

    def lines(self, dataset: InteractionDataset, texts: Mapping[int, str]) -> list[ItemLine]:
        """Titles, and the items' texts where there are any; see the base class."""
        titles = title_texts(dataset, ItemTextSpec(template=self.item_template, max_chars=self.item_chars))
        shown: Mapping[int, str] = texts if self.item_summaries else {}
        return [ItemLine(title, plain_text(shown.get(item, ""))) for item, title in enumerate(titles)]

    def write_users(self, steps: Sequence[UserStep], generator: Generator | None) -> list[Written]:
        """The texts after some steps, all asked at once; see the base class."""
        if generator is None:
            raise RecipeError("recurrent needs a model: name one with --model")
        asked = [_Asked(step) for step in steps]
        for again in (False, True):
            waiting: list[_Asked] = []
            requests: list[Request] = []
            for one in (one for one in asked if one.outcome is None):
                request = self._request(one, generator, again)
                if request is not None:
                    waiting.append(one)
                    requests.append(request)
            for one, reply in zip(waiting, ask(generator, requests, again=again), strict=True):
                self._read(one, reply, generator, again)
        return [one.outcome for one in asked if one.outcome is not None]

    def _request(self, one: _Asked, generator: Generator, again: bool) -> Request | None:
        """The prompt of a step within the generator's length; None, and the step is over, where nothing fits."""
        from llmrec.llm.generating import Request

        def request(previous: str, lines: Sequence[ItemLine]) -> Request:
            text = self._template.render(1, items=lines, previous=previous, opening=self.opening, again=again)
            return Request(text=text, opening=self.opening)

        found, marks = fit_prompt(request, one.step.previous, one.step.lines, generator)
        one.marks = (*one.marks, *marks)
        if found is None:
            one.give_up(f"the titles of the block alone exceed the model's {generator.max_prompt_tokens} prompt tokens")
        return found

    def _read(self, one: _Asked, reply: Reply | Failure, generator: Generator, again: bool) -> None:
        """Take an answer that begins as it must and goes on; a second one that does not ends the step."""
        from llmrec.llm.generating import Reply

        one.marks = (*one.marks, *(("retried",) if again else ()))
        if not isinstance(reply, Reply):
            if reply.transient:
                one.close(one.step.previous, UNFINISHED, reply.reason)
            elif again:
                one.give_up(reply.reason)
            return
        one.spent = (one.spent[0] + reply.prompt_tokens, one.spent[1] + reply.new_tokens)
        text = plain_text(reply.text)
        problem = self._problem(text)
        if problem:
            if again:
                one.give_up(problem)
            return
        if reply.finish == "length":
            text = whole_sentences(text)
            one.marks = (*one.marks, "cut_by_model")
        short = cut_to_tokens(text, self.max_state_tokens, generator.count_tokens)
        one.marks = one.marks if short == text else (*one.marks, "text_shortened")
        one.close(short, OK, "")

    def _problem(self, text: str) -> str:
        opening = plain_text(self.opening)
        if not text:
            return "empty answer"
        if not text.startswith(opening):
            return f"the answer does not begin with {opening!r}"
        return "" if any(letter.isalnum() for letter in text[len(opening) :]) else "the answer ends after its opening"
