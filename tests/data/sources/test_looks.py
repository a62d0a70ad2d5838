"""Looks of synthetic items: seen in pictures only, preferred by the users who should, and changed halfway."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmrec.data.item_images import COLOURS, PATTERNS, SHAPES, decode_image
from llmrec.data.sources import looks, synthetic
from llmrec.data.sources.base import ReadOptions
from llmrec.data.sources.looks import LETTERS, LOOK, RETURN, Look, look_of
from llmrec.data.sources.synthetic import SyntheticSource
from llmrec.errors import RecipeError

OPTIONS: dict[str, Any] = {"users": 300, "items": 160, "seed": 3, "images": True}


def tables(reader: Any, **options: Any) -> tuple[Any, Any]:
    raw = SyntheticSource(**options).read(reader.connection, Path("synthetic"), ReadOptions())
    events = reader.connection.to_pyarrow(raw.interactions).sort_by("source_row")
    return events, reader.connection.to_pyarrow(raw.items)


def histories(events: Any) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for user, item in zip(events["user_key"].to_pylist(), events["item_key"].to_pylist(), strict=True):
        found[user].append(int(item[1:]))
    return found


def digest(table: Any) -> str:
    return hashlib.sha256(repr(table.to_pydict()).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("options", "events", "items"),
    [
        ({}, "e10daad4ab30b129", "5038f2b15da3cf43"),
        ({"users": 7, "items": 31, "events_per_user": 40, "seed": 9}, "866cd81752311919", "1b2577cd8f8c7d9f"),
    ],
)
def test_without_the_options_the_data_are_what_they_always_were(reader, options, events, items) -> None:
    found = tables(reader, **options)
    assert (digest(found[0]), digest(found[1])) == (events, items)


def test_a_look_depends_on_item_and_seed_alone_and_every_value_occurs() -> None:
    found = [look_of(item, 7) for item in range(1, 801)]
    assert found[4] == look_of(5, 7) and found[4:9] != [look_of(item, 8) for item in range(5, 10)]
    for name, values in (("shape", SHAPES), ("colour", [c for c, _ in COLOURS]), ("pattern", PATTERNS),
                         ("lettering", LETTERS)):  # fmt: skip
        counts = [sum(getattr(look, name) == value for look in found) for value in values]
        assert min(counts) > 0.6 * 800 / len(values), name
    assert len({look.codes for look in found}) == len(SHAPES) * len(COLOURS), "shape and colour are independent"


def test_the_picture_shows_the_look(reader) -> None:
    _, items = tables(reader, **OPTIONS, visual_taste=0.5)
    for key, data in zip(items["item_key"].to_pylist()[:20], items["image"].to_pylist(), strict=False):
        look = look_of(int(key[1:]), 3)
        assert data == look.draw()
        if look.shape not in ("ring", "star"):
            assert decode_image(data).getpixel((48, 40)) == dict(COLOURS)[look.colour]


def test_no_text_knows_the_look(reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the items look like, their texts are the same; and no text has a word of a look in it."""
    texts = ["item_key", "title", "description", "categories", "brand"]
    _, items = tables(reader, **OPTIONS, visual_taste=0.5)
    assert items.column_names == [*texts, "image"], "no column holds the look either"
    words = "|".join([*SHAPES, *(name for name, _ in COLOURS), *PATTERNS])
    assert not re.search(rf"(?i)\b({words})\b", repr(items.select(texts).to_pydict()))
    for module in (looks, synthetic):
        monkeypatch.setattr(module, "look_of", lambda item, seed: Look("star", "teal", "dotted", "X"))
    _, others = tables(reader, **OPTIONS, visual_taste=0.5)
    assert others.select(texts).equals(items.select(texts)) and not others.equals(items)


def test_shuffled_pictures_are_the_same_pictures_of_other_items_and_nothing_else_changes(reader) -> None:
    (events, items), (same_events, dealt) = (
        tables(reader, **OPTIONS, visual_taste=0.5, shuffle_pictures=shuffle) for shuffle in (False, True)
    )
    assert same_events.equals(events) and dealt.drop_columns("image").equals(items.drop_columns("image"))
    pictures, others = (table["image"].to_pylist() for table in (items, dealt))
    assert sorted(others) == sorted(pictures)
    assert sum(a == b for a, b in zip(pictures, others, strict=True)) < 0.1 * len(pictures)


