"""Atomic files."""

from __future__ import annotations

import pytest

from llmrec.errors import DataError

INTER = (
    "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    "196\t242\t3\t881250949\n186\t302\t3.5\t8.91717742e+08\n"
)
ITEM = 'item_id:token\tmovie_title:token_seq\tclass:token_seq\n242\t"Kolya" film\tComedy Children\'s\n302\tL.A.\t\n'
USER = "user_id:token\tage:token\n196\t49\n"


def test_folder_and_file(reader):
    for name, text in (("x.inter", INTER), ("x.item", ITEM), ("x.user", USER)):
        reader.write(f"set/{name}", text)
    for path in (reader.folder / "set", reader.folder / "set" / "x.inter"):
        raw = reader.read(path)
        assert reader.rows(raw.interactions, "user_key", "item_key", "rating", "timestamp") == [
            ("196", "242", 3.0, 881250949), ("186", "302", 3.5, 891717742),
        ]  # fmt: skip
        assert reader.rows(raw.items, "item_key", "title", "categories") == [
            ("242", '"Kolya" film', ["Comedy", "Children's"]), ("302", "L.A.", None),
        ]  # fmt: skip
        assert reader.rows(raw.users, "user_key", "age") == [("196", "49")]


def test_interactions_alone(reader):
    assert reader.read(reader.write("x.inter", INTER)).items is None


@pytest.mark.parametrize(
    "header", ["user_id\titem_id", "user_id:token\titem_id:word", "user_id:token,item_id:token", ":token\ta:token"]
)
def test_header_without_types(reader, header):
    with pytest.raises(DataError, match="typed header"):
        reader.read(reader.write("x.inter", f"{header}\n1\t2\n"))


def test_ragged_row(reader):
    with pytest.raises(DataError, match="fewer than 4") as caught:
        reader.read(reader.write("x.inter", INTER + "1\t2\n"))
    assert caught.value.line == 4


@pytest.mark.parametrize("names", [("a.inter", "b.inter"), ()])
def test_folder_must_have_one(reader, names):
    for name in names:
        reader.write(f"set/{name}", INTER)
    (reader.folder / "set").mkdir(exist_ok=True)
    with pytest.raises(DataError, match=".inter file"):
        reader.read(reader.folder / "set", "recbole")
