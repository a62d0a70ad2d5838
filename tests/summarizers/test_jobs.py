"""Which histories are read: nothing from the held-out event on, whole blocks, the same users for a greater limit."""

from __future__ import annotations

import pytest

from llmrec.data.schema import ITEM, USER
from llmrec.errors import DataError, RecipeError
from llmrec.summarizers.jobs import held_out_histories, untitled
from tests.data.tables import dataset_of
from tests.summarizers.stubs import shop

LONG = shop([range(1, 24), range(5, 12), [1, 2]], items=30)


def test_history_ends_before_the_held_out_event() -> None:
    found = held_out_histories(LONG, ["train", "valid", "test"], max_history=30, block_size=3)
    by = {(one.user, one.split): one for one in found}
    assert by[1, "train"].items == tuple(range(1, 21)) and by[1, "valid"].items == tuple(range(1, 22))
    assert by[1, "test"].items == tuple(range(1, 23)) and by[2, "test"].items == tuple(range(5, 11))
    assert (3, "train") not in by and (3, "valid") not in by and by[3, "test"].items == (1,)
    for one in found:
        assert LONG.column(USER)[one.example] == one.user
        assert LONG.column(ITEM)[one.example] == one.items[-1] + 1, "the held-out event is the next one"
    assert found == sorted(found, key=lambda one: (one.user, one.example))


def test_a_long_history_begins_at_a_whole_block() -> None:
    for most in (3, 4, 7, 21, 22, 23):
        one = held_out_histories(LONG, ["test"], max_history=most, block_size=3)[0]
        assert len(one.items) <= most and (one.items[0] - 1) % 3 == 0 and one.items[-1] == 22
        assert most - len(one.items) < 3 or len(one.items) == 22
    with pytest.raises(RecipeError, match="max_history: found 2, expected at least block_size, 3"):
        held_out_histories(LONG, ["test"], max_history=2, block_size=3)


def test_of_several_targets_the_first_is_held_out() -> None:
    splits = ["train", "train", "train", "test", "test", "valid"]
    data = dataset_of([(1, item, split) for item, split in enumerate(splits, start=1)], titles=list("abcdef"))
    found = held_out_histories(data, ["train", "test"], max_history=9, block_size=3)
    assert [(one.split, one.items) for one in found] == [("train", (1, 2)), ("test", (1, 2, 3))]


def test_a_greater_limit_keeps_the_users_of_a_smaller_one() -> None:
    data = shop([[user, user + 1, user + 2] for user in range(1, 26)], items=30)
    drawn = [
        {one.user for one in held_out_histories(data, ["valid", "test"], max_history=9, block_size=3, limit=n, seed=1)}
        for n in (5, 10, 25)
    ]
    assert [len(users) for users in drawn] == [5, 10, 25] and drawn[0] < drawn[1] < drawn[2]
    other = held_out_histories(data, ["test"], max_history=9, block_size=3, limit=5, seed=2)
    assert {one.user for one in other} != drawn[0]


def test_no_targets() -> None:
    with pytest.raises(DataError, match="calibration"):
        held_out_histories(LONG, ["calibration"], max_history=9, block_size=3)


def test_items_without_a_title_are_counted() -> None:
    data = dataset_of([(1, 1, "train"), (1, 2, "train")], titles=["", "b"])
    assert untitled(data, [1, 2, 2]) == 1
    assert untitled(dataset_of([(1, 1, "train"), (1, 2, "train")]), [1, 2]) == 2
