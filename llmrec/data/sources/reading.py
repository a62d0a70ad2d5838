"""Raw files -> numbered rows, and the choice of a source.

CSV is parsed by DuckDB's strict reader with its rejects table, JSON Lines are read as numbered lines of which each
is then parsed on its own, Parquet stays lazy. Text formats are read as text under explicit columns: types are
decided later (`llmrec.data.sources.rows`), row by row, so that one bad value never changes the type of a column.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, cast

import duckdb
import ibis
import numpy as np
from ibis.util import gen_name

from llmrec.data.sources.columns import INTERACTION_ROLES, ITEM_ROLES, USER_ROLES, check_duplicates, plain
from llmrec.data.sources.lines import TextLines, is_gzip, split_lines, text_sample, write_unix_lines
from llmrec.errors import DataError, RecipeError

if TYPE_CHECKING:
    from llmrec.data.sources.base import Source

FileFormat = Literal["csv", "jsonl", "parquet"]
SUFFIXES: dict[str, FileFormat] = {
    ".csv": "csv", ".tsv": "csv", ".txt": "csv", ".tab": "csv", ".dat": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl",
    ".json": "jsonl", ".parquet": "parquet", ".pq": "parquet",
}  # fmt: skip
MAX_COLUMNS = 4096
SEPARATORS = ("::", "\t", ",", ";", "|")
ROW = "file_row"
_CHECK = "check that the file is whole, and its --format"
_NO_SEPARATOR = "\x01\x02\x03"  # JSON forbids raw control characters, so no valid line is ever cut


@dataclass(frozen=True)
class Reject:
    """One row that was left out: where, what stood there, and why."""

    file: str
    line: int
    column: str
    found: str
    reason: str


@dataclass(frozen=True)
class RawFile:
    """The rows of one file, untyped where the format has no types.

    Args:
        path: The file.
        table: `file_row` (int64, 0-based, file order) and c0, c1, ...: text, or native types for Parquet.
        names: Column names in the file; names[i] is column c{i}.
        rejected: Rows that are no rows of the format at all.
        lines_of: Row numbers [n] -> 1-based physical lines [n] (row numbers for Parquet).
        stored: Temporary table behind `table`, to be dropped once the rows are typed; None where `table` is lazy.
    """

    path: Path
    table: ibis.Table
    names: tuple[str, ...]
    rejected: tuple[Reject, ...]
    lines_of: Callable[[np.ndarray], np.ndarray]
    stored: str | None = None

    def column(self, name: str) -> ibis.Column:
        """The column of a name."""
        return self.table[f"c{self.names.index(name)}"]


@dataclass(frozen=True)
class Layout:
    """How a delimited file is cut into fields.

    Args:
        delimiter: One to four characters.
        names: Column names, in file order.
        header: Physical lines before the first row.
        skip: CSV records (blank lines included) before the first row.
        quoted: Whether double quotes enclose fields.
        encoding: "utf-8" or a single-byte encoding.
    """

    delimiter: str
    names: tuple[str, ...]
    header: int = 0
    skip: int = 0
    quoted: bool = True
    encoding: str = "utf-8"


def open_source(path: Path, format: str | None = None) -> Source:
    """The source that reads `path`.

    Args:
        path: A file or folder.
        format: "movielens", "recbole", "amazon", "synthetic", "table", "csv", "jsonl" or "parquet"; None takes
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
        "table": TableSource,
    }
    files = ("csv", "jsonl", "parquet")
    if format is None:
        return next((layout() for layout in layouts.values() if layout.matches(Path(path))), TableSource())
    if format in layouts:
        return layouts[format]()
    if format in files:
        return TableSource(format=cast(FileFormat, format))
    raise RecipeError(f"unknown format {format!r}; expected one of: {', '.join([*layouts, *files])}")


