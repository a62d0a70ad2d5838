"""LightGCN with content: the contract, the formula, inductive users, missing levels, and MovieLens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from llmrec.data.graph import UserItemGraph, content_signals
from llmrec.encoders.lightgcn import LightGCNConfig, LightGCNEncoder
from llmrec.errors import DataError, RecipeError
from tests.contracts.encoders import cyclic_context
from tests.encoders.graphs import GraphEncoderContract, content, fit, with_features

SMALL: dict[str, Any] = {"num_items": 24, "hidden_size": 8, "max_history": 16, "num_layers": 2}


def built(features: bool = True, **options: Any) -> LightGCNEncoder:
    torch.manual_seed(0)
    context = with_features(cyclic_context(24), content(24) if features else {})
    return LightGCNEncoder.from_context(LightGCNConfig(**{**SMALL, **options}), context).eval()


class TestConcatenated(GraphEncoderContract):
    config = LightGCNConfig(**SMALL)
    encoder_class = LightGCNEncoder
    overfit_learning_rate = 2e-2


class TestSummed(GraphEncoderContract):
    config = LightGCNConfig(**SMALL, fusion="sum", train_user="node", item_neighbours=2)
    encoder_class = LightGCNEncoder
    overfit_learning_rate = 2e-2


def test_states_are_the_mean_of_the_layers() -> None:
    model, context = built(), cyclic_context(24)
    s = UserItemGraph.from_context(context).normalised.toarray()
    average = (np.eye(len(s)) + s + s @ s) / 3
    signals = [model.identities().detach().numpy()]
    for (values, _), project in zip(content_signals(content(24), 128).values(), model.projections, strict=True):
        nodes = np.concatenate([np.zeros((20, 6)), values[1:]])
        signals.append(nodes @ project.weight.detach().numpy().T)  # type: ignore[operator]
    expected = np.concatenate([average @ x for x in signals], axis=1)
    np.testing.assert_allclose(model.node_states().detach().numpy(), expected, atol=1e-5)


def test_widths_follow_the_fusion() -> None:
    assert built().gate_dim == 24 and built(fusion="sum").gate_dim == 8
    assert built(features=False).gate_dim == 8


def test_a_pair_is_scored_without_its_own_link() -> None:
    """With train_user history, the user is a new node linked to the other items of the training history."""
    model = built()
    items = torch.from_numpy(cyclic_context(24).train_edges[1]).view(20, 10)
    users = torch.tensor([1, 5, 20])
    positives, negatives = items[users - 1, 3], torch.tensor([[1, 2], [3, 4], [5, 6]])
    found = model.score_edges(users, positives, negatives)
    rest = torch.cat([items[users - 1, :3], items[users - 1, 4:]], dim=1)
    expected = model.score_items({"item_ids": rest, "lengths": torch.full((3,), 9)})
    torch.testing.assert_close(found.positive, expected.gather(1, positives[:, None])[:, 0])
    torch.testing.assert_close(found.negatives, expected.gather(1, negatives))


def test_the_published_training_uses_the_users_own_nodes() -> None:
    model = built(train_user="node")
    states = model.node_states()
    found = model.score_edges(torch.tensor([2]), torch.tensor([7]), torch.tensor([[9]]))
    torch.testing.assert_close(found.positive[0], states[1] @ states[20 + 6])
    torch.testing.assert_close(found.negatives[0, 0], states[1] @ states[20 + 8])


def test_a_missing_level_is_masked() -> None:
    """Garbage in the row of an item without the level changes no state."""
    features = content(24)
    for values, mask in features.values():
        values[~mask] = 1e6
    torch.manual_seed(0)
    changed = LightGCNEncoder.from_context(LightGCNConfig(**SMALL), with_features(cyclic_context(24), features))
    assert torch.equal(changed.node_states(), built().node_states())


def test_the_item_table_follows_the_weights() -> None:
    """What is kept between calls without gradients is made anew after a step."""
    model = built()
    with torch.no_grad():
        before = model.item_vectors()
        assert model.item_vectors() is before
        model.item_embedding.weight.mul_(2)
        after = model.item_vectors()
    assert (after[:, :8] - before[:, :8]).abs().max() > 1e-3 and torch.equal(after[:, 8:], before[:, 8:])


def test_a_step_of_a_fused_optimizer_is_noticed() -> None:
    """Its kernels leave no trace on the weights' versions; validation in between must not see the old table."""
    model = built()
    with torch.no_grad():
        before = model.item_vectors()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model.train().score_edges(torch.tensor([1]), torch.tensor([2]), torch.tensor([[3]])).positive.sum().backward()
    optimizer.step()
    with torch.no_grad():
        assert (model.eval().item_vectors() - before).abs().max() > 1e-2


def test_learns_the_held_out_item_of_a_block() -> None:
    """Items in two blocks: for users of a block, its items outside the history are above all others."""
    rng = np.random.default_rng(0)
    pairs = [(user, item) for user in range(1, 21) for item in rng.permutation(12)[:8] + 1 + 12 * (user % 2)]
    edges = np.array(pairs).T
    context = with_features(cyclic_context(24), {})
    context = type(context)(24, 20, np.bincount(edges[1], minlength=25), edges)
    torch.manual_seed(0)
    model = LightGCNEncoder.from_context(LightGCNConfig(**SMALL), context)
    fit(model, context, 40)
    histories = torch.from_numpy(edges[1]).view(20, 8)
    best = model.recommend({"item_ids": histories, "lengths": torch.full((20,), 8), "seen": histories}, 4).item_ids
    own = (best - 1) // 12 == (torch.arange(1, 21) % 2)[:, None]
    assert own.float().mean() > 0.95


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_layers", 0),
        ("fusion", "mean"),
        ("l2_weight", -1),
        ("recency", 0),
        ("feature_width", 0),
        ("train_user", "x"),
    ],
)
def test_bad_options_are_named(option: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=rf"encoder\.{option}: found"):
        LightGCNConfig(**{option: value})


def test_another_catalogue_is_refused() -> None:
    with pytest.raises(DataError, match="another catalogue"):
        LightGCNEncoder.from_context(LightGCNConfig(num_items=5), cyclic_context(24))
