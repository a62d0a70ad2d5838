"""Cloze strategy: the contract for its losses, which places are masked, and that only those count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmrec import discovery
from llmrec.data.schema import SequenceBatch
from llmrec.encoders.base import EncoderOutput
from llmrec.encoders.bert4rec import BERT4RecConfig, BERT4RecEncoder
from llmrec.encoders.sasrec import SASRecConfig, SASRecEncoder
from llmrec.errors import DataError, RecipeError
from llmrec.strategies.base import StepInfo, TrainContext, TrainingStrategy
from llmrec.strategies.cloze import Cloze
from llmrec.strategies.next_item import NextItem
from tests.contracts.encoders import cyclic_context
from tests.contracts.strategies import ITEMS, StrategyContract


def bert() -> BERT4RecEncoder:
    torch.manual_seed(0)
    return BERT4RecEncoder(
        BERT4RecConfig(num_items=ITEMS, hidden_size=16, max_history=16, dropout=0.0, initializer_range=0.2)
    ).eval()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def step(seed: int = 0) -> StepInfo:
    return StepInfo(0, 1, 0.0, generator(seed))


class TestFullSoftmax(StrategyContract):
    options: dict[str, Any] = {}

    def strategy(self) -> TrainingStrategy:
        return Cloze(mask_probability=0.4, last_only=0.3, **self.options)

    def model(self) -> nn.Module:
        return bert()

    def expected_count(self, batch: SequenceBatch) -> int:
        return int(Cloze(mask_probability=0.4, last_only=0.3).choose(batch, generator(7))[0].sum())

    def test_masking_is_drawn_anew_in_every_step(self) -> None:
        model, batch = self.model(), self.batch()
        assert self.run(model, batch, seed=1).total != self.run(model, batch, seed=2).total


class TestSampledSoftmax(TestFullSoftmax):
    options = {"loss": "sampled_softmax", "negatives": 12, "mask_history": True}


def walks(rows: int = 400, width: int = 10) -> SequenceBatch:
    """Dense windows as training data has them: targets are the inputs, one event later."""
    events = torch.randint(1, ITEMS + 1, (rows, width + 1), generator=generator(5))
    lengths = torch.full((rows,), width)
    return {"item_ids": events[:, :-1], "targets": events[:, 1:], "lengths": lengths, "example_ids": torch.arange(rows)}


def test_the_share_of_masked_events_is_the_probability() -> None:
    chosen, ends = Cloze(mask_probability=0.3, last_only=0.0).choose(walks(2000), generator())
    assert abs(chosen[:, :-1].float().mean() - 0.3) < 0.01
    assert chosen.any(1).all() and (ends == 10).all()


def test_a_share_of_rows_is_cut_and_masks_its_last_event_alone() -> None:
    chosen, ends = Cloze(mask_probability=0.9, last_only=0.25).choose(walks(4000), generator())
    alone = chosen.sum(1) == 1
    assert abs(alone.float().mean() - 0.25) < 0.03 and (ends[~alone] == 10).all()
    assert torch.equal(chosen[alone].int().argmax(1) + 1, ends[alone])
    counts = torch.bincount(ends[alone], minlength=11)[1:]  # every event is asked for alike
    assert counts.min() > 60 and counts.max() < 140


def test_a_row_where_chance_picks_nothing_masks_its_last_event() -> None:
    chosen, ends = Cloze(mask_probability=0.0, last_only=0.0).choose(walks(), generator())
    assert chosen[:, -1].all() and not chosen[:, :-1].any() and (ends == 10).all()


def test_only_targets_are_masked() -> None:
    batch = walks()
    batch["targets"] = batch["targets"] * (torch.arange(10) % 3 == 1)
    batch["targets"][0] = 0
    chosen, ends = Cloze(mask_probability=0.9, last_only=0.5).choose(batch, generator())
    assert (
        ends.min() >= 2 and not chosen[batch["targets"] == 0].any() and chosen[1:].any(1).all() and not chosen[0].any()
    )


def test_9_loss_ignores_unmasked_places() -> None:
    """The loss is the cross-entropy at masked places, written out; targets elsewhere may be anything."""
    model, batch, strategy = bert(), walks(6), Cloze(mask_probability=0.4, last_only=0.0)
    chosen, _ = strategy.choose(batch, generator())
    events = torch.cat([batch["item_ids"], batch["targets"][:, -1:]], dim=1)
    hidden = model.cloze(events, torch.full((6,), 11), F.pad(chosen, (1, 0))).hidden
    losses = [
        F.cross_entropy(model.score(hidden[row, place + 1])[1:], events[row, place + 1] - 1)
        for row, place in chosen.nonzero().tolist()
    ]
    out = strategy.loss(model, batch, step())
    assert out.count == len(losses)
    torch.testing.assert_close(out.total, torch.stack(losses).mean())
    other = batch["targets"] % ITEMS + 1
    other = torch.where(chosen | (torch.arange(10) == 9), batch["targets"], other)
    torch.testing.assert_close(
        strategy.loss(model, {**batch, "targets": other}, step()).total, out.total, rtol=0, atol=0
    )


def test_9_a_masked_event_is_hidden_and_an_unmasked_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A different item at a masked place changes only what is wanted there, not the states."""
    model, batch, strategy = bert(), walks(1), Cloze(mask_probability=0.4, last_only=0.0)
    chosen = strategy.choose(batch, generator())[0][0]
    assert 0 < int(chosen[:-1].sum()) < 9
    states: list[Tensor] = []

    def watched(*args: Tensor) -> EncoderOutput:
        output = BERT4RecEncoder.cloze(model, *args)
        states.append(output.hidden.detach())
        return output

    monkeypatch.setattr(model, "cloze", watched)
    for place in range(9):
        states.clear()
        events = torch.cat([batch["item_ids"], batch["targets"][:, -1:]], dim=1)
        strategy.loss(model, batch, step())
        events[0, place + 1] = events[0, place + 1] % ITEMS + 1
        strategy.loss(model, {**batch, "item_ids": events[:, :-1], "targets": events[:, 1:]}, step())
        moved = (states[0] - states[1]).abs().amax()
        assert (moved == 0) if chosen[place] else (moved > 1e-6)


