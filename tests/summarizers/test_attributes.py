"""Texts without a model: counts by hand, decay, and the same bytes every time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from llmrec.errors import RecipeError
from llmrec.summarizers.attributes import Attributes, attributes_of, weights_of
from llmrec.summarizers.base import ItemLine, UserStep
from llmrec.summarizers.jobs import History, Tally, write_item_texts, write_user_texts
from llmrec.summarizers.store import TextStore
from tests.data.tables import dataset_of

EVENTS = [(1, item, "train") for item in (1, 2, 3)]


def step(previous: str, *texts: str) -> UserStep:
    return UserStep(previous, tuple(ItemLine("", text) for text in texts))


def weights(texts: Sequence[str], folder: Path, **options: Any) -> dict[str, float]:
    """The weights after a history of items with these texts."""
    lines = [ItemLine(""), *(ItemLine("", text) for text in texts)]
    row = History(1, "test", 0, tuple(range(1, len(texts) + 1)))
    with TextStore(folder) as store:
        found = write_user_texts(
            [row], lines, Attributes(**options), None, store, batch=4, tell=lambda *_: None, tally=Tally()
        )
    return weights_of(found[0].text)


def test_items_are_described_by_their_columns() -> None:
    columns = {"categories": [["Kitchen", "Gift"], ["Kitchen"], None], "brand": ["Dunmere", None, None]}
    dataset = dataset_of(EVENTS, titles=["Kettle", "Pot", "Atlas"], item_columns=columns)
    assert Attributes().item_words(dataset)[1:] == ["Kitchen, Gift; Dunmere", "Kitchen", ""]
    assert Attributes(columns=("brand", "title")).item_words(dataset)[1:] == ["Dunmere; Kettle", "Pot", "Atlas"]
    plain = dataset_of(EVENTS, titles=["Kettle", "Pot", "Atlas"])
    assert Attributes().item_words(plain)[1:] == ["Kettle", "Pot", "Atlas"]
    with pytest.raises(RecipeError, match="colour"):
        Attributes(columns=("colour",)).item_words(dataset)


def test_items_without_words_are_counted_as_missing(tmp_path: Path) -> None:
    dataset = dataset_of(EVENTS, titles=["a", "b", "c"], item_columns={"brand": pa.array(["Dunmere", None, " "])})
    with TextStore(tmp_path) as store:
        texts = write_item_texts(
            dataset, [1, 2, 3], Attributes(), None, store, batch=2, tell=lambda *_: None, tally=Tally()
        )
    assert [texts[item].status for item in (1, 2, 3)] == ["ok", "missing", "missing"] and texts[1].text == "Dunmere"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Kitchen, Gift; Alder & Co", ["kitchen", "gift", "alder co"]),
        ("A red circle on the plain ground.", ["red", "circle", "plain", "ground"]),
        ("red; RED. Red!", ["red"]),
        ("the; of", []),
        ("", []),
    ],
)
def test_attributes_of_a_text(text: str, found: list[str]) -> None:
    assert attributes_of(text) == found


def test_weights_decay_by_block_and_come_back_from_the_text() -> None:
    first = Attributes(decay=0.5).write_users([step("", "red; square", "red", "blue")], None)[0].text
    assert first == "Likes, most first: red (2.00), blue (1.00), square (1.00)"
    second = Attributes(decay=0.5).write_users([step(first, "blue")], None)[0].text
    assert weights_of(second) == {"blue": 1.5, "red": 1.0, "square": 0.5}
    assert Attributes(decay=0.5, top=1).write_users([step(first, "blue")], None)[0].text.endswith(": blue (1.50)")
    assert weights_of(Attributes(decay=0).write_users([step(first, "blue")], None)[0].text) == {"blue": 1.0}


def test_a_block_without_attributes_keeps_the_text() -> None:
    kept, failed = Attributes().write_users([step("Likes, most first: red (1.00)", ""), step("", "")], None)
    assert (kept.status, kept.text) == ("kept", "Likes, most first: red (1.00)")
    assert (failed.status, failed.text) == ("failed", "")


def test_modes(tmp_path: Path) -> None:
    texts = ["red", "red", "red", "blue", "blue", "blue", "blue"]
    assert weights(texts, tmp_path, decay=1.0) == {"red": 3, "blue": 4}
    assert weights(texts, tmp_path, decay=0.5) == {"red": 0.75, "blue": 2.5}
    assert weights(texts, tmp_path, decay=0.5, mode="direct") == {"red": 3, "blue": 4}
    assert weights(texts, tmp_path, decay=0.5, mode="last_block") == {"blue": 3}


def test_a_drifting_taste_is_followed_and_a_stray_item_is_not(tmp_path: Path) -> None:
    """What the recurrence is for: the last block alone forgets, equal weights do not follow."""
    drift = ["red"] * 9 + ["blue"] * 6
    assert max(weights(drift, tmp_path), key=weights(drift, tmp_path).__getitem__) == "blue"
    still = weights(drift, tmp_path, decay=1.0)
    assert still["red"] > still["blue"]
    stray = ["red"] * 12 + ["blue", "blue", "red"]
    assert weights(stray, tmp_path)["red"] > weights(stray, tmp_path)["blue"]
    last = weights(stray, tmp_path, mode="last_block")
    assert last["blue"] > last["red"]


def test_version_and_refusals() -> None:
    versions = {Attributes(**options).version(None) for options in ({}, {"decay": 0.1}, {"top": 3}, {"item_chars": 9})}
    assert len(versions) == 4 and Attributes(block_size=9).version(None) in versions
    with pytest.raises(RecipeError, match="decay: found 1.5, expected 0 to 1"):
        Attributes(decay=1.5)
    with pytest.raises(RecipeError, match="top: found 0, expected at least 1"):
        Attributes(top=0)
    with pytest.raises(RecipeError, match="mode: found 'x'"):
        Attributes(mode="x")  # type: ignore[arg-type]
