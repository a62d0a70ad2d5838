"""ALS: the contract, one sweep against a dense computation, the objective, and fold-in against the fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse

import llmrec.encoders.als as als
from llmrec.data.schema import DataContext
from llmrec.encoders.als import ALSConfig, ALSEncoder, event_counts, first_occurrences, fit_items, least_squares
from llmrec.errors import DataError, RecipeError
from tests.contracts.encoders import EncoderContract, cyclic_context
from tests.encoders.movielens import ITEMS, histories, ndcg_at_10, train_context

USERS, CATALOGUE, WIDTH = 30, 14, 5
REGULARIZATION, ALPHA = 0.3, 7.0


def random_context() -> DataContext:
    """Events with repeats; user 30 and item 14 have none."""
    rng = np.random.default_rng(0)
    edges = np.stack([rng.integers(1, USERS, 200), rng.integers(1, CATALOGUE, 200)])
    return DataContext(CATALOGUE, USERS, np.bincount(edges[1], minlength=CATALOGUE + 1), edges)


def dense_counts(context: DataContext) -> np.ndarray:
    """r [U+1, I+1], counted one event at a time."""
    counts = np.zeros((context.num_users + 1, context.num_items + 1))
    for user, item in context.train_edges.T:
        counts[user, item] += 1
    return counts


def dense_step(fixed: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Equation 4 as it is written: a diagonal matrix of confidences over the whole catalogue for every row."""
    found = []
    for row in counts:
        confidence = np.diag(1 + ALPHA * row)
        system = fixed.T @ confidence @ fixed + REGULARIZATION * np.eye(fixed.shape[1])
        found.append(np.linalg.solve(system, fixed.T @ confidence @ (row > 0).astype(float)))
    return np.array(found)


def objective(users: np.ndarray, items: np.ndarray, counts: np.ndarray) -> float:
    """Equation 3 over every pair."""
    errors = (1 + ALPHA * counts) * ((counts > 0) - users @ items.T) ** 2
    return float(errors.sum() + REGULARIZATION * ((users**2).sum() + (items**2).sum()))


