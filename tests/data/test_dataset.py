from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from llmrec.data.dataset import DatasetMeta, InteractionDataset
from llmrec.errors import DataError
from tests.data.tables import dataset_of

EVENTS = [(1, 1, "train"), (1, 2, "train"), (1, 3, "test"), (2, 2, "train"), (2, 1, "valid")]


@pytest.fixture
def dataset() -> InteractionDataset:
    return dataset_of(EVENTS, times=[5, 6, 7, 1, 9], titles=["Alien", None, "Heat", "Ran"])


class TestSaving:
    def test_a_round_trip_keeps_everything(self, dataset, tmp_path):
        loaded = InteractionDataset.load(dataset.save(tmp_path / "a"))
        assert loaded.fingerprint == dataset.fingerprint
        assert loaded.meta == dataset.meta
        assert loaded.interactions.equals(dataset.interactions)
        assert loaded.items.equals(dataset.items)

    def test_a_folder_without_meta_is_refused(self, dataset, tmp_path):
        (dataset.save(tmp_path / "a") / "meta.json").unlink()
        with pytest.raises(DataError, match="llmrec prepare"):
            InteractionDataset.load(tmp_path / "a")

    def test_tables_of_another_data_set_are_refused(self, dataset, tmp_path):
        a, b = dataset.save(tmp_path / "a"), dataset_of(EVENTS[:3], times=[5, 6, 7]).save(tmp_path / "b")
        (a / "meta.json").write_bytes((b / "meta.json").read_bytes())
        with pytest.raises(DataError, match="do not belong together"):
            InteractionDataset.load(a)

    def test_an_unknown_format_is_refused(self, dataset, tmp_path):
        meta = dataset.save(tmp_path / "a") / "meta.json"
        meta.write_text(json.dumps({**json.loads(meta.read_text()), "format": 99}))
        with pytest.raises(DataError, match="unknown data set format"):
            InteractionDataset.load(tmp_path / "a")


class TestFingerprint:
    def test_it_sees_order_splits_times_and_keys(self, dataset):
        moved = dataset_of([*EVENTS[:2], (1, 3, "valid"), *EVENTS[3:]], times=[5, 6, 7, 1, 9])
        later = dataset_of(EVENTS, times=[5, 6, 8, 1, 9])
        bare = dataset_of(EVENTS)
        assert len({dataset.fingerprint, moved.fingerprint, later.fingerprint, bare.fingerprint}) == 4

    def test_it_does_not_see_text_or_layout(self, dataset):
        other = dataset_of(EVENTS, times=[5, 6, 7, 1, 9], titles=["a", "b", "c", "d"])
        assert other.fingerprint == dataset.fingerprint
        pieces = pa.concat_tables([dataset.interactions.slice(0, 2), dataset.interactions.slice(2)])
        assert InteractionDataset(pieces, dataset.items, dataset.users, dataset.meta).fingerprint == dataset.fingerprint


class TestRules:
    def build(self, **change):
        columns = {"user": [1, 1, 2], "item": [1, 2, 1], "order": [0, 1, 0], "split": ["train"] * 3}
        columns.update({k: v for k, v in change.items() if k in columns})
        return InteractionDataset(
            pa.table(columns),
            pa.table({"item": change.get("items", [1, 2]), "key": ["a", "b"]}),
            pa.table({"user": [1, 2], "key": ["x", "y"]}),
            DatasetMeta("n", "s", "given"),
        )

    def test_the_plain_table_passes(self):
        assert self.build().num_users == 2

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"user": [2, 1, 1]}, "sorted by user"),
            ({"order": [1, 0, 0]}, "strictly increasing"),
            ({"order": [0, 0, 0]}, "strictly increasing"),
            ({"item": [1, 3, 1]}, "outside its table"),
            ({"item": [0, 1, 1]}, "outside its table"),
            ({"split": ["train", "dev", "test"]}, "unknown split value"),
            ({"items": [0, 1]}, r"ids 1\.\.2"),
        ],
    )
    def test_a_broken_table_is_refused(self, change, message):
        with pytest.raises(DataError, match=message):
            self.build(**change)


class TestContent:
    def test_context_knows_training_events_only(self, dataset):
        context = dataset.context()
        assert context.train_counts.tolist() == [0, 1, 2, 0, 0]
        assert context.train_edges.tolist() == [[1, 1, 2], [1, 2, 2]]
        assert context.fields == {"timestamps", "titles"}

    def test_summary_counts(self, dataset):
        summary = dataset.summary()
        assert summary["splits"] == {"train": 3, "valid": 1, "test": 1}
        assert summary["history_length"] == {"min": 2, "median": 2.5, "max": 3}
        assert summary["remove_seen"] is True
        json.dumps(summary)

    def test_original_ids_go_both_ways(self, dataset):
        assert dataset.item_ids_of(["key-3", "nobody"]).tolist() == [3, 0]
        assert dataset.user_id_of("user-2") == 2
        with pytest.raises(DataError, match="no user 'user-9'"):
            dataset.user_id_of("user-9")

    def test_an_item_without_title_is_called_by_its_key(self, dataset):
        assert dataset.item_titles == ["", "Alien", "key-2", "Heat", "Ran"]

    def test_a_missing_column_is_named(self, dataset):
        with pytest.raises(DataError, match="no column 'rating'"):
            dataset.column("rating")

    def test_other_interactions_remember_their_parent(self, dataset):
        child = dataset.with_interactions(dataset.interactions.slice(0, 3), "first user only")
        assert child.meta.parent == dataset.fingerprint
        assert child.meta.notes[-1] == "first user only"
        assert np.array_equal(child.user_offsets, [0, 0, 3, 3])
