"""Engines that run the expressions of preparing: embedded DuckDB, or Spark (extra `spark`, with Java 17 or newer).

DuckDB reads and checks the files in both cases, so that a bad row is found and named in the same way; Spark receives
the checked tables as Parquet in a temporary folder. Both engines give the same tables, row for row.

Where Spark is configured from outside (`_OUTSIDE`, or a session that is already active) that configuration is taken
as it is, and the workers must be able to read the temporary folder (TMPDIR). Otherwise a local Spark starts that
listens on the loopback address alone; SPARK_DRIVER_MEMORY sizes it.
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
import ibis.expr.datatypes as dt
import pyarrow as pa

from llmrec.data.schema import ITEM, KEY, ORDER, SPLIT, USER
from llmrec.errors import DataError, DependencyError

if TYPE_CHECKING:
    from llmrec.data.dataset import InteractionDataset
    from llmrec.data.sources.base import RawTables

Engine = Literal["duckdb", "spark"]

_OUTSIDE = ("SPARK_HOME", "SPARK_CONF_DIR", "SPARK_REMOTE", "PYSPARK_SUBMIT_ARGS", "PYSPARK_GATEWAY_PORT")
_LOG_SETTINGS = """rootLogger.level = error
rootLogger.appenderRef.stderr.ref = console
logger.gateway.name = org.apache.spark.api.python.PythonGatewayServer
logger.gateway.level = error
appender.console.type = Console
appender.console.name = console
appender.console.target = SYSTEM_ERR
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %p %c{1}: %m%n%ex
"""
_TABLES = ("interactions", "items", "users")
_OURS = (USER, ITEM, ORDER, SPLIT, KEY)


@contextlib.contextmanager
def connect(engine: Engine = "duckdb") -> Iterator[ibis.BaseBackend]:
    """An Ibis connection: in-memory DuckDB that spills into a temporary folder, or Spark.

    A running Spark session is used as it is and stays; without one a session starts, and is stopped at the end.

    Raises:
        DependencyError: Spark is asked for, and pyspark or Java is missing.
    """
    with tempfile.TemporaryDirectory(prefix="llmrec-prepare-") as folder:
        if engine == "duckdb":
            duckdb = ibis.duckdb.connect(":memory:", temp_directory=folder)
            try:
                yield duckdb
            finally:
                duckdb.disconnect()
            return
        session, ours = _spark_session(Path(folder))
        try:
            yield ibis.pyspark.connect(session)
        finally:
            if ours:
                session.stop()


def _spark_session(folder: Path) -> tuple[Any, bool]:
    """The active session or a new one, and whether it is new."""
    try:
        from pyspark.errors import PySparkRuntimeError
        from pyspark.sql import SparkSession
    except ImportError as error:
        also = "it runs on Java 17 or newer"
        raise DependencyError("pyspark", extra="spark", purpose="--engine spark", also=also) from error
    active = SparkSession.getActiveSession()
    if active is not None:
        return active, False
    builder = SparkSession.builder.appName("llmrec prepare")
    if not any(os.environ.get(name) for name in _OUTSIDE):
        for name, value in _local_settings(folder).items():
            builder = builder.config(name, value)
    try:
        return builder.getOrCreate(), True
    except PySparkRuntimeError as error:
        if error.getCondition() != "JAVA_GATEWAY_EXITED":
            raise
        also = "Java did not start: install Java 17 or newer and put it on PATH or its folder into JAVA_HOME"
        raise DependencyError("pyspark", extra="spark", purpose="--engine spark", also=also) from error


def _local_settings(folder: Path) -> dict[str, str]:
    """A Spark of this machine alone: no web page, no port beyond loopback, errors only; settings stand in `folder`."""
    logs = folder / "log4j2.properties"
    logs.write_text(_LOG_SETTINGS, encoding="utf-8")
    return {
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.memory": os.environ.get("SPARK_DRIVER_MEMORY", "2g"),
        "spark.driver.extraJavaOptions": f'"-Dlog4j2.configurationFile={logs}"',
        # Not `folder`: Java keeps the first place it was given, and clears it itself.
        "spark.local.dir": tempfile.gettempdir(),
        "spark.sql.warehouse.dir": str(folder / "warehouse"),
        # Spark's default of 200 partitions a shuffle is meant for clusters
        "spark.sql.shuffle.partitions": str(os.cpu_count() or 2),
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
    }


@contextlib.contextmanager
def handed_over(raw: RawTables, duckdb: ibis.BaseBackend, spark: ibis.BaseBackend) -> Iterator[RawTables]:
    """The same raw tables on Spark, by way of Parquet files in a temporary folder.

    Types that Spark cannot read travel as text; `restore_types` gives them back.

    Raises:
        DataError: A column holds a type that does not travel.
    """
    views: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="llmrec-prepare-") as folder:
        for name in _TABLES:
            table = getattr(raw, name)
            if table is not None:
                path = Path(folder) / f"{name}.parquet"
                duckdb.to_parquet(_as_carried(table), path)
                views[name] = ibis.util.gen_name(f"llmrec_{name}")
                # With its scheme: a bare path is looked up in the file system of the cluster.
                spark.raw_sql(f"SELECT * FROM parquet.`file://{path}`").createOrReplaceTempView(views[name])
        try:
            yield dataclasses.replace(raw, **{name: spark.table(view) for name, view in views.items()})
        finally:
            for view in views.values():
                spark.raw_sql(f"DROP VIEW IF EXISTS `{view}`")


def _as_carried(table: ibis.Table) -> ibis.Table:
    texts: dict[str, ibis.Value] = {}
    for name, kind in table.schema().items():
        if _is_foreign(kind):
            texts[name] = table[name].cast("string")
        elif any(_is_foreign(part) or _is_unknown(part) for part in _parts(kind)):
            raise DataError(
                "Spark cannot hold this column",
                column=name,
                found=str(kind),
                expected="numbers, text, dates, points in time, and lists or records of them (without nanoseconds)",
                remedy="leave the column out of the source, or use --engine duckdb",
            )
    return table.mutate(**texts) if texts else table


def _is_foreign(kind: dt.DataType) -> bool:
    """Whether Spark cannot read the type from Parquet, or reads another value (DuckDB writes 128 bits as float64)."""
    fine_time = kind.is_timestamp() and (kind.scale or 0) > 6
    huge = kind.is_decimal() and (kind.precision, kind.scale) == (38, 0)
    return fine_time or huge or kind.is_uuid()


def _is_unknown(kind: dt.DataType) -> bool:
    return kind.is_time() or kind.is_interval() or kind.is_unknown()


def _parts(kind: dt.DataType) -> Iterator[dt.DataType]:
    """The type and all types within it."""
    yield kind
    inner = kind.types if kind.is_struct() else (kind.value_type,) if kind.is_array() else ()
    for part in (kind.key_type, kind.value_type) if kind.is_map() else inner:
        yield from _parts(part)


def restore_types(dataset: InteractionDataset, raw: RawTables) -> InteractionDataset:
    """The data set with the columns of the source in the types they were read in."""
    tables = {name: _with_types(getattr(dataset, name), getattr(raw, name)) for name in _TABLES}
    return dataclasses.replace(dataset, **tables)


def _with_types(table: pa.Table, source: ibis.Table | None) -> pa.Table:
    kinds = {} if source is None else {n: k.to_pyarrow() for n, k in source.schema().items() if n not in _OURS}
    columns = {name: table.column(name).cast(kinds.get(name, table.column(name).type)) for name in table.column_names}
    return pa.table(columns)


class Workspace(contextlib.AbstractContextManager["Workspace"]):
    """Results kept on the engine between steps, dropped at the end."""

    def __init__(self, connection: ibis.BaseBackend) -> None:
        self.connection = connection
        self._spark = connection.name == "pyspark"
        self._names: list[str] = []

    def store(self, expression: ibis.Table) -> ibis.Table:
        """Run an expression once; later steps read the result."""
        name = ibis.util.gen_name("llmrec_prepare")
        self._names.append(name)
        if self._spark:
            # A checkpoint forgets how its rows came about; with cache() alone Spark's plans grow with every step.
            self._frame(expression).localCheckpoint().createOrReplaceTempView(name)
            return self.connection.table(name)
        return self.connection.create_table(name, expression, temp=True)

    def release(self, table: ibis.Table) -> None:
        """Drop one stored table early."""
        name = getattr(table.op(), "name", None)
        if name in self._names:
            self._names.remove(name)
            self._drop(name)

    def _drop(self, name: str) -> None:
        # Plain SQL: drop_table of ibis 12 loses the table's name when it meets sqlglot 30.30.
        kind = f"VIEW IF EXISTS `{name}`" if self._spark else f'TABLE IF EXISTS temp.main."{name}"'
        self.connection.raw_sql(f"DROP {kind}")

    def collect(self, expression: ibis.Table) -> pa.Table:
        """The result as Arrow, with ids and order as int64 (Spark numbers rows in int32)."""
        table = self._arrow(expression)
        numbers = {name: table.column(name).cast("int64") for name in (USER, ITEM, ORDER) if name in table.column_names}
        # Built anew, since Spark marks some columns as never empty, and equal tables need equal marks.
        return pa.table({name: numbers.get(name, table.column(name)) for name in table.column_names})

    def row(self, expression: ibis.Table) -> dict[str, Any]:
        """The single row of an aggregate."""
        return self._arrow(expression).to_pylist()[0]

    def number(self, expression: ibis.Scalar) -> int:
        """A scalar count."""
        return int(self._arrow(expression.as_table()).column(0)[0].as_py() or 0)

    def _arrow(self, expression: ibis.Table) -> pa.Table:
        # The way of ibis from Spark to Arrow leads through pandas, which has no whole numbers with gaps.
        return self._frame(expression).toArrow() if self._spark else self.connection.to_pyarrow(expression)

    def _frame(self, expression: ibis.Table) -> Any:
        return self.connection.raw_sql(self.connection.compile(expression))

    def __exit__(self, *exception: object) -> None:
        for name in self._names:
            self._drop(name)
