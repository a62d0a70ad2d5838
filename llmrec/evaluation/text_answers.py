"""Reading a generated answer: which candidate does it name?

The rule is that of LLaRA and iLoRA: an answer is valid if exactly one candidate's title is a substring of it, and
correct if that candidate is the target. HR@1 is correct / total, as in their tables; the share of valid answers is
reported beside it. Correct / valid is never reported: a system could raise it by answering only where it is sure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmrec.errors import DataError


@dataclass(frozen=True)
class AnswerJudgement:
    """What n answers name.

    Args:
        items: [n] int64, the one candidate named, 0 where the answer is invalid.
        valid: [n] bool, exactly one candidate's title is in the answer.
        correct: [n] bool, valid and the target.
        exact: [n] bool, the answer is the target's title and nothing else (stricter than `correct`).
    """

    items: np.ndarray
    valid: np.ndarray
    correct: np.ndarray
    exact: np.ndarray


def normalise_answer(text: str) -> str:
    """First line of the stripped text, stripped and in lower case."""
    return next(iter(text.strip().splitlines()), "").strip().lower()


def named_candidates(text: str, titles: Sequence[str]) -> list[int]:
    """Positions of the titles that stand in the answer; an empty title stands in none."""
    answer = normalise_answer(text)
    names = (normalise_answer(title) for title in titles)
    return [position for position, name in enumerate(names) if name and name in answer]


def judge_answers(
    texts: Sequence[str], candidates: np.ndarray, targets: np.ndarray, titles: Sequence[str]
) -> AnswerJudgement:
    """Judge one answer per example.

    Args:
        texts: n raw generations.
        candidates: [n, C] item ids, the target among them, 0 = padding.
        targets: [n] item ids.
        titles: Title of every item, index = item id.

    Raises:
        DataError: The numbers of answers, candidate lists and targets differ.
    """
    if not len(texts) == len(candidates) == len(targets):
        raise DataError(
            "answers, candidate lists and targets differ in number",
            found=f"{len(texts)} answers, {len(candidates)} lists, {len(targets)} targets",
            expected="one of each per example",
        )
    items = np.zeros(len(texts), dtype=np.int64)
    exact = np.zeros(len(texts), dtype=bool)
    for row, (text, pool, target) in enumerate(zip(texts, candidates, targets, strict=True)):
        named = named_candidates(text, [titles[item] if item else "" for item in pool])
        if len(named) == 1:
            items[row] = pool[named[0]]
        exact[row] = normalise_answer(text) == normalise_answer(titles[int(target)])
    return AnswerJudgement(items, valid=items > 0, correct=(items > 0) & (items == targets), exact=exact)
