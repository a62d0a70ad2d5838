"""The steps of preparing that drop and number rows, as Ibis expressions.

Events travel with integer codes instead of text keys; codes
sort as the keys do, so that what is numbered by code is numbered by original id.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ibis

from llmrec.data.schema import ITEM, ORDER, SPLIT, TIMESTAMP, USER
from llmrec.data.splits import GIVEN
from llmrec.errors import DataError, RecipeError

if TYPE_CHECKING:
    from llmrec.data.engines import Workspace
    from llmrec.data.prepare import PrepareOptions

USER_KEY, ITEM_KEY, SOURCE_ROW, SOURCE_ORDER = "user_key", "item_key", "source_row", "_source_order"
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
_INTEGER = r"^-?[0-9]{1,18}\z"


def parse_positive(rule: str) -> tuple[str, str, float] | None:
    """(column, operator, number) of a positive rule; None for "all".

    Raises:
        RecipeError: The rule is not `column operator number`.
    """
    if rule.strip() == "all":
        return None
    match = _RULE.fullmatch(rule)
    if match is None:
        raise RecipeError(f"positive rule {rule!r} is not understood; expected 'all' or e.g. 'rating >= 4'")
    return match[1], match[2], float(match[3])


def code_events(
    space: Workspace, raw: ibis.Table, options: PrepareOptions, counts: dict[str, int]
) -> tuple[ibis.Table, ibis.Table, ibis.Table]:
    """Events with integer codes instead of text keys (codes sort as the keys do), and the two code tables."""
    missing = [c for c in (USER_KEY, ITEM_KEY, SOURCE_ROW) if c not in raw.columns]
    if missing:
        raise DataError(f"the source gave no {', '.join(missing)}", found=", ".join(raw.columns))
    if SPLIT in raw.columns:
        raw = raw.rename({GIVEN: SPLIT})
    if ORDER in raw.columns:
        raw = raw.rename({SOURCE_ORDER: ORDER})
    _positive(raw, options.positive)  # a wrong rule should fail before the files are read
    # Stored first: the expressions of a source check every value, and each further look would check them again.
    stored = space.store(raw)
    events = _keep_usable(space, stored, options, counts)
    user_keys = space.store(_number_keys(space, events.select(key=events[USER_KEY]).distinct()))
    item_keys = space.store(_number_keys(space, events.select(key=events[ITEM_KEY]).distinct()))
    rest = [c for c in events.columns if c not in (USER_KEY, ITEM_KEY)]
    coded = events.inner_join(user_keys, events[USER_KEY] == user_keys.key)
    coded = coded.select(*rest, ITEM_KEY, user=user_keys.code)
    coded = coded.inner_join(item_keys, coded[ITEM_KEY] == item_keys.key).select(*rest, "user", item=item_keys.code)
    coded = space.store(coded)
    space.release(stored)
    return coded, user_keys, item_keys


def _keep_usable(space: Workspace, raw: ibis.Table, options: PrepareOptions, counts: dict[str, int]) -> ibis.Table:
    """Events with ids that pass the positive rule; what is left out is counted."""
    has_id = raw[USER_KEY].notnull() & raw[ITEM_KEY].notnull()
    positive = _positive(raw, options.positive)
    time = next((raw[c] for c in (TIMESTAMP, SOURCE_ORDER) if c in raw.columns), raw[SOURCE_ROW])
    sums = space.row(
        raw.aggregate(
            rows=raw.count(),
            without_id=(~has_id).sum(),
            without_time=time.isnull().sum(),
            negative=(has_id & ~positive).sum(),
        )
    )
    found = {key: int(value or 0) for key, value in sums.items()}
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
    step = "the positive rule" if found["negative"] else "reading"
    _not_empty(left, step, f"positive: {options.positive}", found["rows"])
    return raw.filter(has_id & positive)


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


def _number_keys(space: Workspace, keys: ibis.Table) -> ibis.Table:
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
    return [c for c in (TIMESTAMP, SOURCE_ORDER, SOURCE_ROW) if c in columns]


def drop_repeats(space: Workspace, events: ibis.Table, options: PrepareOptions, counts: dict[str, int]) -> ibis.Table:
    """Of several events of one (user, item) pair keep the first or last, or all."""
    if options.repeats == "keep":
        return events
    by = [events[c].desc() if options.repeats == "last" else events[c].asc() for c in _time_order(events.columns)]
    ranked = events.mutate(_copy=ibis.row_number().over(group_by=[USER, ITEM], order_by=by))
    kept = space.store(ranked.filter(ranked["_copy"] == 0).drop("_copy"))
    counts["dropped_as_repeats"] = space.number(events.count()) - space.number(kept.count())
    space.release(events)
    return kept


def has_repeats(space: Workspace, events: ibis.Table) -> bool:
    """Whether some (user, item) pair has more than one event."""
    pairs = events.group_by([USER, ITEM]).aggregate(events=events.count())
    return space.number(pairs.events.max()) > 1


def apply_filters(
    space: Workspace, events: ibis.Table, options: PrepareOptions, counts: dict[str, int]
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
    space: Workspace,
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
        if not any(dropped.values()):
            return users, items, left
        for column, number in dropped.items():
            counts[f"core_pass_{step}_{column}s_dropped"] = number
        counts[f"core_pass_{step}_rows_left"] = left


def renumber(kept: ibis.Table, keys: ibis.Table, column: str) -> ibis.Table:
    """code -> dense id from 1 in the same order, with the original key."""
    joined = kept.inner_join(keys, kept[column] == keys.code).select(code=keys.code, key=keys.key)
    return joined.select("code", "key", **{column: ibis.row_number().over(order_by=joined.code) + 1})


def order_events(events: ibis.Table, users: ibis.Table, items: ibis.Table) -> ibis.Table:
    """Final ids and the 0-based position in the user's history."""
    rest = [c for c in events.columns if c not in (USER, ITEM)]
    t = events.inner_join(users, events[USER] == users.code).select(*rest, _item=events[ITEM], user=users[USER])
    t = t.inner_join(items, t["_item"] == items.code).select(*rest, USER, item=items[ITEM])
    t = t.mutate(order=ibis.row_number().over(group_by=USER, order_by=_time_order(t.columns)))
    return t.drop(*[c for c in (SOURCE_ORDER, SOURCE_ROW) if c in t.columns])
