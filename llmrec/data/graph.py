"""The user-item graph of the training events, and item content as signals on it.

    A = [[0, R], [R^T, W]]        S = D^-1/2 A D^-1/2        D = row sums of A; isolated nodes have zero rows

R [U, I] holds 1 where a user met an item in training, however often; validation and test events are never edges, so a
leave-one-out target leaks nothing. W is zero, or optional edges between items of similar content, which tie items
without training events into the graph (ours in this form; weights by level as in a companion model of SSR).
Nodes are users 1..U as 0..U-1, then items 1..I as U..U+I-1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from llmrec.errors import DataError, RecipeError

if TYPE_CHECKING:
    from typing import Self

    from llmrec.data.schema import DataContext, ItemFeatures

_CHUNK = 1 << 24
"""Most similarities held at once (64 MiB of float32)."""
_TINY = 1e-12


@dataclass(frozen=True)
class UserItemGraph:
    """Training edges without repeats, and optionally weighted edges between items.

    Args:
        num_users: U.
        num_items: I.
        edges: [2, E] int64 (user, item), sorted, each pair once.
        neighbours: [I+1, I+1] symmetric weights W between items; None for none.
    """

    num_users: int
    num_items: int
    edges: np.ndarray
    neighbours: sparse.csr_matrix | None = None

    @classmethod
    def from_context(cls, context: DataContext) -> Self:
        """The graph of the training part of a data set.

        Raises:
            DataError: There is no training event, or one names a user or item that does not exist.
        """
        users, items = np.asarray(context.train_edges, dtype=np.int64)
        if not len(users):
            raise DataError("a graph needs edges", found="no training event", expected="at least one")
        for name, ids, last in (("user", users, context.num_users), ("item", items, context.num_items)):
            if ids.min() < 1 or ids.max() > last:
                raise DataError(
                    f"training edges name a {name} that does not exist",
                    found=f"ids {ids.min()} to {ids.max()}",
                    expected=f"ids 1 to {last}",
                )
        keys = np.unique(users * (context.num_items + 1) + items)
        edges = np.stack([keys // (context.num_items + 1), keys % (context.num_items + 1)])
        return cls(context.num_users, context.num_items, edges)

    def with_neighbours(self, features: ItemFeatures, k: int, weights: Mapping[str, float] | None = None) -> Self:
        """The graph with edges from each item to its k nearest items by content; see `nearest_items`."""
        return type(self)(self.num_users, self.num_items, self.edges, nearest_items(features, k, weights))

    @property
    def num_nodes(self) -> int:
        """N = U + I."""
        return self.num_users + self.num_items

    @cached_property
    def adjacency(self) -> sparse.csr_matrix:
        """A [N, N] float64, symmetric, without self-loops."""
        rows, columns = self.edges[0] - 1, self.edges[1] - 1 + self.num_users
        ones, shape = np.ones(len(rows)), (self.num_nodes, self.num_nodes)
        found = sparse.csr_matrix((ones, (rows, columns)), shape=shape)
        if self.neighbours is not None:
            pairs = self.neighbours.tocoo()
            places = (pairs.row - 1 + self.num_users, pairs.col - 1 + self.num_users)
            return sparse.csr_matrix(found + found.T + sparse.csr_matrix((pairs.data, places), shape=shape))
        return sparse.csr_matrix(found + found.T)

    @cached_property
    def degrees(self) -> np.ndarray:
        """[N] float64, row sums of A."""
        return np.asarray(self.adjacency.sum(axis=1)).ravel()

    @property
    def item_degrees(self) -> np.ndarray:
        """[I+1] float64, index = item id; 0 for padding and items without an edge."""
        return np.concatenate([[0.0], self.degrees[self.num_users :]])

    @cached_property
    def normalised(self) -> sparse.csr_matrix:
        """S [N, N] float64, eigenvalues in [-1, 1]; sorted column indices."""
        scale = np.where(self.degrees > 0, 1 / np.sqrt(np.maximum(self.degrees, _TINY)), 0.0)
        found = sparse.csr_matrix(sparse.diags(scale) @ self.adjacency @ sparse.diags(scale))
        found.sort_indices()
        return found


def nearest_items(features: ItemFeatures, k: int, weights: Mapping[str, float] | None = None) -> sparse.csr_matrix:
    """Symmetric weights between items: the k largest positive cosines of each item, levels added up.

    Args:
        features: Levels; an item without a level has no neighbour by it.
        k: Neighbours of an item per level.
        weights: Level -> factor on its cosines; null gives every level 1 / number of levels.

    Returns:
        [I+1, I+1]; an edge exists where either item has the other among its nearest.

    Raises:
        RecipeError: There is no level, or `weights` names one that does not exist.
    """
    if not features:
        raise RecipeError("edges between items come from item features; found none, expected an item_features section")
    weights = dict(weights or dict.fromkeys(features, 1 / len(features)))
    if unknown := sorted(set(weights) - set(features)):
        raise RecipeError(f"neighbour weights: found levels {unknown}, expected some of {sorted(features)}")
    size = len(next(iter(features.values()))[1])
    total = sparse.csr_matrix((size, size))
    for name, weight in weights.items():
        total = total + weight * _nearest(*features[name], k)
    return sparse.csr_matrix(total)


def _nearest(values: np.ndarray, mask: np.ndarray, k: int) -> sparse.csr_matrix:
    present = np.flatnonzero(mask)
    vectors = unit_rows(np.asarray(values, dtype=np.float32)[present])
    k = min(k, len(present) - 1)
    if k < 1:
        return sparse.csr_matrix((len(mask), len(mask)))
    rows, columns, cosines = [], [], []
    step = max(1, _CHUNK // len(present))
    for start in range(0, len(present), step):
        part = vectors[start : start + step] @ vectors.T
        own = np.arange(len(part))
        part[own, start + own] = -np.inf
        best = np.argpartition(-part, k - 1, axis=1)[:, :k]
        rows.append(np.repeat(present[start + own], k))
        columns.append(present[best].ravel())
        cosines.append(np.take_along_axis(part, best, axis=1).ravel())
    data = np.maximum(np.concatenate(cosines), 0.0).astype(np.float64)
    shape = (len(mask), len(mask))
    found = sparse.csr_matrix((data, (np.concatenate(rows), np.concatenate(columns))), shape=shape)
    found = found.maximum(found.T)
    found.eliminate_zeros()
    return sparse.csr_matrix(found)


def content_signals(features: ItemFeatures, width: int) -> ItemFeatures:
    """Feature levels ready to be signals: centred, at most `width` principal directions, rows of length 1.

    What stands in the row of an item without the level plays no part: mean and directions come from the others, and
    the row itself is zero.

    Args:
        features: Level -> (values [I+1, F], mask [I+1]).
        width: Most columns a level keeps.

    Raises:
        DataError: A level has no item, or is not one number per column.
    """
    found: ItemFeatures = {}
    for name, (values, mask) in features.items():
        mask = np.array(mask, dtype=bool)
        mask[0] = False
        if np.ndim(values) != 2 or not mask.any():
            raise DataError(
                f"item feature level {name!r} cannot be a signal",
                found=f"shape {np.shape(values)}, {int(mask.sum())} items that have it",
                expected="[I+1, F] and at least one item",
            )
        rows = np.asarray(values, dtype=np.float64)[mask]
        rows = rows - rows.mean(axis=0)
        if rows.shape[1] > width:
            _, directions = np.linalg.eigh(rows.T @ rows)
            directions = directions[:, ::-1][:, :width]
            largest = np.abs(directions).argmax(axis=0)  # an eigenvector has no sign of its own
            rows = rows @ (directions * np.sign(directions[largest, np.arange(width)]))
        signal = np.zeros((len(mask), rows.shape[1]), dtype=np.float32)
        signal[mask] = unit_rows(rows)
        found[name] = (signal, mask)
    return found


def unit_rows(values: np.ndarray) -> np.ndarray:
    """Rows of length 1; rows of zeros stay zero."""
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), _TINY)
