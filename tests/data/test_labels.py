"""Labels of events, and the examples that ask for them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.data.dataset import InteractionDataset
from llmrec.data.labels import event_labels, labelled_events, labelled_windows
from llmrec.data.sequences import SequenceCollator
from llmrec.errors import DataError, RecipeError
from tests.data.tables import dataset_of

EVENTS = [
    (1, 1, "train"), (1, 2, "train"), (1, 3, "train"), (1, 4, "valid"), (1, 5, "test"), (1, 6, "test"),
    (2, 6, "test"),
    (3, 7, "history"), (3, 1, "test"),
]  # fmt: skip
RATINGS = [5.0, 3.0, 4.0, 1.0, 4.5, 2.0, 4.0, 1.0, 3.5]


def rated(ratings: list[float | None] | list[str] | None = None, column: str = "rating") -> InteractionDataset:
    dataset = dataset_of(EVENTS, times=range(9))
    values = pa.array(RATINGS if ratings is None else ratings)
    return dataset.with_interactions(dataset.interactions.append_column(column, values), "rated")


class TestEventLabels:
    def test_a_rule_says_which_actions_are_positive(self):
        assert event_labels(rated(), "rating >= 4").tolist() == [1, 0, 1, 0, 1, 0, 1, 0, 0]
        assert event_labels(rated(), "rating < 2").tolist() == [0, 0, 0, 1, 0, 0, 0, 1, 0]

    def test_without_a_rule_the_column_label_is_read(self):
        own = rated([1, 0, 0, 1, 0, 0, 0, 1, 1], "label")
        assert event_labels(own).tolist() == [1, 0, 0, 1, 0, 0, 0, 1, 1]
        with pytest.raises(DataError, match="needs a column 'label'"):
            event_labels(rated())

    def test_what_gives_no_label_is_refused(self):
        with pytest.raises(RecipeError, match="makes every action positive"):
            event_labels(rated(), "all")
        with pytest.raises(DataError, match="needs a column 'stars'"):
            event_labels(rated(), "stars >= 4")
        with pytest.raises(DataError, match="2 empty values of 9"):
            event_labels(rated([None, None, *RATINGS[2:]]), "rating >= 4")
        with pytest.raises(DataError, match="labels come from numbers"):
            event_labels(rated(["good"] * 9), "rating >= 4")


class TestLabelledEvents:
    def test_every_event_is_asked_behind_all_earlier_ones(self):
        rows = list(labelled_events(rated(), "test", 10, "rating >= 4"))
        assert [row["item_ids"].tolist() for row in rows] == [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6], [6], [7, 1]]
        assert [row["labels"].tolist() for row in rows] == [[1, 0, 1, 0, 1], [1, 0, 1, 0, 1, 0], [1], [0, 0]]
        assert [row["target_timestamp"] for row in rows] == [4, 5, 6, 8]
        assert not any(row["targets"].any() for row in rows)

    def test_targets_are_the_events_themselves(self):
        examples = labelled_events(rated(), "test", 2, "rating >= 4")
        assert examples.targets.tolist() == [5, 6, 6, 1]
        assert examples.example_ids.tolist() == [4, 5, 6, 8]
        assert examples.lengths.tolist() == [2, 2, 1, 2]

    def test_a_validation_event_sees_no_later_split(self):
        row = labelled_events(rated(), "valid", 10, "rating >= 4")[0]
        assert row["item_ids"].tolist() == [1, 2, 3, 4]


class TestLabelledWindows:
    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(1, 23), min_size=1, max_size=6), st.integers(1, 7))
    def test_every_event_is_an_input_once(self, lengths, max_history):
        events = [(user, 1 + (user + step) % 9, "train") for user, n in enumerate(lengths, 1) for step in range(n)]
        dataset = dataset_of(events)
        marks = pa.array(np.arange(len(events)) % 2)
        dataset = dataset.with_interactions(dataset.interactions.append_column("label", marks), "labelled")
        examples = labelled_windows(dataset, max_history)
        covered = np.concatenate([np.arange(a, b) for a, b in zip(examples.start, examples.end, strict=True)])
        assert sorted(covered) == list(range(len(events)))
        assert examples.lengths.max() <= max_history
        assert all(row["labels"].tolist() == (np.arange(a, b) % 2).tolist()
                   for row, a, b in zip(examples, examples.start, examples.end, strict=True))  # fmt: skip

    def test_a_batch_carries_labels_as_numbers_between_0_and_1(self):
        examples = labelled_windows(rated(), 2, "rating >= 4").subset([0, 1])
        batch = SequenceCollator()(list(examples))
        assert batch["item_ids"].tolist() == [[1, 0], [2, 3]]
        assert batch["labels"].tolist() == [[1.0, 0.0], [0.0, 1.0]] and batch["labels"].is_floating_point()
        assert batch["target_timestamps"].tolist() == [0, 2]

    def test_other_examples_have_no_labels(self):
        assert "labels" not in SequenceCollator()(list(rated().windows(3)))
