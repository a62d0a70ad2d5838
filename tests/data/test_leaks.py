from __future__ import annotations

import numpy as np
import pytest

from llmrec.data import leaks
from llmrec.data.leaks import CandidateLists, inspect_dataset
from tests.data.tables import dataset_of, histories, prepared

CLEAN = [(1, 1, "train"), (1, 2, "train"), (1, 3, "valid"), (1, 4, "test"), (2, 5, "train"), (2, 1, "train")]
TITLES = ["Alien", "Aliens", "Heat", "Ran", "It", "The Thing"]


def prompt_row(target=4, history=(1, 2), prompt="You watched Alien, Aliens. What is next?", **more):
    return {
        "prompt": prompt,
        "completion": TITLES[target - 1],
        "user": 1,
        "history": list(history),
        "target": target,
        **more,
    }


@pytest.fixture
def clean():
    return dataset_of(CLEAN, times=[1, 2, 3, 9, 1, 2], titles=TITLES)


def test_a_clean_data_set_passes_every_check(clean):
    row = prompt_row()
    findings = inspect_dataset(clean, [row])
    assert len({finding.name for finding in findings}) == 10
    assert [finding.name for finding in findings if finding.severity != "ok"] == []


class TestSplitOverlap:  # check 1
    ROWS = [(1, 1, "train"), (1, 2, "train"), (1, 2, "test"), (2, 2, "test")]

    def test_one_event_in_two_splits(self):
        found = leaks.check_split_overlap(dataset_of(self.ROWS, times=[1, 5, 5, 5]))
        assert (found.severity, found.count) == ("error", 1)

    def test_at_another_time_it_is_a_repeat(self):
        assert leaks.check_split_overlap(dataset_of(self.ROWS, times=[1, 5, 6, 5])).severity == "ok"

    def test_declared_repeats_make_it_a_warning(self):
        found = leaks.check_split_overlap(dataset_of(self.ROWS, times=[1, 5, 5, 5], meta={"has_repeats": True}))
        assert (found.severity, found.count) == ("warning", 1)


class TestFutureTraining:  # check 2
    ROWS = [(1, 1, "train"), (1, 2, "test"), (2, 1, "train"), (2, 2, "train"), (2, 3, "train")]
    TIMES = [1, 5, 4, 6, 7]

    @pytest.mark.parametrize(
        ("split", "severity"),
        [
            ("leave_one_out", "warning"),
            ("gap_3", "warning"),
            ("user_80_10_10", "warning"),
            ("temporal_80_10_10", "error"),
        ],
    )
    def test_the_declared_protocol_decides(self, split, severity):
        found = leaks.check_future_training(dataset_of(self.ROWS, times=self.TIMES, meta={"split": split}))
        assert (found.severity, found.count) == (severity, 2)
        assert "50.0%" in found.detail

    def test_without_times_it_cannot_be_told(self):
        assert "cannot be told" in leaks.check_future_training(dataset_of(self.ROWS)).detail

    def test_a_temporal_split_has_none(self):
        dataset = prepared(histories([30, 30]), split="temporal_80_10_10")
        assert leaks.check_future_training(dataset).severity == "ok"


class TestTargetInHistory:  # check 3
    ROWS = [(1, 1, "train"), (1, 2, "train"), (1, 1, "test"), (2, 1, "train")]

    def test_a_repeated_target(self):
        found = leaks.check_target_in_history(dataset_of(self.ROWS))
        assert (found.severity, found.count) == ("error", 1)

    def test_declared_repeats_make_it_a_warning(self):
        found = leaks.check_target_in_history(dataset_of(self.ROWS, meta={"has_repeats": True}))
        assert (found.severity, found.count) == ("warning", 1)

    def test_dropping_repeats_declares_there_are_none(self):
        found = leaks.check_target_in_history(dataset_of(self.ROWS, meta={"has_repeats": True, "repeats": "first"}))
        assert found.severity == "error"

    def test_a_training_repeat_is_no_leak(self):
        rows = [(1, 1, "train"), (1, 1, "train"), (1, 2, "test")]
        assert leaks.check_target_in_history(dataset_of(rows)).severity == "ok"

    def test_a_later_split_is_no_history(self):
        rows = [(1, 3, "train"), (1, 1, "test"), (1, 1, "valid")]
        assert leaks.check_target_in_history(dataset_of(rows)).count == 0

    def test_prompt_rows_are_looked_at(self, clean):
        found = leaks.check_target_in_history(clean, [prompt_row(history=[1, 4]), prompt_row()])
        assert (found.severity, found.count) == ("error", 1)
        original = prompt_row(history=["key-1", "key-4"], target=4) | {"target": "key-4"}
        assert leaks.check_target_in_history(clean, [original]).count == 1


