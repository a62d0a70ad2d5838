"""Action strategy: the contract, what a logit may depend on, learning from actions, and the run of a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel

from llmrec.data.dataset import DatasetMeta, InteractionDataset
from llmrec.data.schema import SequenceBatch
from llmrec.encoders.hstu import HSTUConfig, HSTUEncoder
from llmrec.encoders.sasrec import SASRecConfig, SASRecEncoder
from llmrec.errors import DataError, RecipeError
from llmrec.evaluation.metrics import auc
from llmrec.recipe import parse_recipe
from llmrec.strategies.action import Action
from llmrec.strategies.base import TrainingStrategy
from llmrec.strategies.next_item import NextItem
from llmrec.training.stages import evaluate_run, open_run, run_recipe
from tests.contracts.strategies import ITEMS, WIDTH, StrategyContract

SMALL = {"num_items": ITEMS, "hidden_size": 16, "max_history": 32, "dropout": 0.0, "initializer_range": 0.2}


def ranker(kind: str = "sasrec", **options: Any) -> Any:
    torch.manual_seed(0)
    chosen = {**SMALL, "action_tokens": True, **options}
    made = {"sasrec": (SASRecConfig, SASRecEncoder), "hstu": (HSTUConfig, HSTUEncoder)}[kind]
    return made[1](made[0](**chosen)).eval()


class TestAction(StrategyContract):
    def strategy(self) -> TrainingStrategy:
        return Action()

    def model(self) -> Any:
        return ranker()

    def batch(self) -> SequenceBatch:
        batch = super().batch()
        del batch["targets"]
        labels = torch.rand(5, WIDTH, generator=torch.Generator().manual_seed(3)) < 0.4
        batch["labels"] = labels.float() * (batch["item_ids"] > 0)
        return batch

    def expected_count(self, batch: SequenceBatch) -> int:
        return int(batch["lengths"].sum())

    def test_padding_does_not_matter(self) -> None:
        model, batch = self.model(), self.batch()
        wider = dict(batch)
        for name in ("item_ids", "timestamps", "labels"):
            wider[name] = F.pad(batch[name], (0, 3))  # type: ignore[literal-required]
        self.same(self.run(model, wider).total, self.run(model, batch).total)  # type: ignore[arg-type]

    def test_loss_is_the_mean_over_events(self) -> None:
        model, batch = self.model(), self.batch()
        logits, real = model.score_actions(batch), batch["item_ids"] > 0
        expected = F.binary_cross_entropy_with_logits(logits[real], batch["labels"][real])
        out = Action().loss(model, batch, self.step())
        self.same(out.total, expected)
        self.same(out.parts["positive_rate"], batch["labels"][real].mean())
        self.same(out.parts["predicted_rate"], logits[real].sigmoid().mean().detach())

    def test_positive_events_weigh_more_when_told_to(self) -> None:
        model, batch = self.model(), self.batch()
        logits, real = model.score_actions(batch), batch["item_ids"] > 0
        weight = 1 + 2 * batch["labels"][real]
        each = F.binary_cross_entropy_with_logits(logits[real], batch["labels"][real], reduction="none")
        self.same(Action(positive_weight=3.0).loss(model, batch, self.step()).total, (weight * each).mean())

    def test_models_that_see_later_events_learn_at_the_last_one(self) -> None:
        model, batch = self.model(), self.batch()
        model.supervises = "last"
        out = Action().loss(model, batch, self.step())
        last = batch["lengths"][:, None] - 1
        logits, labels = (x.gather(1, last)[:, 0] for x in (model.score_actions(batch), batch["labels"]))
        assert out.count == 5
        self.same(out.total, F.binary_cross_entropy_with_logits(logits, labels))

    def test_an_encoders_own_loss_is_added(self) -> None:
        model, batch = self.model(), self.batch()
        plain, encode = Action().loss(model, batch, self.step()).total, model.encode_actions

        def with_auxiliary(asked: SequenceBatch) -> Any:
            output = encode(asked)
            output.auxiliary = torch.tensor(0.25)
            return output

        model.encode_actions = with_auxiliary
        self.same(Action().loss(model, batch, self.step()).total, plain + 0.25)

    def test_what_cannot_be_learned_is_refused(self) -> None:
        with pytest.raises(DataError, match="expected.*labels"):
            Action().loss(self.model(), StrategyContract.batch(self), self.step())
        with pytest.raises(RecipeError, match="action_tokens: true"):
            self.prepared(ranker(action_tokens=False))
        with pytest.raises(RecipeError, match="action_tokens: true"):
            ranker(action_tokens=False).score_actions(self.batch())
        with pytest.raises(RecipeError, match="positive_weight"):
            Action(positive_weight=0.0)


@pytest.mark.parametrize("kind", ["sasrec", "hstu"])
def test_a_logit_sees_earlier_actions_and_never_its_own(kind: str) -> None:
    """Turning action t changes the logits behind t (for some row) and none up to t; padding's labels change nothing."""
    model, batch = ranker(kind), TestAction().batch()
    with torch.no_grad():
        before = model.score_actions(batch)
        for t in range(WIDTH):
            labels = batch["labels"].clone()
            labels[:, t] = 1 - labels[:, t]
            after = model.score_actions({**batch, "labels": labels})
            torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1], rtol=0, atol=0)
            if t < WIDTH - 1:
                assert (after[0, t + 1 :] - before[0, t + 1 :]).abs().max() > 1e-6
            asked_or_padding = batch["lengths"] <= t + 1
            torch.testing.assert_close(after[asked_or_padding], before[asked_or_padding], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["sasrec", "hstu"])
