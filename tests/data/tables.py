"""Hand-made raw tables and what they are prepared into."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa

from llmrec.data.dataset import DatasetMeta, InteractionDataset
from llmrec.data.prepare import PrepareOptions, connect, prepare_tables
from llmrec.data.sources.base import RawTables

TYPES = {
    "user_key": pa.string(),
    "item_key": pa.string(),
    "timestamp": pa.int64(),
    "order": pa.int64(),
    "rating": pa.float64(),
    "split": pa.string(),
}


def raw_tables(
    rows: Iterable[Sequence[Any]],
    columns: Sequence[str] = ("user_key", "item_key", "timestamp"),
    items: pa.Table | None = None,
    **more: Any,
) -> RawTables:
    """Raw tables of events given as tuples; source rows are numbered in the given order."""
    rows = list(rows)
    table = pa.table({c: pa.array([row[i] for row in rows], TYPES[c]) for i, c in enumerate(columns)})
    table = table.append_column("source_row", pa.array(range(len(rows)), pa.int64()))
    return RawTables(ibis.memtable(table), None if items is None else ibis.memtable(items), **more)


def prepared(
    rows: Iterable[Sequence[Any]],
    columns: Sequence[str] = ("user_key", "item_key", "timestamp"),
    items: pa.Table | None = None,
    **options: Any,
) -> InteractionDataset:
    """Events given as tuples, prepared."""
    with connect() as connection:
        return prepare_tables(raw_tables(rows, columns, items), PrepareOptions(**options), "hand made", connection)


def histories(lengths: Iterable[int], items: int = 40, start: int = 0) -> list[tuple[str, str, int]]:
    """Events of users u1, u2, ...: distinct items of each user, every event at its own time."""
    rows = []
    for user, length in enumerate(lengths, start=1):
        for step in range(length):
            rows.append((f"u{user}", f"i{(user * 7 + step * 3) % items}", start + step * 1000 + user))
    return rows


def dataset_of(
    events: Sequence[tuple[int, int, str]],
    times: Sequence[int] | None = None,
    titles: Sequence[str] | None = None,
    meta: Mapping[str, Any] | None = None,
    item_columns: Mapping[str, Any] | None = None,
) -> InteractionDataset:
    """A data set written down event by event as (user, item, split); no preparation is involved."""
    users, items = max(e[0] for e in events), max(e[1] for e in events)
    items = max(items, len(titles or ()))
    table = {
        "user": [e[0] for e in events],
        "item": [e[1] for e in events],
        "order": list(range(len(events))),
        "split": [e[2] for e in events],
    }
    if times is not None:
        table["timestamp"] = list(times)
    catalogue: dict[str, Any] = {"item": list(range(1, items + 1)), "key": [f"key-{i}" for i in range(1, items + 1)]}
    if titles is not None:
        catalogue["title"] = list(titles)
    return InteractionDataset(
        pa.table(table),
        pa.table({**catalogue, **(item_columns or {})}),
        pa.table({"user": list(range(1, users + 1)), "key": [f"user-{u}" for u in range(1, users + 1)]}),
        DatasetMeta(**{"name": "hand made", "source": "test", "split": "leave_one_out", **(meta or {})}),
    )


def prepared_parquet(path: Path, columns: Mapping[str, str], **options: Any) -> InteractionDataset:
    """A Parquet file of real events, prepared; `columns` maps ours to theirs."""
    with connect() as connection:
        table = connection.read_parquet(str(path))
        casts = {ours: table[theirs].cast("string" if "key" in ours else "int64") for ours, theirs in columns.items()}
        raw = RawTables(table.select(source_row=ibis.row_number().cast("int64"), **casts), None)
        return prepare_tables(raw, PrepareOptions(**options), path.parent.name, connection)
