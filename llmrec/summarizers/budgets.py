"""Keeping prompts and texts within a number of tokens: longest item texts first, then the previous text.

Nothing is cut without a mark: what is returned says what was shortened, and jobs count it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from llmrec.summarizers.base import ItemLine

if TYPE_CHECKING:
    from llmrec.llm.generating import Generator, Request

Count = Callable[[str], int]
Ask = Callable[[str, Sequence[ItemLine]], "Request"]
"""Previous text and lines -> request."""
TEMPLATE_ROOM = 64
"""Tokens kept free for the marks of a chat template, where a generator cannot count whole prompts."""

_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")


def cut_words(text: str, words: int) -> str:
    """The first words of a text."""
    parts = text.split()
    return text if len(parts) <= words else " ".join(parts[:words])


def whole_sentences(text: str) -> str:
    """A text without an unfinished sentence at its end; unchanged where less than half of it would be left."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends and ends[-1] * 2 >= len(text) else text


def cut_to_tokens(text: str, limit: int, count: Count) -> str:
    """The longest beginning of a text that has at most `limit` tokens, ended after a sentence where possible.

    Args:
        text: One paragraph.
        limit: Most tokens.
        count: Tokens of a text.
    """
    if count(text) <= limit:
        return text
    words = _most(len(text.split()), lambda n: count(cut_words(text, n)) <= limit)
    return whole_sentences(cut_words(text, words))


def prompt_length(request: Request, generator: Generator) -> int:
    """Tokens of a whole prompt: exact where the generator tells, else the words with room for a chat template."""
    exact = getattr(generator, "prompt_tokens", None)
    if exact is not None:
        return int(exact(request))
    return generator.count_tokens(f"{request.text} {request.opening}") + TEMPLATE_ROOM


def fit_prompt(
    ask: Ask, previous: str, lines: Sequence[ItemLine], generator: Generator
) -> tuple[Request | None, tuple[str, ...]]:
    """A request the generator can read whole, and marks of what was shortened.

    All item texts are cut to one number of words, the largest that fits: the longest give way first. Where even the
    titles alone leave no room, the previous text loses its end as well. Titles stay whole.

    Args:
        ask: Makes the request.
        previous: The text so far.
        lines: The items of the block.
        generator: Knows its longest prompt (`max_prompt_tokens`; None is no limit) and counts.

    Returns:
        The request, or None where nothing fits; "items_shortened" and "previous_shortened" where it was so.
    """
    limit = generator.max_prompt_tokens

    def fits(state: str, shown: Sequence[ItemLine]) -> bool:
        return limit is None or prompt_length(ask(state, shown), generator) <= limit

    def shown(words: int) -> list[ItemLine]:
        return [ItemLine(line.title, cut_words(line.text, words)) for line in lines]

    if fits(previous, lines):
        return ask(previous, lines), ()
    longest = max((len(line.text.split()) for line in lines), default=0)
    marks = ("items_shortened",) if longest else ()
    if longest and fits(previous, shown(0)):
        words = _most(longest, lambda n: fits(previous, shown(n)))
        return ask(previous, shown(words)), marks
    if not previous or not fits("", shown(0)):
        return None, ()
    words = _most(len(previous.split()), lambda n: fits(cut_words(previous, n), shown(0)))
    return ask(cut_words(previous, words), shown(0)), (*marks, "previous_shortened")


def _most(upper: int, fits: Callable[[int], bool]) -> int:
    """The largest number in 0..upper that fits; whatever is below one that fits, fits too, and 0 is taken to."""
    low, high = 0, upper
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
