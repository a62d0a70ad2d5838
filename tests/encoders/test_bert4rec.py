"""BERT4Rec: the contract under the cloze objective, and the properties of a correct implementation (numbers 1, 2, 9, 10
and 12 of the list of the sequence encoders; the objective itself stands in tests/strategies/test_cloze.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from llmrec.data.schema import SequenceBatch
from llmrec.encoders.bert4rec import BERT4RecConfig, BERT4RecEncoder
from llmrec.errors import DataError, RecipeError
from llmrec.strategies.base import StepInfo, TrainingStrategy
from llmrec.strategies.cloze import Cloze
from llmrec.strategies.next_item import NextItem
from tests.contracts.encoders import WINDOW, EncoderContract, same, take_rows


class TestBERT4Rec(EncoderContract):
    config = BERT4RecConfig(num_items=50, hidden_size=32, max_history=16, dropout=0.0, initializer_range=0.1)
    encoder_class = BERT4RecEncoder

    def strategy(self) -> TrainingStrategy:
        # The contract's histories are of one length: without cut rows, few items would ever be asked for at the end.
        return Cloze(mask_probability=0.3, last_only=0.8)

    def test_1_fails_the_causality_test_by_design(self) -> None:
        """The very test causal encoders pass, on the same model."""
        with pytest.raises(AssertionError):
            self.test_later_events_never_change_earlier_states(None)
        model, batch = self.model(), take_rows(self.batch(), torch.tensor([0]))
        changed = {**batch, "item_ids": batch["item_ids"].clone()}
        changed["item_ids"][0, -1] = batch["item_ids"][0, -1] % self.config.num_items + 1
        moved = (self.states(model, changed) - self.states(model, batch)).abs().amax(-1)[0]  # type: ignore[arg-type]
        assert moved.shape == (WINDOW,) and (moved > 1e-6).all()


def small(**options: object) -> BERT4RecEncoder:
    torch.manual_seed(0)
    chosen = {"num_items": 20, "hidden_size": 8, "max_history": 12, "dropout": 0.0, "initializer_range": 0.3, **options}
    model = BERT4RecEncoder(BERT4RecConfig(**chosen)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        model.item_bias.normal_()
    return model


def inputs() -> SequenceBatch:
    """Three histories of 6, 4 and 1 events."""
    lengths = torch.tensor([6, 4, 1])
    items = torch.randint(1, 21, (3, 6), generator=torch.Generator().manual_seed(4))
    return {"item_ids": items * (torch.arange(6) < lengths[:, None]), "lengths": lengths}


@pytest.mark.parametrize("implementation", ["sdpa", "math"])
def test_2_padding_leaves_real_states_alone(implementation: str) -> None:
    model, batch = small(implementation=implementation), inputs()
    found, expected = model(**{**batch, "item_ids": F.pad(batch["item_ids"], (0, 5))}), model(**batch)
    assert (found.hidden[:, :6] - expected.hidden).abs().max() < 1e-5
    assert (found.user_repr - expected.user_repr).abs().max() < 1e-5
    assert not found.hidden[:, 6:].any() and not found.hidden[2, 1:].any()


def test_9_a_recommendation_reads_at_a_mask_behind_the_history() -> None:
    """The same state as the cloze form of the history with any item appended and masked."""
    model, batch = small(), inputs()
    places = torch.arange(7)
    masked = places == batch["lengths"][:, None]
    for item in (1, 20):
        events = F.pad(batch["item_ids"], (0, 1)).masked_fill(masked, item)
        same(model.cloze(events, batch["lengths"] + 1, masked).user_repr, model(**batch).user_repr)


def test_9_a_masked_place_does_not_know_its_item_and_the_others_do() -> None:
    model, batch = small(), inputs()
    masked = torch.zeros(3, 6, dtype=torch.bool)
    masked[0, 2] = True
    other = batch["item_ids"].clone()
    other[0, 2] = other[0, 2] % 20 + 1
    same(
        model.cloze(other, batch["lengths"], masked).hidden,
        model.cloze(batch["item_ids"], batch["lengths"], masked).hidden,
    )
    shown = torch.zeros_like(masked)
    moved = (
        model.cloze(other, batch["lengths"], shown).hidden
        - model.cloze(batch["item_ids"], batch["lengths"], shown).hidden
    )
    assert (moved[0].abs().amax(-1) > 1e-6).all() and not moved[1:].any()


def test_9_the_mask_is_no_item_and_is_never_recommended() -> None:
    """Even a mask vector that outshines every item has no score."""
    model, batch = small(), inputs()
    with torch.no_grad():
        model.mask_embedding.copy_(50 * model(**batch).user_repr[0])
    assert len(model.item_vectors()) == 21 and model.score_items(batch).shape == (3, 21)
    ranking = model.recommend(batch, 40)
    assert [sorted(row[:20].tolist()) for row in ranking.item_ids] == [list(range(1, 21))] * 3
    assert not ranking.valid[:, 20:].any() and not ranking.item_ids[:, 20:].any()


def cyclic_prefixes() -> SequenceBatch:
    """Every prefix of walks through 20 items, one target each."""
    walk = (torch.arange(20)[:, None] + torch.arange(6)) % 20 + 1
    ends = torch.arange(1, 6).repeat(20)
    kept = torch.arange(5) < ends[:, None]
    rows = walk.repeat_interleave(5, 0)
    last = torch.arange(5) == ends[:, None] - 1
    return {"item_ids": rows[:, :-1] * kept, "targets": rows[:, 1:] * last, "lengths": ends}


def train(model: BERT4RecEncoder, batch: SequenceBatch, strategy: TrainingStrategy, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(steps):
        optimizer.zero_grad()
        strategy.loss(model, batch, StepInfo(step, steps, 0.0, torch.Generator().manual_seed(step))).total.backward()
        optimizer.step()
    model.eval()


def test_10_cyclic_sequences_with_the_plain_next_item_objective() -> None:
    model, batch = small(hidden_size=32, initializer_range=0.2), cyclic_prefixes()
    train(model, batch, NextItem(), 80)
    wanted = batch["targets"].amax(1)
    assert (model.score_items(batch).argmax(1) == wanted).float().mean() > 0.95


def test_next_item_supervises_the_last_event_only() -> None:
    model, batch = small(), inputs()
    dense: SequenceBatch = {**batch, "targets": batch["item_ids"] % 20 + 1}
    dense["targets"] *= batch["item_ids"] > 0
    out = NextItem().loss(model, dense, StepInfo(0, 1, 0.0, torch.Generator()))
    logits = model.score(model(**batch).user_repr)[:, 1:]
    wanted = dense["targets"].gather(1, batch["lengths"][:, None] - 1)[:, 0]
    assert out.count == 3
    same(out.total, F.cross_entropy(logits, wanted - 1))


def test_10_second_order_sequences_need_two_events() -> None:
    """Next = sum of the last two modulo 7: solved with the whole history, not with a history of one event."""
    walks = []
    for first in range(7):
        for second in range(7):
            walk = [first, second]
            while len(walk) < 6:
                walk.append((walk[-1] + walk[-2]) % 7)
            walks.append(walk)
    walk_ids = torch.tensor(walks) + 1
    targets = walk_ids[:, 1:].clone()
    targets[:, 0] = 0  # the second event is free
    batch: SequenceBatch = {"item_ids": walk_ids[:, :-1], "lengths": torch.full((49,), 5), "targets": targets}
    model = small(num_items=7, hidden_size=32, initializer_range=0.2)
    train(model, batch, Cloze(last_only=0.8), 250)
    assert (model.score_items(batch).argmax(1) == walk_ids[:, -1]).float().mean() > 0.95
    one: SequenceBatch = {"item_ids": walk_ids[:, -2:-1], "lengths": torch.ones(49, dtype=torch.long)}
    assert (model.score_items(one).argmax(1) == walk_ids[:, -1]).float().mean() < 0.5


def test_12_scores_and_inputs_share_one_table() -> None:
    model, batch = small(), inputs()
    torch.testing.assert_close(model.item_vectors()[1:], model.item_embedding.weight[1:], rtol=0, atol=0)
    unused = ({*range(1, 21)} - set(batch["item_ids"].flatten().tolist())).pop()
    before = model.score_items(batch)[:, unused] - model.item_bias[unused]
    with torch.no_grad():
        model.item_embedding.weight[unused].neg_()
    same(model.score_items(batch)[:, unused] - model.item_bias[unused], -before)


def test_the_order_of_events_matters() -> None:
    model, batch = small(), inputs()
    turned = {**batch, "item_ids": batch["item_ids"].clone()}
    turned["item_ids"][0] = turned["item_ids"][0].flip(0)
    assert (model.score_items(turned) - model.score_items(batch))[0, 1:].abs().max() > 1e-3  # type: ignore[arg-type]


def test_fresh_parameters_are_drawn_once_and_come_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BERT4RecEncoder(BERT4RecConfig(num_items=20, hidden_size=64))
    assert not model.item_bias.any() and 0.01 < model.mask_embedding.std() < 0.03
    model.save_pretrained(tmp_path)
    again = BERT4RecEncoder.from_pretrained(tmp_path)
    assert torch.equal(again.mask_embedding, model.mask_embedding)


def test_too_long_batches_are_refused() -> None:
    model, items = small(), torch.ones(1, 14, dtype=torch.long)
    with pytest.raises(DataError, match="max_history = 12"):
        model(items[:, :13], torch.tensor([13]))
    model.cloze(items[:, :13], torch.tensor([13]), items[:, :13] > 1)
    with pytest.raises(DataError, match="longer than the encoder's positions"):
        model.cloze(items, torch.tensor([14]), items > 1)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(RecipeError, match=r"num_heads: found 3, expected a divisor of hidden_size 8"):
        BERT4RecConfig(num_items=5, hidden_size=8, num_heads=3)


def test_unknown_implementations_are_refused() -> None:
    with pytest.raises(RecipeError, match="encoder.implementation: found 'sideways', expected one of"):
        BERT4RecConfig(num_items=5, implementation="sideways")  # type: ignore[arg-type]
