"""The same data set from both engines, row for row. One Spark session for the module, since Java starts slowly."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmrec.data.dataset import InteractionDataset
from llmrec.data.engines import connect
from llmrec.data.filters import _INTEGER
from llmrec.data.prepare import Preparation, PrepareOptions, prepare_source
from llmrec.data.schema import SPLITS
from llmrec.errors import DataError

pytestmark = [
    pytest.mark.slow,
    # pyspark's way to pandas, which one step of a split rule takes, warns of a pandas to come
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]


@pytest.fixture(scope="module")
def spark() -> Iterator[ibis.BaseBackend]:
    pytest.importorskip("pyspark")
    with pytest.MonkeyPatch.context() as patch:
        # Java compiles lightly: every question here is small, and each is compiled anew
        patch.setenv("JAVA_TOOL_OPTIONS", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")
        with connect("spark") as connection:
            yield connection


@pytest.fixture(scope="module")
def table() -> pa.Table:
    """400 events of 40 users: repeats, equal times, rare users and items, no rating here and there, foreign types."""
    chance = random.Random(5)
    users = sorted(
        chance.choices(range(1, 41), [3 if n % 5 else 40 for n in range(40)], k=400), key=lambda _: chance.random()
    )
    at = [1_600_000_000 + 3600 * chance.randint(0, 80) for _ in users]
    days = [datetime.fromtimestamp(second, UTC).replace(tzinfo=None) for second in at]
    rows = range(len(users))
    return pa.table(
        {
            "user_id": users,
            "item_id": [f"{'é' if n % 7 else 'z'} {chance.randint(1, 30)}\n" for n in rows],
            "timestamp": at,
            "rating": [None if n % 13 == 0 else 1.0 + n % 5 for n in rows],
            "split": [chance.choice(["train", "train", "train", "valid", "test"]) for _ in rows],
            "Seen.At": pa.array(
                [np.datetime64(day, "ns") + np.timedelta64(7, "ns") for day in days], pa.timestamp("ns")
            ),
            "to ken": pa.ExtensionArray.from_storage(
                pa.uuid(), pa.array([uuid.UUID(int=n).bytes for n in rows], pa.binary(16))
            ),
            "huge": pa.array([Decimal(10) ** 30 + n for n in rows], pa.decimal128(38, 0)),
            "small": pa.array([n % 200 for n in rows], pa.uint8()),
            "large": pa.array([2**64 - 1 - n for n in rows], pa.uint64()),
            "big": pa.array([None if n % 3 == 0 else 2**53 + 1 + n for n in rows], pa.int64()),
            "words": pa.array([["a", None], [], None] * 133 + [["é"]], pa.list_(pa.string())),
            "odd": pa.array([float("nan"), None, 1.5, -0.0] * 100),
            "day": pa.array([day.date() for day in days]),
        }
    )


@pytest.fixture(scope="module")
def folder(table: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those events with item and user records as a folder of Parquet."""
    folder = tmp_path_factory.mktemp("both") / "a b"
    folder.mkdir()
    items = sorted(set(table["item_id"].to_pylist()))[:-2]
    pq.write_table(table, folder / "interactions.parquet")
    records = {"item_id": items, "title": [None if n % 9 == 0 else f"T{n}" for n in range(len(items))]}
    pq.write_table(
        pa.table({**records, "genres": [["x", f"g{n % 3}"] for n in range(len(items))]}), folder / "items.parquet"
    )
    pq.write_table(
        pa.table({"user_id": list(range(1, 50)), "age": pa.array(range(1, 50), pa.int8())}), folder / "users.parquet"
    )
    return folder


def both(source: Path, **options: Any) -> tuple[Preparation, Preparation]:
    duckdb, spark = (prepare_source(source, PrepareOptions(engine=engine, **options)) for engine in ("duckdb", "spark"))
    return duckdb, spark


def assert_same(duckdb: Preparation, spark: Preparation) -> InteractionDataset:
    ours, theirs = duckdb.dataset, spark.dataset
    for name in ("interactions", "items", "users"):
        first, second = getattr(ours, name), getattr(theirs, name)
        assert first.schema == second.schema, name
        for column in first.column_names:
            # equals() says that NaN differs from NaN; text shows the place of each difference
            assert first[column].equals(second[column]) or str(first[column].to_pylist()) == str(
                second[column].to_pylist()
            ), (name, column)
    assert ours.fingerprint == theirs.fingerprint
    assert ours.meta == theirs.meta
    assert (duckdb.rejected is None) == (spark.rejected is None)
    assert duckdb.rejected is None or duckdb.rejected.equals(spark.rejected)
    return ours


CASES: dict[str, dict[str, Any]] = {
    "leave_one_out": {"repeats": "last", "min_user": 5, "min_item": 5},
    "temporal_80_10_10": {"repeats": "keep", "max_items": 20},
    "user_80_10_10": {"repeats": "first", "positive": "rating >= 2", "seed": 3},
    "gap_2": {"repeats": "keep", "min_user": 2},
    "given": {"repeats": "last"},
}


