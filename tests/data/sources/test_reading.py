"""The choice of a source, hostile bytes, real folders, and speed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmrec.data.sources.amazon import AmazonSource
from llmrec.data.sources.base import RawTables, ReadOptions
from llmrec.data.sources.movielens import MovieLensSource
from llmrec.data.sources.reading import file_format, open_source
from llmrec.data.sources.recbole import RecBoleSource
from llmrec.data.sources.synthetic import SyntheticSource
from llmrec.data.sources.table import TableSource
from llmrec.errors import DataError, RecipeError

CSV = "user_id,item_id,rating,timestamp,title\n" + "".join(
    f'u{n % 4},{n * 7 % 11},{n % 5}.5,{1_600_000_000 + n},"Title, {n}"\n' for n in range(12)
)
JSONL = "".join(
    f'{{"user_id": "u{n % 4}", "item_id": {n}, "timestamp": {1_600_000_000 + n}, "genres": ["a", "b"]}}\n'
    for n in range(12)
)
FOLDERS = {
    "online-retail": (396_337, {"timestamp"}),
    "ml-latest-small": (100_004, {"timestamp", "rating"}),
    "amazon-beauty-2014": (198_502, {"order"}),
    "amazon-industrial-2018": (22_743, {"order"}),
    "amazon-instruments-2018": (206_153, {"order"}),
    "amazon-sports-2014": (296_337, {"order"}),
    "amazon-music-ts": (132_595, {"timestamp"}),
    "ml-1m": (999_611, {"order"}),
    "ml-1m-collm": (51_623, {"timestamp", "label", "split"}),
    "ml-100k": (100_000, {"timestamp", "rating"}),
}


class TestOpenSource:
    @pytest.mark.parametrize(
        ("names", "kind"),
        [
            (("u.data",), MovieLensSource),
            (("ratings.csv", "movies.csv"), MovieLensSource),
            (("a.inter", "a.item"), RecBoleSource),
            (("Beauty.jsonl.gz", "meta_Beauty.jsonl.gz"), AmazonSource),
            (("interactions.csv",), TableSource),
            (("x.txt",), TableSource),
        ],
    )  # fmt: skip
    def test_by_names(self, tmp_path, names, kind):
        for name in names:
            (tmp_path / name).touch()
        assert type(open_source(tmp_path)) is kind

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("u.data", MovieLensSource),
            ("ml-100k.zip", MovieLensSource),
            ("a.inter", RecBoleSource),
            ("synthetic", SyntheticSource),
            ("reviews_Beauty_5.json.gz", AmazonSource),
            ("events.json", TableSource),
            ("anything", TableSource),
        ],
    )  # fmt: skip
    def test_by_file_name(self, name, kind):
        assert type(open_source(Path(name))) is kind

    def test_by_format(self):
        assert open_source(Path("x"), "jsonl").format == "jsonl"
        assert type(open_source(Path("u.data"), "table")) is TableSource
        with pytest.raises(RecipeError, match="unknown format 'excel'"):
            open_source(Path("x"), "excel")

    def test_format_overrules_suffix(self, reader):
        path = reader.write("events.txt", '{"user": 1, "item": 2}\n')
        assert reader.rows(reader.read(path, "jsonl").interactions, "item_key") == [("2",)]
        assert file_format(Path("a.jsonl.gz")) == "jsonl" and file_format(Path("a.gz")) is None


@pytest.mark.parametrize("name", FOLDERS)
def test_real_folders(test_data, reader, name):
    rows, expected = FOLDERS[name]
    raw = reader.read(test_data / name)
    table = raw.interactions
    optional = {"timestamp", "order", "rating", "label", "split"} & set(table.columns)
    assert optional == expected
    counts = table.agg(rows=table.count(), distinct=table.source_row.nunique(), users=table.user_key.nunique())
    assert reader.connection.to_pyarrow(counts).to_pylist()[0]["rows"] == rows
    assert reader.connection.to_pyarrow(counts).to_pylist()[0]["distinct"] == rows
    assert raw.rejected.num_rows == 0
    if raw.items is not None:
        total, distinct = raw.items.count(), raw.items.item_key.nunique()
        assert (
            reader.connection.to_pyarrow(total).as_py()
            == reader.connection.to_pyarrow(distinct).as_py()
            > 3_000 - 2_000
        )


class TestRealDetails:
    def test_ml_100k_ties_follow_the_original_file(self, test_data, reader):
        raw = reader.read(test_data / "ml-100k", items=(test_data / "ml-100k-posters",))
        first = raw.interactions.order_by("source_row").limit(2)
        assert reader.rows(first, "user_key", "item_key", "timestamp") == [
            ("196", "242", 881250949),
            ("186", "302", 891717742),
        ]
        toy = raw.items.filter(raw.items.item_key == "1")
        title, categories, description, image = reader.rows(toy, "title", "categories", "description", "image")[0]
        assert title == "Toy Story (1995)" and categories == ["Animation", "Children's", "Comedy"]
        assert "Woody" in description and image.startswith(b"\xff\xd8")
        assert reader.connection.to_pyarrow(raw.items.image.count()).as_py() == 1_663

    def test_titles_inside_interactions(self, test_data, reader):
        raw = reader.read(test_data / "ml-1m-collm")
        assert reader.connection.to_pyarrow(raw.items.title.count()).as_py() == 3_255
        assert {s for (s,) in reader.rows(raw.interactions.select("split").distinct(), "split")} == {
            "train",
            "valid",
            "test",
        }


def _outcome(reader, name: str, data: bytes) -> RawTables | None:
    """What reading gives: tables whose rows can all be fetched, or None for a DataError."""
    path = reader.write(name, data)
    for how in ("stop", "quarantine"):
        try:
            raw = TableSource().read(reader.connection, path, ReadOptions(on_bad_rows=how))
            table = reader.connection.to_pyarrow(raw.interactions)
            assert table.num_rows and not table["user_key"].null_count and not table["item_key"].null_count
            if raw.items is not None:
                reader.connection.to_pyarrow(raw.items)
            total = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").count(b"\n") + 1
            assert all(1 <= line <= total for line in raw.rejected.column("line").to_pylist())
        except DataError as error:
            assert str(error)
            if how == "quarantine":
                return None
    return raw


PIECES = [b'"', b"\n", b"\r", b"\r\n", b",", b"\x00", b"\xff", b"\\", b"{", b"}", b"'", b"-"]
MUTATIONS = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.sampled_from(["replace", "insert", "delete", "cut"]),
        st.one_of(st.sampled_from(PIECES), st.binary(min_size=1, max_size=3)),
    ),
    min_size=1,
    max_size=5,
)  # fmt: skip


def _mutate(data: bytes, mutations: list[tuple[float, str, bytes]]) -> bytes:
    for place, kind, piece in mutations:
        at = int(place * len(data))
        if kind == "cut":
            data = data[:at]
        else:
            data = data[:at] + (b"" if kind == "delete" else piece) + data[at + (kind != "insert") :]
    return data


FUZZ = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class TestHostileBytes:
    @FUZZ
    @given(mutations=MUTATIONS)
    def test_csv(self, reader, mutations):
        _outcome(reader, "fuzz.csv", _mutate(CSV.encode(), mutations))

    @FUZZ
    @given(mutations=MUTATIONS)
    def test_jsonl(self, reader, mutations):
        _outcome(reader, "fuzz.jsonl", _mutate(JSONL.encode(), mutations))

    def test_the_unchanged_files_are_fine(self, reader):
        assert _outcome(reader, "fuzz.csv", CSV.encode()) and _outcome(reader, "fuzz.jsonl", JSONL.encode())

    @FUZZ
    @given(data=st.binary(max_size=200))
    def test_noise(self, reader, data):
        _outcome(reader, "noise.csv", data)


@pytest.mark.slow
def test_ten_million_rows_are_read_in_under_a_minute(reader):
    path = reader.folder / "big.csv"
    reader.connection.raw_sql(
        "COPY (SELECT 'u' || hash(i) % 200000 AS user_id, hash(i * 7) % 50000 AS item_id, i % 5 AS rating, "
        f"1500000000 + i AS timestamp FROM range(10000000) t(i)) TO '{path}' (HEADER)"
    )
    start = time.perf_counter()
    raw = reader.read(path)
    assert reader.connection.to_pyarrow(raw.interactions.timestamp.max()).as_py() == 1_509_999_999
    assert time.perf_counter() - start < 60
