"""EASE: the contract, its optimality conditions, and the refusal of catalogues that do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from llmrec.encoders.ease import EASEConfig, EASEEncoder, item_weights
from llmrec.errors import DataError, RecipeError
from tests.contracts.encoders import EncoderContract, cyclic_context
from tests.encoders.movielens import ITEMS, histories, ndcg_at_10, train_context


def random_edges(users: int = 40, items: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Edges [2, N] with repeats, and the zero-one matrix [users, items] they stand for."""
    rng = np.random.default_rng(0)
    edges = np.stack([rng.integers(1, users + 1, 300), rng.integers(1, items + 1, 300)])
    dense = np.zeros((users + 1, items + 1))
    dense[edges[0], edges[1]] = 1
    return edges, dense[1:, 1:]


class TestEASE(EncoderContract):
    config = EASEConfig(num_items=24, regularization=5.0)
    encoder_class = EASEEncoder

    def test_whole_history_is_used_where_the_batch_has_it(self) -> None:
        model, batch = self.model(), self.batch()
        whole = torch.cat([batch["item_ids"], torch.tensor([[7, 9]]).expand(6, -1)], dim=1)
        found = model.score_items({**batch, "seen": whole})
        assert torch.equal(found, model.score_items({"item_ids": whole, "lengths": batch["lengths"]}))
        assert not torch.equal(found, self.scores(model, batch))
        out = model(**model.inputs({**batch, "seen": whole}))
        assert torch.equal(out.user_repr, model.user_representation({**batch, "seen": whole}))

    def test_neighbours_on_the_cycle_score_highest(self) -> None:
        model = self.model()
        batch = {"item_ids": torch.tensor([[10]]), "lengths": torch.tensor([1]), "seen": torch.tensor([[10]])}
        assert set(model.recommend(batch, 2).item_ids[0].tolist()) == {9, 11}


def test_weights_meet_the_optimality_conditions() -> None:
    """The gradient of the ridge objective vanishes off the diagonal, where the weights are free; the diagonal is 0."""
    edges, events = random_edges()
    weights = item_weights(edges, 40, 12, 3.0)
    gradient = events.T @ (events @ weights - events) + 3.0 * weights
    off = ~np.eye(12, dtype=bool)
    assert np.abs(np.diag(weights)).max() == 0
    assert np.abs(gradient[off]).max() < 1e-9
    assert np.abs(np.diag(gradient)).min() > 1e-3


def test_large_catalogues_are_refused_with_the_memory_they_need() -> None:
    with pytest.raises(RecipeError, match=r"100000 items.*max_items = 20000.*186 GiB"):
        EASEEncoder(EASEConfig(num_items=100_000))


def test_wrong_values_are_refused() -> None:
    with pytest.raises(RecipeError, match="regularization"):
        EASEConfig(num_items=5, regularization=0.0)
    with pytest.raises(DataError, match="another catalogue"):
        EASEEncoder.from_context(EASEConfig(num_items=24), cyclic_context(30))


def test_movielens_figure(test_data: Path) -> None:
    walks = histories(test_data)
    model = EASEEncoder.from_context(EASEConfig(num_items=ITEMS), train_context(walks))
    assert ndcg_at_10(model, walks) == pytest.approx(0.0735, abs=0.001)
