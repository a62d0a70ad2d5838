"""From raw tables to an `InteractionDataset`: positives, repeats, k-core, ids, order, split.

Every step is an Ibis expression; the same expressions run on embedded DuckDB (which spills to disk) and on Spark.
Nothing loops over rows in Python. The steps, in this order:

1. events that fail the positive rule are dropped;
2. of repeated (user, item) events all, the first or the last are kept;
3. the most frequent `max_items` items are kept, where asked for;
4. users and items with too few events are dropped, again and again until nothing changes (k-core);
5. users and items are numbered from 1 by sorted original id (as numbers where all ids are integers);
6. each user's events are ordered by time (or by the order column), equal times by source row, and split.

Because numbering and order use original ids and times only, a shuffled file gives the same data set wherever
no two events of a user share a time.
"""

from __future__ import annotations

import contextlib
import operator
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ibis
import pyarrow as pa
import pyarrow.compute as pc

from llmrec.data.dataset import DatasetMeta, InteractionDataset
from llmrec.data.leaks import future_training_share
from llmrec.data.schema import ITEM, KEY, ORDER, SPLIT, TIMESTAMP, USER
from llmrec.data.sources.base import RawTables, ReadOptions
from llmrec.data.splits import GIVEN, assign_splits, check_rule
from llmrec.errors import DataError, DependencyError, RecipeError

if TYPE_CHECKING:
    from llmrec.data.sources.base import OnBadRows

Report = Callable[[str], None]
Engine = Literal["duckdb", "spark"]
USER_KEY, ITEM_KEY, SOURCE_ROW = "user_key", "item_key", "source_row"
_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
    "=": operator.eq,
    "!=": operator.ne,
}
_RULE = re.compile(r"\s*([A-Za-z_]\w*)\s*(>=|<=|==|!=|=|>|<)\s*([-+]?\d+(?:\.\d+)?)\s*")
_INTEGER = r"^-?[0-9]{1,18}$"


@dataclass(frozen=True)
class PrepareOptions:
    """How to prepare; every field but the last four changes the data set and is written into its meta.json.

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
    """

    dataset: InteractionDataset
    rejected: pa.Table | None = None


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
    source: str | Path, options: PrepareOptions, connection: ibis.BaseBackend | None = None, report: Report | None = None
) -> Preparation:
    """`prepare`, with the quarantined rows, and telling `report` what is going on."""
    from llmrec.data.sources.reading import open_source

    tell = report or (lambda line: None)
    path, name = _locate(source, tell)
    with contextlib.ExitStack() as stack:
        if connection is None:
            connection = stack.enter_context(connect(options.engine))
        tell(f"reading {path}")
        reader = open_source(path, options.format)
        raw = reader.read(connection, path, ReadOptions(dict(options.columns), tuple(options.items), options.on_bad_rows))
        kind = type(reader).__module__.rpartition(".")[2]
        dataset = prepare_tables(raw, options, options.name or name, connection, source=kind, report=tell)
    return Preparation(dataset, raw.rejected)


def _locate(source: str | Path, tell: Report) -> tuple[Path, str]:
    """Path and default name; a path on disk wins over a name."""
    path = Path(source)
    if path.exists():
        resolved = path.resolve()
        return path, resolved.name if resolved.is_dir() else resolved.stem
    name = str(source)
    if name == "synthetic":
        return path, name
    if path.suffix or len(path.parts) > 1:
        raise DataError(
            "no such file or folder",
            file=path,
            expected="a file, a folder with interactions.* and items.*, or a named data set",
            remedy="check the path; `llmrec list sources` names the data sets that can be downloaded",
        )
    from llmrec.downloads import pull

    tell(f"pulling {name}")
    return Path(pull(name)), name