@pytest.mark.parametrize("rule", CASES)
def test_every_split_rule_gives_the_same_rows(rule, folder, spark):
    dataset = assert_same(*both(folder, split=rule, **CASES[rule]))
    assert spark.raw_sql("SHOW VIEWS").count() == 0, "something is left on the session"
    found = {SPLITS[code] for code in np.unique(dataset.split_codes)}
    assert {"train", "test"} <= found
    assert {"Seen.At", "to ken", "words"} <= set(dataset.interactions.column_names)
    times = dataset.column("timestamp")
    assert ((np.diff(times) == 0) & (np.diff(dataset.column("user")) == 0)).any(), "no tie to put in order"


def test_filters_end_in_the_same_error(folder, spark):
    messages = []
    for engine in ("duckdb", "spark"):
        with pytest.raises(DataError) as caught:
            prepare_source(folder, PrepareOptions(engine=engine, min_user=9000))
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and "min_user=9000" in messages[0]


def test_an_order_column_and_numbers_as_ids(tmp_path, spark):
    """No time at all: the order column decides, equal ones by source row; "9" comes before "10"."""
    rows = [(f"{7 + n % 5}", f"{n * 7 % 11}", n // 20) for n in range(100)]
    table = pa.table({"user_id": [r[0] for r in rows], "item_id": [r[1] for r in rows], "pos": [r[2] for r in rows]})
    pq.write_table(table, tmp_path / "events.parquet")
    dataset = assert_same(*both(tmp_path / "events.parquet", repeats="last"))
    assert dataset.user_keys[1:4] == ["7", "8", "9"] and "timestamps" not in dataset.fields


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (pa.time64("us"), [1, 2, 3]),
        (pa.list_(pa.timestamp("ns")), [[1], [2], [3]]),
        (pa.struct([("a", pa.map_(pa.string(), pa.timestamp("ns")))]), [None, None, None]),
    ],
)
def test_a_column_that_does_not_travel_is_named(kind, values, tmp_path, spark):
    table = pa.table({"user_id": [1, 1, 1], "item_id": [1, 2, 3], "shape": pa.array(values, kind)})
    pq.write_table(table, tmp_path / "events.parquet")
    with pytest.raises(DataError, match="Spark cannot hold this column") as caught:
        prepare_source(tmp_path / "events.parquet", PrepareOptions(engine="spark"))
    assert caught.value.column == "shape"


def test_a_line_end_is_no_part_of_a_number(spark):
    """For the regular expressions of Java `$` stands before a last line end too."""
    keys = ibis.memtable({"key": ["12", "12\n", "-3", "x"]})
    for engine in (ibis.duckdb.connect(), spark):
        assert engine.to_pyarrow(keys.key.re_search(_INTEGER)).to_pylist() == [True, False, True, False]


def test_java_listens_on_the_loopback_address_alone(spark):
    listening = [
        connection.laddr.ip.removeprefix("::ffff:")
        for process in psutil.Process().children(recursive=True)
        if process.name() == "java"
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening and set(listening) == {"127.0.0.1"}
    assert spark.raw_sql("SET spark.ui.enabled").collect()[0].value == "false"


def test_the_verb_is_quiet_keeps_bad_rows_and_leaves_nothing_behind(tmp_path):
    """Its own process: a bad row keeps file and line, the folder equals DuckDB's, Java writes nothing of its own."""
    source, temporary, here = tmp_path / "events.csv", tmp_path / "t m p", tmp_path / "here"
    temporary.mkdir(), here.mkdir()
    lines = [f"u{n % 7},i{n * 5 % 9},{1 + n % 5},{1000 * (n // 3)}" for n in range(70)]
    lines.insert(11, "u1,i1,=1+1,5")
    source.write_text("\n".join(["user_id,item_id,rating,timestamp", *lines]) + "\n")
    environment = {name: value for name, value in os.environ.items() if name != "JAVA_TOOL_OPTIONS"}
    made = {}
    for engine in ("duckdb", "spark"):
        words = ["prepare", source, "--engine", engine, "--out", tmp_path / engine, "--json"]
        words += ["--on-bad-rows", "quarantine", "--min-item", "2", "--repeats", "first"]
        done = subprocess.run(
            [sys.executable, "-m", "llmrec", *map(str, words)],
            cwd=here, env={**environment, "TMPDIR": str(temporary)}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        record = json.loads(done.stdout)
        made[engine] = {key: value for key, value in record.items() if key not in ("folder", "rejected_file")}
        known = ("note: ", "WARNING: Using incubator modules")
        assert [line for line in done.stderr.splitlines() if not line.startswith(known)] == []
    assert made["duckdb"] == made["spark"] and made["spark"]["rejected"] == 1
    for name in ("rejected.csv", "README.md", "meta.json"):
        assert (tmp_path / "duckdb" / name).read_text() == (tmp_path / "spark" / name).read_text()
    assert f"{source},13,rating,'=1+1" in (tmp_path / "spark" / "rejected.csv").read_text()
    assert list(here.iterdir()) == [] and list(temporary.iterdir()) == []


def test_movielens_1m_row_by_row(test_data, spark):
    """A million real events: 10-core on both sides, the order column, one record for each film and user."""
    dataset = assert_same(*both(test_data / "ml-1m", min_user=10, min_item=10))
    assert dataset.num_users == 6040 and dataset.interactions.num_rows > 990_000
    assert dataset.meta.counts["dropped_by_core"] > 0
