from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.data.prepare import PrepareOptions
from llmrec.data.schema import SPLITS
from llmrec.errors import DataError, RecipeError
from tests.data.tables import histories, prepared

RULES = ("leave_one_out", "temporal_80_10_10", "user_80_10_10", "gap_2")


def of_user(dataset, key):
    rows = slice(*dataset.user_offsets[dataset.user_id_of(key) :][:2])
    return [SPLITS[code] for code in dataset.split_codes[rows]]


def splits(dataset):
    return Counter(SPLITS[code] for code in dataset.split_codes)


class TestLeaveOneOut:
    def test_last_is_test_and_second_last_valid(self):
        dataset = prepared(histories([4, 3, 2, 1]))
        assert of_user(dataset, "u1") == ["train", "train", "valid", "test"]
        assert of_user(dataset, "u2") == ["train", "valid", "test"]
        assert of_user(dataset, "u3") == ["train", "train"]
        assert of_user(dataset, "u4") == ["train"]

    def test_too_short_histories_are_an_error(self):
        with pytest.raises(DataError, match="leaves no test event"):
            prepared(histories([2, 1]))


class TestTemporal:
    def test_one_clock_for_all(self):
        dataset = prepared(histories([30, 40, 30]), split="temporal_80_10_10")
        time, codes = dataset.column("timestamp"), dataset.split_codes
        by_split = [time[codes == SPLITS.index(name)] for name in ("train", "valid", "test")]
        assert [len(times) for times in by_split] == [80, 10, 10]
        assert by_split[0].max() < by_split[1].min()
        assert by_split[1].max() < by_split[2].min()

    def test_equal_times_stay_together(self):
        rows = [(f"u{n}", f"i{n % 7}", n // 10) for n in range(100)]
        dataset = prepared(rows, split="temporal_80_10_10")
        assert all(len(set(dataset.split_codes[dataset.column("timestamp") == t])) == 1 for t in range(10))

    def test_coarse_times_are_an_error(self):
        with pytest.raises(DataError, match="too coarse"):
            prepared([(f"u{n}", "i", n // 95) for n in range(100)], split="temporal_80_10_10")

    def test_no_times_are_an_error(self):
        with pytest.raises(DataError, match="needs timestamps"):
            prepared([("u", "a"), ("u", "b"), ("u", "c")], ("user_key", "item_key"), split="temporal_80_10_10")


class TestByUser:
    def test_shares_and_roles(self):
        dataset = prepared(histories([5] * 943, items=60), split="user_80_10_10", seed=3)
        roles = Counter(tuple(of_user(dataset, key)) for key in dataset.user_keys[1:])
        assert roles == {
            ("train",) * 5: 754,
            ("history",) * 4 + ("valid",): 94,
            ("history",) * 4 + ("test",): 95,
        }

    def test_the_seed_draws_the_users_and_is_written_down(self):
        first, again, other = (prepared(histories([4] * 50), split="user_80_10_10", seed=s) for s in (1, 1, 2))
        assert first.fingerprint == again.fingerprint != other.fingerprint
        assert first.meta.filters["seed"] == 1

    def test_a_user_with_one_event_cannot_be_asked(self):
        dataset = prepared(histories([1] * 20 + [3] * 80), split="user_80_10_10")
        assert all(of_user(dataset, f"u{n}") == ["train"] for n in range(1, 21))


class TestGap:
    def test_roles_follow_the_protocol(self):
        dataset = prepared(histories([8, 5, 4]), split="gap_2")
        assert of_user(dataset, "u1") == ["train"] * 4 + ["valid", "test", "history", "test_lapse"]
        assert of_user(dataset, "u2") == ["train", "valid", "test", "history", "test_lapse"]
        assert of_user(dataset, "u3") == ["train"] * 4

    def test_the_lapse_history_is_longer_by_the_gap(self):
        dataset = prepared(histories([12, 9]), split="gap_3")
        plain, lapse = dataset.histories("test", 100), dataset.histories("test_lapse", 100)
        assert (lapse.lengths - plain.lengths).tolist() == [3, 3]

    def test_no_gap_is_leave_one_out(self):
        rows = histories([6, 3, 2])
        assert prepared(rows, split="gap_0").fingerprint == prepared(rows, split="leave_one_out").fingerprint


class TestGiven:
    COLUMNS = ("user_key", "item_key", "timestamp", "split")

    def test_names_are_mapped_and_histories_chronological(self):
        rows = [("u", "d", 4, "Test "), ("u", "c", 3, "validation"), ("u", "a", 1, "TRAIN"), ("u", "b", 2, "val")]
        dataset = prepared(rows, self.COLUMNS, split="given")
        assert of_user(dataset, "u") == ["train", "valid", "valid", "test"]
        assert "split" in dataset.interactions.column_names

    def test_an_unknown_name_is_an_error(self):
        with pytest.raises(DataError, match="unknown value in the split column"):
            prepared([("u", "a", 1, "train"), ("u", "b", 2, "holdout")], self.COLUMNS, split="given")

    def test_a_missing_name_is_an_error(self):
        with pytest.raises(DataError, match="unknown value in the split column"):
            prepared([("u", "a", 1, "train"), ("u", "b", 2, None)], self.COLUMNS, split="given")

    def test_a_missing_column_is_an_error(self):
        with pytest.raises(DataError, match="needs a split column"):
            prepared(histories([4]), split="given")

    def test_another_rule_ignores_the_column(self):
        rows = [("u", "a", 1, "test"), ("u", "b", 2, "odd"), ("u", "c", 3, "train")]
        assert of_user(prepared(rows, self.COLUMNS), "u") == ["train", "valid", "test"]

    def test_no_test_events_are_said(self):
        rows = [("u", "a", 1, "train"), ("u", "b", 2, "valid")]
        assert "the given split has no test events" in prepared(rows, self.COLUMNS, split="given").meta.notes


@pytest.mark.parametrize("rule", ["leave_one_outt", "temporal", "gap_", "gap_-1", "gap_x", ""])
def test_an_unknown_rule_is_refused(rule):
    with pytest.raises(RecipeError, match="unknown split"):
        PrepareOptions(split=rule)


def test_the_nearest_rule_is_suggested():
    with pytest.raises(RecipeError, match="did you mean 'leave_one_out'"):
        PrepareOptions(split="leave-one-out")


@settings(max_examples=4, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=10, max_size=20), st.integers(0, 5))
@pytest.mark.parametrize("rule", RULES)
def test_no_prefix_sees_the_future_and_each_event_has_one_split(rule, lengths, seed):
    rows = histories([*lengths, 12, 12], items=31)
    dataset = prepared(rows, split=rule, seed=seed)
    keys = Counter(zip(*(dataset.column(c).tolist() for c in ("user", "item", "timestamp")), strict=True))
    assert len(keys) == len(rows) and set(keys.values()) == {1}, "every event is there once, so it has one split"
    examples = dataset.windows(5)
    for index in range(len(examples)):
        assert np.all(examples[index]["timestamps"] <= examples[index]["target_timestamp"])
    for split in ("train", "valid", "test", "test_lapse"):
        prefixes = dataset.histories(split, 100)
        for index in range(len(prefixes)):
            row = prefixes[index]
            assert np.all(row["timestamps"] < row["target_timestamp"])
    if rule == "temporal_80_10_10":
        first_test = dataset.column("timestamp")[dataset.split_codes == SPLITS.index("test")].min()
        assert dataset.column("timestamp")[dataset.split_codes == SPLITS.index("train")].max() < first_test