@contextlib.contextmanager
def connect(engine: Engine = "duckdb") -> Iterator[ibis.BaseBackend]:
    """An Ibis connection of our own: in-memory DuckDB that spills into a temporary folder, or local or ambient Spark.

    Raises:
        DependencyError: Spark is asked for and pyspark is missing.
    """
    if engine == "duckdb":
        with tempfile.TemporaryDirectory(prefix="llmrec-prepare-") as folder:
            duckdb = ibis.duckdb.connect(":memory:", temp_directory=folder)
            try:
                yield duckdb
            finally:
                duckdb.disconnect()
        return
    try:
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise DependencyError("pyspark", extra="spark", purpose="--engine spark") from error
    session = SparkSession.builder.appName("llmrec prepare").config("spark.sql.session.timeZone", "UTC").getOrCreate()
    spark = ibis.pyspark.connect(session)
    try:
        yield spark
    finally:
        spark.disconnect()


def parse_positive(rule: str) -> tuple[str, str, float] | None:
    """(column, operator, number) of a positive rule; None for "all".

    Raises:
        RecipeError: The rule is not `column operator number`.
    """
    if rule.strip() == "all":
        return None
    match = _RULE.fullmatch(rule)
    if match is None:
        raise RecipeError(f"positive rule {rule!r} is not understood; expected 'all' or `column operator number`, as in 'rating >= 4'")
    return match[1], match[2], float(match[3])


class _Workspace(contextlib.AbstractContextManager["_Workspace"]):
    """Results kept on the engine between steps, dropped at the end."""

    def __init__(self, connection: ibis.BaseBackend) -> None:
        self.connection = connection
        self._names: list[str] = []

    def store(self, expression: ibis.Table) -> ibis.Table:
        """Run an expression once; later steps read the result."""
        if self.connection.name != "duckdb":
            return expression.cache()
        name = ibis.util.gen_name("llmrec_prepare")
        self._names.append(name)
        return self.connection.create_table(name, expression, temp=True)

    def release(self, table: ibis.Table) -> None:
        """Drop one stored table early."""
        name = getattr(table.op(), "name", None)
        if name in self._names:
            self._names.remove(name)
            self._drop(name)

    def _drop(self, name: str) -> None:
        # Plain SQL: drop_table of ibis 12 loses the table's name when it meets sqlglot 30.30.
        self.connection.raw_sql(f'DROP TABLE IF EXISTS temp.main."{name}"')

    def row(self, expression: ibis.Table) -> dict[str, Any]:
        """The single row of an aggregate."""
        return self.connection.to_pyarrow(expression).to_pylist()[0]

    def number(self, expression: Any) -> int:
        """A scalar count."""
        return int(self.connection.to_pyarrow(expression).as_py() or 0)

    def __exit__(self, *exception: object) -> None:
        for name in self._names:
            self._drop(name)


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
    with _Workspace(connection) as space:
        tell("reading events and numbering ids")
        events, user_keys, item_keys = _code_events(space, raw.interactions, options, counts)
        counts["rows_read"] += rejected
        tell("filtering")
        events = _drop_repeats(space, events, options, counts)
        events, users, items = _filter(space, events, options, counts)
        users = space.store(_renumber(users, user_keys, USER))
        items = space.store(_renumber(items, item_keys, ITEM))
        tell(f"ordering and splitting ({options.split})")
        ordered = space.store(_order_events(events, users, items))
        space.release(events)
        has_repeats = _has_repeats(space, ordered) if options.repeats == "keep" else False
        split = assign_splits(ordered, users.select(USER, KEY), options.split, seed=options.seed, connection=connection)
        extra = [c for c in split.columns if c not in (USER, ITEM, ORDER, SPLIT, SOURCE_ROW)]
        final = split.select(USER, ITEM, ORDER, SPLIT, *sorted(extra, key=lambda c: (c != TIMESTAMP, c)))
        interactions = connection.to_pyarrow(final.order_by([USER, ORDER]))
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
        has_repeats=has_repeats,
        positive=options.positive,
        filters=_filters(options),
        columns=dict(raw.columns),
        notes=(*raw.notes, *_notices(interactions, options, has_repeats, counts)),
        counts=counts,
    )
    return InteractionDataset(interactions, items_table, users_table, meta)


