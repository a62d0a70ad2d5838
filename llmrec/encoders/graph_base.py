"""Base of encoders over the user-item graph: a history is a new user node linked to its items.

Shapes: N = U + I nodes, users first; item_ids [B, L] right padded with 0, scores [B, I+1].
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.blocks.graph_signals import Kept, SparseSymmetric, new_nodes, running_nodes
from llmrec.encoders.base import EncoderOutput, SequenceEncoder, SequenceEncoderConfig, check_same_catalogue
from llmrec.errors import RecipeError

if TYPE_CHECKING:
    from typing import Self

    from llmrec.data.graph import UserItemGraph
    from llmrec.data.schema import DataContext, SequenceBatch


@dataclass
class EdgeScores:
    """What `GraphEncoder.score_edges` returns.

    Args:
        positive: [n] scores of the true pairs.
        negatives: [n, K] scores of the same users with sampled items.
        auxiliary: A scalar the encoder adds to the objective, weighted by its own options, or None.
        parts: Named scalars for the log.
    """

    positive: Tensor
    negatives: Tensor
    auxiliary: Tensor | None
    parts: dict[str, Tensor]


class GraphEncoderConfig(SequenceEncoderConfig):
    """Options of encoders over the user-item graph.

    Args:
        feature_width: Principal directions a feature level keeps.
        l2_weight: Weight of the squared length of a training pair's identity vectors.
        train_user: What scores a training pair (u, i): "history", a new node linked to the other items of u, which is
            what the evaluation asks for and leaves the pair's own link out (ours); "node", u itself, as published.
        recency: Below 1, the links of a history fade with age; see `llmrec.blocks.graph_signals.new_nodes`.
        item_neighbours: Edges from each item to its k nearest by content, for items without training events; 0 = none.
        neighbour_weights: Feature level -> factor on those edges; null weighs all levels the same.
        levels: Feature level -> width; set from the data set.
        graph_entries: Stored numbers of S; set from the data set.
    """

    model_type = "llmrec_graph_encoder"

    feature_width: int = 128
    l2_weight: float = 1e-4
    train_user: Literal["history", "node"] = "history"
    recency: float = 1.0
    item_neighbours: int = 0
    neighbour_weights: dict[str, float] | None = None
    levels: dict[str, int] | None = None
    graph_entries: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.feature_width < 1:
            raise RecipeError(f"encoder.feature_width: found {self.feature_width}, expected a whole number from 1")
        for name in ("l2_weight", "item_neighbours"):
            if getattr(self, name) < 0:
                raise RecipeError(f"encoder.{name}: found {getattr(self, name)}, expected 0 or more")
        if self.train_user not in ("history", "node"):
            raise RecipeError(f"encoder.train_user: found {self.train_user!r}, expected history or node")
        if not 0 < self.recency <= 1:
            raise RecipeError(f"encoder.recency: found {self.recency}, expected above 0, at most 1")

    @property
    def num_signals(self) -> int:
        """M: identities, and one signal for each feature level."""
        return 1 + len(self.levels or {})


class GraphEncoder(SequenceEncoder):
    """Base, named before `SequenceEncoder`, of encoders over the user-item graph: `item_states` and `score_edges`.

    A history is read as a user node that is not in the graph, linked to its items (`new_nodes`): users of training get
    the state their history gives, like everybody else, and no row of a user table is asked for.

    Nodes are users 1..U as 0..U-1, then items. Buffers: the normalised adjacency `graph`; `item_scale` [I+1], 1 /
    sqrt(degree), 0 for padding and 1 for items without an edge; `content_m` [I+1, F_m] and `present` [M - 1, I+1],
    False where an item lacks a feature level (its row of the content is zero).
    """

    optional: ClassVar[frozenset[str]] = frozenset({"seen"})
    reads_item_features: ClassVar[bool] = True

    config: GraphEncoderConfig
    item_scale: Tensor
    present: Tensor

    def __init__(self, config: GraphEncoderConfig) -> None:
        super().__init__(config)
        widths = list((config.levels or {}).values())
        self.user_embedding = nn.Embedding(config.num_users + 1, config.hidden_size, padding_idx=0)
        self.item_embedding = nn.Embedding(config.num_items + 1, config.hidden_size, padding_idx=0)
        self.graph = SparseSymmetric(config.num_users + config.num_items, config.graph_entries)
        self.register_buffer("item_scale", torch.zeros(config.num_items + 1))
        self.register_buffer("present", torch.zeros(len(widths), config.num_items + 1, dtype=torch.bool))
        for number, width in enumerate(widths):
            self.register_buffer(f"content_{number}", torch.zeros(config.num_items + 1, width))
        self._kept_items, self._kept_content = Kept(), Kept()

    @classmethod
    def from_context(cls, config: SequenceEncoderConfig, context: DataContext) -> Self:
        """An untrained model over the graph of the training events.

        Raises:
            DataError: The events or features belong to another catalogue, or there are none.
        """
        from llmrec.data.graph import UserItemGraph, content_signals  # scipy: needed by graph encoders alone

        assert isinstance(config, GraphEncoderConfig)
        check_same_catalogue(config, context)
        graph = UserItemGraph.from_context(context)
        content = content_signals(context.item_features, config.feature_width)
        if config.item_neighbours:
            graph = graph.with_neighbours(context.item_features, config.item_neighbours, config.neighbour_weights)
        matrix, degrees = graph.normalised, graph.item_degrees
        config.num_users, config.graph_entries = context.num_users, matrix.nnz
        config.levels = {name: int(values.shape[1]) for name, (values, _) in content.items()}
        cls.settle(config, graph)
        model = cls(config)
        model.graph.fill(matrix.indptr, matrix.indices, matrix.data)
        model.item_scale.copy_(torch.from_numpy(np.where(degrees > 0, degrees, 1.0)).rsqrt())
        model.item_scale[0] = 0.0
        for number, (values, mask) in enumerate(content.values()):
            getattr(model, f"content_{number}").copy_(torch.from_numpy(values))
            model.present[number] = torch.from_numpy(mask)
        return model

    @classmethod
    def settle(cls, config: Any, graph: UserItemGraph) -> None:  # noqa: B027
        """Decide, before the model is made, options that depend on the graph. The default decides none."""

    @abstractmethod
    def item_states(self) -> tuple[Tensor, ...]:
        """Item vectors [I+1, D], row 0 zero, and whatever else an item has, from a pass over the whole graph."""

    @abstractmethod
    def score_edges(self, users: Tensor, positives: Tensor, negatives: Tensor) -> EdgeScores:
        """Scores of training pairs; whose state stands for a user is an option, `train_user`.

        Args:
            users: [n] user ids.
            positives: [n] items they met.
            negatives: [n, K] sampled items.
        """

    def identities(self) -> Tensor:
        """[N, d], the free vectors of users and items."""
        return torch.cat([self.user_embedding.weight[1:], self.item_embedding.weight[1:]])

    def content(self) -> list[Tensor]:
        """[I+1, F_m] per feature level; rows of items without it are zero."""
        return [getattr(self, f"content_{number}") for number in range(self.config.num_signals - 1)]

    def other_links(self, table: Tensor, users: Tensor, items: Tensor) -> Tensor:
        """[n, D]: users as new nodes linked to all their training items but the given one, whose share is taken out.

        Args:
            table: [I+1, D] item vectors.
            users, items: [n] training pairs.
        """
        count, starts = self.config.num_users, self.graph.starts
        degrees = (starts[users] - starts[users - 1]).to(table.dtype).unsqueeze(-1)
        everything = self.graph(F.pad(table[1:], (0, 0, count, 0)))[users - 1] * degrees.sqrt()
        own = table[items] * self.item_scale[items].to(table.dtype).unsqueeze(-1)
        return (everything - own) / (degrees - 1).clamp(min=1).sqrt()

    def weight_penalty(self, users: Tensor, items: Tensor) -> Tensor:
        """Squared length of the identity vectors of a batch's pairs, per pair; unweighted."""
        lengths = self.user_embedding(users).pow(2).sum() + self.item_embedding(items).pow(2).sum()
        return lengths / max(1, len(users))

    def items(self) -> tuple[Tensor, ...]:
        """`item_states`; in evaluation mode computed once for all calls without gradients, until a weight changes."""
        if torch.is_grad_enabled() or self.training:
            return self.item_states()
        found: tuple[Tensor, ...] = self._kept_items.get([*self.parameters(), *self.buffers()], self.item_states)
        return found

    def train(self, mode: bool = True) -> Self:
        """Switch modes; nothing is kept across the switch, since fused optimizers change weights without a trace."""
        if mode != self.training:
            self._kept_items.drop()
        return super().train(mode)

    def forward(
        self,
        item_ids: Tensor,
        lengths: Tensor,
        *,
        item_embeds: Tensor | None = None,
        seen: Tensor | None = None,
        **features: Tensor,
    ) -> EncoderOutput:
        """The new node after each event; `user_repr` reads `seen` where it is given."""
        table = self._links()
        hidden = running_nodes(item_ids, table, self.config.recency)
        user_repr = self.last_state(hidden, lengths) if seen is None else new_nodes(seen, table, self.config.recency)
        return EncoderOutput(hidden=hidden, user_repr=user_repr)

    def user_representation(self, batch: SequenceBatch) -> Tensor:
        """[B, D], without the states of single positions."""
        return new_nodes(batch.get("seen", batch["item_ids"]), self._links(), self.config.recency)

    def item_vectors(self) -> Tensor:
        """[I+1, D]; row 0 is zero."""
        return self.items()[0]

    def score(self, user_repr: Tensor, item_ids: Tensor | None = None) -> Tensor:
        """[..., D] -> [..., I+1]; with item_ids [..., C] or [C] -> [..., C]. Padding is not masked here."""
        table = self.item_vectors().to(user_repr.dtype)
        if item_ids is None or item_ids.dim() == 1:
            table = table if item_ids is None else table[item_ids]
            return user_repr @ table.T / self.config.temperature
        return (table[item_ids] * user_repr.unsqueeze(-2)).sum(-1) / self.config.temperature

    def _links(self) -> Tensor:
        table = self.item_vectors()
        return table * self.item_scale.to(table.dtype)[:, None]
