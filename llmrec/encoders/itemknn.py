"""ItemKNN: item-based top-N recommendation by cosine neighbours (Deshpande and Karypis, ACM TOIS 2004).

With X [U, I] the zero-one matrix of training events, c_ij the users two items share and c_i the users of an item,

    s_ij = c_ij / (sqrt(c_i c_j) + shrink),   score(user, j) = sum over items i of the history with j in N(i) of s_ij

where N(i) are the k most similar items of i. The shrinkage, which holds back similarities seen with few users, is the
usual addition to the paper. The whole history (`seen`) is used where the batch carries it, the window otherwise; states
of single positions always read the window only. The order and repetition of events play no part.

Shapes: hidden [B, L, I+1], user_repr [B, I+1] (multi-hot), neighbours and similarities [I+1, k].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from llmrec.encoders.base import (
    MultiHotHistories,
    SequenceEncoder,
    SequenceEncoderConfig,
    check_same_catalogue,
    register,
)
from llmrec.errors import RecipeError
from llmrec.paper import Paper

if TYPE_CHECKING:
    from typing import Self

    from llmrec.data.schema import DataContext

PAPER = Paper(
    title="Item-Based Top-N Recommendation Algorithms",
    venue="ACM TOIS 2004",
    url_id="10.1145/963770.963776",
    system="ItemKNN",
)
BLOCK = 1024
"""Items whose similarities are held densely at one time while fitting."""


class ItemKNNConfig(SequenceEncoderConfig):
    """Options of ItemKNN.

    Args:
        neighbours: k, similar items kept for each item.
        shrink: Added to the denominator of the cosine.
    """

    model_type = "llmrec_itemknn"

    neighbours: int = 100
    shrink: float = 10.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.neighbours < 1 or self.shrink < 0:
            raise RecipeError(
                f"encoder itemknn: found neighbours {self.neighbours} and shrink {self.shrink}, "
                "expected neighbours from 1 and shrink from 0"
            )


class ItemKNNEncoder(MultiHotHistories, SequenceEncoder):
    """Neighbour lists as a model."""

    config_class = ItemKNNConfig
    config: ItemKNNConfig
    neighbours: Tensor
    similarities: Tensor

    def __init__(self, config: ItemKNNConfig) -> None:
        super().__init__(config)
        shape = (config.num_items + 1, min(config.neighbours, max(1, config.num_items - 1)))
        # Item 0 with similarity 0 fills the lists of items with fewer neighbours.
        self.register_buffer("neighbours", torch.zeros(shape, dtype=torch.long))
        self.register_buffer("similarities", torch.zeros(shape))
        self.post_init()

    @classmethod
    def from_context(cls, config: SequenceEncoderConfig, context: DataContext) -> Self:
        """A finished model.

        Raises:
            DataError: The events belong to another catalogue.
        """
        assert isinstance(config, ItemKNNConfig)
        check_same_catalogue(config, context)
        model = cls(config)
        k = model.neighbours.shape[1]
        ids, values = cosine_neighbours(context.train_edges, context.num_users, context.num_items, k, config.shrink)
        model.neighbours.copy_(torch.from_numpy(ids))
        model.similarities.copy_(torch.from_numpy(values))
        return model.eval()

    def item_vectors(self) -> Tensor:
        """[I+1, I+1] dense; row j holds the similarities of item j to the items it is a neighbour of.

        Scoring never builds it; it exists for code that wants vectors, on catalogues where it fits.
        """
        size = self.config.num_items + 1
        dense = torch.zeros(size, size, device=self.device, dtype=self.dtype)
        dense.scatter_(1, self.neighbours, self.similarities)
        dense[:, 0] = 0.0
        return dense.T

    def score(self, user_repr: Tensor, item_ids: Tensor | None = None) -> Tensor:
        """[..., I+1] -> [..., I+1], or [..., C] for item_ids [..., C] (or [C])."""
        flat = user_repr.reshape(-1, user_repr.shape[-1])
        users, items = flat.nonzero(as_tuple=True)
        votes = self.similarities[items].to(flat.dtype) * flat[users, items, None]
        slots = users[:, None] * flat.shape[1] + self.neighbours[items]
        scores = torch.zeros_like(flat).view(-1).index_add_(0, slots.view(-1), votes.view(-1)).view_as(user_repr)
        if item_ids is None:
            return scores
        return scores[..., item_ids] if item_ids.dim() == 1 else scores.gather(-1, item_ids)


def cosine_neighbours(
    edges: np.ndarray, num_users: int, num_items: int, k: int, shrink: float
) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar items of every item, by shrunk cosine; ties go to the smaller id.

    Args:
        edges: [2, N] (user, item); repeats count once.
        num_users: U.
        num_items: I.
        k: Neighbours kept.
        shrink: Added to the denominator.

    Returns:
        item ids [I+1, k] int64 and similarities [I+1, k] float32, best first, zeros where there are fewer.
    """
    shape = (num_users + 1, num_items + 1)
    events = sparse.csc_matrix((np.ones(edges.shape[1]), (edges[0], edges[1])), shape=shape)
    events.data[:] = 1.0
    norms = np.sqrt(np.asarray(events.sum(0)).ravel())
    ids = np.zeros((num_items + 1, k), dtype=np.int64)
    values = np.zeros((num_items + 1, k), dtype=np.float32)
    # Blocks keep memory at BLOCK x I however large the catalogue is.
    for start in range(1, num_items + 1, BLOCK):
        rows = np.arange(start, min(start + BLOCK, num_items + 1))
        shared = (events[:, rows].T @ events).toarray()
        similar = np.divide(shared, norms[rows, None] * norms + shrink, out=np.zeros_like(shared), where=shared > 0)
        similar[np.arange(len(rows)), rows] = 0.0
        best = np.argsort(-similar, axis=1, kind="stable")[:, :k]
        values[rows] = np.take_along_axis(similar, best, 1)
        ids[rows] = np.where(values[rows] > 0, best, 0)
    return ids, values


register(ItemKNNConfig, ItemKNNEncoder)
