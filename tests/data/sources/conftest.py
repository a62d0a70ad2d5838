"""Helpers of the source tests: write a file, read it, look at rows."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ibis
import pytest

from llmrec.data.sources.base import RawTables, ReadOptions
from llmrec.data.sources.reading import open_source


class Reader:
    """Reads content through `open_source` on one connection."""

    def __init__(self, folder: Path, connection: Any) -> None:
        self.folder, self.connection = folder, connection

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    def read(self, path: Path, format: str | None = None, **options: Any) -> RawTables:
        return open_source(path, format).read(self.connection, path, ReadOptions(**options))

    def read_text(self, content: str | bytes, name: str = "events.csv", **options: Any) -> RawTables:
        return self.read(self.write(name, content), **options)

    def rows(self, table: ibis.Table, *columns: str) -> list[tuple]:
        """Rows in source order as tuples of the named columns."""
        order = "source_row" if "source_row" in table.columns else table.columns[0]
        records = self.connection.to_pyarrow(table.order_by(order)).to_pylist()
        return [tuple(record[column] for column in columns) for record in records]


@pytest.fixture(scope="session")
def connection() -> Any:
    return ibis.duckdb.connect()


@pytest.fixture
def reader(tmp_path: Path, connection: Any) -> Reader:
    return Reader(tmp_path, connection)


@pytest.fixture
def lines() -> Callable[..., str]:
    """Rows joined to a CSV text with the usual header."""
    return lambda *rows: "\n".join(("user_id,item_id,timestamp", *rows)) + "\n"