def test_a_logit_sees_its_own_item_and_no_later_one(kind: str) -> None:
    model, batch = ranker(kind), TestAction().batch()
    items = batch["item_ids"].clone()
    items[0, 4] = items[0, 4] % ITEMS + 1
    with torch.no_grad():
        moved = (model.score_actions({**batch, "item_ids": items}) - model.score_actions(batch)).abs()[0]
    assert moved[:4].max() < 1e-6 < moved[4]


def test_time_of_a_logit_is_the_events_own() -> None:
    """HSTU's states read the time of the token they predict: here the action, which happens with its item."""
    model, batch = ranker("hstu"), TestAction().batch()
    with torch.no_grad():
        before = model.score_actions(batch)
        late = model.score_actions({**batch, "target_timestamps": batch["target_timestamps"] + 10**7})
        times = batch["timestamps"].clone()
        times[0, 5:] += 10**7
        moved = (model.score_actions({**batch, "timestamps": times}) - before).abs()[0]
    torch.testing.assert_close(late, before, rtol=0, atol=0)
    assert moved[:5].max() < 1e-6 < moved[5]


def test_action_tokens_are_saved_and_off_by_default(tmp_path: Path) -> None:
    model, batch = ranker(), TestAction().batch()
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again.score_actions(batch), model.score_actions(batch), rtol=0, atol=0)
    assert not any("action" in name for name in ranker(action_tokens=False).state_dict())
    assert not model.action_embedding.weight[0].any()


def test_next_items_are_scored_without_actions() -> None:
    """The same encoder still reads plain histories."""
    batch = StrategyContract().batch()
    assert torch.isfinite(NextItem().loss(ranker(), batch, TestAction().step()).total)


@pytest.mark.parametrize("kind", ["sasrec", "hstu"])
def test_actions_that_follow_from_earlier_actions_are_learned(kind: str) -> None:
    """a_t is a_{t-1} turned where the item is odd: neither items nor earlier actions alone tell it."""
    generator = torch.Generator().manual_seed(0)
    items = torch.randint(1, ITEMS + 1, (160, 8), generator=generator)
    labels = (torch.randint(0, 2, (160, 1), generator=generator) + (items % 2).cumsum(1)) % 2
    batch: Any = {"item_ids": items, "lengths": torch.full((160,), 8), "labels": labels.float()}
    batch["timestamps"] = torch.arange(8).expand(160, -1) * 60
    batch["target_timestamps"] = torch.full((160,), 600)
    model = ranker(kind, hidden_size=32, initializer_range=0.05).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    train = {name: value[:120] for name, value in batch.items()}
    held = {name: value[120:] for name, value in batch.items()}
    for _ in range(150):
        optimizer.zero_grad()
        Action().loss(model, train, TestAction().step()).total.backward()  # type: ignore[arg-type]
        optimizer.step()
    with torch.no_grad():
        logits = model.eval().score_actions(held)[:, 1:]
    assert auc(logits.flatten().numpy(), held["labels"][:, 1:].flatten().numpy())[0] > 0.95


