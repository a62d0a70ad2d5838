"""The pointwise question: who is asked what, what a system may see, rates, and the record."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from llmrec.data.dataset import DatasetMeta, InteractionDataset
from llmrec.errors import DataError, RecipeError
from llmrec.evaluation.evaluator import Evaluator, results_record
from llmrec.evaluation.metrics import auc, user_auc
from llmrec.evaluation.pointwise import answers, asked_events, rate_logits, rate_results
from llmrec.evaluation.predictions import load_predictions
from llmrec.evaluation.protocol import EvalProtocol, parse_protocol
from llmrec.evaluation.results import results_table

PROTOCOL = EvalProtocol(mode="pointwise", label_rule="rating >= 4", max_history=5)
# (user, item, split, rating), in order
EVENTS = [
    (1, 1, "train", 5), (1, 2, "train", 1), (1, 3, "test", 4), (1, 4, "test", 2),
    (2, 1, "train", 4), (2, 3, "test", 5), (2, 2, "test", 1), (2, 5, "test", 5),
    (3, 4, "test", 5),
]  # fmt: skip


def make(events: list[tuple[int, int, str, int]] = EVENTS) -> InteractionDataset:
    columns = dict(zip(("user", "item", "split", "rating"), map(list, zip(*events, strict=True)), strict=True))
    table = pa.table({**columns, "order": list(range(len(events))), "timestamp": [60 * n for n in range(len(events))]})
    table = table.set_column(3, "rating", table.column("rating").cast(pa.float64()))
    users, items = max(columns["user"]), 5
    return InteractionDataset(
        table,
        pa.table({"item": list(range(1, items + 1)), "key": [f"i{n}" for n in range(1, items + 1)]}),
        pa.table({"user": list(range(1, users + 1)), "key": [f"u{n}" for n in range(1, users + 1)]}),
        DatasetMeta("rated", "table", "given"),
    )


def wide(users: int = 40, seed: int = 0) -> InteractionDataset:
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(1, users + 1):
        for step in range(12):
            rows.append((user, int(rng.integers(1, 6)), "train" if step < 6 else "test", int(rng.integers(1, 6))))
    return make(rows)


class Counting:
    """Logit = number of known positive actions + item / 10; keeps what it was given."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []

    def score_actions(self, batch: Any) -> Tensor:
        self.batches.append(batch)
        return batch["labels"].cumsum(1) - batch["labels"] + batch["item_ids"] / 10


def test_a_system_is_asked_about_every_event_and_never_told_its_action() -> None:
    system, dataset = Counting(), make()
    result = Evaluator(PROTOCOL, batch_size=2).run(system, dataset, name="counting")  # type: ignore[arg-type]
    table = result.predictions
    assert table.column("example_id").to_pylist() == [2, 3, 5, 6, 7, 8]
    assert table.column("label").to_pylist() == [1, 0, 1, 0, 1, 1]
    assert table.column("item_key").to_pylist() == ["i3", "i4", "i3", "i2", "i5", "i4"]
    # known positive actions before each event: earlier ones of the test split count
    assert table.column("score").to_pylist() == pytest.approx([1.3, 2.4, 1.3, 2.2, 2.5, 0.4])
    for batch in system.batches:
        asked = batch["labels"].gather(1, batch["lengths"][:, None] - 1)
        assert not asked.any() and not batch["targets"].any()
    assert sum(len(batch["lengths"]) for batch in system.batches) == 6
    assert result.measured == "logits" and result.label == "pointwise actions (rating >= 4), test"


def test_turning_an_action_changes_its_own_score_by_nothing() -> None:
    turned = [(*event[:3], 6 - event[3]) if number == 7 else event for number, event in enumerate(EVENTS)]
    scores = [
        Evaluator(PROTOCOL).run(Counting(), make(events)).predictions.column("score").to_pylist()  # type: ignore[arg-type]
        for events in (EVENTS, turned)
    ]
    assert scores[0] == scores[1], "event 7 is its user's last one, so nobody may see its action"


def test_figures_are_those_of_the_table() -> None:
    dataset = wide()
    result = Evaluator(PROTOCOL).run(Counting(), dataset)  # type: ignore[arg-type]
    table = result.predictions
    scores, labels, users = (table.column(name).to_numpy() for name in ("score", "label", "user"))
    assert result.metrics["auc"]["mean"] == pytest.approx(auc(scores, labels)[0])
    within = user_auc(scores, labels, users)
    assert result.metrics["gauc"]["mean"] == pytest.approx(np.nanmean(within))
    left = len(set(users[np.isfinite(within)]))
    assert result.notes == (
        f"gauc: {left} of 40 users ({np.isfinite(within).sum()} of 240 events); the others have one label",
    )
    for value in result.metrics.values():
        assert value["low"] < value["mean"] < value["high"]  # type: ignore[operator]


