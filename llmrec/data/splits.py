"""Split rules as Ibis expressions: events with `user`, `item`, `order` in, the same events with `split` out.

| rule | train | valid | test |
|---|---|---|---|
| leave_one_out | the rest, and all of users with fewer than 3 events | second last event | last event |
| temporal_80_10_10 | events up to the time that closes 80% of all events | up to 90% | after |
| user_80_10_10 | all events of 80% of the users, and of those with one event | last event of 10% | of the rest |
| gap_N | events before the last N + 2, and all of users with fewer than N + 3 | next event | next; test_lapse: last |
| given | the column `split` of the source decides | | |

Earlier events of the test and validation users of user_80_10_10 are `history`: inputs, never a target.

`gap_N` is the protocol of CaseQ: both tests of a user see the same parameters, and the lapse
test sees the N events in between as inputs (they are `history`: never a target).
"""

from __future__ import annotations

import re

import ibis

from llmrec.data.schema import KEY, ORDER, SPLIT, SPLITS, TIMESTAMP, USER
from llmrec.discovery import nearest
from llmrec.errors import DataError, RecipeError

NAMES = ("leave_one_out", "temporal_80_10_10", "user_80_10_10", "gap_30", "given")
GIVEN_NAMES = {
    "training": "train",
    "val": "valid",
    "validation": "valid",
    "dev": "valid",
    "testing": "test",
    **{name: name for name in SPLITS},
}
GIVEN = "_given_split"
"""Name the source's own split column travels under until a rule is chosen."""


def check_rule(rule: str) -> str:
    """The rule itself, if there is such a rule.

    Raises:
        RecipeError: No such rule; the nearest name is suggested.
    """
    if rule in NAMES or re.fullmatch(r"gap_\d{1,6}", rule):
        return rule
    known = f"{', '.join(NAMES)} (gap_N for any N)"
    raise RecipeError(f"unknown split {rule!r}{nearest(rule, list(NAMES))}; known: {known}")


def assign_splits(
    events: ibis.Table, users: ibis.Table, rule: str, *, seed: int, connection: ibis.BaseBackend
) -> ibis.Table:
    """Add the column `split`.

    Args:
        events: user, item, order (0, 1, ... within each user, oldest first) [, timestamp] [, the source's own split].
        users: user, key.
        rule: One of the rules above.
        seed: Draws the users of user_80_10_10; the other rules use no chance.
        connection: Where the expressions run; rules that need a global figure (a time, a count) ask for it here.

    Returns:
        The same rows with `split`, without the source's own split column.

    Raises:
        RecipeError: Unknown rule.
        DataError: The events lack what the rule needs.
    """
    check_rule(rule)
    if rule == "given":
        return _given(events, connection)
    if GIVEN in events.columns:
        events = events.drop(GIVEN)
    if rule == "leave_one_out":
        return _leave_one_out(events)
    if rule == "temporal_80_10_10":
        return _temporal(events, connection)
    if rule == "user_80_10_10":
        return _by_user(events, users, seed, connection)
    return _gap(events, int(rule.removeprefix("gap_")))


def _with_length(events: ibis.Table) -> ibis.Table:
    return events.mutate(_length=events.count().over(group_by=USER))


def _leave_one_out(events: ibis.Table) -> ibis.Table:
    t = _with_length(events)
    split = ibis.cases(
        (t["_length"] < 3, "train"),
        (t[ORDER] == t["_length"] - 1, "test"),
        (t[ORDER] == t["_length"] - 2, "valid"),
        else_="train",
    )
    return t.mutate(split=split).drop("_length")


def _gap(events: ibis.Table, gap: int) -> ibis.Table:
    t = _with_length(events)
    from_end = t["_length"] - t[ORDER]  # 1 = the last event
    split = ibis.cases(
        (t["_length"] < gap + 3, "train"),
        (from_end > gap + 2, "train"),
        (from_end == gap + 2, "valid"),
        (from_end == gap + 1, "test"),
        (from_end == 1, "test_lapse"),
        else_="history",
    )
    return t.mutate(split=split).drop("_length")


