"""Edges: link prediction on the training graph, the objective of graph encoders.

    loss = -[ln sig(s(u, i+)) + sum_k ln(1 - sig(s(u, i-_k)))] / (K + 1)        i-_k uniform over the catalogue

averaged over the training pairs (u, i+) of a batch of windows, plus what the encoder adds (`EdgeScores.auxiliary`);
K = 1 is SSR's L_BCE. Pairs are what windows supervise: every training event but a user's first, which is an edge of the
graph and no positive here. A sampled item that is itself an edge of the user does not count as a negative (ours).

Whether the user of a pair is its own node, which the graph pass has seen with these edges, or a new node without the
pair's link, is the encoder's option. Evaluation always reads a new node, and never has the target among its edges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llmrec.blocks.losses import binary_cross_entropy, draw_negatives, mean_scores
from llmrec.encoders.graph_base import GraphEncoder
from llmrec.errors import DataError, RecipeError
from llmrec.paper import Paper
from llmrec.strategies.base import StepInfo, StepLoss, TrainContext, TrainingStrategy

if TYPE_CHECKING:
    from torch import nn

    from llmrec.data.schema import SequenceBatch

PAPER = Paper(
    title="Structured Spectral Reasoning for Frequency-Adaptive Multimodal Recommendation",
    venue="NeurIPS 2025",
    url_id="2512.01372",
    system="SSR",
)


@dataclass
class Edges(TrainingStrategy):
    """Tell training pairs from sampled ones.

    Args:
        negatives: K, sampled items per pair.
    """

    negatives: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.negatives, bool) or not isinstance(self.negatives, int) or self.negatives < 1:
            raise RecipeError(
                f"strategy 'edges', option 'negatives': found {self.negatives!r}, expected a whole number from 1"
            )
        self._edges: Tensor | None = None
        self._num_items = 0

    def prepare(self, context: TrainContext, model: nn.Module, generator: torch.Generator) -> None:
        """Remember the training pairs, which are no negatives.

        Raises:
            RecipeError: The model has no graph.
        """
        if not isinstance(model, GraphEncoder):
            raise RecipeError(
                f"strategy 'edges': found {type(model).__name__}, expected an encoder over the user-item graph "
                "(ssr, lightgcn); others learn by next_item"
            )
        users, items = context.data.train_edges
        self._num_items = context.data.num_items
        self._edges = torch.from_numpy(np.unique(users * (self._num_items + 1) + items))

    def loss(self, model: Any, batch: SequenceBatch, step: StepInfo) -> StepLoss:
        """Loss of the pairs a batch supervises.

        Args:
            model: A `GraphEncoder`.
            batch: `user_ids` and `targets`; `negatives` [B, L, K] replace the draw.
            step: Its generator draws the negatives.

        Raises:
            DataError: The batch has no users or no targets.
            RuntimeError: `prepare` was not called.
        """
        if missing := {"user_ids", "targets"} - set(batch):
            raise DataError("no pairs to learn from", found=f"fields {sorted(batch)}", expected=f"also {missing}")
        if self._edges is None:
            raise RuntimeError("Edges.loss before Edges.prepare: the training pairs are unknown")
        rows, places = (batch["targets"] > 0).nonzero(as_tuple=True)
        if not len(rows):
            return StepLoss(total=model.item_embedding.weight.sum() * 0.0, count=0)
        users, positives = batch["user_ids"][rows], batch["targets"][rows, places]
        if "negatives" in batch:
            negatives = batch["negatives"][rows, places]
        else:
            negatives = draw_negatives(self._num_items, (len(rows), self.negatives), step.generator, rows.device)
        scores = model.score_edges(users, positives, negatives)
        hits = self._known(users, negatives)
        total = binary_cross_entropy(scores.positive, scores.negatives, hits=hits)
        parts = {"bce": total.detach(), **mean_scores(scores.positive, scores.negatives, hits), **scores.parts}
        if scores.auxiliary is not None:
            total = total + scores.auxiliary
        return StepLoss(total=total, parts=parts, count=len(rows))

    def _known(self, users: Tensor, items: Tensor) -> Tensor:
        """[n], [n, K] -> [n, K] bool: whether the pair is an edge of training."""
        assert self._edges is not None
        self._edges = self._edges.to(users.device)
        keys = users[:, None] * (self._num_items + 1) + items
        places = torch.searchsorted(self._edges, keys).clamp(max=len(self._edges) - 1)
        return self._edges[places] == keys
