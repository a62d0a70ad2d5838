"""What the tests of graph encoders share: content for the contract's items, prepared strategy, held-out test."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from llmrec.data.schema import DataContext, ItemFeatures
from llmrec.encoders.graph_base import GraphEncoder
from llmrec.strategies.base import StepInfo, TrainContext
from llmrec.strategies.edges import Edges
from llmrec.strategies.next_item import NextItem
from tests.contracts.encoders import EVENTS, USERS, EncoderContract, cyclic_context, cyclic_histories, stamped


def content(num_items: int, seed: int = 0) -> ItemFeatures:
    """Two levels of random numbers; item 2 has no picture, item 3 no text, item 4 neither."""
    rng = np.random.default_rng(seed)
    features: ItemFeatures = {}
    for name, missing in (("text", [0, 3, 4]), ("image", [0, 2, 4])):
        mask = np.ones(num_items + 1, dtype=bool)
        mask[missing] = False
        features[name] = (rng.standard_normal((num_items + 1, 6)).astype(np.float32), mask)
    return features


def with_features(context: DataContext, features: ItemFeatures) -> DataContext:
    return DataContext(context.num_items, context.num_users, context.train_counts, context.train_edges, features)


def prepared(context: DataContext, model: GraphEncoder, negatives: int = 1) -> Edges:
    strategy = Edges(negatives)
    strategy.prepare(TrainContext(context, 1, 1, 0), model, torch.Generator())
    return strategy


def fit(model: GraphEncoder, context: DataContext, steps: int, learning_rate: float = 2e-2, negatives: int = 4) -> None:
    """Train on all pairs at once; leaves the model in evaluation mode."""
    strategy = prepared(context, model, negatives)
    users, items = (torch.from_numpy(ids) for ids in context.train_edges)
    batch: Any = {"user_ids": users, "targets": items[:, None], "item_ids": items[:, None]}
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        info = StepInfo(step, steps, 0.0, torch.Generator().manual_seed(step))
        strategy.loss(model, batch, info).total.backward()
        optimizer.step()
    model.eval()


class GraphEncoderContract(EncoderContract):
    """The contract for encoders over a graph; `context` has content, and what order alone decides is not asked for."""

    takes_item_embeds = False

    def context(self) -> DataContext:
        items = self.config.num_items
        return with_features(cyclic_context(items), content(items))

    def strategy(self) -> Edges:
        return prepared(self.context(), self.model())  # type: ignore[arg-type]

    def test_can_be_laid_out_without_data(self) -> None:
        """`llmrec check` asks for widths on the meta device, before a graph is there."""
        with torch.device("meta"), torch.no_grad():
            model = self.encoder_class(copy.deepcopy(self.config))
            assert model.item_vectors().shape == (self.config.num_items + 1, model.gate_dim)

    def test_overfits_cyclic_histories(self, only_trainable: None) -> None:
        """The next item and the one in front of the window are mirror images to a model without order.

        Of the items outside the history, these two are the best for more than 95% of the users. The objective is
        next_item over the states of all positions, which graph encoders know as well.
        """
        model = self.model().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.overfit_learning_rate, weight_decay=0.0)
        histories = torch.from_numpy(cyclic_histories(self.config.num_items))
        asked = stamped(histories[:, 1:-1], torch.full((USERS,), EVENTS - 1))
        hit_rate = 0.0
        for step in range(self.overfit_steps):
            optimizer.zero_grad()
            info = StepInfo(step, self.overfit_steps, 0.0, torch.Generator().manual_seed(step))
            NextItem(mask_history=True).loss(model, self.training_batch(), info).total.backward()
            optimizer.step()
            if step % 25 == 24:
                with torch.no_grad():
                    best = model.eval().recommend({**asked, "seen": histories[:, 1:-1]}, 2).item_ids
                hit_rate = (best == histories[:, -1:]).any(1).float().mean().item()
                if hit_rate > 0.95:
                    break
                model.train()
        assert hit_rate > 0.95
