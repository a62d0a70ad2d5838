from __future__ import annotations

import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.data.leaks import CandidateLists, check_candidate_positions, check_negatives
from llmrec.data.negatives import candidate_lists, read_stored, stored_candidates
from llmrec.errors import DataError, RecipeError
from tests.data.tables import dataset_of


def random_dataset(users=40, items=60, most=12, seed=0, least=3):
    rng = np.random.default_rng(seed)
    events = []
    for user in range(1, users + 1):
        chosen = rng.choice(items, size=rng.integers(least, most + 1), replace=False) + 1
        names = ["train"] * (len(chosen) - 2) + ["valid", "test"]
        events += [(user, int(item), name) for item, name in zip(chosen, names, strict=True)]
    return dataset_of(events, titles=[f"title {i}" for i in range(1, items + 1)])


KINDS = ("uniform", "popularity")


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    size=st.integers(2, 20),
    items=st.integers(45, 90),
    kind=st.sampled_from(KINDS),
    data_seed=st.integers(0, 5),
)
def test_lists_hold_the_target_once_and_nothing_else_the_user_met(seed, size, items, kind, data_seed):
    dataset = random_dataset(items=items, seed=data_seed, users=60)
    examples = dataset.histories("test", 5)
    lists = candidate_lists(dataset, examples, size, kind, seed)
    assert lists.shape == (len(examples), size) and lists.dtype == np.int64
    assert lists.min() >= 1 and lists.max() <= dataset.num_items
    assert all(len(set(row)) == size for row in lists.tolist())
    found = check_negatives(dataset, [CandidateLists("x", examples.users, examples.targets, lists)])
    assert found.severity == "ok", found.detail


@pytest.mark.parametrize("kind", KINDS)
class TestStreams:
    def test_a_row_does_not_depend_on_its_neighbours(self, kind):
        dataset = random_dataset()
        examples = dataset.histories("test", 5)
        lists = candidate_lists(dataset, examples, 20, kind, 7)
        order = np.random.default_rng(0).permutation(len(examples))[:11]
        assert np.array_equal(candidate_lists(dataset, examples.subset(order), 20, kind, 7), lists[order])

    def test_neighbours_do_not_matter_where_chunks_break(self, kind, monkeypatch):
        dataset = random_dataset(users=70)
        examples = dataset.histories("test", 5)
        whole = candidate_lists(dataset, examples, 10, kind, 7)
        monkeypatch.setattr("llmrec.data.negatives._CHUNK_CELLS", 100)
        assert np.array_equal(candidate_lists(dataset, examples, 10, kind, 7), whole)

    def test_the_window_length_does_not_matter(self, kind):
        dataset = random_dataset()
        short, long = (candidate_lists(dataset, dataset.histories("test", n), 9, kind, 1) for n in (1, 50))
        assert np.array_equal(short, long)

    def test_another_seed_is_another_draw(self, kind):
        dataset = random_dataset()
        examples = dataset.histories("test", 5)
        first, second = (candidate_lists(dataset, examples, 9, kind, seed) for seed in (1, 2))
        assert (first == second).mean() < 0.3


class TestLaw:
    def dataset(self, rows=30_000):
        # one long user makes items 1..6 known; everybody else has a history of two items, so 8 others are drawable
        events = [(user, item, "train" if item == 1 else "test") for user in range(1, rows + 1) for item in (1, 2)]
        counts = {3: 1, 4: 2, 5: 3, 6: 4}
        more, user = [], rows
        for item, times in counts.items():
            for _ in range(times):
                user += 1
                more.append((user, item, "train"))
        return dataset_of(events + more, titles=[str(i) for i in range(10)])

    def test_uniform_draws_are_uniform_and_targets_stand_anywhere(self):
        dataset = self.dataset()
        examples = dataset.histories("test", 5)
        lists = candidate_lists(dataset, examples, 4, "uniform", 3)
        counts = np.bincount(lists.ravel(), minlength=11)[3:]
        assert counts.sum() == 3 * len(examples)
        assert np.allclose(counts / len(examples), 3 / 8, atol=0.012)
        place = np.argmax(lists == 2, axis=1)
        assert np.allclose(np.bincount(place) / len(place), 0.25, atol=0.012)
        found = check_candidate_positions([CandidateLists("x", examples.users, examples.targets, lists)])
        assert found.severity == "ok", found.detail

    @pytest.mark.parametrize("rounds", [4, 0])
    def test_popularity_draws_follow_training_counts(self, rounds, monkeypatch):
        # rounds 0 leaves everything to the exact completion; both ways must follow the same law
        monkeypatch.setattr("llmrec.data.negatives._ROUNDS", rounds)
        dataset = self.dataset()
        examples = dataset.histories("test", 5)
        lists = candidate_lists(dataset, examples, 2, "popularity", 3)
        drawn = lists[lists != 2]
        shares = np.bincount(drawn, minlength=11)[3:] / len(drawn)
        assert np.allclose(shares, [0.1, 0.2, 0.3, 0.4, 0, 0, 0, 0], atol=0.012)

    def test_the_completion_agrees_with_sequential_draws_on_pairs(self, monkeypatch):
        dataset = self.dataset()
        examples = dataset.histories("test", 5)
        shares = []
        for rounds in (4, 0):
            monkeypatch.setattr("llmrec.data.negatives._ROUNDS", rounds)
            lists = candidate_lists(dataset, examples, 3, "popularity", 5)
            shares.append(np.bincount(lists.ravel(), minlength=7)[3:7] / len(examples))
        assert np.allclose(*shares, atol=0.015)


