"""CSV, JSON Lines and Parquet tables: what is understood, what is refused, and how it is said."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmrec.data.sources.table import TableSource
from llmrec.errors import DataError, LlmrecError, RecipeError

KEYS = ("user_key", "item_key")
TIMES = (*KEYS, "timestamp")


class TestUnderstood:
    @pytest.mark.parametrize("separator", [",", ";", "\t", "|", "::"])
    def test_separator_is_sniffed(self, reader, separator):
        text = "userId,movieId,rating,timestamp\n1,10,4.5,100\n2,20,3,200\n".replace(",", separator)
        raw = reader.read_text(text)
        assert reader.rows(raw.interactions, *TIMES, "rating") == [("1", "10", 100, 4.5), ("2", "20", 200, 3.0)]
        assert raw.columns == {"user": "userId", "item": "movieId", "rating": "rating", "timestamp": "timestamp"}

    @pytest.mark.parametrize("header", ["USER_ID,Item ID,Time", "customer_id,asin,date", "uid,productId,TS"])
    def test_columns_are_sniffed_without_case(self, reader, header):
        raw = reader.read_text(f"{header}\na,b,5\n")
        assert reader.rows(raw.interactions, *TIMES) == [("a", "b", 5)]

    def test_explicit_columns_win(self, reader):
        text = "user_id,who,item_id,when,timestamp\n1,ann,x,7,99\n"
        raw = reader.read_text(text, columns={"user": "who", "time": "when"})
        assert reader.rows(raw.interactions, *TIMES) == [("ann", "x", 7)]
        assert "user_id" in raw.interactions.columns and "source_timestamp" in raw.interactions.columns

    def test_ids_stay_text(self, reader, lines):
        ids = ["-7", "9223372036854775808", "18446744073709551617", "007", "ünï", "🛒", "a b", "1.0", "1e5"]
        raw = reader.read_text(lines(*[f'{key},"{key}",{n}' for n, key in enumerate(ids)], '"x,""y""",z,9'))
        assert [key for key, _ in reader.rows(raw.interactions, *KEYS)] == [*ids, 'x,"y"']
        assert reader.rows(raw.interactions, *KEYS)[1] == (ids[1], ids[1])

    @pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
    def test_line_ends(self, reader, lines, newline):
        raw = reader.read_text(lines("a,b,1", "c,d,2").replace("\n", newline).encode())
        assert reader.rows(raw.interactions, *TIMES) == [("a", "b", 1), ("c", "d", 2)]

    def test_mixed_line_ends(self, reader):
        raw = reader.read_text(b"user_id,item_id,timestamp\na,b,1\r\nc,d,2\ne,f,3\r\ng,h,4")
        assert [t for *_, t in reader.rows(raw.interactions, *TIMES)] == [1, 2, 3, 4]

    def test_byte_order_mark(self, reader, lines):
        raw = reader.read_text(b"\xef\xbb\xbf" + lines("a,b,1").encode())
        assert reader.rows(raw.interactions, *TIMES) == [("a", "b", 1)]

    def test_blank_lines_and_no_final_newline(self, reader):
        raw = reader.read_text("\n\nuser_id,item_id\n\na,b\n\n\nc,d")
        assert reader.rows(raw.interactions, *KEYS, "source_row") == [("a", "b", 0), ("c", "d", 1)]

    def test_quoted_fields_hold_separators_and_newlines(self, reader):
        raw = reader.read_text('user_id,item_id,title\nu,1,"One, two\nthree ""four"""\n')
        assert reader.rows(raw.items, "item_key", "title") == [("1", 'One, two\nthree "four"')]

    @pytest.mark.parametrize("name", ["events.csv.gz", "events.CSV", "events.dat", "wild[1]*card.csv", "it's.csv"])
    def test_file_names(self, reader, lines, name):
        assert reader.rows(reader.read_text(lines("a,b,1"), name=name).interactions, *KEYS) == [("a", "b")]

    def test_jsonl(self, reader):
        records = [{"user": 2**64 + 1, "item": "é", "time": 5, "rating": 4}, {"user": -1, "item": 3, "time": "6"}]
        text = "\n\n".join(json.dumps(record) for record in records)
        for name in ("events.jsonl", "events.jsonl.gz", "events.json"):
            raw = reader.read_text(text, name=name)
            assert reader.rows(raw.interactions, *TIMES) == [(str(2**64 + 1), "é", 5), ("-1", "3", 6)]
            assert reader.rows(raw.interactions, "rating") == [(4.0,), (None,)]

    def test_unicode_line_separators_end_no_line(self, reader):
        raw = reader.read_text('{"user":"a\u2028b","item":1}\n{"user":"c\u0085","item":2}\n', name="events.jsonl")
        assert reader.rows(raw.interactions, "user_key") == [("a\u2028b",), ("c\u0085",)]
        raw = reader.read_text("user_id,item_id,a\u2028b\nx,1,2\n,2,3\n", on_bad_rows="quarantine")
        assert raw.rejected.column("line").to_pylist() == [3]

    def test_parquet_keeps_types_and_wholes(self, reader):
        path = reader.folder / "events.parquet"
        table = {
            "user_id": [1.0, 2.0],
            "item_id": [2**63 - 1, -5],
            "timestamp": pa.array([0, 10**15], pa.timestamp("us")),
        }
        pq.write_table(pa.table(table), path)
        raw = reader.read(path)
        assert reader.rows(raw.interactions, *TIMES) == [("1", str(2**63 - 1), 0), ("2", "-5", 10**9)]

    def test_source_row_column_is_the_tie_break(self, reader):
        raw = reader.read_text("user_id,item_id,src_row\na,x,7\na,y,3\n")
        assert reader.rows(raw.interactions, "item_key", "source_row") == [("y", 3), ("x", 7)]

    def test_repeated_source_rows_are_replaced(self, reader):
        raw = reader.read_text("user_id,item_id,src_row\na,x,7\na,y,7\na,z,1\n")
        assert sorted(row for (row,) in reader.rows(raw.interactions, "source_row")) == [0, 1, 2]
        assert any("repeated" in note for note in raw.notes)

    def test_order_label_and_split(self, reader):
        raw = reader.read_text("user_id,item_id,pos,label,split\na,x,0,1,Training\na,y,1,false,val\n")
        assert reader.rows(raw.interactions, "order", "label", "split") == [(0.0, 1.0, "train"), (1.0, 0.0, "valid")]