def test_users_with_a_look_choose_by_it_and_the_others_as_ever(reader) -> None:
    source = SyntheticSource(**OPTIONS, visual_taste=0.6)
    truth = {row["user_key"]: row for row in source.tastes().to_pylist()}
    assert len(truth) == 180 and all(row["first"] == row["second"] for row in truth.values())
    assert {row["attribute"] for row in truth.values()} == {"shape", "colour"}
    found, plain = (histories(tables(reader, **OPTIONS, **more)[0]) for more in ({"visual_taste": 0.6}, {}))
    shares = []
    for user, items in found.items():
        if user not in truth:
            assert items == plain[user]
            continue
        assert len(items) == len(set(items))
        liked = [getattr(look_of(item, 3), truth[user]["attribute"]) == truth[user]["first"] for item in items]
        shares.append(np.mean(liked))
    assert LOOK - 0.05 < np.mean(shares) < LOOK + 0.1
    others = [np.mean([look_of(i, 3).colour == "red" for i in items]) for u, items in found.items() if u not in truth]
    assert np.mean(others) < 0.3


def test_a_drift_changes_the_look_in_the_second_half(reader) -> None:
    options = {**OPTIONS, "visual_taste": 1.0, "taste_drift": 0.5}
    truth = SyntheticSource(**options).tastes().to_pylist()
    found = histories(tables(reader, **options)[0])
    drifting = [row for row in truth if row["first"] != row["second"]]
    assert len(truth) == 300 and len(drifting) == 150
    shares = []
    for row in drifting:
        values = [getattr(look_of(item, 3), row["attribute"]) for item in found[row["user_key"]]]
        early, late = values[:10], values[10:]
        shares.append(
            [np.mean([v == row[when] for v in half]) for half in (early, late) for when in ("first", "second")]
        )
    before, not_yet, still, after = np.mean(shares, axis=0)
    assert before > LOOK - 0.05 and not_yet < 0.12
    assert after == pytest.approx(LOOK * (1 - RETURN) + 0.05, abs=0.08) and still == pytest.approx(0.22, abs=0.08)


def test_ratings_follow_the_look(reader) -> None:
    events, _ = tables(reader, **OPTIONS, visual_taste=1.0)
    truth = {row["user_key"]: row for row in SyntheticSource(**OPTIONS, visual_taste=1.0).tastes().to_pylist()}
    liked = [
        getattr(look_of(int(item[1:]), 3), truth[user]["attribute"]) == truth[user]["first"]
        for user, item in zip(events["user_key"].to_pylist(), events["item_key"].to_pylist(), strict=True)
    ]
    rating, liked_mask = events["rating"].to_numpy(), np.array(liked)
    assert rating[liked_mask].mean() > rating[~liked_mask].mean() + 1


@pytest.mark.parametrize("sizes", [(1, 2, 1), (3, 5, 9), (7, 31, 40)])
def test_small_worlds(reader, sizes) -> None:
    users, items, events = sizes
    options = {"users": users, "items": items, "events_per_user": events, "images": True, "visual_taste": 1.0}
    found = histories(tables(reader, **options, taste_drift=1.0)[0])
    assert len(found) == users
    assert all(len(history) == len(set(history)) <= min(items, events) for history in found.values())


def test_equal_seeds_give_equal_data(reader) -> None:
    options = {**OPTIONS, "users": 40, "visual_taste": 0.5, "taste_drift": 0.5}
    first, again = (tables(reader, **options) for _ in range(2))
    assert first[0].equals(again[0]) and first[1].equals(again[1])
    assert not tables(reader, **{**options, "seed": 4})[0].equals(first[0])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"visual_taste": 1.5, "images": True}, "visual_taste=1.5; expected a share from 0 to 1"),
        ({"visual_taste": "half", "images": True}, "visual_taste='half'; expected a share"),
        ({"visual_taste": 0.5}, "expected images: true"),
        ({"taste_drift": 0.5, "images": True}, "expected visual_taste above 0"),
        ({"taste_drift": -1, "visual_taste": 1, "images": True}, "taste_drift=-1"),
        ({"shuffle_pictures": True}, "expected images: true"),
    ],
)
def test_senseless_looks(reader, wrong, message) -> None:
    with pytest.raises(RecipeError, match=message):
        tables(reader, **wrong)
