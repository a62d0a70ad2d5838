"""The generator: deterministic, without repeats, and with a rule to be learned."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from llmrec.data.sources.base import ReadOptions
from llmrec.data.sources.synthetic import SyntheticSource
from llmrec.errors import RecipeError


def _tables(reader, **options):
    raw = SyntheticSource(**options).read(reader.connection, Path("synthetic"), ReadOptions())
    events = reader.connection.to_pyarrow(raw.interactions).sort_by("source_row")
    return events, reader.connection.to_pyarrow(raw.items)


def test_equal_seeds_give_equal_data(reader):
    first, items = _tables(reader, users=50, seed=3, images=True)
    again, same_items = _tables(reader, users=50, seed=3, images=True)
    other, _ = _tables(reader, users=50, seed=4)
    assert first.equals(again) and items.equals(same_items) and not first.equals(other)


def test_columns_and_sizes(reader):
    events, items = _tables(reader, users=40, items=120, events_per_user=12)
    assert events.schema.names == ["user_key", "item_key", "source_row", "timestamp", "rating"]
    assert set(events["user_key"].to_pylist()) == {f"u{n}" for n in range(1, 41)}
    assert items.num_rows == 120 and set(events["item_key"].to_pylist()) <= set(items["item_key"].to_pylist())
    assert max(Counter(events["user_key"].to_pylist()).values()) == 12
    assert len(set(items["title"].to_pylist())) == 120 and "image" not in items.schema.names
    assert set(events["rating"].to_pylist()) <= {1.0, 2.0, 3.0, 4.0, 5.0}


def test_users_meet_an_item_once_and_in_time(reader):
    events, _ = _tables(reader)
    frame = events.to_pydict()
    pairs = list(zip(frame["user_key"], frame["item_key"], strict=True))
    assert len(pairs) == len(set(pairs))
    same = np.array(frame["user_key"][1:]) == np.array(frame["user_key"][:-1])
    assert np.diff(frame["timestamp"])[same].min() > 0
    assert frame["source_row"] == list(range(len(pairs)))


def test_last_item_predicts_better_than_popularity(reader):
    histories: dict[str, list[str]] = defaultdict(list)
    for user, item in zip(*_tables(reader)[0].select(["user_key", "item_key"]).to_pydict().values(), strict=True):
        histories[user].append(item)
    popular, follows = Counter[str](), defaultdict(Counter)
    for items in histories.values():
        popular.update(items[:-1])
        for before, after in zip(items[:-2], items[1:-1], strict=True):
            follows[before][after] += 1
    hits = {"popular": 0, "follows": 0}
    for items in histories.values():
        unseen = [item for item, _ in popular.most_common() if item not in items[:-1]]
        hits["popular"] += items[-1] in unseen[:10]
        hits["follows"] += items[-1] in [item for item, _ in follows[items[-2]].most_common(10)]
    assert hits["follows"] > 3 * hits["popular"] > 0 and hits["follows"] > 0.5 * len(histories)


@pytest.mark.parametrize("sizes", [(1, 2, 1), (3, 5, 9), (7, 31, 40), (2, 9, 3)])
def test_small_worlds(reader, sizes):
    users, items, events = sizes
    table, catalogue = _tables(reader, users=users, items=items, events_per_user=events)
    counts = Counter(table["user_key"].to_pylist())
    assert len(counts) == users and max(counts.values()) <= min(items, events) and catalogue.num_rows == items


@pytest.mark.parametrize("wrong", [{"users": 0}, {"items": 1}, {"events_per_user": 0}, {"seed": -1}])
def test_senseless_sizes(reader, wrong):
    with pytest.raises(RecipeError, match="expected"):
        _tables(reader, **wrong)


def test_large_catalogue_has_distinct_titles(reader):
    _, items = _tables(reader, users=5, items=5_000)
    assert len(set(items["title"].to_pylist())) == 5_000