class TestTimes:
    @pytest.mark.parametrize(
        ("value", "seconds"),
        [
            ("1700000000", 1_700_000_000), ("1700000000123", 1_700_000_000), ("1700000000123456", 1_700_000_000),
            ("1700000000123456789", 1_700_000_000), ("8.812509e+08", 881_250_900), ("12.9", 12), ("-5", -5),
            ("2020-01-01", 1_577_836_800), ("2020-01-01 00:00:10", 1_577_836_810), ("2020/01/01", 1_577_836_800),
            ("2020-01-01T02:00:00+02:00", 1_577_836_800), ("2020-01-01T00:00:00Z", 1_577_836_800),
        ],
    )  # fmt: skip
    def test_units_and_dates(self, reader, lines, value, seconds):
        assert reader.rows(reader.read_text(lines(f"a,b,{value}")).interactions, "timestamp") == [(seconds,)]

    def test_conversion_is_told(self, reader, lines):
        assert any("milliseconds" in note for note in reader.read_text(lines("a,b,1700000000123")).notes)

    def test_future_is_told(self, reader, lines):
        raw = reader.read_text(lines("a,b,1700000000", f"a,c,{int(time.time()) + 10**8}"))
        assert any(note.startswith("1 times lie in the future") for note in raw.notes)

    @pytest.mark.parametrize("odd", ["1700000000123", "2020-01-01", "soon", "", "NaN", "inf", "9999999999999999999999"])
    def test_one_odd_time_is_a_bad_row(self, reader, lines, odd):
        text = lines("a,b,1700000000", "a,c,1700000001", f"a,d,{odd}")
        with pytest.raises(DataError) as caught:
            reader.read_text(text)
        assert (caught.value.line, caught.value.column) == (4, "timestamp")
        raw = reader.read_text(text, on_bad_rows="quarantine")
        assert len(reader.rows(raw.interactions, "timestamp")) == 2
        assert raw.rejected.column("line").to_pylist() == [4]

    def test_empty_time_column_is_left_out(self, reader, lines):
        raw = reader.read_text(lines("a,b,", "a,c,"))
        assert "timestamp" not in raw.interactions.columns and "holds no times" in raw.notes[0]