class TestAnswerInPrompt:  # check 4
    def rows(self, *prompts, **more):
        clean_rows = [prompt_row(target=3), prompt_row(target=6), prompt_row(target=5)]
        return [*(prompt_row(prompt=prompt, **more) for prompt in prompts), *clean_rows]

    @pytest.mark.parametrize(
        "prompt",
        [
            "You will love Ran. What is next?",
            "History: Alien, RAN. Next?",
            "next: key-4",
            [{"role": "user", "content": "(Ran)"}],
        ],
    )
    def test_title_or_original_id(self, clean, prompt):
        found = leaks.check_answer_in_prompt(clean, self.rows(prompt))
        assert (found.severity, found.count) == ("error", 1)
        assert "row 1" in found.detail

    def test_the_completion_counts_as_answer(self, clean):
        found = leaks.check_answer_in_prompt(clean, self.rows("codes <a_1><b_2> so far", completion="<a_1><b_2>"))
        assert found.count == 1

    def test_a_semantic_id_of_the_catalogue_counts_as_answer(self):
        codes = [[f"<a_{i}>", f"<b_{i}>"] for i in range(6)]
        dataset = dataset_of(CLEAN, titles=TITLES, item_columns={"semantic_id": codes})
        found = leaks.check_answer_in_prompt(dataset, self.rows("after <a_0><b_0> comes <a_3><b_3>"))
        assert found.count == 1

    def test_a_candidate_list_may_hold_it_once(self, clean):
        listed = {"candidates": [3, 4, 6]}
        rows = self.rows("Choose one of: Heat; Ran; The Thing.", **listed)
        assert leaks.check_answer_in_prompt(clean, rows).severity == "ok"
        rows = self.rows("Choose one of: Heat; Ran; The Thing. Hint: Ran", **listed)
        assert leaks.check_answer_in_prompt(clean, rows).count == 1

    def test_part_of_a_listed_title_is_no_leak(self, clean):
        row = prompt_row(target=1, history=[2], prompt="You watched Aliens. Next?")
        assert leaks.check_answer_in_prompt(clean, [row]).severity == "ok"

    def test_other_spaces_in_the_catalogue_do_not_matter(self):
        dataset = dataset_of(CLEAN, titles=["Alien", "Aliens", "Heat", "Ran  Away ", "It", "The Thing"])
        row = prompt_row(prompt="One of: Heat; Ran Away.", candidates=[3, 4]) | {"completion": " Ran Away"}
        assert leaks.check_answer_in_prompt(dataset, [row]).severity == "ok"
        row = prompt_row(prompt="One of: Heat; Ran Away. Ran\nAway", candidates=[3, 4])
        assert leaks.check_answer_in_prompt(dataset, [row]).severity == "error"

    def test_part_of_a_word_is_no_leak(self, clean):
        assert leaks.check_answer_in_prompt(clean, self.rows("You watched Rancho and Grand")).severity == "ok"

    def test_words_of_the_template_are_no_leak(self, clean):
        rows = [
            prompt_row(target=t, history=[1], prompt="You watched Alien. What comes after it?") for t in (5, 3, 4, 6)
        ]
        assert leaks.check_answer_in_prompt(clean, rows).severity == "ok"

    def test_yes_and_no_of_the_template_are_no_leak(self, clean):
        rows = [prompt_row(target=t, prompt="Answer Yes or No.", completion="Yes") for t in (3, 4, 6)]
        assert leaks.check_answer_in_prompt(clean, rows).severity == "ok"


class TestCandidatePositions:  # check 5
    def lists(self, place, rows=400, size=5):
        rng = np.random.default_rng(0)
        table = np.tile(np.arange(2, size + 2), (rows, 1))
        table[np.arange(rows), [place(rng) for _ in range(rows)]] = 1
        return [CandidateLists("x", np.ones(rows, dtype=int), np.ones(rows, dtype=int), table)]

    def test_a_fixed_place_is_found(self):
        found = leaks.check_candidate_positions(self.lists(lambda rng: 0))
        assert found.severity == "error" and found.count == 400

    def test_a_preferred_place_is_found(self):
        found = leaks.check_candidate_positions(self.lists(lambda rng: rng.choice(5, p=[0.4, 0.15, 0.15, 0.15, 0.15])))
        assert found.severity == "error"

    def test_a_uniform_place_passes(self):
        assert leaks.check_candidate_positions(self.lists(lambda rng: rng.integers(5))).severity == "ok"

    def test_lists_of_different_lengths_are_judged_by_their_own(self):
        rng = np.random.default_rng(1)
        sizes = rng.integers(2, 7, size=4000)
        rows = []
        for size in sizes:
            row = list(range(2, size + 2))
            row[rng.integers(size)] = 1
            rows.append(row)
        group = CandidateLists("x", [1] * len(rows), [1] * len(rows), rows)
        assert leaks.check_candidate_positions([group]).severity == "ok"

    def test_few_lists_prove_nothing(self):
        assert "too few" in leaks.check_candidate_positions(self.lists(lambda rng: 0, rows=10)).detail

    def test_the_same_lists_twice_are_not_more_evidence(self):
        (group,) = self.lists(lambda rng: rng.choice(5, p=[0.27, 0.1825, 0.1825, 0.1825, 0.1825]))
        alone = leaks.check_candidate_positions([group])
        assert alone.severity == leaks.check_candidate_positions([group, group]).severity == "ok"

    def test_prompt_rows_are_looked_at(self, clean):
        rows = [prompt_row(candidates=[4, 5, 6]) for _ in range(60)]
        names = {f.name: f.severity for f in inspect_dataset(clean, rows)}
        assert names["candidate_positions"] == "error"