def _code_events(
    space: _Workspace, raw: ibis.Table, options: PrepareOptions, counts: dict[str, int]
) -> tuple[ibis.Table, ibis.Table, ibis.Table]:
    """Events with integer codes instead of text keys (codes sort as the keys do), and the two code tables."""
    missing = [c for c in (USER_KEY, ITEM_KEY, SOURCE_ROW) if c not in raw.columns]
    if missing:
        raise DataError(f"the source gave no {', '.join(missing)}", found=", ".join(raw.columns))
    if "split" in raw.columns:
        raw = raw.rename({GIVEN: "split"})
    if ORDER in raw.columns:
        raw = raw.rename(source_order=ORDER)
    has_id = raw[USER_KEY].notnull() & raw[ITEM_KEY].notnull()
    positive = _positive(raw, options.positive)
    time = next((raw[c] for c in (TIMESTAMP, "source_order") if c in raw.columns), raw[SOURCE_ROW])
    found = space.row(
        raw.aggregate(
            rows=raw.count(),
            without_id=(~has_id).sum(),
            without_time=time.isnull().sum(),
            negative=(has_id & ~positive).sum(),
        )
    )
    found = {key: int(value or 0) for key, value in found.items()}
    if found["without_time"]:
        raise DataError(
            f"{found['without_time']} events have no time",
            found="empty values in the time or order column",
            expected="a time for each event, or no time column at all",
            remedy="--on-bad-rows quarantine leaves them out",
        )
    counts["rows_read"] = found["rows"]
    counts["dropped_without_id"], counts["dropped_by_positive"] = found["without_id"], found["negative"]
    left = found["rows"] - found["without_id"] - found["negative"]
    _not_empty(left, "the positive rule" if found["negative"] else "reading", f"positive: {options.positive}", found["rows"])
    events = space.store(raw.filter(has_id & positive))
    user_keys = space.store(_number_keys(space, events.select(key=events[USER_KEY]).distinct()))
    item_keys = space.store(_number_keys(space, events.select(key=events[ITEM_KEY]).distinct()))
    rest = [c for c in events.columns if c not in (USER_KEY, ITEM_KEY)]
    coded = events.inner_join(user_keys, events[USER_KEY] == user_keys.key)
    coded = coded.select(*rest, ITEM_KEY, user=user_keys.code)
    coded = coded.inner_join(item_keys, coded[ITEM_KEY] == item_keys.key).select(*rest, "user", item=item_keys.code)
    coded = space.store(coded)
    space.release(events)
    return coded, user_keys, item_keys


def _positive(raw: ibis.Table, rule: str) -> Any:
    parsed = parse_positive(rule)
    if parsed is None:
        return ibis.literal(True)
    column, sign, number = parsed
    if column not in raw.columns or not raw[column].type().is_numeric():
        numeric = [c for c in raw.columns if raw[c].type().is_numeric() and c != SOURCE_ROW]
        raise DataError(
            f"the positive rule {rule!r} needs a numeric column {column!r}",
            found=f"numeric columns: {', '.join(numeric) or 'none'}",
            expected=column,
            remedy="name the column with --columns rating=..., or drop --positive",
        )
    return _OPERATORS[sign](raw[column], number).fill_null(False)


def _number_keys(space: _Workspace, keys: ibis.Table) -> ibis.Table:
    """key -> code 1, 2, ... in sorted order; integers sort as numbers ("2" before "10")."""
    integers = space.connection.to_pyarrow(keys.key.re_search(_INTEGER).all()).as_py()
    by = [keys.key.cast("int64"), keys.key] if integers else [keys.key]
    return keys.mutate(code=ibis.row_number().over(order_by=by) + 1)


def _not_empty(left: int, step: str, setting: str, before: int) -> None:
    if not left:
        raise DataError(
            f"no events are left after {step}",
            found=f"{before} events before, 0 after ({setting})",
            expected="at least one event",
            remedy=f"loosen {step}, or check that the right columns were read",
        )


def _time_order(columns: tuple[str, ...] | list[str]) -> list[str]:
    return [c for c in (TIMESTAMP, "source_order", SOURCE_ROW) if c in columns]


