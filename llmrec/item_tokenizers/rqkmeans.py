"""RQ-KMeans: semantic ids by k-means on residuals, without a network.

Level h clusters what the levels before it left over, and the number of the cluster is the code:

    s_h = argmin_j ||r_h - C_h[j]||^2;   r_{h+1} = r_h - C_h[s_h];   r_1 = x;   x ~ sum_h C_h[s_h]

TIGER introduced such codes with a residual quantised autoencoder (RQ-VAE); k-means codebooks are what OneRec and GRID
use instead, and they fit in seconds. Variants: `normalize_residuals` (rows of unit length before every level, as in
GRID), `balanced` (no cluster above its share, as in MiniOneRec), `product` (the dimensions are divided among the
levels, and nothing is left over from one to the next: product quantisation).

Ours: x is the fused feature vector of an item (all levels side by side), reduced by PCA; the balanced assignment is
greedy by distance instead of an optimal transport problem; the default for collisions is the nearest free last code.

Shapes: I items, M levels, W_h codes of level h, d dimensions after PCA; codebooks [W_h, d].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from llmrec.blocks.quantize import distances, nearest
from llmrec.data.schema import ItemFeatures
from llmrec.errors import DataError, RecipeError
from llmrec.item_tokenizers.base import (
    CollisionPolicy,
    FitReport,
    ItemTokenizer,
    fused,
    fused_statistics,
    kmeans,
)
from llmrec.paper import Paper

PAPER = Paper(
    title="Recommender Systems with Generative Retrieval", venue="NeurIPS 2023", url_id="2305.05065", system="TIGER"
)
CHUNK = 65_536
"""Rows whose distances to a codebook are held at once while balancing."""
BALANCING_ROUNDS = 10
"""Alternations of balanced assignment and means; sizes are bounded after each, so this is only fine-tuning."""


@dataclass
class RQKMeans(ItemTokenizer):
    """Residual k-means codes; see the module.

    Args:
        levels: M, number of levels.
        codebook_size: W, codes per level; one number, or one per level.
        collisions: What happens to items with one code, see `CollisionPolicy`.
        iterations: Most Lloyd iterations per level.
        normalize_residuals: Rows get length 1 before every level; direction alone is coded (no reconstruction then).
        balanced: No cluster of the fit holds more than ceil(I / W) + 1 items; added items go to the nearest.
        product: Divide the dimensions among the levels instead of coding residuals.
        pca: Dimensions kept by PCA, clamped to what the data have; None keeps all.
        whiten: Give every kept dimension variance 1.
    """

    levels: int = 3
    codebook_size: int | tuple[int, ...] = 256
    collisions: CollisionPolicy = "nearest_free"
    iterations: int = 100
    normalize_residuals: bool = False
    balanced: bool = False
    product: bool = False
    pca: int | None = 64
    whiten: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.codebook_size, list):
            self.codebook_size = tuple(self.codebook_size)
        for name in ("levels", "iterations"):
            if getattr(self, name) < 1:
                raise RecipeError(f"item_tokenizer.{name}: found {getattr(self, name)}, expected at least 1")
        if len(self.sizes) != self.levels or min(self.sizes) < 1:
            raise RecipeError(
                f"item_tokenizer.codebook_size: found {self.codebook_size!r}, expected a positive number, "
                f"or one for each of {self.levels} levels"
            )
        if self.collisions not in get_args(CollisionPolicy):
            known = ", ".join(get_args(CollisionPolicy))
            raise RecipeError(f"item_tokenizer.collisions: found {self.collisions!r}, expected one of {known}")
        if self.pca is not None and self.pca < 1:
            raise RecipeError(f"item_tokenizer.pca: found {self.pca}, expected at least 1, or null for no PCA")
        if self.whiten and self.pca is None:
            raise RecipeError("item_tokenizer.whiten: found true with pca: null, expected a number of PCA dimensions")
        if self.product and self.normalize_residuals:
            raise RecipeError(
                "item_tokenizer.normalize_residuals: found true with product: true, expected one of them "
                "(product codes have no residuals)"
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        """(M,) codes per level as asked for, without the level that policy append adds."""
        return self.codebook_size if isinstance(self.codebook_size, tuple) else (self.codebook_size,) * self.levels

    @property
    def codebooks(self) -> tuple[Tensor, ...]:
        """M tensors [W_h, d]; a product codebook is 0 outside its dimensions, so sums of rows reconstruct items."""
        return tuple(getattr(self, f"codebook_{level}") for level in range(1, self.levels + 1))

    def fit(self, items: ItemFeatures, *, seed: int) -> FitReport:
        """Cluster level by level; codes of all items."""
        center, scale = fused_statistics(items)
        self.center, self.scale = torch.from_numpy(center), torch.from_numpy(scale)
        joined = fused(items, center, scale)
        self.basis = principal_axes(joined, self.pca, whiten=self.whiten, seed=seed)
        values = torch.from_numpy(joined) @ self.basis
        power = float(values.double().square().mean())
        rest, columns, details = values, [], {}
        for level, size in enumerate(self.sizes):
            rest, part = self._entering(level, rest), self._part(level, rest.shape[1])
            book, column = self._cluster(rest[:, part], size, seed + level)
            whole = rest.new_zeros(size, rest.shape[1])
            whole[:, part] = book
            setattr(self, f"codebook_{level + 1}", whole)
            columns.append(column)
            last, rest = rest, rest - whole[column]
            if not self.normalize_residuals:
                left = float(rest.double().square().mean())
                details[f"unexplained_{level + 1}"] = left / power if power else 0.0
        left = float("nan") if self.normalize_residuals else float(rest.double().square().mean())
        return self._settle(
            torch.stack(columns, dim=1),
            self.sizes,
            self.collisions,
            costs=lambda rows: self._last_costs(last[rows]),
            seed=seed,
            reconstruction=left,
            details=details,
        )

    def add(self, items: ItemFeatures) -> None:
        """Code the items beyond the catalogue with the codebooks as they are.

        Raises:
            DataError: The levels have other widths than those of the fit, or items are missing.
        """
        old = len(self.codes) - 1
        found = [(values.shape[1], len(values) - 1) for values, _ in items.values()]
        if sum(width for width, _ in found) != len(self.center) or min(rows for _, rows in found) < old:
            raise DataError(
                "these features do not extend the catalogue of the tokenizer",
                found=f"{len(found)} levels, {sum(w for w, _ in found)} dimensions, {min(n for _, n in found)} items",
                expected=f"{len(self.center)} dimensions and at least {old} items",
                remedy="give the levels of the fit, in their order, for old and new items",
            )
        # Row 0 of features is padding; here the last old item stands in its place.
        beyond = {name: (values[old:], mask[old:]) for name, (values, mask) in items.items()}
        joined = fused(beyond, self.center.numpy(), self.scale.numpy())
        rest, columns = torch.from_numpy(joined) @ self.basis, []
        for level, book in enumerate(self.codebooks):
            rest, part = self._entering(level, rest), self._part(level, rest.shape[1])
            column = nearest(rest[:, part], book[:, part])
            columns.append(column)
            last, rest = rest, rest - book[column]
        if len(rest):
            self._append(torch.stack(columns, dim=1), self.collisions, costs=lambda rows: self._last_costs(last[rows]))

    def reconstruct(self, codes: Tensor) -> Tensor:
        """Codes [..., >= M] -> [..., d], sums of codebook rows; a level added for collisions is ignored."""
        return torch.stack([book[codes[..., level]] for level, book in enumerate(self.codebooks)]).sum(0)

    def _arrays(self) -> dict[str, Tensor]:
        names = ["center", "scale", "basis", *(f"codebook_{level}" for level in range(1, self.levels + 1))]
        return {name: getattr(self, name) for name in names}

    def _entering(self, level: int, rest: Tensor) -> Tensor:
        """[n, d] as the level sees it."""
        return torch.nn.functional.normalize(rest, dim=1) if self.normalize_residuals else rest

    def _part(self, level: int, width: int) -> slice:
        """The dimensions a level codes; empty for the last levels when there are fewer dimensions than levels."""
        if not self.product:
            return slice(0, width)
        bounds = np.cumsum([0, *(len(part) for part in np.array_split(np.arange(width), self.levels))])
        return slice(int(bounds[level]), int(bounds[level + 1]))

    def _cluster(self, values: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """(codebook [W, d], codes [n]) of one level."""
        if values.shape[1] == 0:
            return values.new_zeros(size, 0), torch.zeros(len(values), dtype=torch.long)
        book = torch.from_numpy(kmeans(values.numpy(), size, seed=seed, iterations=self.iterations)[0])
        if self.balanced:
            return balance(values, book)
        return book, nearest(values, book)

    def _last_costs(self, rest: Tensor) -> Tensor:
        """[n, d] before the last level -> [n, W_M] squared distances."""
        part = self._part(self.levels - 1, rest.shape[1])
        return distances(rest[:, part], self.codebooks[-1][:, part])


def principal_axes(values: np.ndarray, count: int | None, *, whiten: bool, seed: int) -> Tensor:
    """[D, d] float32: maps centred rows [I, D] to their first principal components; identity when `count` is None.

    d is at most `count`, and at most the number of directions in which the rows differ (at least 1).
    """
    width = values.shape[1]
    if count is None:
        return torch.eye(width)
    if len(values) < 2 or not np.any(values):
        return torch.eye(width)[:, :1]
    from sklearn.decomposition import PCA

    solver = "covariance_eigh" if len(values) >= width else "full"
    model = PCA(min(count, *values.shape), svd_solver=solver, random_state=seed % (2**32)).fit(values)
    variance = model.explained_variance_
    # Directions of rounding noise: whitening would blow them up.
    kept = max(1, int((variance > 1e-6 * variance[0]).sum()))
    axes = model.components_[:kept].T
    if whiten:
        axes = axes / np.sqrt(variance[:kept])
    return torch.from_numpy(np.ascontiguousarray(axes, dtype=np.float32))


def balance(values: Tensor, book: Tensor) -> tuple[Tensor, Tensor]:
    """(codebook [W, d], codes [n]): alternates bounded assignment and means, starting from a codebook.

    No code has more than ceil(n / W) + 1 rows. Codes without rows keep their centroid. The codebook holds the means
    of the returned assignment, so the error is never above that of the mean of all rows.
    """
    codes = None
    for _ in range(BALANCING_ROUNDS):
        again = assign_balanced(values, book)
        if codes is not None and torch.equal(again, codes):
            break
        codes = again
        count = torch.bincount(codes, minlength=len(book))
        mean = torch.zeros_like(book).index_add_(0, codes, values) / count.clamp(min=1)[:, None]
        book = torch.where(count[:, None] > 0, mean, book)
    assert codes is not None
    return book, codes


def assign_balanced(values: Tensor, book: Tensor) -> Tensor:
    """[n, d], [W, d] -> codes [n] with at most ceil(n / W) + 1 rows each.

    Rounds over all rows at once: every row without a code asks for the nearest one with room, and a code takes the
    nearest of those that ask. A round fills at least one code or serves everybody, so there are at most W of them.
    """
    room = torch.full((len(book),), -(-len(values) // len(book)) + 1)
    codes = torch.full((len(values),), -1)
    waiting = torch.arange(len(values))
    while len(waiting):
        full = room == 0
        asked, price = [], []
        for rows in waiting.split(CHUNK):
            cost, code = distances(values[rows], book).masked_fill(full, float("inf")).min(dim=1)
            asked.append(code)
            price.append(cost)
        code = torch.cat(asked)
        order = torch.argsort(torch.cat(price), stable=True)
        order = order[torch.argsort(code[order], stable=True)]  # by code, then by distance
        code = code[order]
        start = torch.searchsorted(code, torch.arange(len(book)))
        taken = torch.arange(len(code)) - start[code] < room[code]
        codes[waiting[order[taken]]] = code[taken]
        room -= torch.bincount(code[taken], minlength=len(book))
        waiting = torch.sort(waiting[order[~taken]]).values
    return codes
