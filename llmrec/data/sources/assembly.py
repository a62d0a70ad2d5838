"""Raw files of a data set -> `RawTables`: the part all file sources share."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa
from ibis import _

from llmrec.data.item_images import IMAGE_FILE, IMAGE_PATH
from llmrec.data.schema import BRAND, CATEGORIES, DESCRIPTION, IMAGE, LABEL, ORDER, RATING, SPLIT, TIMESTAMP, TITLE
from llmrec.data.sources import columns as roles
from llmrec.data.sources import rows
from llmrec.data.sources.base import RawTables, ReadOptions
from llmrec.data.sources.reading import ROW, RawFile
from llmrec.errors import DataError

USER_KEY, ITEM_KEY, SOURCE_ROW = "user_key", "item_key", "source_row"
_RESERVED = {
    USER_KEY, ITEM_KEY, SOURCE_ROW, TIMESTAMP, ORDER, RATING, LABEL, SPLIT, TITLE, DESCRIPTION, CATEGORIES, BRAND,
    IMAGE, IMAGE_PATH, IMAGE_FILE, "user", "item", "key",
}  # fmt: skip
_SPLIT_NAMES = (("val", "valid"), ("validation", "valid"), ("dev", "valid"), ("training", "train"), ("testing", "test"))
_SECONDS_AHEAD = 86_400
_LARGEST_ROW = 2.0**53


@dataclass(frozen=True)
class Part:
    """One typed table with what was found on the way; `extras` maps names in the file to names in the table."""

    table: ibis.Table
    rejected: pa.Table
    columns: Mapping[str, str]
    notes: tuple[str, ...] = ()
    extras: Mapping[str, str] = field(default_factory=dict)


def assemble(
    connection: Any,
    interactions: RawFile,
    items: Sequence[RawFile],
    users: RawFile | None,
    options: ReadOptions,
    *,
    categories_separator: str = r"\s*[|;]\s*",
) -> RawTables:
    """Type, check and join the files of one data set.

    Args:
        connection: Ibis connection on DuckDB.
        interactions: The interaction file.
        items: Item files; the first has precedence where two give the same field of an item.
        users: The user file.
        options: Column overrides and the rule for bad rows.
        categories_separator: Regular expression between the categories of one text value.

    Raises:
        DataError: A column is missing, a row is bad (under "stop"), nothing is left, or no item id matches.
    """
    overrides = roles.checked_overrides(options.columns)
    _check_overrides(overrides, interactions, items)
    main = read_interactions(connection, interactions, overrides, options)
    parts = [read_items(connection, raw, overrides, options, categories_separator) for raw in items]
    known = {role for part in parts for role in part.columns}
    inner = _items_within(main, overrides, known, categories_separator)
    joined = [*parts, inner] if inner else parts
    table = joined[0].table if joined else None
    for part in joined[1:]:
        table = _join_items(table, part.table)
    notes = [*main.notes, *(note for part in parts for note in part.notes)]
    if parts:
        notes += _check_overlap(connection, main.table, table, [raw.path for raw in items])
    people = read_users(connection, users, overrides, options) if users else None
    everything = [main, *joined, *([people] if people else [])]
    rejected = pa.concat_tables([part.rejected for part in everything])
    if rejected.num_rows:
        notes.append(f"{rejected.num_rows} bad rows were left out")
    found = {ours: theirs for part in reversed(everything[: 1 + len(joined)]) for ours, theirs in part.columns.items()}
    return RawTables(
        interactions=main.table,
        items=table,
        users=people.table if people else None,
        rejected=rejected,
        columns={**found, **main.columns},
        notes=tuple([*notes, *(people.notes if people else ())]),
    )


def _check_overrides(overrides: Mapping[str, str], interactions: RawFile, items: Sequence[RawFile]) -> None:
    for role, name in overrides.items():
        files = [interactions] if role in roles.INTERACTION_ROLES else [*items, interactions]
        if not any(name in raw.names for raw in files):
            present = [column for raw in files for column in raw.names]
            roles.require({}, [role], overrides, file=files[0].path, names=present)


def read_interactions(connection: Any, raw: RawFile, overrides: Mapping[str, str], options: ReadOptions) -> Part:
    """The interaction table: keys, source_row and what else the file has.

    Raises:
        DataError: As for `assemble`.
    """
    found = roles.sniff_columns(raw.names, roles.INTERACTION_ROLES, overrides)
    roles.require(found, ("user", "item"), overrides, file=raw.path, names=raw.names)
    column = {role: raw.column(name) for role, name in found.items()}
    checks = [rows.check_id(column[role], found[role]) for role in ("user", "item")]
    typed: dict[str, ibis.Value] = {
        USER_KEY: rows.as_text(column["user"]),
        ITEM_KEY: rows.as_text(column["item"]),
        SOURCE_ROW: raw.table[ROW],
    }
    notes: list[str] = []
    if "timestamp" in found:
        times = rows.read_time(connection, column["timestamp"], found["timestamp"])
        if times is None:
            notes.append(f"column {found['timestamp']!r} holds no times and was left out")
        else:
            typed[TIMESTAMP], check, unit = times
            checks.append(check)
            if unit in (2, 3, 4):
                notes.append(
                    f"times in column {found['timestamp']!r} are {rows.UNITS[unit][0]}; they were converted to seconds"
                )
    for role in (ORDER, RATING, LABEL, roles.ROW):
        if role in found:
            required, largest = role in (ORDER, roles.ROW), _LARGEST_ROW if role == roles.ROW else rows.LARGEST
            checks.append(rows.check_number(column[role], found[role], required=required, largest=largest))
            whole = role == roles.ROW or (role != RATING and column[role].type().is_integer())
            value = rows.as_number(column[role])
            typed[role] = value.try_cast("int64") if whole else value
    if SPLIT in found:
        text = column[SPLIT].cast("string").strip().lower()
        typed[SPLIT] = ibis.cases(*[(text == theirs, ours) for theirs, ours in _SPLIT_NAMES], else_=text)
    extras = _extras(raw, set(found.values()))
    typed.update({ours: raw.column(theirs) for theirs, ours in extras.items()})
    table, rejected = rows.divide(connection, raw, typed, checks, options.on_bad_rows)
    table, more = _check_interactions(connection, table.drop(ROW), raw, rejected, in_file_order=roles.ROW not in found)
    return Part(table, rejected, found, (*notes, *more), extras)


def _check_interactions(
    connection: Any, table: ibis.Table, raw: RawFile, rejected: pa.Table, *, in_file_order: bool
) -> tuple[ibis.Table, list[str]]:
    notes: list[str] = []
    soon = int(time.time()) + _SECONDS_AHEAD
    times = {"late": (_[TIMESTAMP] > soon).sum(), "latest": _[TIMESTAMP].max()} if TIMESTAMP in table.columns else {}
    source_rows = {} if in_file_order else {"distinct": _[SOURCE_ROW].nunique()}
    counts = connection.to_pyarrow(table.agg(total=_.count(), **times, **source_rows)).to_pylist()[0]
    if not counts["total"]:
        first = rejected.slice(0, 1).to_pylist()
        raise DataError(
            "no row is left" if first else "the file has no rows",
            file=raw.path,
            line=first[0]["line"] if first else None,
            found=f"{first[0]['reason']}: {first[0]['found']}" if first else "column names only",
            expected="at least one interaction",
            remedy="check the separator and the columns (--columns user=..,item=..,time=..)",
        )
    if counts.get("late"):
        notes.append(f"{counts['late']} times lie in the future (the latest is {counts['latest']} seconds since 1970)")
    if counts.get("distinct", counts["total"]) != counts["total"]:
        notes.append("the column of source rows has repeated values; file order is used instead")
        table = table.mutate(**{SOURCE_ROW: ibis.row_number().over(order_by=[SOURCE_ROW])})
    return table, notes


def _extras(raw: RawFile, used: set[str]) -> dict[str, str]:
    """Columns without a role -> the name they keep (a name of ours gets the prefix "source_")."""
    result: dict[str, str] = {}
    taken = set(_RESERVED)
    for name in raw.names:
        if name in used:
            continue
        ours = name
        while ours.casefold() in taken:
            ours = f"source_{ours}"
        taken.add(ours.casefold())
        result[name] = ours
    return result


def _item_fields(columns: Mapping[str, ibis.Column], separator: str) -> dict[str, ibis.Value]:
    """Item fields by role, typed."""
    fields: dict[str, ibis.Value] = {}
    for role, column in columns.items():
        if role in (TITLE, DESCRIPTION, BRAND):
            fields[role] = rows.as_sentence(column)
        elif role == CATEGORIES:
            fields[role] = rows.as_list(column, separator)
    return fields


def _image_fields(column: ibis.Column, file: Path) -> dict[str, ibis.Value]:
    """An image column of bytes, of paths, or of both as records {bytes, path}, beside the file it stands in.

    The file says below which folder a path must lie, also where item files of several folders are joined.
    """
    kind = column.type()
    if kind.is_struct() and "bytes" in kind.names:
        data = column["bytes"]
        path = column["path"] if "path" in kind.names else ibis.null("string")
        fields = {IMAGE: data, IMAGE_PATH: ibis.cases((data.isnull(), path), else_=ibis.null("string"))}
    elif kind.is_binary():
        fields = {IMAGE: column}
    else:
        fields = {IMAGE_PATH: column.cast("string").strip().nullif("")}
    given = ibis.or_(*(value.notnull() for value in fields.values()))
    return {**fields, IMAGE_FILE: ibis.cases((given, str(file)), else_=ibis.null("string"))}


def read_items(
    connection: Any, raw: RawFile, overrides: Mapping[str, str], options: ReadOptions, separator: str
) -> Part:
    """An item table with one row an item.

    Raises:
        DataError: As for `assemble`.
    """
    found = roles.sniff_columns(raw.names, roles.ITEM_ROLES, overrides)
    roles.require(found, ("item",), {}, file=raw.path, names=raw.names)
    fields = _item_fields({role: raw.column(name) for role, name in found.items()}, separator)
    if IMAGE in found:
        fields |= _image_fields(raw.column(found[IMAGE]), raw.path)
    part = _read_entities(connection, raw, ITEM_KEY, found["item"], fields, set(found.values()), options)
    return replace(part, columns={role: name for role, name in found.items() if role != "item"})


def read_users(connection: Any, raw: RawFile, overrides: Mapping[str, str], options: ReadOptions) -> Part:
    """A user table with one row a user.

    Raises:
        DataError: As for `assemble`.
    """
    found = roles.sniff_columns(raw.names, roles.USER_ROLES, overrides)
    roles.require(found, ("user",), {}, file=raw.path, names=raw.names)
    return _read_entities(connection, raw, USER_KEY, found["user"], {}, {found["user"]}, options)


def _read_entities(
    connection: Any,
    raw: RawFile,
    key: str,
    name: str,
    fields: Mapping[str, ibis.Value],
    used: set[str],
    options: ReadOptions,
) -> Part:
    others = {ours: raw.column(theirs) for theirs, ours in _extras(raw, used).items()}
    typed = {key: rows.as_text(raw.column(name)), **fields, **others}
    table, rejected = rows.divide(connection, raw, typed, [rows.check_id(raw.column(name), name)], options.on_bad_rows)
    counts = connection.to_pyarrow(table.agg(total=table.count(), distinct=table[key].nunique())).to_pylist()[0]
    repeated = counts["total"] - counts["distinct"]
    notes: tuple[str, ...] = ()
    if repeated:
        notes = (f"{raw.path.name}: {repeated} rows repeat a {key}; the first row of each is kept",)
        firsts = table.group_by(key).agg(**{ROW: table[ROW].min()})
        table = table.semi_join(firsts, [key, ROW])
    return Part(table.drop(ROW), rejected, {}, notes)


def _items_within(main: Part, overrides: Mapping[str, str], known: set[str], separator: str) -> Part | None:
    """Item fields that stand in the interaction file itself: the first value of each item."""
    found = roles.sniff_columns(main.extras, roles.TEXT_ROLES, overrides)
    found = {role: name for role, name in found.items() if role not in known}
    if not found:
        return None
    table = main.table
    fields = _item_fields({role: table[main.extras[name]] for role, name in found.items()}, separator)
    table = table.select(ITEM_KEY, SOURCE_ROW, **fields)
    firsts = {name: table[name].argmin(table[SOURCE_ROW]) for name in fields}
    return Part(table.group_by(ITEM_KEY).agg(**firsts), rows.reject_table(()), found)


def _join_items(left: ibis.Table, right: ibis.Table) -> ibis.Table:
    """All items of both, the left value first where both have a field."""
    joined = left.outer_join(right, ITEM_KEY, lname="", rname="{name}_right")
    columns: dict[str, ibis.Value] = {}
    for name in dict.fromkeys((*left.columns, *right.columns)):
        both = name in left.columns and name in right.columns
        columns[name] = ibis.coalesce(joined[name], joined[f"{name}_right"]) if both else joined[name]
    return joined.select(**columns)


def _check_overlap(connection: Any, interactions: ibis.Table, items: ibis.Table, files: Sequence[Path]) -> list[str]:
    used = interactions.select(ITEM_KEY).distinct()
    total = connection.to_pyarrow(used.count()).as_py()
    missing = connection.to_pyarrow(used.anti_join(items.select(ITEM_KEY), ITEM_KEY).count()).as_py()
    if missing == total:
        ours = connection.to_pyarrow(used.limit(3))[ITEM_KEY].to_pylist()
        theirs = connection.to_pyarrow(items.select(ITEM_KEY).limit(3))[ITEM_KEY].to_pylist()
        raise DataError(
            "no item of the interactions has a row in the item file",
            file=files[0],
            column="item",
            found=f"ids such as {theirs}; the interactions have ids such as {ours}",
            expected="the same item ids in both files",
            remedy="name the id column of both with --columns item=NAME, or write the ids alike",
        )
    return [f"{missing} of {total} items have no row in the item file"] if missing else []
