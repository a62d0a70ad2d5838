from __future__ import annotations

import numpy as np
import pytest

from llmrec.errors import DataError
from llmrec.evaluation.text_answers import judge_answers, named_candidates, normalise_answer

TITLES = ["", "Toy Story (1995)", "Alien", "Aliens", "Heat"]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Heat", "heat"),
        ("  HEAT \nToy Story (1995)", "heat"),
        ("\n\n Heat.\n", "heat."),
        ("", ""),
        (" \n \n", ""),
    ],
)
def test_normalised_answers(text, expected):
    assert normalise_answer(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("I would choose toy story (1995).", [1]),
        ("Aliens", [2, 3]),  # one title inside another: ambiguous under the rule
        ("Alien", [2]),
        ("Heat or Alien", [2, 4]),
        ("Casablanca", []),
        ("Casablanca\nHeat", []),  # only the first line is the answer
        ("", []),
    ],
)
def test_named_candidates(text, expected):
    assert named_candidates(text, TITLES) == expected


def test_judgement_by_hand():
    texts = ["Heat", "the answer: heat", "Alien", "Heat or Alien", "nothing"]
    candidates = np.array([[1, 2, 4, 0]] * 5)
    judged = judge_answers(texts, candidates, np.full(5, 4), TITLES)
    assert judged.items.tolist() == [4, 4, 2, 0, 0]
    assert judged.valid.tolist() == [True, True, True, False, False]
    assert judged.correct.tolist() == [True, True, False, False, False]
    assert judged.exact.tolist() == [True, False, False, False, False]
    # correct / total is 2/5; correct / valid would be 2/3
    assert judged.correct.mean() == pytest.approx(0.4) and judged.valid.mean() == pytest.approx(0.6)


def test_only_candidates_count():
    judged = judge_answers(["Aliens"], np.array([[3, 4]]), np.array([3]), TITLES)
    assert judged.correct.tolist() == [True]  # "Alien" is in the answer but not among the candidates


def test_two_candidates_of_one_title_are_ambiguous():
    judged = judge_answers(["Heat"], np.array([[1, 2]]), np.array([1]), ["", "Heat", "heat"])
    assert judged.valid.tolist() == [False] and judged.correct.tolist() == [False]


def test_numbers_must_match():
    with pytest.raises(DataError, match="differ in number"):
        judge_answers(["a"], np.array([[1], [2]]), np.array([1, 2]), TITLES)
