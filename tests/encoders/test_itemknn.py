"""ItemKNN: the contract, and lists and scores against a dense computation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import llmrec.encoders.itemknn as itemknn
from llmrec.encoders.itemknn import ItemKNNConfig, ItemKNNEncoder, cosine_neighbours
from llmrec.errors import DataError, RecipeError
from tests.contracts.encoders import EncoderContract, cyclic_context
from tests.encoders.movielens import ITEMS, histories, ndcg_at_10, train_context


def dense_similarities(edges: np.ndarray, users: int, items: int, shrink: float) -> np.ndarray:
    """[I+1, I+1] shrunk cosines with a zero diagonal, straight from the formula."""
    events = np.zeros((users + 1, items + 1))
    events[edges[0], edges[1]] = 1
    shared, counts = events.T @ events, events.sum(0)
    similar = shared / (np.sqrt(np.outer(counts, counts)) + shrink + 1e-30)
    np.fill_diagonal(similar, 0)
    return similar


class TestItemKNN(EncoderContract):
    config = ItemKNNConfig(num_items=24, neighbours=6, shrink=2.0)
    encoder_class = ItemKNNEncoder

    def test_scores_are_sums_over_the_lists_of_history_items(self) -> None:
        model, batch = self.model(), self.batch()
        dense = torch.zeros(25, 25)
        for item in range(1, 25):
            for other, value in zip(model.neighbours[item].tolist(), model.similarities[item].tolist(), strict=True):
                dense[item, other] += value
        for row, found in enumerate(self.scores(model, batch)):
            history = sorted(set(batch["item_ids"][row].tolist()) - {0})
            torch.testing.assert_close(found[1:], dense[history].sum(0)[1:])
        user_repr = model.user_representation(batch)
        torch.testing.assert_close(user_repr @ model.item_vectors().T, model.score(user_repr))

    def test_whole_history_is_used_where_the_batch_has_it(self) -> None:
        model, batch = self.model(), self.batch()
        whole = torch.cat([batch["item_ids"], torch.tensor([[7, 9]]).expand(6, -1)], dim=1)
        found = model.score_items({**batch, "seen": whole})
        assert torch.equal(found, model.score_items({"item_ids": whole, "lengths": batch["lengths"]}))
        assert not torch.equal(found, self.scores(model, batch))


@pytest.mark.parametrize("block", [3, 1024])
def test_lists_hold_the_best_cosines(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(itemknn, "BLOCK", block)
    rng = np.random.default_rng(0)
    edges = np.stack([rng.integers(1, 31, 200), rng.integers(1, 13, 200)])
    ids, values = cosine_neighbours(edges, 30, 12, 4, 1.5)
    dense = dense_similarities(edges, 30, 12, 1.5)
    assert ids[0].tolist() == [0] * 4 and values[0].tolist() == [0] * 4
    for item in range(1, 13):
        np.testing.assert_allclose(values[item], np.sort(dense[item])[::-1][:4], rtol=1e-6)
        np.testing.assert_allclose(dense[item, ids[item]], values[item], rtol=1e-6)
        assert item not in ids[item]


def test_items_with_few_neighbours_end_in_padding() -> None:
    edges = np.array([[1, 1, 2], [1, 2, 3]])
    ids, values = cosine_neighbours(edges, 2, 4, 3, 0.0)
    assert ids.tolist() == [[0, 0, 0], [2, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert values[1].tolist() == [1, 0, 0]


def test_wrong_values_are_refused() -> None:
    with pytest.raises(RecipeError, match="neighbours 0"):
        ItemKNNConfig(num_items=5, neighbours=0)
    with pytest.raises(DataError, match="another catalogue"):
        ItemKNNEncoder.from_context(ItemKNNConfig(num_items=24), cyclic_context(30))


def test_movielens_figure(test_data: Path) -> None:
    walks = histories(test_data)
    model = ItemKNNEncoder.from_context(ItemKNNConfig(num_items=ITEMS), train_context(walks))
    assert ndcg_at_10(model, walks) == pytest.approx(0.0540, abs=0.001)
