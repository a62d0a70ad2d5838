"""Edges: the contract over a graph encoder, the loss, what counts as a negative, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from llmrec.data.schema import SequenceBatch
from llmrec.encoders.lightgcn import LightGCNConfig, LightGCNEncoder
from llmrec.errors import DataError, RecipeError
from llmrec.strategies.base import TrainingStrategy
from llmrec.strategies.edges import Edges
from tests.contracts.encoders import cyclic_context
from tests.contracts.strategies import ITEMS, WIDTH, StrategyContract


class TestEdges(StrategyContract):
    """Negatives come with the batch here: draws per place would follow the order of the rows."""

    def strategy(self) -> TrainingStrategy:
        return Edges(negatives=3)

    def model(self) -> Any:
        torch.manual_seed(0)
        config = LightGCNConfig(num_items=ITEMS, hidden_size=8, l2_weight=0.01)
        return LightGCNEncoder.from_context(config, cyclic_context(ITEMS))

    def batch(self) -> SequenceBatch:
        generator = torch.Generator().manual_seed(3)
        return {**super().batch(), "negatives": torch.randint(1, ITEMS + 1, (5, WIDTH, 3), generator=generator)}  # type: ignore[typeddict-item]

    def test_padding_does_not_matter(self) -> None:
        model, batch = self.model(), self.batch()
        wider: dict[str, Any] = {**batch, "negatives": F.pad(batch["negatives"], (0, 0, 0, 3))}
        wider.update({name: F.pad(batch[name], (0, 3)) for name in ("item_ids", "timestamps", "targets")})  # type: ignore[literal-required]
        self.same(self.run(model, wider).total, self.run(model, batch).total)  # type: ignore[arg-type]

    def test_loss_is_the_mean_over_pairs(self) -> None:
        model, batch = self.model(), self.batch()
        edges = {(int(u), int(i)) for u, i in cyclic_context(ITEMS).train_edges.T}
        losses = []
        for row, place in (batch["targets"] > 0).nonzero().tolist():
            user, target = batch["user_ids"][row][None], batch["targets"][row, place][None]
            scores = model.score_edges(user, target, batch["negatives"][row, place][None])
            counted = [k for k in range(3) if (int(user), int(batch["negatives"][row, place, k])) not in edges]
            terms = F.softplus(-scores.positive).sum() + F.softplus(scores.negatives[0, counted]).sum()
            losses.append(terms / (1 + len(counted)))
        out = self.run(model, batch)
        self.same(out.parts["bce"], torch.stack(losses).mean())
        self.same(out.total, out.parts["bce"] + 0.01 * out.parts["l2"])

    def test_drawn_negatives_follow_the_generator(self) -> None:
        model, batch = self.model(), self.batch()
        del batch["negatives"]
        first = self.run(model, batch, seed=1).total
        assert self.run(model, batch, seed=1).total == first != self.run(model, batch, seed=2).total

    def test_known_pairs_are_no_negatives(self) -> None:
        """A user's own training items as negatives leave the positive term alone."""
        model, batch = self.model(), self.batch()
        first = cyclic_context(ITEMS).train_edges.reshape(2, -1, 10)[1, :, 0]
        own = torch.from_numpy(first)[batch["user_ids"] - 1]
        batch["negatives"] = own[:, None, None].expand(5, WIDTH, 1)
        out = self.run(model, batch)
        rows, places = (batch["targets"] > 0).nonzero(as_tuple=True)
        scores = model.score_edges(batch["user_ids"][rows], batch["targets"][rows, places], own[rows, None])
        self.same(out.parts["bce"], F.softplus(-scores.positive).mean())

    def test_a_batch_without_pairs_has_no_loss(self) -> None:
        model, batch = self.model(), self.batch()
        batch["targets"] = torch.zeros_like(batch["targets"])
        out = self.run(model, batch)
        assert out.count == 0 and out.total == 0 and out.total.requires_grad

    def test_a_batch_without_users_is_refused(self) -> None:
        model, batch = self.model(), self.batch()
        del batch["user_ids"]
        with pytest.raises(DataError, match="user_ids"):
            self.run(model, batch)

    def test_a_loss_before_preparing_is_refused(self) -> None:
        with pytest.raises(RuntimeError, match="prepare"):
            Edges().loss(self.model(), self.batch(), self.step())


def test_a_model_without_a_graph_is_refused() -> None:
    contract = StrategyContract()
    contract.strategy = lambda: Edges()  # type: ignore[method-assign]
    with pytest.raises(RecipeError, match="SASRecEncoder"):
        contract.prepared(contract.model())


@pytest.mark.parametrize("value", [0, 1.5, True, "2"])
def test_a_number_of_negatives_is_expected(value: Any) -> None:
    with pytest.raises(RecipeError, match="negatives"):
        Edges(negatives=value)