def _tie_rule(columns: tuple[str, ...]) -> str:
    names = [{"timestamp": "time", "order": "order column"}[c] for c in (TIMESTAMP, ORDER) if c in columns]
    return f"{', then '.join(names)}; equal ones keep the order of the source rows" if names else "order of the source rows"


def _drop_repeats(space: _Workspace, events: ibis.Table, options: PrepareOptions, counts: dict[str, int]) -> ibis.Table:
    if options.repeats == "keep":
        return events
    by = [events[c].desc() if options.repeats == "last" else events[c].asc() for c in _time_order(events.columns)]
    ranked = events.mutate(copy=ibis.row_number().over(group_by=[USER, ITEM], order_by=by))
    kept = space.store(ranked.filter(ranked.copy == 0).drop("copy"))
    counts["dropped_as_repeats"] = space.number(events.count()) - space.number(kept.count())
    space.release(events)
    return kept


def _has_repeats(space: _Workspace, events: ibis.Table) -> bool:
    pairs = events.group_by([USER, ITEM]).aggregate(events=events.count())
    return space.number(pairs.events.max()) > 1


def _filter(
    space: _Workspace, events: ibis.Table, options: PrepareOptions, counts: dict[str, int]
) -> tuple[ibis.Table, ibis.Table, ibis.Table]:
    """Apply max_items and the k-core; only the sets of kept ids are stored between passes, never the events."""
    before = space.number(events.count())
    if options.max_items is not None:
        totals = events.group_by(ITEM).aggregate(events=events.count())
        top = space.store(totals.order_by([totals.events.desc(), totals.item]).limit(options.max_items))
        events = events.semi_join(top, ITEM)
        left = space.number(events.count())
        counts["dropped_by_max_items"], before = before - left, left
    users, items = (space.store(events.select(c).distinct()) for c in (USER, ITEM))
    if options.min_user > 1 or options.min_item > 1:
        users, items, left = _core(space, events, users, items, options, counts, before)
        counts["dropped_by_core"] = before - left
        events = events.semi_join(users, USER).semi_join(items, ITEM)
    return events, users, items


def _core(
    space: _Workspace,
    events: ibis.Table,
    users: ibis.Table,
    items: ibis.Table,
    options: PrepareOptions,
    counts: dict[str, int],
    before: int,
) -> tuple[ibis.Table, ibis.Table, int]:
    """Iterate min_user and min_item until a pass changes nothing; the fixed point does not depend on who goes first."""
    number_of = {USER: space.number(users.count()), ITEM: space.number(items.count())}
    left, step = before, 0
    while True:
        step += 1
        start = dict(number_of)
        for column, least in ((USER, options.min_user), (ITEM, options.min_item)):
            kept = events.semi_join(users, USER).semi_join(items, ITEM)
            totals = kept.group_by(column).aggregate(events=kept.count())
            totals = space.store(totals.filter(totals.events >= least))
            now = space.row(totals.aggregate(ids=totals.count(), events=totals.events.sum()))
            number_of[column], rows = int(now["ids"]), int(now["events"] or 0)
            _not_empty(rows, f"the k-core filter min_{column}={least}", f"pass {step}", left)
            left = rows
            space.release(users if column == USER else items)
            users, items = (totals, items) if column == USER else (users, totals)
        dropped = {column: start[column] - number_of[column] for column in start}
        if step > 1 and not any(dropped.values()):
            return users, items, left
        counts[f"core_pass_{step}_users_dropped"], counts[f"core_pass_{step}_items_dropped"] = dropped[USER], dropped[ITEM]
        counts[f"core_pass_{step}_rows_left"] = left


def _renumber(kept: ibis.Table, keys: ibis.Table, column: str) -> ibis.Table:
    """code -> dense id from 1 in the same order, with the original key."""
    joined = kept.inner_join(keys, kept[column] == keys.code).select(code=keys.code, key=keys.key)
    return joined.select("code", "key", **{column: ibis.row_number().over(order_by=joined.code) + 1})