class TestDuplicateTitles:  # check 6
    def test_normalised_titles_are_compared(self):
        dataset = dataset_of(CLEAN, titles=["The Thing", "the  thing!", "Amélie", "Amelie", "Heat", None])
        found = leaks.check_duplicate_titles(dataset)
        assert (found.severity, found.count) == ("warning", 4)

    def test_different_or_missing_titles_pass(self, clean):
        assert leaks.check_duplicate_titles(clean).severity == "ok"
        assert leaks.check_duplicate_titles(dataset_of(CLEAN)).severity == "ok"
        assert leaks.check_duplicate_titles(dataset_of(CLEAN, titles=[None, None, "!", "?", "a", "b"])).severity == "ok"


class TestCoreFilter:  # check 7
    def test_a_core_over_all_events_is_a_warning(self):
        found = leaks.check_core_filter(prepared(histories([6, 6, 6], items=9), min_user=5))
        assert (found.severity, found.count) == ("warning", 1)
        assert "min_user 5" in found.detail

    def test_no_filter_or_one_over_training_events_passes(self, clean):
        assert leaks.check_core_filter(clean).severity == "ok"
        trained = dataset_of(CLEAN, meta={"filters": {"min_user": 5, "min_item": 1, "core_on": "train"}})
        assert leaks.check_core_filter(trained).severity == "ok"


class TestFittedSplits:  # check 8
    def test_an_artefact_fitted_on_test_events(self, clean):
        found = leaks.check_fitted_splits(
            clean, {"tokenizer": ["train", "test"], "text": ["items"], "counts": ["train"]}
        )
        assert (found.severity, found.count) == ("error", 1)
        assert "tokenizer was fitted on train, test" in found.detail

    def test_event_counts_over_all_splits_among_item_columns(self):
        over_all = dataset_of(CLEAN, titles=TITLES, item_columns={"popularity": [2, 1, 1, 1, 1, 0]})
        over_train = dataset_of(CLEAN, titles=TITLES, item_columns={"popularity": [2, 1, 0, 0, 1, 0]})
        assert leaks.check_fitted_splits(over_all, {}).count == 1
        assert leaks.check_fitted_splits(over_train, {}).severity == "ok"

    def test_mean_ratings_over_all_splits_among_item_columns(self):
        rows = [
            ("u", "a", 1, 5.0),
            ("u", "b", 2, 1.0),
            ("v", "c", 1, 2.0),
            ("v", "b", 3, 4.0),
            ("u", "c", 5, 3.0),
            ("v", "a", 9, 1.0),
        ]
        import pyarrow as pa

        means = pa.table({"item_key": ["a", "b", "c"], "mean": [3.0, 2.5, 2.5]})
        dataset = prepared(rows, ("user_key", "item_key", "timestamp", "rating"), items=means)
        found = leaks.check_fitted_splits(dataset, {})
        assert found.severity == "error" and "mean ratings" in found.detail

    def test_the_context_of_models_counts_training_events(self, clean):
        train = clean.split_codes == 0
        assert clean.context().train_counts.sum() == train.sum()


class TestNegatives:  # check 9
    def lists(self, *rows, target=4, user=1):
        return [CandidateLists("x", [user] * len(rows), [target] * len(rows), list(rows))]

    def test_a_negative_the_user_chose(self, clean):
        found = leaks.check_negatives(clean, self.lists([4, 5, 6], [4, 2, 6], [4, 3, 1]))
        assert (found.severity, found.count) == ("error", 3)

    def test_a_list_without_its_target_or_with_two(self, clean):
        assert leaks.check_negatives(clean, self.lists([5, 6])).count == 1
        assert leaks.check_negatives(clean, self.lists([4, 4, 6])).count == 1

    def test_clean_lists_pass(self, clean):
        assert leaks.check_negatives(clean, self.lists([4, 5, 6], [6, 4])).severity == "ok"

    def test_prompt_rows_are_looked_at(self, clean):
        row = prompt_row(candidates=[4, 1, 6])
        names = {f.name: f.count for f in inspect_dataset(clean, [row])}
        assert names["negatives"] == 1


def test_a_history_that_runs_backwards():  # beyond the nine
    found = leaks.check_history_order(dataset_of(CLEAN, times=[1, 3, 2, 9, 1, 2]))
    assert (found.severity, found.count) == ("error", 1)
