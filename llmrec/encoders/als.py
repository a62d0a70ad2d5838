"""ALS: matrix factorisation of implicit feedback by alternating least squares (Hu, Koren, Volinsky, ICDM 2008).

With r_ui the number of events of user u at item i, p_ui = 1 where r_ui > 0 and c_ui = 1 + alpha r_ui, factors x_u and
y_i minimise (equation 3 of the paper)

    sum over ALL u, i of c_ui (p_ui - x_u . y_i)^2 + lambda (sum of |x_u|^2 + sum of |y_i|^2)

by solving for all users with the items fixed, then for all items with the users fixed (equations 4 and 5):

    x_u = (Y^T Y + lambda I + alpha sum_i r_ui y_i y_i^T)^-1 sum_i (1 + alpha r_ui) y_i

Y^T Y is computed once a sweep, so the cost follows the number of events (section 4 of the paper).

Departure: a user's vector is not a row of the fitted table. It is the same closed form on the items of the history at
hand (fold-in), so that users of any split, and every prefix of a history, have one; on a training history it is what
the next user step would give. The whole history (`seen`) is used where the batch carries it, the window otherwise;
states of single positions always read the window only, which keeps them causal. The order of events plays no part.
The values of `factors` and `regularization` are ours; alpha = 40 is the paper's.

`item_vectors()` are also collaborative features of items. Equations are solved in float64, in the fit and after it.

Shapes: hidden [B, L, f], user_repr [B, f], item_factors [I+1, f] with a zero row for padding; items without a training
event have zero factors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from llmrec.encoders.base import (
    EncoderOutput,
    SequenceEncoder,
    SequenceEncoderConfig,
    check_same_catalogue,
    register,
)
from llmrec.errors import RecipeError
from llmrec.paper import Paper

if TYPE_CHECKING:
    from typing import Self

    from llmrec.data.schema import DataContext, SequenceBatch

PAPER = Paper(
    title="Collaborative Filtering for Implicit Feedback Datasets",
    venue="ICDM 2008",
    url_id="10.1109/ICDM.2008.22",
    system="ALS",
)
CHUNK = 1 << 22
"""Numbers held by one batch of equations (32 MiB of float64)."""
_START = 0.01


class ALSConfig(SequenceEncoderConfig):
    """Options of ALS; `hidden_size` always equals `factors`.

    Args:
        factors: f, width of user and item vectors.
        iterations: Sweeps, each one user step and one item step.
        regularization: lambda.
        alpha: Confidence that one event adds.
        seed: Of the initial item factors. An option of its own because a baseline is fitted anew whenever a run is
            measured, and must come out the same.
    """

    model_type = "llmrec_als"

    factors: int = 64
    iterations: int = 15
    regularization: float = 0.01
    alpha: float = 40.0
    seed: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in ("factors", "iterations"):
            if getattr(self, name) < 1:
                raise RecipeError(f"encoder.{name}: found {getattr(self, name)}, expected a whole number from 1")
        for name in ("regularization", "alpha"):
            if getattr(self, name) <= 0:
                raise RecipeError(f"encoder.{name}: found {getattr(self, name)}, expected a number above 0")
        self.hidden_size = self.factors


class ALSEncoder(SequenceEncoder):
    """Item factors as a model; user vectors are solved for when they are asked for."""

    config_class = ALSConfig
    optional: ClassVar[frozenset[str]] = frozenset({"seen"})
    trainable: ClassVar[bool] = False

    config: ALSConfig
    item_factors: Tensor

    def __init__(self, config: ALSConfig) -> None:
        super().__init__(config)
        self.register_buffer("item_factors", torch.zeros(config.num_items + 1, config.factors))
        self.post_init()

    @classmethod
    def from_context(cls, config: SequenceEncoderConfig, context: DataContext) -> Self:
        """A finished model.

        Raises:
            DataError: The events belong to another catalogue.
        """
        assert isinstance(config, ALSConfig)
        check_same_catalogue(config, context)
        model = cls(config)
        model.item_factors.copy_(fit_items(event_counts(context), config))
        return model.eval()

    def forward(
        self,
        item_ids: Tensor,
        lengths: Tensor,
        *,
        item_embeds: Tensor | None = None,
        seen: Tensor | None = None,
        **features: Tensor,
    ) -> EncoderOutput:
        """Fold-in of every prefix; `user_repr` reads `seen` where it is given."""
        base = self._base()
        # A prefix needs an f x f system for each position.
        rows = max(1, CHUNK // (item_ids.shape[1] * self.config.factors**2))
        parts = [self._fold_in(part, base, prefixes=True) for part in item_ids.split(rows)]
        user_repr = self._user_vectors(item_ids if seen is None else seen, base)
        return EncoderOutput(hidden=torch.cat(parts), user_repr=user_repr)

    def user_representation(self, batch: SequenceBatch) -> Tensor:
        """[B, f], without solving for the positions of the history."""
        return self._user_vectors(batch.get("seen", batch["item_ids"]), self._base())

    def item_vectors(self) -> Tensor:
        """[I+1, f] item factors; row 0 is zero."""
        return self.item_factors

    def score(self, user_repr: Tensor, item_ids: Tensor | None = None) -> Tensor:
        """x . y: [..., f] -> [..., I+1], or [..., C] for item_ids [..., C] (or [C])."""
        if item_ids is None or item_ids.dim() == 1:
            table = self.item_factors if item_ids is None else self.item_factors[item_ids]
            return user_repr @ table.to(user_repr.dtype).T
        return (self.item_factors[item_ids].to(user_repr.dtype) * user_repr.unsqueeze(-2)).sum(-1)

    @property
    def device(self) -> torch.device:
        """Where the factors are; there are no parameters to ask."""
        return self.item_factors.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the factors."""
        return self.item_factors.dtype

    def _base(self) -> Tensor:
        # Not kept: a buffer would be rounded by a cast of the model, and the product costs less than scoring a batch.
        return regularised_gram(self.item_factors, self.config.regularization)

    def _user_vectors(self, item_ids: Tensor, base: Tensor) -> Tensor:
        rows = max(1, CHUNK // (item_ids.shape[1] * self.config.factors + self.config.factors**2))
        return torch.cat([self._fold_in(part, base, prefixes=False) for part in item_ids.split(rows)])

    def _fold_in(self, item_ids: Tensor, base: Tensor, *, prefixes: bool) -> Tensor:
        """[B, S] -> [B, f], or [B, S, f] for every prefix; repeats raise the confidence, padding adds nothing."""
        alpha = self.config.alpha
        vectors = self.item_factors[item_ids].double()  # [B, S, f]
        wanted = vectors * (first_occurrences(item_ids).unsqueeze(-1) + alpha)
        if prefixes:
            systems = base + alpha * (vectors.unsqueeze(-1) * vectors.unsqueeze(-2)).cumsum(1)
            return solve(systems, wanted.cumsum(1)).to(self.dtype)
        return solve(base + alpha * vectors.mT @ vectors, wanted.sum(1)).to(self.dtype)


def first_occurrences(item_ids: Tensor) -> Tensor:
    """[B, S] -> [B, S] float64: 1 where an item stands for the first time in its row, 0 at its repeats."""
    ordered, order = item_ids.sort(dim=1, stable=True)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.zeros_like(new).scatter_(1, order, new).double()


def solve(systems: Tensor, wanted: Tensor) -> Tensor:
    """x of A x = b for positive definite A [..., f, f] and b [..., f]."""
    factor = torch.linalg.cholesky(systems)
    return torch.cholesky_solve(wanted.unsqueeze(-1), factor).squeeze(-1)


def regularised_gram(vectors: Tensor, regularization: float) -> Tensor:
    """V^T V + lambda I, [f, f] float64, of vectors [N, f]; N may be large, no float64 copy of all of them is made."""
    width = vectors.shape[1]
    found = regularization * torch.eye(width, dtype=torch.float64, device=vectors.device)
    for part in vectors.split(max(1, CHUNK // width)):
        exact = part.double()
        found += exact.T @ exact
    return found


def event_counts(context: DataContext) -> sparse.csr_matrix:
    """r [U+1, I+1]: training events of each user at each item."""
    users, items = context.train_edges
    shape = (context.num_users + 1, context.num_items + 1)
    counts = sparse.csr_matrix((np.ones(len(users)), (users, items)), shape=shape)
    counts.sum_duplicates()
    return counts


def fit_items(counts: sparse.csr_matrix, config: ALSConfig) -> Tensor:
    """Item factors [I+1, f] float64 after `config.iterations` sweeps.

    Args:
        counts: r [U+1, I+1].
        config: Factors, sweeps, lambda, alpha and the seed of the initial item factors (normal, small: the paper names
            no start, and the first user step only reads directions from it).
    """
    generator = torch.Generator().manual_seed(config.seed)
    items = _START * torch.randn(counts.shape[1], config.factors, generator=generator, dtype=torch.float64)
    items[0] = 0.0
    by_item = counts.T.tocsr()
    for _ in range(config.iterations):
        users = least_squares(items, counts, config.regularization, config.alpha)
        items = least_squares(users, by_item, config.regularization, config.alpha)
    return items


def least_squares(fixed: Tensor, counts: sparse.csr_matrix, regularization: float, alpha: float) -> Tensor:
    """Half a sweep: the optimal factors of one side while the other side is fixed (equation 4, or 5).

    Args:
        fixed: [M, f] float64.
        counts: r [N, M]; rows without an event get zero factors, which is their optimum.
        regularization: lambda.
        alpha: Confidence that one event adds.

    Returns:
        [N, f] float64.
    """
    base, width = regularised_gram(fixed, regularization), fixed.shape[1]
    found = torch.zeros(counts.shape[0], width, dtype=torch.float64)
    lengths = np.diff(counts.indptr)
    order = np.argsort(-lengths, kind="stable")[: int((lengths > 0).sum())]
    start = 0
    while start < len(order):
        # Rows of similar length share a batch, so little is padded.
        longest = int(lengths[order[start]])
        rows = order[start : start + max(1, CHUNK // (longest * width + 2 * width**2))]
        real = np.arange(longest) < lengths[rows][:, None]
        places = np.where(real, counts.indptr[rows][:, None] + np.arange(longest), 0)
        amounts = torch.from_numpy(alpha * counts.data[places] * real).unsqueeze(-1)  # alpha r
        vectors = fixed[torch.from_numpy(counts.indices[places].astype(np.int64))]
        systems = base + (vectors * amounts).mT @ vectors
        wanted = (vectors * (amounts + torch.from_numpy(real).unsqueeze(-1))).sum(1)
        found[torch.from_numpy(rows)] = solve(systems, wanted)
        start += len(rows)
    return found


register(ALSConfig, ALSEncoder)
