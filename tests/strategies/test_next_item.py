"""Next-item strategy: the contract for each loss, choice of places, negatives, history mask and answer loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmrec.data.schema import SequenceBatch
from llmrec.errors import DataError, RecipeError
from llmrec.strategies.base import StepInfo, TrainingStrategy
from llmrec.strategies.next_item import NextItem
from tests.contracts.strategies import ITEMS, WIDTH, StrategyContract


class TestFullSoftmax(StrategyContract):
    def strategy(self) -> TrainingStrategy:
        return NextItem(label_smoothing=0.1)

    def test_loss_is_the_mean_over_places(self) -> None:
        model, batch = self.model(), self.batch()
        scores = model.score(model.represent(batch))
        flat = [
            F.cross_entropy(scores[row, place, 1:], batch["targets"][row, place] - 1)
            for row in range(5)
            for place in range(int(batch["lengths"][row]))
        ]
        out = NextItem().loss(model, batch, self.step())
        self.same(out.total, torch.stack(flat).mean())
        self.same(out.parts["perplexity"], out.total.exp())


class TestFullSoftmaxWithoutHistory(StrategyContract):
    def strategy(self) -> TrainingStrategy:
        return NextItem(mask_history=True)

    def test_history_up_to_the_place_is_no_class(self) -> None:
        model, batch = self.model(), self.batch()
        scores, losses = model.score(model.represent(batch)), []
        for row in range(5):
            for place in range(int(batch["lengths"][row])):
                target = int(batch["targets"][row, place])
                known = set(batch["item_ids"][row, : place + 1].tolist()) - {target}
                classes = [item for item in range(1, ITEMS + 1) if item not in known]
                losses.append(scores[row, place, classes].logsumexp(0) - scores[row, place, target])
        self.same(self.run(model, batch).total, torch.stack(losses).mean())


class TestSampledSoftmaxShared(StrategyContract):
    def strategy(self) -> TrainingStrategy:
        return NextItem(loss="sampled_softmax", negatives=12, mask_history=True)

    def test_another_draw_gives_another_loss(self) -> None:
        model, batch = self.model(), self.batch()
        assert self.run(model, batch, seed=1).total != self.run(model, batch, seed=2).total


class TestGBCEPerPlace(StrategyContract):
    """Negatives come with the batch here: draws per place would follow the order of the rows."""

    def strategy(self) -> TrainingStrategy:
        return NextItem(loss="gbce", negatives=6, shared_negatives=False)

    def batch(self) -> SequenceBatch:
        generator = torch.Generator().manual_seed(3)
        return {**super().batch(), "negatives": torch.randint(1, ITEMS + 1, (5, WIDTH, 6), generator=generator)}  # type: ignore[typeddict-item]

    def test_padding_does_not_matter(self) -> None:
        model, batch = self.model(), self.batch()
        wider: dict[str, Any] = {**batch, "negatives": F.pad(batch["negatives"], (0, 0, 0, 3))}
        wider.update({name: F.pad(batch[name], (0, 3)) for name in ("item_ids", "timestamps", "targets")})  # type: ignore[literal-required]
        self.same(self.run(model, wider).total, self.run(model, batch).total)  # type: ignore[arg-type]


class TestBCE(StrategyContract):
    def strategy(self) -> TrainingStrategy:
        return NextItem(loss="bce", negatives=3)


def step(seed: int = 0) -> StepInfo:
    return StepInfo(0, 1, 0.0, torch.Generator().manual_seed(seed))


class Table(nn.Module):
    """A `DenseScorer` that is no encoder: one learned state per position."""

    def __init__(self, causal: bool = True, supervises: str = "all") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.states, self.items = nn.Parameter(torch.randn(2, 4, 3)), nn.Parameter(torch.randn(ITEMS + 1, 3))
        self.causal, self.supervises = causal, supervises

    def represent(self, batch: SequenceBatch) -> Tensor:
        return self.states

    def score(self, user_repr: Tensor, item_ids: Tensor | None = None) -> Tensor:
        if item_ids is None or item_ids.dim() == 1:
            return user_repr @ (self.items if item_ids is None else self.items[item_ids]).T
        return (self.items[item_ids] * user_repr.unsqueeze(-2)).sum(-1)


def table_batch(**more: Tensor) -> SequenceBatch:
    return {
        "item_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]),
        "lengths": torch.tensor([4, 2]),
        "targets": torch.tensor([[2, 3, 4, 7], [6, 8, 0, 0]]),
        **more,
    }  # type: ignore[typeddict-item,return-value]


def test_any_dense_scorer_can_be_trained() -> None:
    model = Table()
    out = NextItem().loss(model, table_batch(), step())
    out.total.backward()
    assert out.count == 6
    reached = model.states.grad.abs().sum(-1) > 0  # type: ignore[union-attr]
    assert reached.tolist() == [[True] * 4, [True, True, False, False]]


@pytest.mark.parametrize("options", [{"causal": False}, {"supervises": "last"}])
def test_models_that_saw_their_targets_learn_at_the_last_event_only(options: dict[str, Any]) -> None:
    model = Table(**options)
    out = NextItem().loss(model, table_batch(), step())
    out.total.backward()
    assert out.count == 2
    assert (model.states.grad.abs().sum(-1) > 0).tolist() == [[False, False, False, True], [False, True, False, False]]  # type: ignore[union-attr]


def test_a_batch_without_supervised_places_has_loss_zero() -> None:
    model = Table()
    out = NextItem().loss(model, table_batch(targets=torch.zeros(2, 4, dtype=torch.long)), step())
    out.total.backward()
    assert out.total == 0 and out.count == 0 and not model.states.grad.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("loss", ["sampled_softmax", "bce", "gbce"])
def test_given_negatives_replace_the_draw(loss: Any) -> None:
    model, strategy = Table(), NextItem(loss=loss, negatives=3)
    strategy._num_items = ITEMS
    batch = table_batch(negatives=torch.tensor([9, 10, 11]))
    per_place = table_batch(negatives=torch.tensor([9, 10, 11]).expand(2, 4, 3))
    first = strategy.loss(model, batch, step(1)).total
    torch.testing.assert_close(strategy.loss(model, batch, step(2)).total, first, rtol=0, atol=0)
    torch.testing.assert_close(strategy.loss(model, per_place, step(3)).total, first)


def test_draws_per_place_differ_between_places() -> None:
    strategy = NextItem(loss="bce", negatives=50, shared_negatives=False)
    strategy._num_items = ITEMS
    rows, places = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0])
    drawn = strategy._negatives_at(Table(), table_batch(), rows, places, step())
    assert drawn.shape == (3, 50) and drawn.min() >= 1 and drawn.max() <= ITEMS
    assert not torch.equal(drawn[0], drawn[1])


def test_draws_need_the_size_of_the_catalogue() -> None:
    with pytest.raises(RecipeError, match="size of the catalogue is unknown"):
        NextItem(loss="bce").loss(Table(), table_batch(), step())


def test_answers_are_left_to_the_model_that_writes_them() -> None:
    class Writer(nn.Module):
        def answer_loss(self, batch: SequenceBatch) -> Tensor:
            return torch.tensor(2.5)

    labels = torch.tensor([[-100, -100, 4, 9], [-100, -100, -100, 9]])
    out = NextItem().loss(Writer(), {"token_labels": labels}, step())  # type: ignore[typeddict-item]
    assert out.total == 2.5 and out.count == 3


def test_a_batch_without_targets_is_refused() -> None:
    with pytest.raises(DataError, match="token_labels"):
        NextItem().loss(Table(), {"item_ids": torch.ones(1, 1), "lengths": torch.ones(1)}, step())  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"loss": "hinge"}, "loss"),
        ({"negatives": 0}, "negatives"),
        ({"negatives": "many"}, "negatives"),
        ({"shared_negatives": "no"}, "shared_negatives"),
        ({"gbce_t": 1.5}, "gbce_t"),
        ({"label_smoothing": 1}, "label_smoothing"),
        ({"mask_history": 1}, "mask_history"),
        ({"loss": "bce", "label_smoothing": 0.1}, "label_smoothing"),
        ({"mask_history": True, "label_smoothing": 0.1}, "label_smoothing"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], option: str) -> None:
    with pytest.raises(RecipeError, match=f"option '{option}'"):
        NextItem(**options)