class TestRefused:
    """Each message says where, what was found, what was expected and how to mend it."""

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", "empty"), (b"\n\n", "empty"), (b"user_id,item_id\n", "no rows"),
            ("user_id,item_id\na,b\n".encode("utf-16"), "UTF-16"),
            ("user_id,item_id\na,b\n".encode("utf-16-le"), "UTF-16"),
            (b"user_id\xa7item_id\na\xa7b\n", "no separator"), (b"user_id.item_id\na.b\n", "no separator"),
            (b"user_id,price\na,1\n", "no item column"), (b"1,2,3\n4,5,6\n", "no user column"),
            (b"user_id,item_id,Item_ID\na,b,c\n", "duplicate column"), (b"PK\x03\x04rest", "zip"),
            (b"\x1f\x8bbroken", "cannot be read"), (b"user_id," + b"c," * 5000 + b"item_id\n1\n", "columns"),
        ],
    )  # fmt: skip
    def test_files(self, reader, content, words):
        with pytest.raises(DataError, match=words) as caught:
            reader.read_text(content)
        assert "events.csv" in str(caught.value)

    def test_missing_column_lists_those_present(self, reader):
        with pytest.raises(DataError) as caught:
            reader.read_text("user_id,thing,when\na,b,1\n")
        assert all(name in str(caught.value) for name in ("'user_id'", "'thing'", "'when'", "--columns item="))

    @pytest.mark.parametrize(
        ("row", "column", "words"),
        [
            ("c,d", "", "fewer than 3"), ("c,d,2,x", "", "more than 3"), (",d,2", "user_id", "empty id"),
            ("c,  ,2", "item_id", "empty id"), ("NaN,d,2", "user_id", "empty id"), ("c,<NA>,2", "item_id", "empty id"),
            ('c,"d"e,2', "item_id", "quote"), ("c,d,x", "timestamp", "not a time"),
        ],
    )  # fmt: skip
    def test_rows(self, reader, lines, row, column, words):
        text = lines("a,b,1", row, "e,f,3")
        with pytest.raises(DataError, match=words) as caught:
            reader.read_text(text)
        assert (caught.value.line, caught.value.column or "") == (3, column)
        assert "--on-bad-rows quarantine" in str(caught.value) and caught.value.expected
        raw = reader.read_text(text, on_bad_rows="quarantine")
        assert reader.rows(raw.interactions, *TIMES) == [("a", "b", 1), ("e", "f", 3)]
        reject = raw.rejected.to_pylist()[0]
        assert reject["line"] == 3 and reject["reason"] and reject["file"].endswith("events.csv")

    def test_not_utf8_row(self, reader, lines):
        raw = reader.read_text(lines("a,b,1").encode() + b"c,caf\xe9,2\n", on_bad_rows="quarantine")
        assert raw.rejected.select(["line", "reason"]).to_pylist() == [{"line": 3, "reason": "not UTF-8 text"}]

    @pytest.mark.parametrize("value", ["NaN", "inf", "good"])
    def test_rating_must_be_finite(self, reader, value):
        with pytest.raises(DataError, match="finite"):
            reader.read_text(f"user_id,item_id,rating\na,b,{value}\n")

    def test_nan_ids_in_parquet(self, reader):
        path = reader.folder / "events.parquet"
        pq.write_table(pa.table({"user_id": [1.0, float("nan"), None], "item_id": ["a", "b", "c"]}), path)
        raw = reader.read(path, on_bad_rows="quarantine")
        assert reader.rows(raw.interactions, *KEYS) == [("1", "a")]
        assert raw.rejected.column("line").to_pylist() == [2, 3]

    def test_first_bad_row_is_reported_whatever_its_kind(self, reader, lines):
        with pytest.raises(DataError) as caught:
            reader.read_text(lines("a,b,1", "a,c,x", "short", "a,d,y"))
        assert caught.value.line == 3 and "2 more bad rows" in str(caught.value)

    def test_lines_are_physical(self, reader):
        text = 'user_id,item_id,title\n\na,1,"two\nlines"\n\nb,2,5" wide\nshort\n,3,x\nc,4,"y\n\nz"\nd,,w\n'
        raw = reader.read_text(text, on_bad_rows="quarantine")
        assert raw.rejected.column("line").to_pylist() == [7, 8, 12]

    @pytest.mark.parametrize("newline", ["\r\n", "\r"])
    def test_lines_with_other_ends(self, reader, newline):
        text = 'user_id,item_id\n"a",1\nshort\n\n,3\n'.replace("\n", newline)
        assert reader.read_text(text, on_bad_rows="quarantine").rejected.column("line").to_pylist() == [3, 5]

    def test_lines_with_mixed_ends(self, reader):
        raw = reader.read_text(b"user_id,item_id\r\na,1\nshort\r\n\n,3\n", on_bad_rows="quarantine")
        assert raw.rejected.column("line").to_pylist() == [3, 5]

    def test_jsonl_rows(self, reader):
        text = '{"user":"a","item":1}\n\nnot json\n{"user":"a"}\n[1]\n{"user":"b","item":2}\n{"user":"\x01","item":3}\n'
        raw = reader.read_text(text, name="events.jsonl", on_bad_rows="quarantine")
        assert raw.rejected.column("line").to_pylist() == [3, 4, 5, 7]
        assert reader.rows(raw.interactions, *KEYS) == [("a", "1"), ("b", "2")]
        with pytest.raises(DataError, match="JSON object") as caught:
            reader.read_text(text, name="events.jsonl")
        assert caught.value.line == 3

    def test_json_array(self, reader):
        with pytest.raises(DataError, match="JSON array"):
            reader.read_text('[{"user": 1, "item": 2}]', name="events.json")

    def test_parquet_that_is_none(self, reader):
        with pytest.raises(DataError, match="Parquet"):
            reader.read_text("user_id,item_id\na,b\n", name="events.parquet")

    def test_everything_bad(self, reader, lines):
        with pytest.raises(DataError, match="no row is left"):
            reader.read_text(lines(",b,1", ",c,2"), on_bad_rows="quarantine")

    def test_overrides(self, reader, lines):
        with pytest.raises(DataError, match="no column 'who'"):
            reader.read_text(lines("a,b,1"), columns={"user": "who"})
        with pytest.raises(RecipeError, match="colour"):
            reader.read_text(lines("a,b,1"), columns={"colour": "user_id"})

    @pytest.mark.parametrize("name", ["absent.csv", "absent/"])
    def test_missing_path(self, reader, name):
        with pytest.raises(DataError, match="no such file"):
            reader.read(Path(reader.folder / name))

    def test_long_line(self, reader, lines):
        text = lines("a,b,1", "c," + "d" * 3_000_000 + ",2", "e,f,3")
        raw = reader.read_text(text, on_bad_rows="quarantine")
        assert raw.rejected.column("line").to_pylist() == [3]
        assert len(raw.rejected.column("found")[0].as_py()) <= 200
        with pytest.raises(DataError, match="megabyte"):
            reader.read_text("x" * 2_000_000)


