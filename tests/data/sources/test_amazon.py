"""Amazon reviews of three years."""

from __future__ import annotations

import json

import pytest

from llmrec.data.sources.amazon import domain_of
from llmrec.errors import DataError

OLD = [
    {"reviewerID": "A1", "asin": "B1", "reviewText": "good", "overall": 5.0, "unixReviewTime": 1252800000},
    {"reviewerID": "A2", "asin": "B2", "overall": 3, "unixReviewTime": 1252800001},
]  # fmt: skip
OLD_META = [
    {"asin": "B1", "title": "It's a lamp", "description": "Bright", "brand": "Lum",
     "categories": [["Home", "Light"], ["Home", "Sale"]]},
    {"asin": "B2", "title": 'Said "so"', "imUrl": "http://x"},
]  # fmt: skip
NEW = [
    {"user_id": "U", "asin": "V", "parent_asin": "P", "rating": 4.0, "title": "a review", "timestamp": 1588687728923}
]
NEW_META = [
    {"parent_asin": "P", "title": "Thing", "description": ["One.", "Two."], "store": "Shop", "categories": ["X", "Y"]}
]


def _lines(records: list[dict], dump=json.dumps) -> str:
    return "".join(dump(record) + "\n" for record in records)


@pytest.mark.parametrize("dump", [json.dumps, repr])
def test_2014(reader, dump):
    path = reader.write("a/reviews_Beauty_5.json.gz", _lines(OLD))
    reader.write("a/meta_Beauty.json.gz", _lines(OLD_META, dump))
    for place in (path, path.parent):
        raw = reader.read(place)
        assert reader.rows(raw.interactions, "user_key", "item_key", "rating", "timestamp") == [
            ("A1", "B1", 5.0, 1252800000), ("A2", "B2", 3.0, 1252800001),
        ]  # fmt: skip
        assert reader.rows(raw.items, "item_key", "title", "description", "brand", "categories") == [
            ("B1", "It's a lamp", "Bright", "Lum", ["Home", "Light", "Sale"]), ("B2", 'Said "so"', None, None, None),
        ]  # fmt: skip
        assert not {"reviewText", "imUrl"} & {*raw.interactions.columns, *raw.items.columns}


def test_2023(reader):
    path = reader.write("All_Beauty.jsonl", _lines(NEW))
    reader.write("meta_All_Beauty.jsonl", _lines(NEW_META))
    raw = reader.read(path)
    assert reader.rows(raw.interactions, "user_key", "item_key", "timestamp") == [("U", "P", 1588687728)]
    assert reader.rows(raw.items, "title", "description", "brand", "categories") == [
        ("Thing", "One. Two.", "Shop", ["X", "Y"])
    ]


def test_two_domains(reader):
    for name, records, meta in (("Beauty", OLD, OLD_META), ("Toys", OLD[:1], OLD_META[:1])):
        reader.write(f"a/reviews_{name}_5.json", _lines(records))
        reader.write(f"a/meta_{name}.json", _lines(meta))
    raw = reader.read(reader.folder / "a")
    assert reader.rows(raw.interactions, "source_row", "domain", "item_key") == [
        (0, "Beauty", "B1"), (1, "Beauty", "B2"), (2, "Toys", "B1"),
    ]  # fmt: skip
    assert sorted(reader.rows(raw.items, "item_key", "domain")) == [("B1", "Beauty"), ("B2", "Beauty")]


def test_domain_names():
    from pathlib import Path

    names = ["reviews_Beauty_5.json.gz", "meta_Beauty.json.gz", "Beauty_5.json", "Beauty.jsonl", "meta_Beauty.jsonl"]
    assert {domain_of(Path(name)) for name in names} == {"Beauty"}


def test_code_in_metadata_is_never_run(reader):
    path = reader.write("reviews_X_5.json", _lines(OLD))
    reader.write("meta_X.json", "{'asin': 'B1', 'title': 'ok'}\n{'asin': __import__('os').getcwd()}\n")
    with pytest.raises(DataError, match="not a JSON object") as caught:
        reader.read(path)
    assert caught.value.line == 2 and str(caught.value.file).endswith("meta_X.json")


def test_bad_review(reader):
    path = reader.write("reviews_X_5.json", _lines(OLD) + '{"reviewerID": "A3"}\n')
    with pytest.raises(DataError, match="empty id") as caught:
        reader.read(path)
    assert caught.value.line == 3
    with pytest.raises(DataError, match="no review file"):
        reader.read(reader.folder / "nowhere.json", "amazon")