def start() -> torch.Tensor:
    items = torch.randn(CATALOGUE + 1, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return items * (torch.arange(CATALOGUE + 1) > 0)[:, None]


class TestALS(EncoderContract):
    config = ALSConfig(num_items=24, factors=8, iterations=5, regularization=0.1, alpha=10.0)
    encoder_class = ALSEncoder

    def test_whole_history_is_used_where_the_batch_has_it(self) -> None:
        model, batch = self.model(), self.batch()
        whole = torch.cat([batch["item_ids"], torch.tensor([[7, 9]]).expand(6, -1)], dim=1)
        found = model.score_items({**batch, "seen": whole})
        torch.testing.assert_close(found, model.score_items({"item_ids": whole, "lengths": batch["lengths"]}))
        assert (found - self.scores(model, batch))[:, 1:].abs().max() > 1e-3
        out = model(**model.inputs({**batch, "seen": whole}))
        torch.testing.assert_close(out.user_repr, model.user_representation({**batch, "seen": whole}))
        torch.testing.assert_close(out.hidden, self.states(model, batch))

    def test_every_state_is_the_vector_of_its_prefix(self) -> None:
        """Also with repeats, whose first occurrence is another place for another prefix."""
        model = self.model()
        items = torch.tensor([[3, 5, 3, 3, 8, 5], [1, 2, 9, 4, 2, 1]])
        states = self.states(model, {"item_ids": items, "lengths": torch.tensor([6, 6])})
        for end in range(1, 7):
            prefix = {"item_ids": items[:, :end], "lengths": torch.tensor([end, end])}
            torch.testing.assert_close(states[:, end - 1], model.user_representation(prefix))

    def test_the_seed_is_an_option_and_nothing_else_is_drawn(self) -> None:
        first = self.model(1)
        state = torch.get_rng_state()
        ALSEncoder.from_context(ALSConfig(num_items=24, factors=8), self.context())
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(self.model(2).item_factors, first.item_factors)
        options = {**self.config.to_diff_dict(), "seed": 1}
        other = ALSEncoder.from_context(ALSConfig(**options), self.context())
        assert not torch.allclose(other.item_factors, first.item_factors)


@pytest.mark.parametrize("chunk", [1, 300, 1 << 22])
def test_a_sweep_is_the_dense_computation(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(als, "CHUNK", chunk)
    context = random_context()
    counts, dense, items = event_counts(context), dense_counts(context), start()
    users = least_squares(items, counts, REGULARIZATION, ALPHA)
    expected = dense_step(items.numpy(), dense)
    np.testing.assert_allclose(users.numpy(), expected, rtol=1e-9, atol=1e-12)
    items = least_squares(users, counts.T.tocsr(), REGULARIZATION, ALPHA)
    np.testing.assert_allclose(items.numpy(), dense_step(expected, dense.T), rtol=1e-9, atol=1e-12)
    assert not users[0].any() and not users[USERS].any() and not items[0].any() and not items[CATALOGUE].any()


def test_the_gradient_of_the_objective_vanishes_after_a_step() -> None:
    """Taken by automatic differentiation of equation 3, at the users just solved for; the items' does not vanish."""
    context = random_context()
    items = start().requires_grad_()
    users = least_squares(items.detach(), event_counts(context), REGULARIZATION, ALPHA).requires_grad_()
    counts = torch.from_numpy(dense_counts(context))
    errors = (1 + ALPHA * counts) * ((counts > 0).double() - users @ items.T) ** 2
    total = errors.sum() + REGULARIZATION * ((users**2).sum() + (items**2).sum())
    total.backward()
    assert users.grad is not None and items.grad is not None
    assert users.grad.abs().max() < 1e-9 < 1e-2 < items.grad.abs().max()


def test_no_step_raises_the_objective() -> None:
    context = random_context()
    counts, dense, items = event_counts(context), dense_counts(context), start()
    users, losses = torch.zeros(USERS + 1, WIDTH, dtype=torch.float64), []
    for _ in range(6):
        users = least_squares(items, counts, REGULARIZATION, ALPHA)
        losses.append(objective(users.numpy(), items.numpy(), dense))
        items = least_squares(users, counts.T.tocsr(), REGULARIZATION, ALPHA)
        losses.append(objective(users.numpy(), items.numpy(), dense))
    assert (np.diff(losses) < 1e-9 * losses[0]).all() and losses[-1] < 0.9 * losses[0]


def test_fold_in_of_a_training_history_is_the_user_step() -> None:
    """Repeats in the history count as repeated events do in the fit, in any order."""
    context = random_context()
    config = ALSConfig(
        num_items=CATALOGUE, factors=WIDTH, iterations=3, regularization=REGULARIZATION, alpha=ALPHA, seed=5
    )
    model = ALSEncoder.from_context(config, context)
    torch.testing.assert_close(model.item_factors, fit_items(event_counts(context), config).float())
    users = least_squares(model.item_factors.double(), event_counts(context), REGULARIZATION, ALPHA)
    repeated = 0
    for user in range(1, USERS):
        items = context.train_edges[1, context.train_edges[0] == user]
        repeated += len(items) - len(set(items.tolist()))
        history = torch.tensor(items[::-1].copy())[None]
        found = model.user_representation({"item_ids": history, "lengths": torch.tensor([len(items)])})
        torch.testing.assert_close(found[0], users[user].float(), rtol=1e-4, atol=1e-5)
    assert repeated > 10


def test_first_occurrences_are_marked() -> None:
    found = first_occurrences(torch.tensor([[4, 2, 4, 0, 0], [1, 1, 1, 2, 1]]))
    assert found.tolist() == [[1, 1, 0, 1, 0], [1, 0, 0, 1, 0]]


def test_what_users_share_is_recommended() -> None:
    """Two circles of users, each with half of the catalogue: an unseen item of one's own half beats the other half."""
    rng = np.random.default_rng(1)
    users = np.repeat(np.arange(1, 41), 6)
    items = np.concatenate([rng.permutation(10)[:6] + 1 + 10 * (user % 2) for user in range(1, 41)])
    context = DataContext(20, 40, np.bincount(items, minlength=21), np.stack([users, items]))
    model = ALSEncoder.from_context(ALSConfig(num_items=20, factors=2, regularization=1.0), context)
    history = torch.tensor([[2, 5, 9], [12, 15, 19]])
    batch = {"item_ids": history, "lengths": torch.tensor([3, 3]), "seen": history}
    best = model.recommend(batch, 7).item_ids
    assert set(best[0].tolist()) == set(range(1, 11)) - {2, 5, 9}
    assert set(best[1].tolist()) == set(range(11, 21)) - {12, 15, 19}


def test_a_catalogue_of_one_item_and_more_factors_than_items() -> None:
    edges = np.array([[1, 1, 2], [1, 1, 1]])
    context = DataContext(1, 2, np.array([0, 3]), edges)
    model = ALSEncoder.from_context(ALSConfig(num_items=1, factors=4), context)
    score = model.score_items({"item_ids": torch.tensor([[1]]), "lengths": torch.tensor([1])})
    assert score[0, 1] == pytest.approx(1.0, abs=0.1)
    assert isinstance(event_counts(context), sparse.csr_matrix) and event_counts(context)[1, 1] == 2


def test_wrong_values_are_refused() -> None:
    for name, value in (("factors", 0), ("iterations", 0), ("regularization", 0.0), ("alpha", -1.0)):
        with pytest.raises(RecipeError, match=f"encoder.{name}: found {value}"):
            ALSConfig(num_items=5, **{name: value})
    assert ALSConfig(num_items=5, factors=8).hidden_size == 8
    with pytest.raises(DataError, match="another catalogue"):
        ALSEncoder.from_context(ALSConfig(num_items=24), cyclic_context(30))


def test_movielens_figure(test_data: Path) -> None:
    walks = histories(test_data)
    config = ALSConfig(num_items=ITEMS, factors=32, iterations=5, alpha=1.0, regularization=10.0)
    model = ALSEncoder.from_context(config, train_context(walks))
    assert ndcg_at_10(model, walks) == pytest.approx(0.0744, abs=0.001)