def file_format(path: Path) -> FileFormat | None:
    """Format by the file's suffix (".gz" set aside), or None."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return SUFFIXES.get(suffixes[-1]) if suffixes else None


def read_file(connection: Any, path: Path, format: FileFormat | None = None) -> RawFile:
    """Read one table of any format.

    Args:
        connection: Ibis connection on DuckDB.
        path: The file; CSV and JSON Lines may be gzipped.
        format: None decides by the suffix.

    Raises:
        DataError: The file cannot be read as what it claims to be.
    """
    if not path.is_file():
        raise DataError(
            "no such file", file=path, expected="a CSV, TSV, JSON Lines or Parquet file", remedy="check the path"
        )
    format = format or file_format(path) or "csv"
    if format == "parquet":
        return read_parquet(connection, path)
    if format == "jsonl":
        return read_jsonl(connection, path)
    return read_delimited(connection, path, sniff_layout(path))


@contextmanager
def _reported(path: Path, kind: str) -> Iterator[None]:
    """Turn errors of the reader into DataError."""
    try:
        yield
    except (duckdb.Error, UnicodeError) as error:
        raise DataError(
            f"cannot be read as {kind}", file=path, found=str(error).split("\n")[0], remedy=_CHECK
        ) from error


def quote_sql(text: str) -> str:
    """A string literal of SQL."""
    return "'" + text.replace("'", "''") + "'"


def _literal_path(path: Path) -> str:
    """A path in which no character is read as a wildcard."""
    return quote_sql("".join(f"[{c}]" if c in "*?[" else c for c in str(path)))


def read_parquet(connection: Any, path: Path) -> RawFile:
    """A lazy view of a Parquet file.

    Raises:
        DataError: Not a Parquet file.
    """
    scan, view = f"read_parquet({_literal_path(path)}, file_row_number=true)", gen_name("llmrec_parquet")
    with _reported(path, "Parquet"):
        names = [row[0] for row in connection.raw_sql(f"DESCRIBE FROM {scan}").fetchall()]
        names.remove("file_row_number")
        columns = ", ".join(f'"{name.replace(chr(34), chr(34) * 2)}" AS c{i}' for i, name in enumerate(names))
        connection.raw_sql(f"CREATE TEMP VIEW {view} AS SELECT file_row_number AS {ROW}, {columns} FROM {scan}")
    return RawFile(path, connection.table(view), tuple(names), (), lambda rows: rows + 1)


def read_jsonl(connection: Any, path: Path, *, keep: Collection[str] = (), shown: Path | None = None) -> RawFile:
    """JSON Lines; the columns are the keys met in the first megabyte, values are kept as text.

    Args:
        connection: Ibis connection on DuckDB.
        path: The file.
        keep: Keys to read; empty reads all.
        shown: Path to name in messages, where it differs.

    Raises:
        DataError: The file is empty, a JSON array, or holds no JSON object at its start.
    """
    shown = shown or path
    names = tuple(name for name in _json_keys(path) if not keep or name in keep)
    shape = quote_sql(json.dumps(dict.fromkeys(names, "VARCHAR"), ensure_ascii=False))
    fields = "".join(f", fields[{quote_sql(name)}] AS c{i}" for i, name in enumerate(names))
    projection = (
        f"SELECT {ROW}, CASE WHEN fields IS NULL THEN substr(c0, 1, 200) END AS malformed{fields} FROM (SELECT *, "
        f"CASE WHEN json_valid(c0) AND json_type(c0) = 'OBJECT' THEN json_transform(c0, {shape}) END AS fields "
        f"FROM ({{rows}}) WHERE trim(c0, ' \t\r') <> '')"
    )
    layout = Layout(_NO_SEPARATOR, ("line",), quoted=False)
    table, rejected = _load_text(connection, path, shown, layout, projection)
    index = TextLines(path)
    bad_lines = np.array(sorted(reject.line for reject in rejected), dtype=np.int64)
    whole = connection.table(table)
    with _reported(shown, "JSON Lines"):
        broken = connection.to_pyarrow(whole.filter(whole.malformed.notnull()).select(ROW, "malformed"))
    places = index.lines_of_rows(broken[ROW].to_numpy(), bad_lines)
    texts = broken["malformed"].to_pylist()
    rejects = [
        Reject(str(shown), int(line), "", text, "not a JSON object") for line, text in zip(places, texts, strict=True)
    ]
    kept = whole.filter(whole.malformed.isnull()).drop("malformed")
    return RawFile(shown, kept, names, (*rejected, *rejects), lambda rows: index.lines_of_rows(rows, bad_lines), table)


def _json_keys(path: Path) -> tuple[str, ...]:
    text, whole = text_sample(path)
    lines = split_lines(text)
    lines = lines if whole else lines[:-1] or lines
    if text.lstrip().startswith("["):
        raise DataError(
            "the file is one JSON array",
            file=path,
            line=1,
            found="[",
            expected="JSON Lines: one object a line",
            remedy=f"convert it: jq -c '.[]' {path.name} > {path.stem}.jsonl",
        )
    keys: dict[str, None] = {}
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue  # reported with its number by the read itself
        if isinstance(record, dict):
            keys.update(dict.fromkeys(record))
    keys.pop("", None)
    if not keys or len(keys) > MAX_COLUMNS:
        raise DataError(
            "no JSON object found" if not keys else f"{len(keys)} different keys",
            file=path,
            line=1,
            found=lines[0][:200],
            expected=f"one JSON object a line, at most {MAX_COLUMNS} keys",
            remedy="check --format, or convert the file to JSON Lines",
        )
    names = tuple(key for key in keys if key.isprintable())
    check_duplicates(names, path)
    return names


def sniff_layout(path: Path) -> Layout:
    """Separator and column names of a delimited file with a header.

    The separator is the one that yields most columns whose names we know, then most columns.

    Raises:
        DataError: No separator fits, or the header is broken.
    """
    text, whole = text_sample(path)
    body = text.lstrip("\r\n")
    blank = len(text[: len(text) - len(body)].replace("\r\n", "\n"))
    if not whole and "\n" not in body and "\r" not in body:
        raise DataError(
            "the first line is longer than a megabyte",
            file=path,
            line=1,
            found=body[:100],
            expected="a line of column names",
            remedy="check that this is a table, and its --format",
        )
    known = {
        name for roles in (INTERACTION_ROLES, ITEM_ROLES, USER_ROLES) for names in roles.values() for name in names
    }
    options = [_split_header(body, separator) for separator in SEPARATORS]
    best = max(
        range(len(options)), key=lambda i: (sum(plain(n) in known for n in options[i][0]), len(options[i][0]), -i)
    )
    names, height = options[best]
    separator = SEPARATORS[best]
    if len(names) > MAX_COLUMNS:
        raise DataError(
            f"{len(names)} columns",
            file=path,
            line=1,
            expected=f"at most {MAX_COLUMNS}",
            remedy="drop the columns that are not needed",
        )
    if len(names) == 1 and plain(names[0]) not in known:
        raise DataError(
            "no separator found in the first line",
            file=path,
            line=1,
            found=names[0],
            expected="column names separated by ',', ';', tab, '|' or '::'",
            remedy="add a line of column names, or convert the file",
        )
    if not all(name.strip() for name in names):
        names = tuple(name if name.strip() else f"column {i + 1}" for i, name in enumerate(names))
    check_duplicates(names, path)
    return Layout(separator, names, header=blank + height, skip=blank + 1, quoted=separator != "::")


def _split_header(text: str, separator: str) -> tuple[tuple[str, ...], int]:
    """Names in the first record, and the physical lines it takes."""
    if len(separator) > 1:
        return tuple(name.strip() for name in split_lines(text)[0].rstrip("\r\n").split(separator)), 1
    rows = csv.reader(split_lines(text), delimiter=separator)
    try:
        names = next(rows)
    except csv.Error:
        return (split_lines(text)[0].rstrip("\r\n"),), 1
    return tuple(name.strip() for name in names), rows.line_num


def read_delimited(connection: Any, path: Path, layout: Layout, *, shown: Path | None = None) -> RawFile:
    """A delimited text file whose layout is known; every column is text, rows of another width are rejected.

    Args:
        connection: Ibis connection on DuckDB.
        path: The file.
        layout: How it is cut.
        shown: Path to name in messages, where it differs.

    Raises:
        DataError: The file cannot be read at all.
    """
    shown = shown or path
    table, rejected = _load_text(connection, path, shown, layout, "{rows}")
    index = TextLines(
        path,
        delimiter=layout.delimiter if layout.quoted else "",
        header=layout.header,
        skips_blank=len(layout.names) > 1,
        encoding=layout.encoding,
    )
    bad_lines = np.array(sorted({reject.line for reject in rejected}), dtype=np.int64)
    rows = connection.table(table)
    return RawFile(
        shown, rows, layout.names, tuple(rejected), lambda numbers: index.lines_of_rows(numbers, bad_lines), table
    )


def _load_text(connection: Any, path: Path, shown: Path, layout: Layout, projection: str) -> tuple[str, list[Reject]]:
    """Load a text file into a temporary table; mixed line ends are made equal first, in a copy."""
    if layout.encoding == "utf-8":
        try:
            return _load_once(connection, path, shown, layout, projection)
        except duckdb.Error as error:
            if "state machine" not in str(error):
                raise DataError(
                    "the text cannot be read", file=shown, found=str(error).split("\n")[0], remedy=_CHECK
                ) from error
    with TemporaryDirectory(prefix="llmrec-") as folder, _reported(shown, "text"):
        copy = Path(folder) / "lines.txt"
        write_unix_lines(path, copy, layout.encoding)
        return _load_once(connection, copy, shown, layout, projection)


def _load_once(connection: Any, path: Path, shown: Path, layout: Layout, projection: str) -> tuple[str, list[Reject]]:
    table, rejects, scans = (gen_name(f"llmrec_{name}") for name in ("text", "rejects", "scans"))
    columns = ", ".join(f"c{i}: 'VARCHAR'" for i in range(len(layout.names)))
    quote = quote_sql('"' if layout.quoted else "")
    packing = "gzip" if is_gzip(path) else "none"
    scan = (
        f"read_csv({_literal_path(path)}, auto_detect=false, header=false, skip={layout.skip}, columns={{{columns}}}, "
        f"delim={quote_sql(layout.delimiter)}, quote={quote}, escape={quote}, compression='{packing}', "
        f"store_rejects=true, rejects_table='{rejects}', rejects_scan='{scans}')"
    )
    query = projection.replace("{rows}", f"SELECT row_number() OVER () - 1 AS {ROW}, * FROM {scan}")
    try:
        connection.raw_sql(f"CREATE TEMP TABLE {table} AS {query}")
        found = connection.raw_sql(
            "SELECT line, line_byte_position, column_idx, error_type::VARCHAR, substr(csv_line, 1, 200) "
            f"FROM {rejects} ORDER BY line, column_idx"
        ).fetchall()
    finally:
        connection.raw_sql(f"DROP TABLE IF EXISTS {rejects}")
        connection.raw_sql(f"DROP TABLE IF EXISTS {scans}")
    return table, _describe(found, TextLines(path), shown, layout)


def _describe(found: Sequence[tuple], index: TextLines, path: Path, layout: Layout) -> list[Reject]:
    """Rejects of the CSV reader in our words, one a line."""
    width = len(layout.names)
    reasons = {
        "MISSING COLUMNS": f"fewer than {width} columns",
        "TOO MANY COLUMNS": f"more than {width} columns",
        "UNQUOTED VALUE": "a double quote is not closed, or text follows a closing quote",
        "LINE SIZE OVER MAXIMUM": "the line is longer than 2,000,000 bytes",
        "INVALID ENCODING": "not UTF-8 text",
    }
    result: dict[int, Reject] = {}
    for line, offset, column, kind, text in found:
        place = index.line_of_offset(offset) if offset else int(line)
        name = layout.names[column - 1] if kind == "UNQUOTED VALUE" and column and column <= width else ""
        result.setdefault(
            place, Reject(str(path), place, name, (text or "").strip("\r\n"), reasons.get(kind, kind.lower()))
        )
    return [result[place] for place in sorted(result)]
