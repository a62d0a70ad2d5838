"""Amazon reviews of 2014, 2018 and 2023: JSON Lines (also gzipped) with a metadata file `meta_*` beside them.

A review file, or a folder; a folder with several review files becomes one data set whose `domain` column names the
file an event came from. Review texts are not read. Metadata of 2014 are lines of Python literals; they are parsed as
data and never executed.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ibis
import pyarrow as pa
from ibis import _

from llmrec.data.sources.assembly import assemble
from llmrec.data.sources.base import RawTables, ReadOptions, Source
from llmrec.data.sources.lines import open_bytes
from llmrec.data.sources.reading import RawFile, file_format, read_file, read_jsonl
from llmrec.errors import DataError

REVIEW_KEYS = (
    "reviewerID", "asin", "overall", "unixReviewTime", "user_id", "parent_asin", "rating", "timestamp", "verified",
    "verified_purchase",
)  # fmt: skip
META_KEYS = ("asin", "parent_asin", "title", "description", "brand", "store", "categories", "category", "price")


class AmazonSource(Source):
    """Reads review files with their metadata."""

    @classmethod
    def matches(cls, path: Path) -> bool:
        """A review file called like the provider's or with a metadata file beside it, or a folder with both."""
        if path.is_dir():
            files = _json_files(path)
            return any(_is_meta(p) for p in files) and any(not _is_meta(p) for p in files)
        named = path.name.startswith("reviews_") or domain_of(path) != path.name.split(".")[0]
        return file_format(path) == "jsonl" and not _is_meta(path) and (named or metadata_of(path) is not None)

    def read(self, connection: Any, path: Path, options: ReadOptions) -> RawTables:
        """Lazy tables of reviews and products.

        Raises:
            DataError: No review file, or a line that is not what was expected.
        """
        path = Path(path)
        reviews = [p for p in _json_files(path) if not _is_meta(p)] if path.is_dir() else [path]
        if not reviews or not all(p.is_file() for p in reviews):
            raise DataError(
                "no review file",
                file=path,
                expected="JSON Lines with reviewerID or user_id, asin, and a time",
                remedy="name the review file, or the folder that holds it and meta_*.jsonl",
            )
        domains = [(domain_of(p), self._read_domain(connection, p, options)) for p in reviews]
        return domains[0][1] if len(domains) == 1 else _union(connection, domains)

    def _read_domain(self, connection: Any, path: Path, options: ReadOptions) -> RawTables:
        with TemporaryDirectory(prefix="llmrec-") as folder:
            meta = metadata_of(path)
            items = [_read_meta(connection, meta, Path(folder))] if meta else []
            items += [read_file(connection, Path(item)) for item in options.items]
            return assemble(connection, read_jsonl(connection, path, keep=REVIEW_KEYS), items, None, options)


def domain_of(path: Path) -> str:
    """The product category in a file name: "Beauty" of reviews_Beauty_5.json.gz."""
    return re.sub(r"^(reviews|meta)_|_\d+$|_5core$", "", re.sub(r"^(reviews|meta)_", "", path.name.split(".")[0]))


def metadata_of(path: Path) -> Path | None:
    """The metadata file beside a review file."""
    files = _json_files(path.parent) if path.parent.is_dir() else []
    return next((p for p in files if _is_meta(p) and domain_of(p) == domain_of(path)), None)


def _json_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file() and file_format(p) == "jsonl")


def _is_meta(path: Path) -> bool:
    return path.name.startswith("meta_")


def _read_meta(connection: Any, path: Path, folder: Path) -> RawFile:
    """A metadata file; one of Python literals goes through a JSON copy in `folder`, line by line."""
    with open_bytes(path) as file:
        is_python = re.match(rb"\s*\{\s*u?'", file.read(64)) is not None
    if not is_python:
        return read_jsonl(connection, path, keep=META_KEYS)
    copy = folder / "meta.jsonl"
    with open_bytes(path) as file, open(copy, "w", encoding="utf-8", newline="\n") as out:
        for line in file:
            out.write(_as_json(line.decode("utf-8", "replace").rstrip("\r\n")) + "\n")
    return read_jsonl(connection, copy, keep=META_KEYS, shown=path)


def _as_json(line: str) -> str:
    """A line of Python literals as JSON; any other line as it is, to be rejected with its number."""
    try:
        return json.dumps(ast.literal_eval(line), ensure_ascii=False)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return line


def _union(connection: Any, domains: list[tuple[str, RawTables]]) -> RawTables:
    """Several domains as one data set: source rows count on, a product of two domains belongs to the first."""
    tables = [raw for _name, raw in domains]
    catalogues = [raw.items for raw in tables if raw.items is not None]
    shared = _shared([raw.interactions for raw in tables])
    fields = _shared(catalogues)
    offset = 0
    events: list[ibis.Table] = []
    items: ibis.Table | None = None
    for name, raw in domains:
        domain = ibis.literal(name)
        events.append(raw.interactions.select(shared).mutate(source_row=_.source_row + offset, domain=domain))
        offset += connection.to_pyarrow(raw.interactions.source_row.max()).as_py() + 1
        if raw.items is not None:
            mine = raw.items.select(fields).mutate(domain=domain)
            items = mine if items is None else ibis.union(items, mine.anti_join(items, "item_key"))
    return RawTables(
        interactions=ibis.union(*events),
        items=items,
        rejected=pa.concat_tables([raw.rejected for raw in tables if raw.rejected is not None]),
        columns=tables[0].columns,
        notes=tuple(f"{name}: {note}" for name, raw in domains for note in raw.notes),
    )


def _shared(tables: list[ibis.Table]) -> list[str]:
    """Columns all tables have, in the order of the first."""
    return [name for name in tables[0].columns if all(name in table.columns for table in tables)] if tables else []
