"""Engines that run the expressions of preparing: embedded DuckDB, or Spark (extra `spark`).

DuckDB reads and checks the files in both cases, so that a bad row is found and named in the same way; Spark receives
the checked tables as Parquet in a temporary folder, which the workers of a cluster must be able to read (TMPDIR).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ibis
import pyarrow as pa

from llmrec.data.schema import ITEM, ORDER, USER
from llmrec.errors import DependencyError

if TYPE_CHECKING:
    from llmrec.data.sources.base import RawTables

Engine = Literal["duckdb", "spark"]


@contextlib.contextmanager
def connect(engine: Engine = "duckdb") -> Iterator[ibis.BaseBackend]:
    """An Ibis connection: in-memory DuckDB that spills into a temporary folder, or Spark.

    A running Spark session is used as it is; without one a session starts, local unless a master is configured.

    Raises:
        DependencyError: Spark is asked for and pyspark is missing.
    """
    if engine == "duckdb":
        with tempfile.TemporaryDirectory(prefix="llmrec-prepare-") as folder:
            duckdb = ibis.duckdb.connect(":memory:", temp_directory=folder)
            try:
                yield duckdb
            finally:
                duckdb.disconnect()
        return
    try:
        from pyspark import SparkConf
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise DependencyError("pyspark", extra="spark", purpose="--engine spark") from error
    session, ours = SparkSession.getActiveSession(), False
    if session is None:
        builder, ours = SparkSession.builder.appName("llmrec prepare"), True
        if not SparkConf().contains("spark.master"):
            # Spark's default of 200 partitions a shuffle is meant for clusters
            builder = builder.master("local[*]").config("spark.sql.shuffle.partitions", str(os.cpu_count() or 2))
        session = builder.config("spark.ui.showConsoleProgress", "false").getOrCreate()
    try:
        yield ibis.pyspark.connect(session)
    finally:
        if ours:
            session.stop()


def hand_over(raw: RawTables, duckdb: ibis.BaseBackend, engine: ibis.BaseBackend, folder: Path) -> RawTables:
    """The same raw tables on another engine, by way of Parquet files in `folder`."""
    moved: dict[str, ibis.Table] = {}
    for name in ("interactions", "items", "users"):
        table = getattr(raw, name)
        if table is not None:
            duckdb.to_parquet(table, folder / f"{name}.parquet")
            moved[name] = engine.read_parquet(str(folder / f"{name}.parquet"))
    return dataclasses.replace(raw, **moved)


class Workspace(contextlib.AbstractContextManager["Workspace"]):
    """Results kept on the engine between steps, dropped at the end."""

    def __init__(self, connection: ibis.BaseBackend) -> None:
        self.connection = connection
        self._names: list[str] = []

    def store(self, expression: ibis.Table) -> ibis.Table:
        """Run an expression once; later steps read the result."""
        name = ibis.util.gen_name("llmrec_prepare")
        if self.connection.name != "duckdb":
            # A checkpoint forgets how its rows came about; with cache() alone Spark's plans grow with every step.
            frame = self.connection.raw_sql(self.connection.compile(expression)).localCheckpoint()
            frame.createOrReplaceTempView(name)
            return self.connection.table(name)
        self._names.append(name)
        return self.connection.create_table(name, expression, temp=True)

    def release(self, table: ibis.Table) -> None:
        """Drop one stored table early."""
        name = getattr(table.op(), "name", None)
        if name in self._names:
            self._names.remove(name)
            self._drop(name)

    def _drop(self, name: str) -> None:
        # Plain SQL: drop_table of ibis 12 loses the table's name when it meets sqlglot 30.30.
        self.connection.raw_sql(f'DROP TABLE IF EXISTS temp.main."{name}"')

    def collect(self, expression: ibis.Table) -> pa.Table:
        """The result as Arrow, with ids and order as int64 (Spark numbers rows in int32)."""
        table = self.connection.to_pyarrow(expression)
        for place, name in enumerate(table.column_names):
            if name in (USER, ITEM, ORDER):
                table = table.set_column(place, name, table.column(name).cast("int64"))
        return table

    def row(self, expression: ibis.Table) -> dict[str, Any]:
        """The single row of an aggregate."""
        return self.connection.to_pyarrow(expression).to_pylist()[0]

    def number(self, expression: Any) -> int:
        """A scalar count."""
        return int(self.connection.to_pyarrow(expression).as_py() or 0)

    def __exit__(self, *exception: object) -> None:
        for name in self._names:
            self._drop(name)
