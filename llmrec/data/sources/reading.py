"""Raw files -> numbered rows, and the choice of a source.

CSV is parsed by DuckDB's strict reader with its rejects table, JSON Lines are read as numbered lines of which each
is then parsed on its own, Parquet stays lazy. All text formats are read as text with explicit columns: types are
decided later (`llmrec.data.sources.rows`), row by row, so that one bad value never changes the type of a column.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, TYPE_CHECKING, Any, Literal, cast

import numpy as np

from llmrec.data.sources.columns import INTERACTION_ROLES, ITEM_ROLES, check_duplicates, plain
from llmrec.errors import DataError, RecipeError

if TYPE_CHECKING:
    import ibis

    from llmrec.data.sources.base import Source

FileFormat = Literal["csv", "jsonl", "parquet"]
SUFFIXES: dict[str, FileFormat] = {
    ".csv": "csv", ".tsv": "csv", ".txt": "csv", ".tab": "csv", ".dat": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl",
    ".json": "jsonl", ".parquet": "parquet", ".pq": "parquet",
}  # fmt: skip
MAX_COLUMNS = 4096
SAMPLE_BYTES = 1 << 20
SEPARATORS = ("::", "\t", ",", ";", "|")
_FORMATS = {"movielens": None, "recbole": None, "amazon": None, "table": None, "csv": "csv", "jsonl": "jsonl", "parquet": "parquet"}


def open_source(path: Path, format: str | None = None) -> Source:
    """The source that reads `path`.

    Args:
        path: A file or folder.
        format: "movielens", "recbole", "amazon", "table", "csv", "jsonl", "parquet" or "synthetic"; None takes
            the first layout whose file names match, and `table` when none does.

    Raises:
        RecipeError: There is no such format.
    """
    from llmrec.data.sources.amazon import AmazonSource
    from llmrec.data.sources.movielens import MovieLensSource
    from llmrec.data.sources.recbole import RecBoleSource
    from llmrec.data.sources.synthetic import SyntheticSource
    from llmrec.data.sources.table import TableSource

    layouts: dict[str, type[Source]] = {
        "movielens": MovieLensSource,
        "recbole": RecBoleSource,
        "amazon": AmazonSource,
        "synthetic": SyntheticSource,
    }
    if format is None:
        return next((layout() for layout in layouts.values() if layout.matches(Path(path))), TableSource())
    if format in layouts:
        return layouts[format]()
    if format == "table" or format in set(SUFFIXES.values()):
        return TableSource(format=None if format == "table" else cast(FileFormat, format))
    raise RecipeError(f"unknown format {format!r}; expected one of: {', '.join([*layouts, 'table', 'csv', 'jsonl', 'parquet'])}")
