"""SASRec: the contract for each block variant, and the properties of a correct implementation (numbers 1, 2, 3, 10, 11
and 12 of the list of the sequence encoders; 4 and 5 stand in tests/blocks/test_losses.py)."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmrec.data.schema import SequenceBatch
from llmrec.data.sequences import pad_right
from llmrec.encoders.sasrec import SASRecConfig, SASRecEncoder
from llmrec.errors import DataError, RecipeError
from llmrec.strategies.base import StepInfo
from llmrec.strategies.next_item import NextItem
from tests.contracts.encoders import EncoderContract, same

NORMS = ("pre", "classic", "post")


class TestSASRecPre(EncoderContract):
    config = SASRecConfig(num_items=50, hidden_size=16, max_history=16)
    encoder_class = SASRecEncoder


class TestSASRecClassic(TestSASRecPre):
    config = SASRecConfig(num_items=50, hidden_size=16, max_history=16, norm="classic")


class TestSASRecPostMath(TestSASRecPre):
    config = SASRecConfig(num_items=50, hidden_size=16, max_history=16, norm="post", implementation="math")


def small(norm: str = "pre", **options: object) -> SASRecEncoder:
    torch.manual_seed(0)
    chosen = {"num_items": 20, "hidden_size": 8, "max_history": 12, "dropout": 0.0, "initializer_range": 0.3, **options}
    return SASRecEncoder(SASRecConfig(norm=norm, **chosen)).eval()  # type: ignore[arg-type]


def inputs(rows: int = 3, width: int = 6) -> SequenceBatch:
    items = torch.randint(1, 21, (rows, width), generator=torch.Generator().manual_seed(4))
    return {"item_ids": items, "lengths": torch.full((rows,), width)}


def train(model: SASRecEncoder, batch: SequenceBatch, strategy: NextItem, steps: int, lr: float = 5e-3) -> None:
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=lr, weight_decay=0.0)
    for step in range(steps):
        optimizer.zero_grad()
        strategy.loss(model, batch, StepInfo(step, steps, 0.0, torch.Generator().manual_seed(step))).total.backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize("norm", NORMS)
def test_1_state_t_has_no_gradient_from_later_events(norm: str) -> None:
    """The Jacobian itself is block lower triangular, for every pair of positions."""
    model, batch = small(norm), inputs(1)
    embeds = model.item_embedding(batch["item_ids"]).detach().requires_grad_()
    hidden = model(**batch, item_embeds=embeds).hidden
    for t in range(6):
        (gradient,) = torch.autograd.grad(hidden[0, t].pow(3).sum(), embeds, retain_graph=True)
        reach = gradient[0].abs().sum(-1)
        assert not reach[t + 1 :].any()
        assert (reach[: t + 1] > 0).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("pads", [1, 6])
def test_2_padding_leaves_real_states_alone(norm: str, pads: int) -> None:
    model, batch = small(norm), inputs()
    padded = {**batch, "item_ids": F.pad(batch["item_ids"], (0, pads))}
    found, expected = model(**padded), model(**batch)
    assert (found.hidden[:, :6] - expected.hidden).abs().max() < 1e-5
    assert (found.user_repr - expected.user_repr).abs().max() < 1e-5
    assert not found.hidden[:, 6:].any()


@pytest.mark.parametrize("norm", NORMS)
def test_3_without_branches_only_norms_of_the_input_remain(norm: str) -> None:
    model, batch = small(norm, num_layers=1), inputs()
    block = model.blocks[0]
    for layer in (block.attention.output, block.feed_forward.output):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)

    def chain(x: Tensor, times: int) -> Tensor:
        for _ in range(times):
            x = F.layer_norm(x, (8,))
        return x

    items = model.item_embedding(batch["item_ids"])
    positions = model.position_embedding(torch.arange(6))
    # classic: both norms of the block and the last one; pre: the last one; post: input, then two in the block.
    embedded = items + positions if norm == "post" else items * 8**0.5 + positions
    same(model(**batch).hidden, chain(embedded, {"pre": 1, "classic": 3, "post": 3}[norm]), atol=2e-4)


def test_10_second_order_sequences_need_two_events() -> None:
    """Next = sum of the last two modulo 7: solved with the whole history, not with a history of one event."""
    items, pairs = 7, [(a, b) for a in range(7) for b in range(7)]
    walks = []
    for first, second in pairs:
        walk = [first, second]
        while len(walk) < 8:
            walk.append((walk[-1] + walk[-2]) % items)
        walks.append(walk)
    walk_ids = torch.tensor(walks) + 1
    batch: SequenceBatch = {
        "item_ids": walk_ids[:, :-1], "lengths": torch.full((49,), 7), "targets": walk_ids[:, 1:].clone(),
    }  # type: ignore[typeddict-item]  # fmt: skip
    batch["targets"][:, 0] = 0  # the second event is free
    model = small(num_items=items, hidden_size=32, initializer_range=0.05)
    train(model, batch, NextItem(), 400)
    exact = (model.score_items(batch).argmax(1) == walk_ids[:, -1]).float().mean()
    assert exact > 0.95
    one: SequenceBatch = {"item_ids": walk_ids[:, -2:-1], "lengths": torch.ones(49, dtype=torch.long)}  # type: ignore[typeddict-item]
    assert (model.score_items(one).argmax(1) == walk_ids[:, -1]).float().mean() < 0.5


@pytest.mark.parametrize("loss", ["sampled_softmax", "bce", "gbce"])
def test_10_cyclic_sequences_with_every_sampled_loss(loss: str) -> None:
    model = small(num_items=20, hidden_size=32, initializer_range=0.05)
    walk = (torch.arange(20)[:, None] + torch.arange(9)) % 20 + 1
    batch: SequenceBatch = {"item_ids": walk[:, :-1], "targets": walk[:, 1:], "lengths": torch.full((20,), 8)}  # type: ignore[typeddict-item]
    train(model, batch, NextItem(loss=loss, negatives=10), 150)  # type: ignore[arg-type]
    assert (model.score_items(batch).argmax(1) == walk[:, -1]).float().mean() > 0.95


def ml_like(users: int = 1000, items: int = 1000, seed: int = 0) -> np.ndarray:
    """[users, 30]: popular items are frequent, nobody repeats an item, users stay near a taste that drifts."""
    rng = np.random.default_rng(seed)
    place = rng.normal(size=(items, 8))
    fame = -0.8 * np.log(np.arange(1, items + 1))[rng.permutation(items)]
    taste = rng.normal(size=(users, 8))
    chosen = np.zeros((users, 30), dtype=np.int64)
    taken = np.zeros((users, items), dtype=bool)
    for t in range(30):
        logits = 0.5 * taste @ place.T + fame + rng.gumbel(size=(users, items))
        logits[taken] = -np.inf
        pick = logits.argmax(1)
        taken[np.arange(users), pick] = True
        chosen[:, t] = pick + 1
        taste = 0.8 * taste + 0.6 * place[pick]
    return chosen


@pytest.mark.slow
def test_11_full_softmax_beats_bce_with_one_negative() -> None:
    """1000 users, three seeds, the same budget: NDCG@10 over the whole catalogue, seen items removed."""
    events = torch.from_numpy(ml_like())
    asked = {"item_ids": events[:, :-1], "lengths": torch.full((1000,), 29), "seen": events[:, :-1]}

    def ndcg(strategy: NextItem, seed: int) -> float:
        torch.manual_seed(seed)
        model = SASRecEncoder(SASRecConfig(num_items=1000, hidden_size=32, max_history=30, num_layers=1, dropout=0.2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
        generator = torch.Generator().manual_seed(seed)
        for epoch in range(15):
            for rows in torch.randperm(1000, generator=generator).split(100):
                lengths = torch.full((len(rows),), 28)
                batch = {"item_ids": events[rows, :-2], "targets": events[rows, 1:-1], "lengths": lengths}
                optimizer.zero_grad()
                info = StepInfo(epoch, 15, 0.0, generator)
                strategy.loss(model, batch, info).total.backward()  # type: ignore[arg-type]
                optimizer.step()
        found = model.eval().recommend(asked, 10).item_ids == events[:, -1:]  # type: ignore[arg-type]
        return float((found / torch.log2(torch.arange(10) + 2)).sum(1).mean())

    for seed in range(3):
        weak = ndcg(NextItem(loss="bce", negatives=1, shared_negatives=False), seed)
        assert ndcg(NextItem(), seed) > 1.05 * weak


def test_12_scores_and_inputs_share_one_table(tmp_path: Path) -> None:
    model, batch = small(), inputs()
    before = model.score_items(batch)
    assert model.item_vectors().shape == (21, 8)
    torch.testing.assert_close(model.item_vectors()[1:], model.item_embedding.weight[1:], rtol=0, atol=0)
    unused = ({*range(1, 21)} - set(batch["item_ids"].flatten().tolist())).pop()
    with torch.no_grad():
        model.item_embedding.weight[unused].neg_()
    after = model.score_items(batch)
    same(after[:, unused], -before[:, unused])
    model.save_pretrained(tmp_path)
    assert sum("item" in name for name in model.state_dict()) == 1


def test_math_attention_gives_the_same_states_and_second_derivatives() -> None:
    fused, batch = small(), inputs()
    written_out = SASRecEncoder(SASRecConfig(**{**_options(fused.config), "implementation": "math"})).eval()
    written_out.load_state_dict(fused.state_dict())
    same(written_out(**batch).hidden, fused(**batch).hidden)
    embeds = written_out.item_embedding(batch["item_ids"]).detach().requires_grad_()
    out = written_out(**batch, item_embeds=embeds).user_repr
    (first,) = torch.autograd.grad(out.pow(2).sum(), embeds, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), embeds)
    assert torch.isfinite(second).all() and second.abs().sum() > 0


def _options(config: SASRecConfig) -> dict[str, object]:
    names = ("num_items", "hidden_size", "max_history", "dropout", "num_layers", "num_heads", "norm")
    return {name: getattr(copy.deepcopy(config), name) for name in names}


def test_too_long_batches_are_refused() -> None:
    with pytest.raises(DataError, match="max_history = 12"):
        small()(**inputs(width=13))


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(RecipeError, match=r"num_heads: found 3, expected a divisor of hidden_size 8"):
        SASRecConfig(num_items=5, hidden_size=8, num_heads=3)


@pytest.mark.parametrize("name", ["norm", "activation", "implementation"])
def test_unknown_variants_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=rf"encoder.{name}: found 'sideways', expected one of"):
        SASRecConfig(num_items=5, **{name: "sideways"})  # type: ignore[arg-type]


def test_order_of_events_matters() -> None:
    model, batch = small(), inputs(1)
    turned = {**batch, "item_ids": pad_right([batch["item_ids"][0].flip(0).numpy()])}
    assert (model.score_items(turned) - model.score_items(batch))[:, 1:].abs().max() > 1e-3
