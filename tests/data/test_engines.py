"""What of the engines can be told without Java; tests/data/test_spark.py compares their rows."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmrec.data.engines import Workspace, _as_carried, _local_settings, _with_types, connect
from llmrec.errors import DataError, DependencyError
from tests.conftest import ROOT


def test_a_missing_library_names_the_extra_and_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyspark.sql", None)
    with pytest.raises(DependencyError, match=r"llmrec\[spark\].*Java 17"), connect("spark"):
        pass


@pytest.mark.parametrize("found", ["none", "too old"])
def test_missing_java_names_the_extra_and_java(found: str, tmp_path: Path) -> None:
    """In a process of its own: Java that runs already would be used again."""
    pytest.importorskip("pyspark")
    if found == "too old":
        (tmp_path / "bin").mkdir()
        java = tmp_path / "bin" / "java"
        java.write_text("#!/bin/sh\necho UnsupportedClassVersionError >&2\nexit 1\n", encoding="utf-8")
        java.chmod(0o755)
    words = ["prepare", "synthetic", "--engine", "spark", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "llmrec", *words],
        cwd=ROOT, env={**os.environ, "JAVA_HOME": str(tmp_path)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "llmrec[spark]" in done.stderr and "Java 17 or newer" in done.stderr and "JAVA_HOME" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_local_spark_is_closed_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARK_DRIVER_MEMORY", "5g")
    settings = _local_settings(tmp_path)
    assert settings["spark.driver.bindAddress"] == settings["spark.driver.host"] == "127.0.0.1"
    assert settings["spark.ui.enabled"] == "false" and settings["spark.driver.memory"] == "5g"
    assert "spark.master" not in settings, "a master of the user's own stays"


FOREIGN = pa.table(
    {
        "moment": pa.array([1_600_000_000_123_456_789, None], pa.timestamp("ns")),
        "huge": pa.array([Decimal(10) ** 30, None], pa.decimal128(38, 0)),
        "token": pa.array([str(uuid.UUID(int=1)), None]),
        "small": pa.array([200, None], pa.uint8()),
        "words": pa.array([["a", None], None], pa.list_(pa.string())),
        "plain": pa.array([float("nan"), None]),
    }
)


def test_foreign_types_travel_as_text_and_come_back(tmp_path: Path) -> None:
    pq.write_table(FOREIGN, tmp_path / "t.parquet")
    with connect() as duckdb:
        table = duckdb.read_parquet(tmp_path / "t.parquet")
        carried = _as_carried(table)
        assert {name for name in table.columns if carried.schema()[name] != table.schema()[name]} == {"moment", "huge"}
        back = _with_types(duckdb.to_pyarrow(carried), table)
        assert back.schema == duckdb.to_pyarrow(table).schema
        assert str(back.to_pylist()) == str(FOREIGN.to_pylist())
        plain = table.select("token", "small")
        assert _as_carried(plain) is plain


@pytest.mark.parametrize("kind", ["TIME", "INTERVAL", "TIMESTAMP_NS[]", "STRUCT(a MAP(VARCHAR, UUID))", "BIT"])
def test_what_cannot_travel_is_named(kind: str) -> None:
    with connect() as duckdb:
        duckdb.raw_sql(f"CREATE TABLE t (good INTEGER, strange {kind})")
        with pytest.raises(DataError, match="--engine duckdb") as caught:
            _as_carried(duckdb.table("t"))
        assert caught.value.column == "strange"


def test_nothing_is_left_of_a_workspace() -> None:
    with connect() as duckdb:
        duckdb.raw_sql("CREATE TABLE t AS SELECT unnest([1, 2])::TINYINT AS item")
        with Workspace(duckdb) as space:
            first = space.store(duckdb.table("t"))
            second = space.store(first.filter(first.item > 1))
            space.release(first)
            assert space.number(second.count()) == 1 and space.row(second) == {"item": 2}
            assert space.collect(second)["item"].type == pa.int64()
            assert len(duckdb.raw_sql("SHOW TABLES").fetchall()) == 2
        assert duckdb.raw_sql("SHOW TABLES").fetchall() == [("t",)]