def test_one_kind_of_action_is_refused() -> None:
    with pytest.raises(DataError, match="6 positive of 6 events"):
        asked_events(make(), replace(PROTOCOL, label_rule="rating >= 1"))
    with pytest.raises(DataError, match="0 positive of 0 events"):
        asked_events(make(), replace(PROTOCOL, split="valid"))


def test_a_system_without_logits_or_with_nan_is_refused() -> None:
    with pytest.raises(DataError, match="gives no logits of actions"):
        Evaluator(PROTOCOL).run(object(), make())  # type: ignore[arg-type]

    class Broken:
        def score_actions(self, batch: Any) -> Tensor:
            return batch["labels"] * torch.nan

    with pytest.raises(DataError, match="NaN"):
        Evaluator(PROTOCOL).run(Broken(), make())  # type: ignore[arg-type]


def test_rates_by_hand() -> None:
    """g = 2/3 of three training events; item 2 was shown once and not liked; user 2 had liked 2 of 3 before event 7."""
    dataset = make()
    found = rate_logits(asked_events(dataset, PROTOCOL), dataset, PROTOCOL.label_rule)

    def logit(positive: float, events: float) -> float:
        rate = (positive + 10 * 2 / 3) / (events + 10)
        return float(np.log(rate / (1 - rate)))

    assert found["item_rate"] == pytest.approx([logit(0, 0)] * 3 + [logit(0, 1)] + [logit(0, 0)] * 2)
    expected = [logit(1, 2), logit(2, 3), logit(1, 1), logit(2, 2), logit(2, 3), logit(0, 0)]
    assert found["user_rate"] == pytest.approx(expected)
    assert found["item_user_rate"] == pytest.approx(found["item_rate"] + found["user_rate"] - logit(0, 0))


def test_rates_do_not_read_the_actions_they_are_asked_about() -> None:
    turned = [(*event[:3], 6 - event[3]) if number == 7 else event for number, event in enumerate(EVENTS)]
    before, after = (
        rate_logits(asked_events(data, PROTOCOL), data, PROTOCOL.label_rule) for data in (make(), make(turned))
    )
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_rates_stand_beside_a_system_and_unknown_names_are_refused(tmp_path: Path) -> None:
    dataset = wide()
    results = rate_results(["item_rate", "user_rate"], dataset, PROTOCOL, train=dataset)
    results["counting"] = Evaluator(PROTOCOL).run(Counting(), dataset, name="counting")  # type: ignore[arg-type]
    record = results_record(results)
    assert list(record["models"]) == ["item_rate", "user_rate", "counting"]
    table = results_table(record, ["auc", "gauc"])
    assert [column.header for column in table.columns] == ["system", "auc", "gauc"]
    with pytest.raises(RecipeError, match="did you mean 'item_rate'"):
        rate_results(["itemrate"], dataset, PROTOCOL, train=dataset)
    results["counting"].save(tmp_path)
    with pytest.raises(DataError, match=r"(?s)logits of events.*metrics\.json"):
        load_predictions(tmp_path / "predictions" / "counting.parquet")


def test_the_question_of_a_protocol() -> None:
    dataset = make()
    assert PROTOCOL.slug == "test-pointwise"
    assert EvalProtocol.from_dict(PROTOCOL.to_dict()) == PROTOCOL
    same = replace(PROTOCOL, ks=(3,), max_history=9, remove_seen=True)
    assert same.fingerprint(dataset) == PROTOCOL.fingerprint(dataset)
    for other in (
        replace(PROTOCOL, label_rule="rating >= 5"),
        replace(PROTOCOL, split="valid"),
        EvalProtocol(),
    ):
        assert other.fingerprint(dataset) != PROTOCOL.fingerprint(dataset)
    with pytest.raises(RecipeError, match="no meaning for mode 'pointwise'"):
        parse_protocol("candidates-20", mode="pointwise")
    with pytest.raises(RecipeError, match="no meaning for mode 'score'"):
        EvalProtocol(label_rule="rating >= 4")


def test_answers_are_the_labels_of_the_asked_events() -> None:
    assert answers(asked_events(make(), PROTOCOL)).tolist() == [1, 0, 1, 0, 1, 1]