def test_a_cut_row_is_learned_as_a_recommendation_asks() -> None:
    """With cut rows only, the loss is that of the next item after the shorter histories, read at an appended mask."""
    model, batch = bert(), walks(20)
    _, ends = Cloze(last_only=1.0).choose(batch, generator())
    assert len(set(ends.tolist())) > 5
    kept = torch.arange(10) < ends[:, None]
    shorter: SequenceBatch = {"item_ids": batch["item_ids"] * kept, "targets": batch["targets"] * kept, "lengths": ends}
    found = Cloze(last_only=1.0).loss(model, batch, step())
    expected = NextItem().loss(model, shorter, step())
    assert found.count == expected.count == 20
    torch.testing.assert_close(found.total, expected.total)


def test_examples_with_one_target_behind_the_history_are_learned_there() -> None:
    batch = walks(20)
    batch["targets"] = batch["targets"] * (torch.arange(10) == 9)
    assert Cloze(mask_probability=0.9).loss(bert(), batch, step()).count == 20


def test_a_batch_without_targets_has_loss_zero() -> None:
    batch = walks(3)
    out = Cloze().loss(bert(), {**batch, "targets": torch.zeros(3, 10, dtype=torch.long)}, step())
    assert out.count == 0 and out.total == 0


def test_models_that_cannot_fill_in_are_refused() -> None:
    model = SASRecEncoder(SASRecConfig(num_items=ITEMS, hidden_size=8))
    context = TrainContext(cyclic_context(ITEMS), num_examples=1, total_steps=1, seed=0)
    with pytest.raises(RecipeError, match="found SASRecEncoder, expected an encoder that fills in"):
        Cloze().prepare(context, model, generator())
    with pytest.raises(RecipeError, match="use strategy next_item"):
        Cloze().loss(model, walks(2), step())


def test_a_batch_without_a_field_of_targets_is_refused() -> None:
    batch = walks(2)
    del batch["targets"]
    with pytest.raises(DataError, match="nothing to learn from"):
        Cloze().loss(bert(), batch, step())


@pytest.mark.parametrize("option", ["mask_probability", "last_only"])
@pytest.mark.parametrize("value", [-0.1, 1.5, True, "half"])
def test_shares_lie_between_zero_and_one(option: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=rf"strategy 'cloze', option '{option}': found .* expected a number"):
        Cloze(**{option: value})


def test_a_recipe_finds_it_and_its_options() -> None:
    built = discovery.build("strategy", "cloze", {"mask_probability": 0.6, "loss": "gbce", "negatives": 8})
    assert type(built) is Cloze and (built.mask_probability, built.objective, built.negatives) == (0.6, "gbce", 8)
