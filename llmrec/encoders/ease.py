"""EASE: a linear item-item model with a closed form ("Embarrassingly Shallow Autoencoders for Sparse Data", WWW 2019).

With X [U, I] the zero-one matrix of training events, G = X^T X and P = (G + lambda I)^-1, the item-item weights are

    B_ij = -P_ij / P_jj for i != j,   B_jj = 0,   score(user, j) = sum over items i of the history of B_ij

so the user representation is the multi-hot history. The whole history (`seen`) is used where the batch carries it,
the window otherwise; states of single positions always read the window only, which keeps them causal. The order and
repetition of events play no part.

Shapes: hidden [B, L, I+1], user_repr [B, I+1], weights [I+1, I+1].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import linalg, sparse
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
    title="Embarrassingly Shallow Autoencoders for Sparse Data", venue="WWW 2019", url_id="1905.03375", system="EASE"
)


class EASEConfig(SequenceEncoderConfig):
    """Options of EASE.

    Args:
        regularization: lambda; larger values trust co-occurrences less.
        max_items: Largest catalogue accepted; the weights are a dense [I+1, I+1] matrix.
    """

    model_type = "llmrec_ease"

    regularization: float = 500.0
    max_items: int = 20_000

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.regularization <= 0:
            raise RecipeError(f"encoder.regularization: found {self.regularization}, expected a number above 0")


class EASEEncoder(MultiHotHistories, SequenceEncoder):
    """Item-item weights as a model."""

    config_class = EASEConfig
    config: EASEConfig
    weights: Tensor

    def __init__(self, config: EASEConfig) -> None:
        super().__init__(config)
        check_catalogue(config.num_items, config.max_items)
        # Row = scored item, column = history item: the layout of `item_vectors`.
        self.register_buffer("weights", torch.zeros(config.num_items + 1, config.num_items + 1))
        self.post_init()

    @classmethod
    def from_context(cls, config: SequenceEncoderConfig, context: DataContext) -> Self:
        """A finished model.

        Raises:
            RecipeError: The catalogue is larger than `max_items`.
            DataError: The events name items outside the catalogue.
        """
        assert isinstance(config, EASEConfig)
        check_same_catalogue(config, context)
        model = cls(config)
        weights = item_weights(context.train_edges, context.num_users, context.num_items, config.regularization)
        model.weights[1:, 1:] = torch.from_numpy(weights.T.astype(np.float32))
        return model.eval()

    def item_vectors(self) -> Tensor:
        """[I+1, I+1]; row j holds the weights with which histories speak for item j."""
        return self.weights

    def score(self, user_repr: Tensor, item_ids: Tensor | None = None) -> Tensor:
        """[..., I+1] -> [..., I+1], or [..., C] for item_ids [..., C] (or [C])."""
        if item_ids is not None and item_ids.dim() == 1:
            return user_repr @ self.weights[item_ids].to(user_repr.dtype).T
        scores = user_repr @ self.weights.to(user_repr.dtype).T
        # One product over the catalogue and a pick: gathering [..., C, I+1] rows of weights would be far larger.
        return scores if item_ids is None else scores.gather(-1, item_ids)


def check_catalogue(num_items: int, max_items: int) -> None:
    """Refuse catalogues whose dense weights would not fit.

    Raises:
        RecipeError: Too many items; the message says how much memory they would need.
    """
    if num_items > max_items:
        # Float64 matrix and its inverse while fitting, and float32 weights.
        need = (num_items + 1) ** 2 * (8 + 8 + 4) / 2**30
        raise RecipeError(
            f"encoder ease: found a catalogue of {num_items} items, expected at most max_items = {max_items}; fitting "
            f"would need about {need:.0f} GiB of memory. Raise encoder.max_items if there is that much, or use itemknn"
        )


def item_weights(edges: np.ndarray, num_users: int, num_items: int, regularization: float) -> np.ndarray:
    """B [I, I] float64 of the closed form; row = history item, column = scored item.

    Args:
        edges: [2, N] (user, item); repeats count once.
        num_users: U.
        num_items: I.
        regularization: lambda.
    """
    shape = (num_users + 1, num_items + 1)
    events = sparse.csr_matrix((np.ones(edges.shape[1]), (edges[0], edges[1])), shape=shape)
    events.data[:] = 1.0
    gram = (events.T @ events).toarray()[1:, 1:]
    gram[np.diag_indices(num_items)] += regularization
    inverse = linalg.inv(gram, overwrite_a=True, check_finite=False)
    weights = inverse / -np.diag(inverse)[None, :]
    weights[np.diag_indices(num_items)] = 0.0
    return weights


register(EASEConfig, EASEEncoder)
