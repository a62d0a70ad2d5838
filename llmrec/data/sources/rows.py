"""Numbered raw rows -> typed tables with our column names; rows that break a rule are set aside with the reason.

Times: a numeric column is read in the unit (s, ms, us, ns) that most of its values have by size, a text column as
ISO 8601 dates (UTC where no zone is written). A value of another unit than the rest is a bad row, because a
guess for each row would mend a wrong unit in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ibis
import numpy as np
import pyarrow as pa
from ibis import _

from llmrec.data.sources.reading import ROW, RawFile, Reject
from llmrec.errors import DataError

if TYPE_CHECKING:
    from llmrec.data.sources.base import OnBadRows

REJECT_SCHEMA = pa.schema(
    [
        ("file", pa.string()),
        ("line", pa.int64()),
        ("column", pa.string()),
        ("found", pa.string()),
        ("reason", pa.string()),
    ]
)
NULL_WORDS = ("NaN", "nan", "<NA>", "NULL", "null", "None")
UNITS = {
    1: ("seconds", 1.0),
    2: ("milliseconds", 1e3),
    3: ("microseconds", 1e6),
    4: ("nanoseconds", 1e9),
    5: ("ISO dates", 1.0),
}
_EXPECTED = {
    "empty id": "a user or item id",
    "not a time": "seconds, milliseconds or microseconds since 1970, or an ISO 8601 date such as 2024-01-31 12:00:00",
    "not a finite number": "a number such as 4.5",
    "not a JSON object": "one JSON object on the line",
    "not UTF-8 text": "UTF-8 text (convert with: iconv -f LATIN1 -t UTF-8)",
}


@ibis.udf.scalar.builtin
def json_extract_string(text: str, path: str) -> list[str]:  # type: ignore[empty-body]
    """DuckDB's function, for paths with a wildcard."""


@ibis.udf.scalar.builtin
def json_valid(text: str) -> bool:  # type: ignore[empty-body]
    """DuckDB's function."""


@dataclass(frozen=True)
class Check:
    """One column's rule: the reason is null where the row is good."""

    column: str
    found: ibis.Value
    reason: ibis.Value


def as_text(column: ibis.Column) -> ibis.Column:
    """Ids as text; whole floating-point numbers lose their ".0" (pandas turns ids into floats around gaps)."""
    if column.type().is_floating():
        whole = column.try_cast("int64")
        cases = ((column.isnan(), ibis.null("string")), (whole.cast("float64") == column, whole.cast("string")))
        return ibis.cases(*cases, else_=column.cast("string"))
    return column.cast("string")


def as_number(column: ibis.Column) -> ibis.Column:
    """float64, null where the value is no finite number; true and false count as 1 and 0."""
    kind = column.type()
    if kind.is_string():
        number = column.try_cast("float64")
        number = ibis.coalesce(number, ibis.cases((column.lower() == "true", 1.0), (column.lower() == "false", 0.0)))
    else:
        number = column.try_cast("float64")
    return ibis.cases((number.isnan() | number.isinf(), ibis.null("float64")), else_=number)


def as_list(column: ibis.Column, separator: str = r"\s*[|;]\s*") -> ibis.Column:
    """Categories as array<string>: lists, JSON lists (one level of nesting is flattened), or joined by `separator`."""
    kind = column.type()
    if kind.is_array():
        result = column.cast("array<string>")
    else:
        text = column.cast("string").strip()
        is_list = text.startswith("[") & text.endswith("]")
        is_json = is_list & json_valid(text)
        nested = is_json & text.re_search(r"^\[\s*\[")
        bare = text.re_replace(r"^\[\s*['\"]?|['\"]?\s*\]$", "")
        result = ibis.cases(
            (nested, json_extract_string(text, "$[*][*]")),
            (is_json, json_extract_string(text, "$[*]")),
            (is_list, bare.re_split(r"['\"]\s*,\s*['\"]")),
            else_=text.re_split(separator),
        )
    words = result.map(lambda word: word.strip()).filter(
        lambda word: word.notnull() & ~word.isin(("", "(no genres listed)"))
    )
    return words.filter(lambda word, position: words.index(word) == position)


def as_sentence(column: ibis.Column) -> ibis.Column:
    """Text; lists of text (also as JSON) are joined by blanks, empty text is null."""
    if column.type().is_array():
        text = column.cast("array<string>").join(" ")
    else:
        raw = column.cast("string").strip()
        is_json = raw.startswith("[") & raw.endswith("]") & json_valid(raw)
        text = ibis.cases((is_json, json_extract_string(raw, "$[*]").join(" ")), else_=raw)
    return text.strip().nullif("")


def check_id(column: ibis.Column, name: str) -> Check:
    """Ids must be there; whitespace alone and words that stand for nothing are no ids."""
    text = as_text(column)
    empty = text.isnull() | (text.strip() == "") | text.isin(NULL_WORDS)
    return Check(name, column.cast("string"), ibis.cases((empty, "empty id")))


def check_number(column: ibis.Column, name: str, *, required: bool) -> Check:
    """Numbers must be finite; an empty value is allowed unless `required`."""
    text = column.cast("string")
    present = ibis.literal(True) if required else text.notnull() & (text.strip() != "")
    return Check(name, text, ibis.cases((present & as_number(column).isnull(), "not a finite number")))