class TestLimits:
    def test_a_list_may_use_the_whole_rest_of_the_catalogue(self):
        dataset = random_dataset(users=30, items=14, most=6, least=6)
        examples = dataset.histories("test", 5)
        lists = candidate_lists(dataset, examples, 9, "uniform", 0)
        assert all(len(set(row)) == 9 for row in lists.tolist())
        with pytest.raises(DataError, match="too small for candidate lists of 10"):
            candidate_lists(dataset, examples, 10, "uniform", 0)

    def test_items_without_training_events_cannot_be_drawn_by_popularity(self):
        dataset = dataset_of([(1, 1, "train"), (1, 2, "test"), (2, 3, "train")], titles=list("abcdef"))
        examples = dataset.histories("test", 5)
        assert sorted(candidate_lists(dataset, examples, 2, "popularity", 0)[0]) == [2, 3]
        with pytest.raises(DataError, match="leaves 1 items"):
            candidate_lists(dataset, examples, 3, "popularity", 0)

    def test_wrong_requests_are_refused(self):
        dataset = random_dataset()
        examples = dataset.histories("test", 5)
        with pytest.raises(RecipeError, match="at least 2"):
            candidate_lists(dataset, examples, 1)
        with pytest.raises(RecipeError, match="unknown kind"):
            candidate_lists(dataset, examples, 5, "hard")  # type: ignore[arg-type]

    def test_no_examples_give_no_lists(self):
        dataset = random_dataset()
        assert candidate_lists(dataset, dataset.histories("test", 5).subset(np.zeros(0, dtype=int)), 5).shape == (0, 5)


class TestStored:
    def test_lists_are_written_once_and_read_back(self, tmp_path):
        dataset = random_dataset()
        first = stored_candidates(tmp_path, dataset, "test", 10, "popularity", 4)
        path = tmp_path / "candidates" / "test-popularity-10-4.parquet"
        written = path.stat().st_mtime_ns
        again = stored_candidates(tmp_path, dataset, "test", 10, "popularity", 4)
        assert np.array_equal(first, again) and path.stat().st_mtime_ns == written
        assert np.array_equal(first, candidate_lists(dataset, dataset.histories("test", 9), 10, "popularity", 4))
        assert [p.name for p in path.parent.iterdir()] == [path.name]

    def test_lists_of_another_data_set_are_refused(self, tmp_path):
        stored_candidates(tmp_path, random_dataset(), "test", 10)
        with pytest.raises(DataError, match="belong to another data set"):
            stored_candidates(tmp_path, random_dataset(seed=1), "test", 10)

    def test_a_file_of_another_shape_is_refused(self, tmp_path):
        dataset = random_dataset()
        stored_candidates(tmp_path, dataset, "test", 10)
        folder = tmp_path / "candidates"
        (folder / "test-uniform-10-0.parquet").rename(folder / "test-uniform-5-0.parquet")
        with pytest.raises(DataError, match="another shape"):
            stored_candidates(tmp_path, dataset, "test", 5)

    def test_checks_can_read_them(self, tmp_path):
        dataset = random_dataset()
        lists = stored_candidates(tmp_path, dataset, "valid", 6)
        (read,), fitted = read_stored(tmp_path)
        assert np.array_equal(read.candidates, lists)
        assert fitted == {"valid-uniform-6-0.parquet": ["train"]}
        assert pq.read_schema(tmp_path / "candidates" / read.name).metadata[b"llmrec.seed"] == b"0"


def test_a_hundred_thousand_rows_take_seconds():
    rng = np.random.default_rng(0)
    items = rng.integers(1, 20_001, size=(100_000, 3))
    users = np.repeat(np.arange(1, 100_001), 3)
    dataset = dataset_of(
        list(zip(users.tolist(), items.ravel().tolist(), ["train", "valid", "test"] * 100_000, strict=True))
    )
    examples = dataset.histories("test", 5)
    start = time.process_time()
    lists = candidate_lists(dataset, examples, 20, "uniform", 0)
    assert lists.shape == (100_000, 20)
    assert time.process_time() - start < 10
