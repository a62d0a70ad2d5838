"""From raw tables to an `InteractionDataset`: positives, repeats, k-core, ids, order, split.

Every step is an Ibis expression; the same expressions run on embedded DuckDB (which spills to disk) and on Spark.
Nothing loops over rows in Python. The steps, in this order:

1. events that fail the positive rule are dropped;
2. of repeated (user, item) events all, the first or the last are kept;
3. the most frequent `max_items` items are kept, where asked for;
4. users and items with too few events are dropped, again and again until nothing changes (k-core);
5. users and items are numbered from 1 by sorted original id (as numbers where all ids are integers);
6. each user's events are ordered by time (or by the order column), equal times by source row, and split;
7. images of the items that are left are checked and read; broken ones are listed, their items stay without one.

Because numbering and order use original ids and times only, a shuffled file gives the same data set wherever
no two events of a user share a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ibis
import pyarrow as pa
import pyarrow.compute as pc

from llmrec.data.dataset import DatasetMeta, InteractionDataset
from llmrec.data.engines import Engine, Workspace, connect, handed_over, restore_types
from llmrec.data.filters import (
    ITEM_KEY,
    SOURCE_ROW,
    USER_KEY,
    apply_filters,
    code_events,
    drop_repeats,
    has_repeats,
    order_events,
    parse_positive,
    renumber,
)
from llmrec.data.image_checks import check_images
from llmrec.data.leaks import future_training_share
from llmrec.data.schema import ITEM, KEY, ORDER, SPLIT, TIMESTAMP, USER
from llmrec.data.sources.base import RawTables, ReadOptions
from llmrec.data.splits import assign_splits, check_rule
from llmrec.discovery import nearest
from llmrec.errors import DataError, RecipeError

if TYPE_CHECKING:
    from llmrec.data.sources.base import OnBadRows, Source

Report = Callable[[str], None]


@dataclass(frozen=True)
class PrepareOptions:
    """How to prepare. What changes the data set is written into its meta.json.

    Args:
        min_user, min_item: Fewest events of a user and of an item (iterated k-core over all events).
        positive: "all", or a rule `column operator number` such as `rating >= 4`; events failing it are dropped.
        repeats: Which of several events of one (user, item) pair stay.
        split: Split rule, see `llmrec.data.splits`.
        max_items: Keep only this many most frequent items (before the k-core).
        seed: Draws the users of user_80_10_10.
        columns: Explicit column mapping, ours -> theirs.
        items: Extra item files joined on the item id.
        name: Name of the data set; None takes it from the source.
        format: Source kind; None looks at the file names.
        on_bad_rows: "stop" at the first bad row, or "quarantine" bad rows and go on.
        engine: Where the expressions run.
        source_options: Options of a generated source, such as users, items and seed of "synthetic".
    """

    min_user: int = 1
    min_item: int = 1
    positive: str = "all"
    repeats: Literal["keep", "first", "last"] = "keep"
    split: str = "leave_one_out"
    max_items: int | None = None
    seed: int = 0
    columns: Mapping[str, str] = field(default_factory=dict)
    items: tuple[Path, ...] = ()
    name: str | None = None
    format: str | None = None
    on_bad_rows: OnBadRows = "stop"
    engine: Engine = "duckdb"
    source_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_rule(self.split)
        parse_positive(self.positive)
        for name, value, allowed in (
            ("repeats", self.repeats, ("keep", "first", "last")),
            ("on_bad_rows", self.on_bad_rows, ("stop", "quarantine")),
            ("engine", self.engine, ("duckdb", "spark")),
        ):
            if value not in allowed:
                raise RecipeError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")
        for name in ("min_user", "min_item", "max_items"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise RecipeError(f"{name} is {number}; expected a whole number >= 1 (1 filters nothing)")


@dataclass(frozen=True)
class Preparation:
    """What preparing yields.

    Args:
        dataset: The data set.
        rejected: Quarantined rows (file, line, column, found, reason), or None.
        rejected_images: Images left out (item, file, found, reason, remedy), or None where the items have none.
    """

    dataset: InteractionDataset
    rejected: pa.Table | None = None
    rejected_images: pa.Table | None = None


def prepare(
    source: str | Path, options: PrepareOptions | None = None, connection: ibis.BaseBackend | None = None
) -> InteractionDataset:
    """Prepare a named data set ("movielens-100k", "synthetic"), a file or a folder.

    Raises:
        DataError: The source cannot be read, or nothing is left of it.
        DependencyError: The engine is not installed.
    """
    return prepare_source(source, options or PrepareOptions(), connection).dataset


def prepare_source(
    source: str | Path,
    options: PrepareOptions,
    connection: ibis.BaseBackend | None = None,
    report: Report | None = None,
) -> Preparation:
    """`prepare`, with the quarantined rows, and telling `report` what is going on.

    Files are read and checked by DuckDB whatever the engine. A `connection` given here is a DuckDB one.
    """
    from llmrec.data.sources.reading import open_source

    tell = report or (lambda line: None)
    path, name = _locate(source, tell)
    how = ReadOptions(dict(options.columns), tuple(options.items), options.on_bad_rows)
    reader = _configured(open_source(path, options.format), options.source_options)
    kind = type(reader).__module__.rpartition(".")[2]
    with contextlib.ExitStack() as stack:
        duckdb = connection or stack.enter_context(connect("duckdb"))
        tell(f"reading {path}")
        raw = reader.read(duckdb, path, how)
        engine, tables = duckdb, raw
        if options.engine != "duckdb":
            tell(f"handing events to {options.engine}")
            engine = stack.enter_context(connect(options.engine))
            tables = stack.enter_context(handed_over(raw, duckdb, engine))
        dataset = prepare_tables(tables, options, options.name or name, engine, source=kind, report=tell)
        if options.engine != "duckdb":
            dataset = restore_types(dataset, raw)
    if kind == "synthetic":  # pictures of our own drawing
        return Preparation(dataset, raw.rejected)
    return Preparation(*_with_checked_images(dataset, raw.rejected, tell))


def _with_checked_images(
    dataset: InteractionDataset, rejected: pa.Table | None, tell: Report
) -> tuple[InteractionDataset, pa.Table | None, pa.Table | None]:
    """The data set with sound images as bytes, the bad rows as they are, and the images left out."""
    checked = check_images(dataset.items, tell)
    if checked is None:
        return dataset, rejected, None
    counts, notes = {**dataset.meta.counts, **checked.counts}, (*dataset.meta.notes, checked.note)
    meta = dataclasses.replace(dataset.meta, counts=counts, notes=notes)
    return dataclasses.replace(dataset, items=checked.items, meta=meta), rejected, checked.rejected


def _configured(reader: Source, options: Mapping[str, Any]) -> Source:
    if not options:
        return reader
    known: list[str] = [f.name for f in dataclasses.fields(reader)] if dataclasses.is_dataclass(reader) else []
    for name in options:
        if name not in known:
            names = f"options: {', '.join(known)}" if known else "it has no options"
            raise RecipeError(
                f"the source {type(reader).__name__} has no option {name!r}{nearest(name, known)}; {names}"
            )
    return dataclasses.replace(reader, **options)  # type: ignore[type-var]


def _locate(source: str | Path, tell: Report) -> tuple[Path, str]:
    """Path and default name; a path on disk wins over a name."""
    path = Path(source)
    if path.exists():
        resolved = path.resolve()
        return path, resolved.name if resolved.is_dir() else resolved.stem
    name = str(source)
    if name == "synthetic":
        return path, name
    from llmrec.downloads import NAMES, pull

    if name not in NAMES:
        raise DataError(
            "no such file, folder or named data set",
            file=path,
            expected="a file, a folder with interactions.* and items.*, movielens-100k or synthetic",
            remedy="check the path from the folder you are in",
        )
    tell(f"pulling {name}")
    return pull(name, report=tell), name


def prepare_tables(
    raw: RawTables,
    options: PrepareOptions,
    name: str,
    connection: ibis.BaseBackend,
    *,
    source: str = "table",
    report: Report | None = None,
) -> InteractionDataset:
    """Prepare tables that are already on a connection.

    Raises:
        DataError: A column is missing, ids do not meet, or a filter leaves nothing.
    """
    tell = report or (lambda line: None)
    rejected = raw.rejected.num_rows if raw.rejected is not None else 0
    counts: dict[str, int] = {"rows_rejected": rejected}
    with Workspace(connection) as space:
        tell("reading events and numbering ids")
        events, user_keys, item_keys = code_events(space, raw.interactions, options, counts)
        tell("filtering")
        events = drop_repeats(space, events, options, counts)
        events, users, items = apply_filters(space, events, options, counts)
        users = space.store(renumber(users, user_keys, USER))
        items = space.store(renumber(items, item_keys, ITEM))
        tell(f"ordering and splitting ({options.split})")
        ordered = space.store(order_events(events, users, items))
        space.release(events)
        repeated = options.repeats == "keep" and has_repeats(space, ordered)
        split = assign_splits(ordered, users.select(USER, KEY), options.split, seed=options.seed, connection=connection)
        extra = [c for c in split.columns if c not in (USER, ITEM, ORDER, SPLIT, SOURCE_ROW)]
        final = split.select(USER, ITEM, ORDER, SPLIT, *sorted(extra, key=lambda c: (c != TIMESTAMP, c)))
        interactions = space.collect(final.order_by([USER, ORDER]))
        _check_test(interactions, options.split)
        space.release(ordered)
        tell("joining item records")
        items_table = _join_records(space, items, raw.items, ITEM, ITEM_KEY, counts)
        users_table = _join_records(space, users, raw.users, USER, USER_KEY, counts)
    meta = DatasetMeta(
        name=name,
        source=source,
        split=options.split,
        tie_rule=_tie_rule(raw.interactions.columns),
        repeats=options.repeats,
        has_repeats=repeated,
        positive=options.positive,
        filters=_filters(options),
        columns=dict(raw.columns),
        notes=(*raw.notes, *_notices(interactions, options, repeated, raw.notes)),
        counts=counts,
    )
    return InteractionDataset(interactions, items_table, users_table, meta)


def _join_records(
    space: Workspace, ids: ibis.Table, records: ibis.Table | None, column: str, key: str, counts: dict[str, int]
) -> pa.Table:
    """The id table with the source's own columns; ids without a record keep empty fields."""
    ids = ids.select(column, KEY)
    if records is None:
        return space.collect(ids.order_by(column))
    total, distinct = space.number(records.count()), space.number(records[key].nunique())
    if total != distinct:
        raise DataError(
            f"{total - distinct} {column} records share an id with another",
            column=key,
            found=f"{total} records, {distinct} ids",
            expected=f"one record for each {column}",
            remedy="drop the doubled records from the source",
        )
    rest = [c for c in records.columns if c not in (key, column, KEY)]
    joined = ids.left_join(records, ids[KEY] == records[key])
    missing = space.number(joined.filter(joined[key].isnull()).count())
    counts[f"{column}s_without_record"] = missing
    table = space.collect(joined.select(column, KEY, *rest).order_by(column))
    if missing == table.num_rows:
        example = space.connection.to_pyarrow(records.select(key).limit(3)).column(0).to_pylist()
        raise DataError(
            f"no {column} of the interactions has a record: the ids do not meet",
            found=f"interactions: {table.column(KEY).to_pylist()[:3]}, {column} records: {example}",
            expected="the same ids in both files",
            remedy=f"name the id column of both with --columns {column}=...",
        )
    return table


