"""GRU4Rec: the contract, and the properties of a correct implementation (numbers 1, 2, 8, 10 and 12 of the list of the
sequence encoders)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llmrec.data.schema import SequenceBatch
from llmrec.encoders.gru4rec import GRU4RecConfig, GRU4RecEncoder
from llmrec.errors import RecipeError
from llmrec.interfaces import IncrementalEncoder
from llmrec.strategies.base import StepInfo
from llmrec.strategies.next_item import NextItem
from tests.contracts.encoders import EncoderContract, same


class TestGRU4Rec(EncoderContract):
    config = GRU4RecConfig(num_items=50, hidden_size=16, gru_size=24, max_history=16)
    encoder_class = GRU4RecEncoder


def small(**options: object) -> GRU4RecEncoder:
    torch.manual_seed(0)
    chosen = {"num_items": 20, "hidden_size": 8, "gru_size": 12, "dropout": 0.0, "initializer_range": 0.3, **options}
    return GRU4RecEncoder(GRU4RecConfig(**chosen)).eval()  # type: ignore[arg-type]


def inputs() -> SequenceBatch:
    """Three histories of 6, 4 and 1 events."""
    lengths = torch.tensor([6, 4, 1])
    items = torch.randint(1, 21, (3, 6), generator=torch.Generator().manual_seed(4))
    return {"item_ids": items * (torch.arange(6) < lengths[:, None]), "lengths": lengths}


def test_states_follow_the_recurrence() -> None:
    """z, r and n written out; W and U hold the gates in the order r, z, n."""
    model, batch = small(), inputs()
    (w_r, w_z, w_n), (u_r, u_z, u_n) = model.gru.weight_ih_l0.chunk(3), model.gru.weight_hh_l0.chunk(3)
    state: Tensor = torch.zeros(12)
    expected = []
    for item in batch["item_ids"][0]:
        x = model.item_embedding.weight[item]
        r, z = torch.sigmoid(w_r @ x + u_r @ state), torch.sigmoid(w_z @ x + u_z @ state)
        n = torch.tanh(w_n @ x + r * (u_n @ state))
        state = (1 - z) * n + z * state
        expected.append(model.output(state))
    same(model(**batch).hidden[0], torch.stack(expected))


def test_1_state_t_has_no_gradient_from_later_events() -> None:
    model, batch = small(), inputs()
    embeds = model.item_embedding(batch["item_ids"]).detach().requires_grad_()
    hidden = model(**batch, item_embeds=embeds).hidden
    for t in range(6):
        (gradient,) = torch.autograd.grad(hidden[0, t].pow(2).sum(), embeds, retain_graph=True)
        reach = gradient[0].abs().sum(-1)
        assert not reach[t + 1 :].any() and (reach[: t + 1] > 0).all()


def test_2_padding_leaves_real_states_alone() -> None:
    model, batch = small(), inputs()
    found, expected = model(**{**batch, "item_ids": F.pad(batch["item_ids"], (0, 5))}), model(**batch)
    assert (found.hidden[:, :6] - expected.hidden).abs().max() < 1e-5
    assert (found.user_repr - expected.user_repr).abs().max() < 1e-5
    assert not found.hidden[:, 6:].any() and not found.hidden[2, 1:].any()


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bias": True}])
def test_8_the_incremental_state_equals_the_full_output(options: dict[str, object]) -> None:
    model, batch = small(**options), inputs()
    assert isinstance(model, IncrementalEncoder)
    full = model(**batch)
    state = model.init_state(3)
    for t in range(6):
        state = model.step(state, batch["item_ids"][:, t])
        going_on = batch["lengths"] > t
        same(model.read(state)[going_on], full.hidden[going_on, t])
    # Item 0 is no event: the shorter histories have kept the state of their last one.
    same(model.read(state), full.user_repr)


def test_8_a_step_leaves_the_given_state_as_it_was_and_keeps_its_size() -> None:
    model = small()
    before = model.step(model.init_state(2), torch.tensor([3, 4]))
    copy = before.clone()
    after = model.step(before, torch.tensor([5, 6]))
    assert torch.equal(before, copy) and not torch.equal(after, before)
    for _ in range(200):  # longer than max_history
        after = model.step(after, torch.tensor([1, 2]))
    assert after.shape == before.shape == (1, 2, 12) and torch.isfinite(model.read(after)).all()


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
    model = small(num_items=7, hidden_size=32, gru_size=64).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(200):
        optimizer.zero_grad()
        NextItem().loss(model, batch, StepInfo(step, 200, 0.0, torch.Generator())).total.backward()
        optimizer.step()
    model.eval()
    assert (model.score_items(batch).argmax(1) == walk_ids[:, -1]).float().mean() > 0.95
    one: SequenceBatch = {"item_ids": walk_ids[:, -2:-1], "lengths": torch.ones(49, dtype=torch.long)}
    assert (model.score_items(one).argmax(1) == walk_ids[:, -1]).float().mean() < 0.5


def test_12_scores_and_inputs_share_one_table() -> None:
    model, batch = small(), inputs()
    torch.testing.assert_close(model.item_vectors()[1:], model.item_embedding.weight[1:], rtol=0, atol=0)
    unused = ({*range(1, 21)} - set(batch["item_ids"].flatten().tolist())).pop()
    before = model.score_items(batch)
    with torch.no_grad():
        model.item_embedding.weight[unused].neg_()
    same(model.score_items(batch)[:, unused], -before[:, unused])
    assert [name for name in model.state_dict() if "item" in name] == ["item_embedding.weight"]


@pytest.mark.parametrize("name", ["gru_size", "num_layers"])
def test_sizes_start_at_one(name: str) -> None:
    with pytest.raises(RecipeError, match=rf"encoder.{name}: found 0, expected a whole number from 1"):
        GRU4RecConfig(num_items=5, **{name: 0})  # type: ignore[arg-type]