def rated(folder: Path) -> InteractionDataset:
    """60 users, 20 items; an item is liked by its number, more so by every second user; later splits by order."""
    rng, rows = np.random.default_rng(0), []
    for user in range(1, 61):
        for order, item in enumerate(rng.permutation(20)[:14]):
            liked = rng.random() < (0.15 + 0.035 * item if user % 2 else 0.05 + 0.02 * item)
            split = "train" if order < 10 else "valid" if order < 12 else "test"
            rows.append((user, int(item) + 1, order, split, 1000 * order + user, 4.0 if liked else 2.0))
    names = ("user", "item", "order", "split", "timestamp", "rating")
    table = pa.table({name: [row[i] for row in rows] for i, name in enumerate(names)})
    items = pa.table({"item": list(range(1, 21)), "key": [f"i{n}" for n in range(1, 21)]})
    users = pa.table({"user": list(range(1, 61)), "key": [f"u{n}" for n in range(1, 61)]})
    dataset = InteractionDataset(table, items, users, DatasetMeta("rated", "table", "given"))
    dataset.save(folder)
    return dataset


def recipe_of(data: Path, **changes: Any) -> Any:
    stage = {
        "train": "encoder", "strategy": {"type": "action"}, "metric": "auc", "num_train_epochs": 3,
        "learning_rate": 1e-2, "per_device_train_batch_size": 30, "eval_strategy": "epoch", "save_strategy": "epoch",
    }  # fmt: skip
    raw: dict[str, Any] = {
        "name": "ranker",
        "dataset": {"source": str(data), "max_history": 6, "label": "rating >= 4"},
        "encoder": {"type": "sasrec", "action_tokens": True, "hidden_size": 16},
        "stages": [stage],
        "evaluate": {"mode": "pointwise", "metrics": ["auc"], "baselines": ["item_rate", "user_rate"]},
    }
    return parse_recipe({**raw, **changes})


def test_a_recipe_trains_a_ranker_and_measures_it_beside_rates(tmp_path: Path) -> None:
    dataset, run = rated(tmp_path / "data"), tmp_path / "run"
    record = run_recipe(recipe_of(tmp_path / "data"), run, say=lambda line: None)
    assert set(record["models"]) == {"item_rate", "user_rate", "sasrec"}
    assert record["examples"] == 120 and record["users"] == 60
    assert record["protocol"] == "pointwise actions (rating >= 4), test"
    assert set(record["models"]["sasrec"]) == {"auc", "gauc", "logloss"}
    assert "of 60 users" in record["notes"]["sasrec"][0]
    folder = run / "evaluations" / "test-pointwise"
    assert json.loads((folder / "metrics.json").read_text()) == json.loads((run / "metrics.json").read_text())
    table = pq.read_table(folder / "predictions" / "sasrec.parquet")
    rows = table.column("example_id").to_numpy()
    expected = (dataset.column("rating")[rows] >= 4).astype(int)
    assert table.column("label").to_pylist() == expected.tolist()
    assert table.column("item").to_pylist() == dataset.column("item")[rows].tolist()
    value = auc(table.column("score").to_numpy(), expected)[0]
    assert record["models"]["sasrec"]["auc"]["mean"] == pytest.approx(value)
    assert record["models"]["item_rate"]["auc"]["mean"] > 0.55
    log = [json.loads(line) for line in (run / "stages/1-encoder/log.jsonl").read_text().splitlines()]
    assert any("auc" in str(sorted(entry)) for entry in log)
    again = evaluate_run(open_run(run, say=str), recipe_of(tmp_path / "data").evaluate, primary=False)
    assert again["models"] == record["models"], "a loaded run says the same"
    config = json.loads((run / "encoder" / "config.json").read_text())
    assert config["max_history"] == 12, "two tokens for each of six events"


def test_recipes_that_cannot_be_pointwise_are_refused(tmp_path: Path) -> None:
    data = {"source": "synthetic", "positive": "rating >= 4"}
    with pytest.raises(RecipeError, match="drops the negative actions"):
        recipe_of(tmp_path, dataset=data).resolve()
    with pytest.raises(RecipeError, match="action_tokens: true"):
        recipe_of(tmp_path, encoder={"type": "sasrec"}).resolve()
    rated(tmp_path / "data")
    evaluate = {"mode": "pointwise", "baselines": ["popularity"]}
    stage = {"train": "encoder", "strategy": {"type": "action"}, "metric": "auc", "max_steps": 1}
    with pytest.raises(RecipeError, match="gives no rates of actions"):
        run_recipe(recipe_of(tmp_path / "data", evaluate=evaluate, stages=[stage]), tmp_path / "run", say=str)
