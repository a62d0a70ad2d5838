"""Caser: the contract with and without user vectors, and the properties of a correct implementation (numbers 1, 2, 10
and 12 of the list of the sequence encoders)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llmrec.data.schema import SequenceBatch
from llmrec.encoders.caser import CaserConfig, CaserEncoder
from llmrec.errors import RecipeError
from llmrec.strategies.base import StepInfo
from llmrec.strategies.next_item import NextItem
from tests.contracts.encoders import USERS, EncoderContract, same


class TestCaser(EncoderContract):
    config = CaserConfig(num_items=50, hidden_size=16, max_history=16, horizontal_filters=4)
    encoder_class = CaserEncoder


class TestCaserWithUsers(TestCaser):
    config = CaserConfig(
        num_items=50, num_users=USERS, hidden_size=16, max_history=16, window=3, horizontal_filters=4, use_user=True
    )


def small(**options: object) -> CaserEncoder:
    torch.manual_seed(0)
    chosen = {
        "num_items": 20, "num_users": 9, "hidden_size": 8, "window": 4, "horizontal_filters": 3, "vertical_filters": 2,
        "dropout": 0.0, "initializer_range": 0.3, **options,
    }  # fmt: skip
    model = CaserEncoder(CaserConfig(**chosen)).eval()  # type: ignore[arg-type]
    with torch.no_grad():  # fresh biases are zero and would hide mistakes at the padding of a window
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def inputs() -> SequenceBatch:
    """Three histories of 7, 4 and 1 events."""
    lengths = torch.tensor([7, 4, 1])
    items = torch.randint(1, 21, (3, 7), generator=torch.Generator().manual_seed(4))
    kept = torch.arange(7) < lengths[:, None]
    return {"item_ids": items * kept, "lengths": lengths, "user_ids": torch.tensor([3, 9, 1])}


def one_window(model: CaserEncoder, items: list[int]) -> Tensor:
    """The state of one history as the paper writes it: one image, two-dimensional filters that slide over it."""
    window, width = model.config.window, model.config.hidden_size
    image = torch.zeros(window, width)
    for place, item in enumerate(items[-window:]):
        image[window - len(items[-window:]) + place] = model.item_embedding.weight[item]
    vertical = [
        weights @ image + bias for weights, bias in zip(model.vertical.weight, model.vertical.bias, strict=True)
    ]
    horizontal = []
    for filters in model.horizontal:
        kernel = filters.weight.transpose(1, 2)[:, None]  # [n_h, 1, i, d]
        answers = F.relu(F.conv2d(image[None, None], kernel, filters.bias))
        horizontal.append(answers.amax(dim=(2, 3))[0])
    return model.output(F.relu(model.mix(torch.cat([*vertical, *horizontal]))))


@pytest.mark.parametrize("window", [1, 4, 10])
def test_every_position_equals_its_own_window(window: int) -> None:
    model, batch = small(window=window), inputs()
    hidden = model(**model.inputs(batch)).hidden
    for row, length in enumerate(batch["lengths"].tolist()):
        for t in range(length):
            same(hidden[row, t], one_window(model, batch["item_ids"][row, : t + 1].tolist()))


def test_1_no_state_sees_a_later_event_or_one_before_its_window() -> None:
    model, batch = small(initializer_range=1.0), inputs()
    embeds = model.item_embedding(batch["item_ids"]).detach().requires_grad_()
    hidden = model(**model.inputs(batch), item_embeds=embeds).hidden
    for t in range(7):
        (gradient,) = torch.autograd.grad(hidden[0, t].pow(2).sum(), embeds, retain_graph=True)
        reached = gradient[0].abs().sum(-1) > 0
        assert reached.tolist() == [t - 4 < event <= t for event in range(7)]


def test_2_padding_leaves_real_states_alone() -> None:
    model, batch = small(), inputs()
    expected = model(batch["item_ids"], batch["lengths"])
    found = model(F.pad(batch["item_ids"], (0, 5)), batch["lengths"])
    assert (found.hidden[:, :7] - expected.hidden).abs().max() < 1e-5
    assert (found.user_repr - expected.user_repr).abs().max() < 1e-5
    assert not found.hidden[:, 7:].any() and not found.hidden[2, 1:].any()


def second_order(window: int) -> float:
    """Share of solved histories when the next item is the sum of the last two modulo 7."""
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
    model = small(num_items=7, hidden_size=32, window=window, horizontal_filters=8).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(100):
        optimizer.zero_grad()
        NextItem().loss(model, batch, StepInfo(step, 100, 0.0, torch.Generator())).total.backward()
        optimizer.step()
    return float((model.eval().score_items(batch).argmax(1) == walk_ids[:, -1]).float().mean())


def test_10_second_order_sequences_need_a_window_of_two() -> None:
    assert second_order(window=3) > 0.95
    assert second_order(window=1) < 0.5


def test_12_scores_and_inputs_share_one_table() -> None:
    model, batch = small(), inputs()
    torch.testing.assert_close(model.item_vectors()[1:], model.item_embedding.weight[1:], rtol=0, atol=0)
    unused = ({*range(1, 21)} - set(batch["item_ids"].flatten().tolist())).pop()
    before = model.score_items(batch)
    with torch.no_grad():
        model.item_embedding.weight[unused].neg_()
    same(model.score_items(batch)[:, unused], -before[:, unused])


def test_user_vectors_enter_only_where_asked_for() -> None:
    batch = inputs()
    others = {**batch, "user_ids": batch["user_ids"].flip(0)}
    plain, personal = small(), small(use_user=True)
    assert plain.uses == frozenset() and personal.uses == {"user_ids"}
    same(plain.score_items(others), plain.score_items(batch))  # type: ignore[arg-type]
    moved = (personal.score_items(others) - personal.score_items(batch))[:, 1:].abs().amax(1)  # type: ignore[arg-type]
    assert moved[0] > 1e-3 and moved[2] > 1e-3 and moved[1] < 1e-6


def test_unknown_users_are_nobody() -> None:
    model, batch = small(use_user=True), inputs()
    nobody = model.score_items({**batch, "user_ids": torch.zeros(3, dtype=torch.long)})
    same(model.score_items({**batch, "user_ids": torch.tensor([10, 500, 77])}), nobody)


def test_user_vectors_need_users() -> None:
    with pytest.raises(RecipeError, match="encoder.use_user: found num_users = 0"):
        CaserEncoder(CaserConfig(num_items=5, use_user=True))
    with pytest.raises(KeyError, match="needs user_ids"):
        small(use_user=True)(inputs()["item_ids"], inputs()["lengths"])


@pytest.mark.parametrize("name", ["window", "horizontal_filters", "vertical_filters"])
def test_sizes_start_at_one(name: str) -> None:
    with pytest.raises(RecipeError, match=rf"encoder.{name}: found 0, expected a whole number from 1"):
        CaserConfig(num_items=5, **{name: 0})  # type: ignore[arg-type]
