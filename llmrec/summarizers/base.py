"""Base of summarizers: pictures, words and histories -> short texts. One file per summarizer.

A summarizer is a dataclass whose fields are its options. It writes texts of items, of users, or both:

    items:  (words, picture) of an item                      -> its text, each on its own
    users:  (previous text, the items of the next block)     -> the next text, a recurrence whose state is words

It decides what is asked and which answers count; `llmrec.summarizers.jobs` decides in which order, keeps every finished
text in a `TextStore`, and asks for nothing twice. What decides a text besides its content (prompt, options, the
generator) is in `version`; together with the content it is the key of the text, so a changed prompt or model makes
new texts and never reads old ones.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from llmrec.errors import RecipeError

if TYPE_CHECKING:
    from llmrec.data.dataset import InteractionDataset
    from llmrec.llm.generating import Failure, Generator, Reply, Request

Mode = Literal["recurrent", "direct", "last_block"]

OK = "ok"
MISSING = "missing"
"""Nothing to summarise: no picture, no words."""
BROKEN = "broken"
"""A picture that cannot be decoded."""
FAILED = "failed"
"""Asked, and no usable answer came."""
KEPT = "kept"
"""One block of a user: no usable answer came, the previous text stands."""
UNFINISHED = "unfinished"
"""No answer for a passing reason; never stored, so the same command asks again."""


@dataclass(frozen=True)
class ItemContent:
    """What a summarizer may read of one item.

    Args:
        item: Its id.
        words: What `Summarizer.item_words` says of it.
        image: The encoded picture, or None.
        problem: Why there is no picture although there should be one.
    """

    item: int
    words: str = ""
    image: bytes | None = None
    problem: str = ""


@dataclass(frozen=True)
class ItemLine:
    """An item as a user's prompt shows it: its title, and its text where there is one."""

    title: str
    text: str = ""


@dataclass(frozen=True)
class UserStep:
    """One step of a user: the text so far ("" at first) and the items of one block, oldest first."""

    previous: str
    lines: tuple[ItemLine, ...]


@dataclass(frozen=True)
class Written:
    """What became of one item, or of one step of a user.

    Args:
        text: The text; "" where there is none.
        status: "ok", "missing", "broken", "failed", "kept" or "unfinished".
        reason: Why it is not "ok".
        prompt_tokens: Tokens read for it, second attempts included.
        new_tokens: Tokens written for it, second attempts included.
        marks: Things to count, such as "retried", "text_shortened", "prompt_shortened".
    """

    text: str
    status: str = OK
    reason: str = ""
    prompt_tokens: int = 0
    new_tokens: int = 0
    marks: tuple[str, ...] = ()


class Summarizer(ABC):
    """Base class; a summarizer is a dataclass whose fields are its options."""

    summarises: ClassVar[frozenset[str]]
    """"items", "users" or both."""
    needs_generator: ClassVar[bool] = True
    reads_images: ClassVar[bool] = False
    block_size: int
    mode: Mode

    @abstractmethod
    def version(self, generator: Generator | None) -> str:
        """Hash of everything but the content that decides a text: prompt, options, the generator's identity."""

    def item_words(self, dataset: InteractionDataset) -> list[str]:
        """The words to read of each item, index = item id; empty for a summarizer that looks at pictures alone."""
        return [""] * (dataset.num_items + 1)

    def item_key(self, content: ItemContent, version: str) -> str:
        """The key of an item's text: version, words and picture."""
        picture = "" if content.image is None else hashlib.sha256(content.image).hexdigest()
        return hash_of("item", version, content.words, picture, content.problem)

    def write_items(self, items: Sequence[ItemContent], generator: Generator | None) -> list[Written]:
        """The texts of some items, in their order.

        Raises:
            RecipeError: This summarizer writes no items.
        """
        raise RecipeError(f"{type(self).__name__} writes no texts of items; expected a summarizer such as item_vision")

    def lines(self, dataset: InteractionDataset, texts: Mapping[int, str]) -> list[ItemLine]:
        """Every item as a user's prompt shows it, index = item id; `texts` holds the items' summaries.

        Raises:
            RecipeError: This summarizer writes no users.
        """
        raise RecipeError(f"{type(self).__name__} writes no texts of users; expected a summarizer such as recurrent")

    def spans(self, events: int) -> list[tuple[int, int]]:
        """The blocks [from, to) in which a history of so many events is read."""
        return block_spans(events, self.block_size, self.mode)

    def user_key(self, step: UserStep, version: str) -> str:
        """The key of a step's text: version, previous text and the items of the block.

        Neither the user nor `mode` and `block_size` are part of it: they decide which steps there are, not what a step
        says, so users share the texts of shared beginnings.
        """
        return hash_of("user", version, step.previous, [[line.title, line.text] for line in step.lines])

    def write_users(self, steps: Sequence[UserStep], generator: Generator | None) -> list[Written]:
        """The texts after some steps, in their order.

        Raises:
            RecipeError: This summarizer writes no users.
        """
        raise RecipeError(f"{type(self).__name__} writes no texts of users; expected a summarizer such as recurrent")


def hash_of(*parts: Any) -> str:
    """32 hex digits of a SHA-256 over JSON values."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()[:32]


def block_spans(events: int, block_size: int, mode: Mode) -> list[tuple[int, int]]:
    """The blocks [from, to) of a history: one after the other, all at once, or the latest `block_size` events alone.

    Args:
        events: Length of the history.
        block_size: Events of a block; the last block may be shorter.
        mode: "recurrent", "direct" (one block of everything) or "last_block" (a full block wherever the history has
            one, so that the ablation is not also one of shorter blocks; ours).
    """
    if events == 0:
        return []
    if mode == "direct":
        return [(0, events)]
    if mode == "last_block":
        return [(max(0, events - block_size), events)]
    return [(start, min(start + block_size, events)) for start in range(0, events, block_size)]


def check_at_least(summarizer: Summarizer, **least: int) -> None:
    """Refuse options below their least values.

    Raises:
        RecipeError: Naming option, found and expected.
    """
    for name, smallest in least.items():
        found = getattr(summarizer, name)
        if found < smallest:
            raise RecipeError(f"{type(summarizer).__name__}.{name}: found {found}, expected at least {smallest}")


def check_mode(summarizer: Summarizer) -> None:
    """Refuse an unknown mode.

    Raises:
        RecipeError: Naming option, found and expected.
    """
    if summarizer.mode not in get_args(Mode):
        found = f"{type(summarizer).__name__}.mode: found {summarizer.mode!r}"
        raise RecipeError(f"{found}, expected {', '.join(get_args(Mode))}")


def ask(generator: Generator, requests: Sequence[Request], *, again: bool) -> list[Reply | Failure]:
    """One answer a request; what an endpoint had answered before it failed for good is not thrown away.

    Args:
        generator: Answers.
        requests: May be empty.
        again: Whether these are second attempts beside finished texts, which a failure must not cost.

    Raises:
        EndpointError: The endpoint answers nobody, and nothing arrived that is worth keeping.
    """
    from llmrec.llm.endpoint import EndpointError
    from llmrec.llm.generating import Failure

    if not requests:
        return []
    try:
        return generator.generate(requests)
    except EndpointError as error:
        answers = [*error.answers, *([None] * len(requests))][: len(requests)]
        if not again and all(answer is None for answer in answers):
            raise
        missing = Failure(str(error).splitlines()[0], transient=True)
        return [missing if answer is None else answer for answer in answers]
