"""Answers name items by exact title, and nothing is guessed."""

from __future__ import annotations

import pytest

from llmrec.errors import DataError
from llmrec.llm.decoding import TitleIndex, normalise_title

TITLES = ["", "Alien (1979)", "Aliens (1986)", "The  Thing", "Twin", "twin", ""]


@pytest.mark.parametrize(
    ("answer", "item"),
    [
        (" alien (1979)\nand more", 1),
        ("ALIENS (1986)", 2),
        ("the thing", 3),
        ("alien", 0),
        ("Alien (1979) and Aliens (1986)", 0),
        ("", 0),
        ("\n\n", 0),
        ("twin", 0),
    ],
)
def test_exact_titles(answer: str, item: int) -> None:
    assert TitleIndex(TITLES).item(answer) == item


def test_candidates_limit_and_disambiguate() -> None:
    index = TitleIndex(TITLES)
    assert index.item("Aliens (1986)", {1, 3}) == 0
    assert index.item("twin", {5, 1}) == 5
    assert index.item("twin", {4, 5}) == 0


def test_titles_are_needed() -> None:
    with pytest.raises(DataError, match="no item has a title"):
        TitleIndex(["", "", " "])
    assert normalise_title("  A  b\nc ") == "a b"