def _temporal(events: ibis.Table, connection: ibis.BaseBackend) -> ibis.Table:
    if TIMESTAMP not in events.columns:
        raise DataError(
            "a split by time needs timestamps",
            found=f"columns {', '.join(events.columns)}",
            expected="a time of each event (an order within the user is not enough: users must share one clock)",
            remedy="name the time column with --columns time=..., or choose --split leave_one_out",
        )
    counts = events.group_by(TIMESTAMP).aggregate(events=events.count())
    running = counts.mutate(
        until=counts.events.sum().over(ibis.window(order_by=TIMESTAMP, preceding=None, following=0)),
        total=counts.events.sum().over(ibis.window()),
    )
    cuts = connection.execute(
        running.aggregate(
            valid=running[TIMESTAMP].min(where=running.until * 10 >= running.total * 8),
            test=running[TIMESTAMP].min(where=running.until * 10 >= running.total * 9),
            last=running[TIMESTAMP].max(),
        )
    ).iloc[0]
    if not cuts["valid"] < cuts["test"] < cuts["last"]:
        raise DataError(
            "the times are too coarse for temporal_80_10_10: valid or test would be empty",
            column=TIMESTAMP,
            found=f"80% of the events end at {cuts['valid']}, 90% at {cuts['test']}, all at {cuts['last']}",
            expected="three different times",
            remedy="choose --split leave_one_out or user_80_10_10",
        )
    time = events[TIMESTAMP]
    split = ibis.cases((time <= int(cuts["valid"]), "train"), (time <= int(cuts["test"]), "valid"), else_="test")
    return events.mutate(split=split)


def _by_user(events: ibis.Table, users: ibis.Table, seed: int, connection: ibis.BaseBackend) -> ibis.Table:
    """Users are ranked by a digest of (seed, original id), so the draw does not depend on the order of the file."""
    lengths = events.group_by(USER).aggregate(events=events.count())
    askable = users.semi_join(lengths.filter(lengths.events >= 2), USER)
    total = int(connection.to_pyarrow(askable.count()).as_py())
    train, valid = total * 8 // 10, total // 10
    hashed = askable.select(USER, KEY, digest=(ibis.literal(f"{seed}:") + askable[KEY]).hexdigest("md5"))
    ranked = hashed.select(USER, _drawn=ibis.row_number().over(order_by=[hashed.digest, hashed[KEY]]))
    t = _with_length(events)
    t = t.left_join(ranked, t[USER] == ranked[USER]).select(*t.columns, _drawn=ranked["_drawn"].fill_null(-1))
    is_last = t[ORDER] == t["_length"] - 1
    split = ibis.cases(
        (t["_drawn"] < train, "train"),
        (~is_last, "history"),
        (t["_drawn"] < train + valid, "valid"),
        else_="test",
    )
    return t.mutate(split=split).drop("_length", "_drawn")


def _given(events: ibis.Table, connection: ibis.BaseBackend) -> ibis.Table:
    if GIVEN not in events.columns:
        raise DataError(
            "--split given needs a split column",
            found=f"columns {', '.join(events.columns)}",
            expected="a column named split, or --columns split=NAME",
            remedy="choose another --split",
        )
    clean = events[GIVEN].strip().lower()
    found = connection.to_pyarrow(events.select(name=clean).distinct()).column("name").to_pylist()
    strange = sorted(str(name) for name in found if name not in GIVEN_NAMES)
    if strange:
        raise DataError(
            "unknown value in the split column",
            column=SPLIT,
            found=", ".join(repr(name) for name in strange[:8]),
            expected=f"one of {', '.join(sorted(GIVEN_NAMES))}",
            remedy="rename the values in the source, or choose another --split",
        )
    branches = [(clean == theirs, ours) for theirs, ours in GIVEN_NAMES.items() if theirs in found]
    return events.mutate(split=ibis.cases(*branches)).drop(GIVEN)
