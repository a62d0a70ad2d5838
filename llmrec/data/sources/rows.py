"""Numbered raw rows -> typed tables with our column names; rows that break a rule are set aside with the reason.

Times: a numeric column is read in the unit (s, ms, us, ns) that most of its values have by size, a text column as
ISO 8601 dates (UTC where no zone is written). A value of another unit than the rest is a bad row, because a
guess for each row would mend a wrong unit in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ibis import _
from ibis.util import gen_name

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
_DATES = 5
LARGEST = 1.7976931348623157e308
_FLAW = "llmrec_flaw_"
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
    """float64, null where the value is no number; true and false count as 1 and 0. May be NaN or infinite."""
    number = column.try_cast("float64")
    if column.type().is_string():
        number = ibis.cases(
            (number.notnull(), number), (column.lower() == "true", 1.0), (column.lower() == "false", 0.0)
        )
    return number


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


def check_number(column: ibis.Column, name: str, *, required: bool, largest: float = LARGEST) -> Check:
    """Numbers must be finite and at most `largest` in size; an empty value is allowed unless `required`."""
    text = column.cast("string")
    finite = (as_number(column).abs() <= largest).fill_null(False)  # NaN is greater than every number
    wrong = ~finite if required else ~finite & text.notnull() & (text.strip() != "")
    return Check(name, text, ibis.cases((wrong, "not a finite number")))


def read_time(connection: Any, column: ibis.Column, name: str) -> tuple[ibis.Value, Check, int] | None:
    """Times as int64 seconds, the rule that a row must keep, and the unit; None when the column is empty.

    Returns:
        Seconds, the check, and a key of `UNITS`.
    """
    kind, found = column.type(), column.cast("string")
    if kind.is_timestamp() or kind.is_date():
        seconds = column.cast("timestamp").epoch_seconds().cast("int64")
        return seconds, Check(name, found, ibis.cases((column.isnull(), "not a time"))), _DATES
    number = column.try_cast("float64")
    size = number.abs()
    units = [(size < limit, unit) for unit, limit in zip((1, 2, 3, 4), (1e11, 1e14, 1e17, 9.2e18), strict=True)]
    date = _date_seconds(column) if kind.is_string() else ibis.null("int64")
    # A CASE looks at a branch only where the earlier ones failed, so dates are parsed only where no number stands.
    unit = ibis.cases(*units, (number.notnull(), ibis.null("int64")), (date.notnull(), _DATES)).cast("int8")
    rows = column.as_table().select(unit=unit, filled=found.notnull() & (found.strip() != ""))
    counts = connection.to_pyarrow(rows.group_by("unit", "filled").agg(rows=_.count())).to_pylist()
    if not any(count["filled"] for count in counts):
        return None
    known = [(-count["rows"], count["unit"]) for count in counts if count["unit"] is not None]
    chosen = min(known)[1] if known else 1
    text = f"these are {UNITS[chosen][0]}, like most rows of the column; this value looks like {{}}"
    mixed = [(unit == code, text.format(UNITS[code][0])) for code in UNITS if code != chosen]
    reason = ibis.cases((unit == chosen, ibis.null("string")), *mixed, else_="not a time")
    # Only good rows are converted: a number of any size may stand in the others.
    seconds = date if chosen == _DATES else ibis.cases((unit == chosen, (number / UNITS[chosen][1]).floor()))
    return seconds, Check(name, found, reason), chosen


def _date_seconds(column: ibis.Column) -> ibis.Value:
    text = column.strip()
    zoned = text.re_search(r"\d{2}:\d{2}.*([zZ]|[+-]\d{2}(:?\d{2})?|[a-zA-Z])$")
    moment = ibis.cases(
        (~text.re_search(r"^\d{4}[-/]\d{1,2}[-/]\d{1,2}"), ibis.null("int64")),
        (zoned, text.try_cast("timestamp('UTC')").epoch_seconds().cast("int64")),
        else_=text.try_cast("timestamp").epoch_seconds().cast("int64"),
    )
    return moment


def divide(
    connection: Any, raw: RawFile, typed: Mapping[str, ibis.Value], checks: Sequence[Check], on_bad_rows: OnBadRows
) -> tuple[ibis.Table, pa.Table]:
    """Type a file and set its bad rows aside.

    Text is typed once, into a temporary table that replaces the raw one; Parquet stays lazy.

    Args:
        connection: Ibis connection on DuckDB.
        raw: The file.
        typed: Our name -> value, over the columns of `raw`.
        checks: Rules; the first one broken is the reason given.
        on_bad_rows: "stop" or "quarantine".

    Returns:
        `file_row` and the typed columns of good rows, and the table of rejects.

    Raises:
        DataError: A row is bad and the rule is "stop".
    """
    code = ibis.cases(*[(check.reason.notnull(), number) for number, check in enumerate(checks)]).cast("int8")
    reason = ibis.coalesce(*(check.reason for check in checks), ibis.null("string"))
    found = ibis.cases(*[(check.reason.notnull(), check.found.substr(0, 200)) for check in checks])
    flaws = {_FLAW + "code": code, _FLAW + "found": found, _FLAW + "reason": reason}
    table = raw.table.select(ROW, **typed, **flaws)
    if raw.stored:
        table = connection.create_table(gen_name("llmrec_rows"), table, temp=True)
        connection.raw_sql(f"DROP TABLE {raw.stored}")
    flawed = table.filter(table[_FLAW + "reason"].notnull())
    bad = connection.to_pyarrow(flawed.select(ROW, *flaws).order_by(ROW))
    lines = raw.lines_of(bad[ROW].to_numpy()) if bad.num_rows else np.zeros(0, dtype=np.int64)
    names = pa.array([check.column for check in checks]).take(bad[_FLAW + "code"])
    founds = pc.fill_null(bad[_FLAW + "found"], "")
    files = pa.array([str(raw.path)] * bad.num_rows, pa.string())
    rejects = pa.table([files, pa.array(lines, pa.int64()), names, founds, bad[_FLAW + "reason"]], schema=REJECT_SCHEMA)
    rejected = pa.concat_tables([reject_table(raw.rejected), rejects]).sort_by("line")
    if rejected.num_rows and on_bad_rows == "stop":
        raise_first(rejected)
    return table.filter(table[_FLAW + "reason"].isnull()).drop(*flaws), rejected


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