def _order_events(events: ibis.Table, users: ibis.Table, items: ibis.Table) -> ibis.Table:
    """Final ids and the 0-based position in the user's history."""
    rest = [c for c in events.columns if c not in (USER, ITEM)]
    t = events.inner_join(users, events[USER] == users.code).select(*rest, code=events[ITEM], user=users[USER])
    t = t.inner_join(items, t.code == items.code).select(*rest, USER, item=items[ITEM])
    t = t.mutate(order=ibis.row_number().over(group_by=USER, order_by=_time_order(t.columns)))
    return t.drop(*[c for c in ("source_order", SOURCE_ROW) if c in t.columns])


def _join_records(
    space: _Workspace, ids: ibis.Table, records: ibis.Table | None, column: str, key: str, counts: dict[str, int]
) -> pa.Table:
    """The id table with the source's own columns; ids without a record keep empty fields."""
    ids = ids.select(column, KEY)
    if records is None:
        return space.connection.to_pyarrow(ids.order_by(column))
    total, distinct = space.number(records.count()), space.number(records[key].nunique())
    if total != distinct:
        raise DataError(f"{total - distinct} {column} records share an id with another", expected=f"one record for each {column}")
    rest = [c for c in records.columns if c not in (key, column, KEY)]
    joined = ids.left_join(records, ids[KEY] == records[key])
    missing = space.number(joined.filter(joined[key].isnull()).count())
    counts[f"{column}s_without_record"] = missing
    table = space.connection.to_pyarrow(joined.select(column, KEY, *rest).order_by(column))
    if missing == table.num_rows:
        example = space.connection.to_pyarrow(records.select(key).limit(3)).column(0).to_pylist()
        raise DataError(
            f"no {column} of the interactions has a record: the ids do not meet",
            found=f"interactions: {table.column(KEY).to_pylist()[:3]}, {column} records: {example}",
            expected="the same ids in both files",
            remedy=f"name the id column of both with --columns {column}=...",
        )
    return table


def _filters(options: PrepareOptions) -> dict[str, Any]:
    filters: dict[str, Any] = {"min_user": options.min_user, "min_item": options.min_item}
    if options.min_user > 1 or options.min_item > 1:
        filters["core_on"] = "all"
    if options.max_items is not None:
        filters["max_items"] = options.max_items
    if options.split == "user_80_10_10":
        filters["seed"] = options.seed
    return filters


def _notices(table: pa.Table, options: PrepareOptions, has_repeats: bool, counts: dict[str, int]) -> list[str]:
    notes = [_share_notice(table, options.split)] if options.split == "leave_one_out" else []
    if not pc.any(pc.equal(table.column(SPLIT), "test")).as_py():
        if options.split != "given":
            raise DataError(
                f"the split {options.split} leaves no test event",
                found=f"{table.num_rows} events, longest history {pc.max(table.column(ORDER)).as_py() + 1}",
                expected="users with enough events (3 for leave_one_out, 2 for user_80_10_10, N + 3 for gap_N)",
                remedy="choose another --split",
            )
        notes.append("the given split has no test events")
    if has_repeats:
        notes.append("repeated (user, item) events are kept, so seen items are not removed at evaluation")
    if counts.get("items_without_record"):
        notes.append(f"{counts['items_without_record']} items have no record in the item files")
    if TIMESTAMP not in table.column_names:
        return notes
    low, high = pc.min_max(table.column(TIMESTAMP)).as_py().values()
    notes.append(f"times from {_day(low)} to {_day(high)} (UTC)")
    now = int(datetime.now(UTC).timestamp())
    future = pc.sum(pc.greater(table.column(TIMESTAMP), now + 86_400)).as_py()
    if future:
        notes.append(f"far future: {future} events lie after today; are the times in milliseconds or another unit?")
    return notes


def _share_notice(table: pa.Table, split: str) -> str:
    share = future_training_share(table)
    if share is None:
        return f"{split} holds out each user's last events; without timestamps nobody can tell how many training events are later"
    return f"{split}: {share:.1%} of the training events are later than the earliest test event; temporal_80_10_10 has none"


def _day(seconds: int) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")
    except (OverflowError, ValueError, OSError):
        return f"{seconds} s"
