"""The items of a data set stand for it where the events stay at home."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmrec.data.catalogue import ItemCatalogue, check_item_index, item_index
from llmrec.errors import CheckpointError, DataError
from tests.data.tables import dataset_of

EVENTS = [(1, 2, "train"), (1, 3, "test"), (2, 1, "train"), (2, 2, "train")]
TITLES = ["One", "Two", ""]
DATA = dataset_of(EVENTS, times=[1, 2, 3, 4], titles=TITLES, item_columns={"price": [1, 2, 3]})


@pytest.mark.parametrize("titles", [True, False])
def test_items_survive_and_nothing_else_is_written(tmp_path: Path, titles: bool) -> None:
    ItemCatalogue.of(DATA, titles=titles).save(tmp_path)
    loaded = ItemCatalogue.load(tmp_path)
    assert (loaded.fingerprint, loaded.num_users, loaded.num_items) == (DATA.fingerprint, 2, 3)
    assert loaded.item_keys == DATA.item_keys and loaded.summary() == json.loads(json.dumps(DATA.summary()))
    assert loaded.item_titles == (DATA.item_titles if titles else DATA.item_keys)
    assert loaded.item_ids_of(["key-3", "none"]).tolist() == [3, 0]
    assert ("titles" in loaded.fields) is titles and "timestamps" in loaded.fields
    assert sorted(path.name for path in tmp_path.iterdir()) == ["catalogue.json", "items.parquet"]
    written = pq.read_table(tmp_path / "items.parquet")
    assert written.column_names == ["item", "key", "title"][: 3 if titles else 2]
    record = (tmp_path / "catalogue.json").read_text(encoding="utf-8")
    assert "user-1" not in record and ("Two" in record) is False


def test_a_catalogue_of_a_catalogue_is_the_same(tmp_path: Path) -> None:
    first = ItemCatalogue.of(DATA, titles=True)
    again = ItemCatalogue.of(ItemCatalogue.load(first.save(tmp_path)), titles=True)
    assert again.files() == first.files()


@pytest.mark.parametrize(
    "question",
    [
        lambda data: data.context(),
        lambda data: data.user_id_of("user-1"),
        lambda data: data.column("item"),
        lambda data: data.user_offsets,
        lambda data: data.split_codes,
        lambda data: data.histories("test", 5),
    ],
)
def test_what_needs_events_says_what_is_missing(question: Callable[[Any], Any]) -> None:
    with pytest.raises(DataError, match=f"(?s)interactions .* not at hand.*{DATA.fingerprint}.*dataset="):
        question(ItemCatalogue.of(DATA, titles=True))


def test_other_items_are_refused_naming_both_hashes(tmp_path: Path) -> None:
    folder = ItemCatalogue.of(DATA, titles=True).save(tmp_path)
    stored, table = item_index(DATA), pq.read_table(folder / "items.parquet")
    swapped = table.set_column(1, "key", pa.array(["key-2", "key-1", "key-3"]))
    pq.write_table(swapped, folder / "items.parquet")
    wrong = replace(DATA, items=swapped)
    with pytest.raises(CheckpointError, match=stored["keys"]) as error:
        ItemCatalogue.load(folder)
    assert "item index" in str(error.value) and item_index(wrong)["keys"] in str(error.value)
    pq.write_table(table.set_column(2, "title", pa.array(["One", "2", ""])), folder / "items.parquet")
    with pytest.raises(CheckpointError, match=f"item titles {stored['titles']}"):
        ItemCatalogue.load(folder)


def test_titles_count_only_where_they_are_read() -> None:
    other = dataset_of(EVENTS, titles=["One", "Zwei", ""])
    check_item_index("run", item_index(DATA), other)
    with pytest.raises(CheckpointError, match="item titles"):
        check_item_index("run", item_index(DATA), other, titles=True)
    assert item_index(dataset_of(EVENTS))["titles"] is None


@pytest.mark.parametrize("damage", ["gone", "not json", "no meta", "other format"])
def test_a_damaged_catalogue(tmp_path: Path, damage: str) -> None:
    path = ItemCatalogue.of(DATA, titles=True).save(tmp_path) / "catalogue.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    if damage == "gone":
        path.unlink()
    elif damage == "no meta":
        path.write_text(json.dumps({key: value for key, value in record.items() if key != "meta"}), encoding="utf-8")
    else:
        path.write_text("{" if damage == "not json" else json.dumps({**record, "format": 9}), encoding="utf-8")
    with pytest.raises(DataError, match="catalogue|format"):
        ItemCatalogue.load(tmp_path)
