"""The Python face of a run: original ids in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llmrec
from llmrec.data.schema import Ranking
from llmrec.errors import CheckpointError, DataError
from llmrec.recommender import Recommender, part_name
from tests.runs import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recommender") / "run"
    train("ilora", out)
    return out


@pytest.fixture(scope="module")
def recommender(run: Path) -> Recommender:
    return Recommender.from_pretrained(run)


@pytest.fixture(scope="module")
def history(recommender: Recommender) -> list[str]:
    return recommender.history_of(recommender.dataset.user_keys[1])


def test_original_ids_and_titles_come_out_best_first(recommender: Recommender, history: list[str]) -> None:
    titles = dict(zip(recommender.dataset.item_keys, recommender.dataset.item_titles, strict=True))
    items = recommender.recommend([history], 5)[0]
    assert len(items) == 5 == len({item.item for item in items})
    assert all(item.title == titles[item.item] for item in items)
    assert [item.score for item in items] == sorted((item.score for item in items), reverse=True)
    assert llmrec.Recommender is Recommender


def test_seen_items_are_left_out_unless_asked_for(recommender: Recommender, history: list[str]) -> None:
    everything = recommender.dataset.num_items
    unseen = recommender.recommend([history], everything)[0]
    assert {item.item for item in unseen} == set(recommender.dataset.item_keys[1:]) - set(history)
    assert len(recommender.recommend([history], everything, allow_seen=True)[0]) == everything


def test_histories_do_not_influence_each_other(recommender: Recommender, history: list[str]) -> None:
    histories = [history, history[-1:], history[:3]]
    together = recommender.recommend(histories, 4, batch_size=2)
    for one, answers in zip(histories, together, strict=True):
        alone = recommender.recommend([one], 4)[0]
        assert [item.item for item in alone] == [item.item for item in answers]
        assert [item.score for item in alone] == pytest.approx([item.score for item in answers], abs=1e-4)


def test_an_empty_history(recommender: Recommender, history: list[str]) -> None:
    with pytest.raises(DataError, match="history 1 is empty"):
        recommender.recommend([history, []], 3)
    answers = recommender.recommend([history, []], 3, on_empty="popular")
    counts = recommender.dataset.context().train_counts
    assert [item.score for item in answers[1]] == sorted(counts[1:].tolist(), reverse=True)[:3]
    assert answers[0] == recommender.recommend([history], 3)[0]


def test_an_unknown_item(recommender: Recommender, history: list[str]) -> None:
    with pytest.raises(DataError, match="no-such-item"):
        recommender.recommend([[*history, "no-such-item"]], 3)
    skipped = recommender.recommend([["no-such-item", *history]], 3, on_unknown="skip")
    assert skipped == recommender.recommend([history], 3)
    with pytest.raises(DataError, match="is empty"):
        recommender.recommend([["no-such-item"]], 3, on_unknown="skip")


@pytest.mark.parametrize("system", ["model", "encoder"])
def test_a_history_longer_than_the_window(run: Path, system: str) -> None:
    recommender = Recommender.from_pretrained(run, system=system)  # type: ignore[arg-type]
    long = recommender.dataset.item_keys[1:21]
    assert len(long) > recommender.max_history
    whole = recommender.recommend([long], 30)[0]
    assert not {item.item for item in whole} & set(long), "items before the window count as seen too"
    latest = recommender.recommend([long[-recommender.max_history :]], 30, allow_seen=True)[0]
    scores = {item.item: item.score for item in latest}
    assert [scores[item.item] for item in whole] == pytest.approx([item.score for item in whole], abs=1e-4)


def test_the_encoder_of_a_run_can_be_asked_alone(run: Path, recommender: Recommender) -> None:
    encoder = Recommender.from_pretrained(run, system="encoder")
    assert (encoder.name, recommender.name) == ("sasrec", "ilora")


def test_reasons_are_history_items_with_true_counts(recommender: Recommender, history: list[str]) -> None:
    users, items = recommender.dataset.context().train_edges
    buyers = {key: set(users[items == number]) for number, key in enumerate(recommender.dataset.item_keys)}
    for item in recommender.recommend([history], 5, reasons=3)[0]:
        similarities = [reason.similarity for reason in item.reasons]
        assert len(similarities) == 3 and similarities == sorted(similarities, reverse=True)
        assert np.all(np.abs(similarities) <= 1.0 + 1e-6)
        for reason in item.reasons:
            assert reason.item in history and reason.item != item.item
            assert reason.shared_users == len(buyers[reason.item] & buyers[item.item])


def test_users_by_original_id(recommender: Recommender) -> None:
    dataset = recommender.dataset
    user = dataset.user_keys[3]
    wanted = dataset.column("item")[dataset.column("user") == 3]
    assert recommender.history_of(user) == [dataset.item_keys[item] for item in wanted]
    with pytest.raises(DataError):
        recommender.history_of("nobody")


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a run"):
        Recommender.from_pretrained(tmp_path)


def test_an_unfinished_run_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes((run / "recipe.yaml").read_bytes())
    (tmp_path / "dataset").symlink_to(run / "dataset")
    with pytest.raises(CheckpointError, match="train the recipe"):
        Recommender.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("written", "short"), [("sasrec", "sasrec"), ("pack.mine.MixRec", "mixrec"), ("a/b.py:MixRec", "mixrec")]
)
def test_short_names(written: str, short: str) -> None:
    assert part_name(written) == short


def test_given_items_are_ranked_per_history(recommender: Recommender, history: list[str]) -> None:
    keys = recommender.dataset.item_keys
    pools = [keys[1:6], [*keys[4:9], history[0]], keys[1:6]]
    histories = [history, history[:2], history[:3]]
    together = recommender.rank(histories, pools, batch_size=2)
    for one, pool, answers in zip(histories, pools, together, strict=True):
        assert {item.item for item in answers} == set(pool), "seen items are ranked like any other"
        assert [item.score for item in answers] == sorted((item.score for item in answers), reverse=True)
        alone = recommender.rank([one], [pool])[0]
        assert [item.item for item in alone] == [item.item for item in answers]
    every = {item.item: item.score for item in recommender.recommend([history], len(keys), allow_seen=True)[0]}
    assert [item.score for item in together[0]] == pytest.approx([every[item.item] for item in together[0]], abs=1e-4)


@pytest.mark.parametrize("pool", [[], ["no-such-item"], ["i1", "i1"]])
def test_candidates_that_cannot_be_ranked(recommender: Recommender, history: list[str], pool: list[str]) -> None:
    with pytest.raises(DataError, match="history 0 cannot be ranked"):
        recommender.rank([history], [pool])
    with pytest.raises(DataError, match="its own list"):
        recommender.rank([history], [])


class Timed:
    """Recommends the item numbered like the hours between the latest event and the question."""

    uses = frozenset({"timestamps", "target_timestamps"})

    def recommend(self, batch: Any, k: int) -> Ranking:
        latest = batch["timestamps"].gather(1, batch["lengths"][:, None] - 1)
        items = (batch["target_timestamps"][:, None] - latest) // 3600
        return Ranking(items, torch.zeros_like(items, dtype=torch.float32), items > 0)


class TestTimes:
    @pytest.fixture()
    def timed(self, recommender: Recommender) -> Recommender:
        return Recommender(Timed(), recommender.dataset, max_history=3, name="timed")

    def test_times_and_question_reach_the_system(self, timed: Recommender) -> None:
        keys = timed.dataset.item_keys
        times = [[0, 10, 20, 30], [5]]
        found = timed.recommend([keys[1:5], keys[1:2]], 1, times=times, at=30 + 2 * 3600)
        assert [row[0].item for row in found] == [keys[2], keys[2]]

    def test_times_of_skipped_items_are_skipped(self, timed: Recommender) -> None:
        keys = timed.dataset.item_keys
        asked = [[keys[1], "no such item"]]
        found = timed.recommend(asked, 1, on_unknown="skip", times=[[0, 3600]], at=3600)
        assert found[0][0].item == keys[1]

    @pytest.mark.parametrize(
        ("times", "at", "message"),
        [
            (None, 5, "reads when the events of a history happened"),
            ([[1, 2]], None, "answers for a moment in time"),
            ([[1]], 5, "every event needs its time"),
            ([[2, 1]], 5, "oldest first"),
            ([[1, 2], [3]], 5, "each history needs its own times"),
        ],
    )
    def test_wrong_times_are_named(self, times: Any, at: int | None, message: str, timed: Recommender) -> None:
        with pytest.raises(DataError, match=message):
            timed.recommend([timed.dataset.item_keys[1:3]], 1, times=times, at=at)
