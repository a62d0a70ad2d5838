from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.data.sequences import SequenceCollator
from llmrec.errors import DataError
from tests.data.tables import dataset_of

# user 1: three training events, valid, test; user 2: test only; user 3: history, then valid
EVENTS = [
    (1, 1, "train"), (1, 2, "train"), (1, 3, "train"), (1, 4, "valid"), (1, 5, "test"),
    (2, 6, "test"),
    (3, 7, "history"), (3, 1, "history"), (3, 2, "valid"),
]  # fmt: skip


class TestPrefixExamples:
    def test_a_validation_target_sees_no_later_split(self):
        dataset = dataset_of([(1, 1, "train"), (1, 2, "test"), (1, 3, "valid")])
        row = dataset.histories("valid", 10)[0]
        assert row["item_ids"].tolist() == [1]
        assert row["targets"].tolist() == [3]

    def test_a_test_target_sees_all_earlier_events(self):
        examples = dataset_of(EVENTS).histories("test", 10)
        assert len(examples) == 1, "a target without history cannot be asked for"
        assert examples[0]["item_ids"].tolist() == [1, 2, 3, 4]
        assert examples[0]["targets"].tolist() == [0, 0, 0, 5]
        assert examples[0]["example_id"] == 4

    def test_history_events_are_inputs_and_never_targets(self):
        dataset = dataset_of(EVENTS)
        examples = dataset.histories("valid", 10)
        assert [row["targets"][-1] for row in examples] == [4, 2]
        assert examples[1]["item_ids"].tolist() == [7, 1]
        assert len(dataset.histories("train", 10)) == 2

    def test_the_window_is_short_and_seen_is_whole(self):
        row = dataset_of(EVENTS, times=range(9)).histories("test", 2)[0]
        assert row["item_ids"].tolist() == [3, 4]
        assert row["seen"].tolist() == [1, 2, 3, 4]
        assert row["timestamps"].tolist() == [2, 3]
        assert row["target_timestamp"] == 4

    def test_an_unknown_split_is_refused(self):
        with pytest.raises(DataError, match="no targets in split"):
            dataset_of(EVENTS).histories("history", 5)  # type: ignore[arg-type]


class TestWindows:
    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(1, 23), min_size=1, max_size=6), st.integers(1, 7))
    def test_every_event_but_the_first_is_supervised_once(self, lengths, max_history):
        events = [(user, 1 + (user + step) % 9, "train") for user, n in enumerate(lengths, 1) for step in range(n)]
        dataset = dataset_of(events)
        examples = dataset.windows(max_history)
        supervised = np.zeros(len(events), dtype=int)
        for first, start, end in zip(examples.first, examples.start, examples.end, strict=True):
            assert first <= start < end <= start + max_history
            supervised[start + 1 : end + 1] += 1
        offsets = dataset.user_offsets
        starts = [offsets[user] for user in range(1, len(lengths) + 1)]
        assert supervised[starts].tolist() == [0] * len(lengths)
        assert np.delete(supervised, starts).tolist() == [1] * (len(events) - len(lengths))

    def test_targets_are_the_inputs_shifted_by_one(self):
        row = dataset_of(EVENTS).windows(10)[0]
        assert row["item_ids"].tolist() == [1, 2]
        assert row["targets"].tolist() == [2, 3]


class TestCollator:
    def test_shapes_and_padding(self):
        dataset = dataset_of(EVENTS, times=range(9))
        examples = dataset.histories("valid", 10).with_candidates(np.array([[4, 8], [8, 2]]))
        batch = SequenceCollator(with_seen=True)([examples[0], examples[1]])
        assert batch["item_ids"].tolist() == [[1, 2, 3], [7, 1, 0]]
        assert batch["lengths"].tolist() == [3, 2]
        assert batch["targets"].tolist() == [[0, 0, 4], [0, 2, 0]]
        assert batch["target_timestamps"].tolist() == [3, 8]
        assert batch["candidates"].tolist() == [[4, 8], [8, 2]]
        assert batch["seen"].shape == (2, 3)
        assert all(value.dtype == torch.int64 for value in batch.values())

    def test_extras_may_add_fields(self):
        def add(rows, batch):
            batch["labels"] = torch.ones(len(rows))

        examples = dataset_of(EVENTS).histories("valid", 10)
        assert SequenceCollator(extras=add)([examples[0]])["labels"].tolist() == [1.0]

    def test_a_subset_keeps_its_candidates(self):
        examples = dataset_of(EVENTS).histories("valid", 10).with_candidates(np.array([[4, 8], [8, 2]]))
        part = examples.subset([1])
        assert part.candidates.tolist() == [[8, 2]]
        assert part.targets.tolist() == [2]
        with pytest.raises(DataError, match="one candidate list per example"):
            part.with_candidates(np.zeros((2, 2), dtype=np.int64))