class TestFolders:
    def test_items_and_users_are_joined(self, reader):
        reader.write("shop/interactions.csv", "user_id,item_id\n1,10\n2,20\n")
        reader.write(
            "shop/items.tsv", "item_id\tname\tgenres\tprice\n10\tTea\tDrink|Hot\t3\n20\tTea\t\t4\n30\tCup\tHome\t5\n"
        )
        reader.write("shop/users.jsonl", '{"user_id": 1, "age": 30, "user_key": "k"}\n')
        extra = reader.write(
            "more.jsonl", '{"id": 10, "overview": "Nice tea", "categories": ["X"]}\n{"id": 40, "overview": ""}\n'
        )
        raw = reader.read(reader.folder / "shop", items=(extra,))
        assert reader.rows(raw.items, "item_key", "title", "categories", "description", "price") == [
            ("10", "Tea", ["Drink", "Hot"], "Nice tea", "3"), ("20", "Tea", None, None, "4"),
            ("30", "Cup", ["Home"], None, "5"),
            ("40", None, None, None, None),
        ]  # fmt: skip
        assert reader.rows(raw.users, "user_key", "age", "source_user_key") == [("1", "30", "k")]
        assert raw.columns["title"] == "name" and raw.columns["description"] == "overview"

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ('["A","B"]', ["A", "B"]), ('[["A","B"],["A","C"]]', ["A", "B", "C"]), ("['A', 'B']", ["A", "B"]),
            ("A|B", ["A", "B"]), ("A; B", ["A", "B"]), ("A, B", ["A, B"]), ("(no genres listed)", []), ("[]", []),
            ("A|B|A", ["A", "B"]),
        ],
    )  # fmt: skip
    def test_categories(self, reader, value, expected):
        quoted = value.replace('"', '""')
        raw = reader.read_text(f'user_id,item_id,genres\n1,2,"{quoted}"\n')
        assert reader.rows(raw.items, "categories") == [(expected,)]

    def test_repeated_items_keep_the_first(self, reader):
        reader.write("shop/interactions.csv", "user_id,item_id\n1,10\n")
        reader.write("shop/items.csv", "item_id,title\n10,first\n10,second\n")
        raw = reader.read(reader.folder / "shop")
        assert reader.rows(raw.items, "item_key", "title") == [("10", "first")]
        assert any("repeat" in note for note in raw.notes)

    def test_items_that_match_nothing(self, reader):
        reader.write("shop/interactions.csv", "user_id,item_id\n1,10\n")
        reader.write("shop/items.csv", "item_id,title\nx10,Tea\n")
        with pytest.raises(DataError, match="no item of the interactions"):
            reader.read(reader.folder / "shop")

    def test_images_are_bytes_or_paths(self, reader):
        events = reader.write("e.csv", "user_id,item_id\n1,10\n")
        pq.write_table(pa.table({"item_id": [10], "image": [b"\x89PNG"]}), reader.folder / "i.parquet")
        paths = reader.write("p.csv", "item_id,image\n10,a/b.png\n")
        raw = reader.read(events, items=(reader.folder / "i.parquet", paths))
        assert reader.rows(raw.items, "image", "image_path") == [(b"\x89PNG", "a/b.png")]

    def test_folder_without_or_with_two_tables(self, reader):
        reader.write("none/readme.md", "hello")
        with pytest.raises(DataError, match="readme.md"):
            reader.read(reader.folder / "none")
        reader.write("two/interactions.csv", "user_id,item_id\n1,2\n")
        reader.write("two/interactions.jsonl", '{"user_id": 1, "item_id": 2}\n')
        with pytest.raises(DataError, match="more than one"):
            reader.read(reader.folder / "two")

    def test_matches_looks_at_names_only(self, tmp_path):
        assert TableSource.matches(Path("never-there.csv.gz")) and not TableSource.matches(Path("never-there.bin"))
        assert not TableSource.matches(tmp_path)

    def test_bad_row_of_an_item_file(self, reader):
        reader.write("shop/interactions.csv", "user_id,item_id\n1,10\n")
        reader.write("shop/items.csv", "item_id,title\n10,Tea\n,Cup\n")
        with pytest.raises(DataError, match="empty id") as caught:
            reader.read(reader.folder / "shop")
        assert caught.value.line == 3 and str(caught.value.file).endswith("items.csv")
        assert issubclass(DataError, LlmrecError)
