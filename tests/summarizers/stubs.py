"""A generator without a model, and a small shop with known histories."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from llmrec.data.dataset import InteractionDataset
from llmrec.llm.generating import Failure, Reply, Request
from tests.data.tables import dataset_of

Answer = Callable[[Request], "str | Reply | Failure"]


def echo(request: Request) -> str:
    """The opening, a word that depends on the whole prompt, and the prompt's own words: what leaks in, leaks out."""
    mark = hashlib.sha256(request.text.encode()).hexdigest()[:8]
    return f"{request.opening} {mark} after reading: {' '.join(request.text.split())}".strip()


def short(request: Request) -> str:
    """As `echo`, without the prompt's words."""
    return f"{request.opening} {hashlib.sha256(request.text.encode()).hexdigest()[:8]} things.".strip()


class Stub:
    """Answers by a function; counts words as tokens, and remembers what it was asked.

    Args:
        answer: Request -> text, reply or failure.
        limit: Longest prompt in words.
        identity: As a model's.
    """

    def __init__(self, answer: Answer = short, limit: int | None = None, identity: str = "stub") -> None:
        self.answer, self.max_prompt_tokens, self.identity = answer, limit, identity
        self.asked: list[Request] = []
        self.calls: list[int] = []

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def prompt_tokens(self, request: Request) -> int:
        return self.count_tokens(request.text)

    def generate(self, requests: Sequence[Request]) -> list[Reply | Failure]:
        self.calls.append(len(requests))
        self.asked += requests
        return [self._reply(request) for request in requests]

    def _reply(self, request: Request) -> Reply | Failure:
        found = self.answer(request)
        if isinstance(found, str):
            return Reply(found, self.count_tokens(request.text), self.count_tokens(found), "stop")
        return found


def shop(histories: Sequence[Sequence[int]], items: int = 30) -> InteractionDataset:
    """Users with these items in this order; the last two events of each are valid and test."""
    events = [
        (user, item, "test" if place == len(row) - 1 else "valid" if place == len(row) - 2 else "train")
        for user, row in enumerate(histories, start=1)
        for place, item in enumerate(row)
    ]
    return dataset_of(events, titles=[f"Title{number}." for number in range(1, items + 1)])