def _tie_rule(columns: tuple[str, ...]) -> str:
    names = [{"timestamp": "time", "order": "order column"}[c] for c in (TIMESTAMP, ORDER) if c in columns]
    return f"{', then '.join(names)}; equal ones by source row" if names else "source row"


def _filters(options: PrepareOptions) -> dict[str, Any]:
    filters: dict[str, Any] = {"min_user": options.min_user, "min_item": options.min_item}
    if options.min_user > 1 or options.min_item > 1:
        filters["core_on"] = "all"
    if options.max_items is not None:
        filters["max_items"] = options.max_items
    if options.split == "user_80_10_10":
        filters["seed"] = options.seed
    return filters


def _notices(table: pa.Table, options: PrepareOptions, repeated: bool, known: tuple[str, ...]) -> list[str]:
    """What a reader of the data card should know. Expects at least one test event, unless the split was given."""
    notes = [_share_notice(table, options.split)] if options.split == "leave_one_out" else []
    if options.split == "given" and not _has_test(table):
        notes.append("the given split has no test events")
    if repeated:
        notes.append("repeated (user, item) events are kept, so seen items are not removed at evaluation")
    if TIMESTAMP not in table.column_names:
        return notes
    low, high = pc.min_max(table.column(TIMESTAMP)).as_py().values()
    notes.append(f"times from {_day(low)} to {_day(high)} (UTC)")
    now = int(datetime.now(UTC).timestamp())
    future = pc.sum(pc.greater(table.column(TIMESTAMP), now + 86_400)).as_py()
    if future and not any("future" in note for note in known):
        notes.append(f"far future: {future} events lie after today; are the times in milliseconds or another unit?")
    return notes


def _has_test(table: pa.Table) -> bool:
    return bool(pc.any(pc.equal(table.column(SPLIT), "test")).as_py())


def _check_test(table: pa.Table, rule: str) -> None:
    if rule != "given" and not _has_test(table):
        raise DataError(
            f"the split {rule} leaves no test event",
            found=f"{table.num_rows} events, longest history {pc.max(table.column(ORDER)).as_py() + 1}",
            expected="users with enough events (3 for leave_one_out, 2 for user_80_10_10, N + 3 for gap_N)",
            remedy="choose another --split",
        )


def _share_notice(table: pa.Table, split: str) -> str:
    share = future_training_share(table)
    if share is None:
        return f"{split}: training events may be later than test events; without timestamps the share is unknown"
    text = f"{split}: {share:.1%} of the training events are later than the earliest test event"
    return f"{text}; temporal_80_10_10 has none"


def _day(seconds: int) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")
    except (OverflowError, ValueError, OSError):
        return f"{seconds} s"