def read_time(connection: Any, column: ibis.Column, name: str) -> tuple[ibis.Column, Check, int] | None:
    """Times as int64 seconds, the rule that a row must keep, and the unit; None when the column is empty.

    Returns:
        Seconds, the check, and a key of `UNITS`.
    """
    kind = column.type()
    if kind.is_timestamp() or kind.is_date():
        moment = column.cast("timestamp")
        seconds = (moment.epoch_seconds()).cast("int64")
        return seconds, Check(name, column.cast("string"), ibis.cases((column.isnull(), "not a time"))), 5
    number, date = _numbers_and_dates(column)
    size = number.abs()
    unit = ibis.cases(
        (size < 1e11, 1), (size < 1e14, 2), (size < 1e17, 3), (size < 9.2e18, 4), (date.notnull(), 5)
    ).cast("int8")
    table = column.as_table().select(unit=unit)
    counts = connection.to_pyarrow(table.filter(_.unit.notnull()).group_by("unit").agg(rows=_.count())).to_pydict()
    if not counts["unit"]:
        texts = column.cast("string")
        filled = connection.to_pyarrow(texts.notnull() & (texts.strip() != "")).to_numpy(zero_copy_only=False)
        if not filled.any():
            return None
        return ibis.null("int64"), Check(name, texts, ibis.literal("not a time")), 1
    chosen = min(zip([-rows for rows in counts["rows"]], counts["unit"], strict=True))[1]
    other = "these are {0}, like most rows of the column; this value looks like {1}"
    mixed = [(unit == code, other.format(UNITS[chosen][0], UNITS[code][0])) for code in UNITS if code != chosen]
    reason = ibis.cases((unit.isnull(), "not a time"), *mixed)
    seconds = date if chosen == 5 else (number / UNITS[chosen][1]).floor().try_cast("int64")
    return seconds, Check(name, column.cast("string"), reason), chosen


def _numbers_and_dates(column: ibis.Column) -> tuple[ibis.Column, ibis.Column]:
    if not column.type().is_string():
        return as_number(column), ibis.null("int64")
    text = column.strip()
    number = text.try_cast("float64")
    number = ibis.cases((number.isnan() | number.isinf(), ibis.null("float64")), else_=number)
    is_date = text.re_search(r"^\d{4}[-/]\d{1,2}[-/]\d{1,2}")
    zoned = text.re_search(r"\d{2}:\d{2}.*([zZ]|[+-]\d{2}(:?\d{2})?|[a-zA-Z])$")
    moment = ibis.cases(
        (is_date & zoned, text.try_cast("timestamp('UTC')").epoch_seconds()),
        (is_date, text.try_cast("timestamp").epoch_seconds()),
    )
    return number, moment.cast("int64")


def divide(
    connection: Any, raw: RawFile, checks: Sequence[Check], on_bad_rows: OnBadRows
) -> tuple[ibis.Column, pa.Table]:
    """Which rows are good, and the table of those that are not.

    Raises:
        DataError: A row is bad and the rule is "stop", or no row is good.
    """
    reason = ibis.coalesce(*(check.reason for check in checks), ibis.null("string"))
    columns = [(check.reason.notnull(), check.column) for check in checks]
    founds = [(check.reason.notnull(), ibis.coalesce(check.found, ibis.literal("")).substr(0, 200)) for check in checks]
    table = raw.table.select(ROW, column=ibis.cases(*columns), found=ibis.cases(*founds), reason=reason)
    bad = connection.to_pyarrow(table.filter(_.reason.notnull()).order_by(ROW))
    lines = raw.lines_of(bad[ROW].to_numpy()) if bad.num_rows else np.zeros(0, dtype=np.int64)
    files = pa.array([str(raw.path)] * bad.num_rows, pa.string())
    rows = pa.table(
        [files, pa.array(lines, pa.int64()), bad["column"], bad["found"], bad["reason"]], schema=REJECT_SCHEMA
    )
    rejected = pa.concat_tables([reject_table(raw.rejected), rows]).sort_by("line")
    if rejected.num_rows and on_bad_rows == "stop":
        raise_first(rejected)
    return reason.isnull(), rejected


def reject_table(rejects: Iterable[Reject]) -> pa.Table:
    """Rejects as the table `RawTables.rejected` holds."""
    return pa.Table.from_pylist([vars(reject) for reject in rejects], schema=REJECT_SCHEMA)


def raise_first(rejected: pa.Table) -> None:
    """Raise the first bad row as an error that says how to go on.

    Raises:
        DataError: Always.
    """
    first = rejected.slice(0, 1).to_pylist()[0]
    rest = f" ({rejected.num_rows - 1} more bad rows follow)" if rejected.num_rows > 1 else ""
    reason = first["reason"]
    raise DataError(
        f"bad row: {reason}{rest}",
        file=first["file"],
        line=first["line"],
        column=first["column"] or None,
        found=first["found"],
        expected=_EXPECTED.get(reason, "a row like the others"),
        remedy="mend the line, or leave bad rows out and list them with: --on-bad-rows quarantine",
    )
