"""RQ-KMeans: the contract, residual and product codes against scikit-learn, balanced sizes, catalogues at the edge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from llmrec.blocks.quantize import nearest
from llmrec.data.schema import ItemFeatures
from llmrec.errors import DataError, RecipeError
from llmrec.item_tokenizers.base import fused
from llmrec.item_tokenizers.rqkmeans import RQKMeans, assign_balanced, balance, principal_axes
from tests.contracts.item_tokenizers import ItemTokenizerContract, item_features


class TestRQKMeans(ItemTokenizerContract):
    tokenizer_class = RQKMeans
    options = {"levels": 3, "codebook_size": 8}


class TestProduct(ItemTokenizerContract):
    tokenizer_class = RQKMeans
    options = {"levels": 2, "codebook_size": (8, 16), "product": True, "whiten": True, "pca": 10}


class TestBalanced(ItemTokenizerContract):
    tokenizer_class = RQKMeans
    options = {"levels": 2, "codebook_size": 12, "balanced": True, "normalize_residuals": True, "collisions": "random"}


def one_level(values: np.ndarray) -> ItemFeatures:
    """[I, d] as features of one level, every item present."""
    mask = np.ones(len(values) + 1, dtype=bool)
    mask[0] = False
    return {"title": (np.concatenate([np.zeros_like(values[:1]), values]).astype(np.float32), mask)}


def clustered(rows: int, width: int = 8, centres: int = 6, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(centres, width)) * 4)[rng.integers(centres, size=rows)] + rng.normal(size=(rows, width))


def fitted(items: ItemFeatures, seed: int = 0, **options: Any) -> RQKMeans:
    tokenizer = RQKMeans(**options)
    tokenizer.fit(items, seed=seed)
    return tokenizer


# Residual codes ------------------------------------------------------------------------------------------------------


def test_one_level_is_plain_kmeans() -> None:
    """Card, property 1: the codes are scikit-learn's labels (same seed, same rows), and each the nearest centroid."""
    items = one_level(clustered(300))
    tokenizer = fitted(items, seed=3, levels=1, codebook_size=6, pca=None, collisions="none")
    values = fused(items)
    reference = KMeans(6, init="k-means++", n_init=1, max_iter=100, random_state=3).fit(values)
    assert np.array_equal(tokenizer.codes[1:, 0].numpy(), reference.labels_)
    assert tokenizer.report is not None
    assert tokenizer.report.reconstruction == pytest.approx(reference.inertia_ / values.size, rel=1e-4)
    gaps = ((values[:, None] - reference.cluster_centers_) ** 2).sum(-1)
    assert np.array_equal(gaps.argmin(1), tokenizer.codes[1:, 0].numpy())


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("product", [False, True])
def test_error_never_grows_with_levels(balanced: bool, product: bool) -> None:
    """Card, property 1: every further level brings the sum of codebook rows closer to the items."""
    items = one_level(clustered(400))
    tokenizer = fitted(
        items, levels=4, codebook_size=5, pca=None, collisions="none", balanced=balanced, product=product
    )
    values, codes = torch.from_numpy(fused(items)), tokenizer.codes[1:]
    total, errors = torch.zeros_like(values), [float(values.square().mean())]
    for level, book in enumerate(tokenizer.codebooks):
        total = total + book[codes[:, level]]
        errors.append(float((values - total).square().mean()))
    assert all(after < before for before, after in zip(errors, errors[1:], strict=False))
    assert tokenizer.report is not None and tokenizer.report.reconstruction == pytest.approx(errors[-1], rel=1e-4)
    unexplained = [tokenizer.report.details[f"unexplained_{level}"] for level in (1, 2, 3, 4)]
    assert unexplained == pytest.approx([error / errors[0] for error in errors[1:]], rel=1e-4)
    assert torch.allclose(tokenizer.reconstruct(codes), total, atol=1e-5)


def test_levels_after_the_first_code_residuals() -> None:
    items = one_level(clustered(200))
    tokenizer = fitted(items, seed=5, levels=2, codebook_size=(4, 7), pca=None, collisions="none")
    values = torch.from_numpy(fused(items))
    rest = values - tokenizer.codebooks[0][tokenizer.codes[1:, 0]]
    labels = KMeans(7, init="k-means++", n_init=1, max_iter=100, random_state=6).fit(rest.numpy()).labels_
    assert np.array_equal(labels, tokenizer.codes[1:, 1].numpy())
    assert tokenizer.level_sizes == (4, 7)


def test_normalised_residuals_code_directions() -> None:
    values = clustered(100)
    values = np.concatenate([values, -values])  # centred
    options: dict[str, Any] = {"levels": 2, "codebook_size": 6, "pca": None, "collisions": "none"}
    tokenizer = fitted(one_level(values), normalize_residuals=True, **options)
    assert torch.linalg.vector_norm(tokenizer.codebooks[0], dim=1).max() <= 1 + 1e-5
    assert tokenizer.report is not None and np.isnan(tokenizer.report.reconstruction)
    tokenizer.add(one_level(np.concatenate([values, values * 3.0])))
    assert torch.equal(tokenizer.codes[201:], tokenizer.codes[1:201]), "length alone changed a code"
    plain = fitted(one_level(values), **options)
    plain.add(one_level(np.concatenate([values, values * 3.0])))
    assert not torch.equal(plain.codes[201:], plain.codes[1:201])


# Product codes -------------------------------------------------------------------------------------------------------


def test_product_is_independent_kmeans_of_each_slice() -> None:
    items = one_level(clustered(240, width=9))
    tokenizer = fitted(items, seed=2, levels=3, codebook_size=5, pca=None, product=True, collisions="none")
    values = fused(items)
    for level, part in enumerate((slice(0, 3), slice(3, 6), slice(6, 9))):
        model = KMeans(5, init="k-means++", n_init=1, max_iter=100, random_state=2 + level).fit(values[:, part])
        assert np.array_equal(model.labels_, tokenizer.codes[1:, level].numpy())
        book = tokenizer.codebooks[level].clone()
        assert np.allclose(book[:, part], model.cluster_centers_, atol=1e-5)
        book[:, part] = 0
        assert not book.any(), "a level says nothing about the dimensions of the others"


def test_product_with_fewer_dimensions_than_levels() -> None:
    tokenizer = fitted(one_level(clustered(30, width=2)), levels=3, codebook_size=30, product=True)
    assert tokenizer.unique and tokenizer.level_sizes == (30, 30, 30)


# Balanced codes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "size"), [(500, 16), (17, 16), (3, 16), (1000, 1)])
def test_balanced_sizes_are_bounded(rows: int, size: int) -> None:
    values = torch.from_numpy(clustered(rows, centres=2)).float()  # two lumps: plain k-means is far from even
    book, codes = balance(values, values[torch.arange(size) % rows].clone())
    assert codes.min() >= 0 and torch.bincount(codes, minlength=size).max() <= -(-rows // size) + 1
    for code in torch.unique(codes):
        assert torch.allclose(book[code], values[codes == code].mean(0), atol=1e-4), "centroids are means of their rows"


def test_balanced_fit_bounds_what_plain_kmeans_does_not() -> None:
    items = one_level(np.concatenate([clustered(300, centres=1), clustered(20, centres=5, seed=1) * 5]))
    options: dict[str, Any] = {"levels": 2, "codebook_size": 16, "collisions": "none"}
    bound = -(-320 // 16) + 1
    plain, even = fitted(items, **options), fitted(items, balanced=True, **options)
    assert torch.bincount(plain.codes[1:, 0]).max() > bound
    for column in even.codes[1:].T:
        assert torch.bincount(column).max() <= bound


def test_balanced_assignment_is_greedy_by_distance() -> None:
    """Against the plain loop: in every round the nearest of those that ask are served."""
    values, book = torch.from_numpy(clustered(60, width=3)).float(), torch.from_numpy(clustered(7, width=3)).float()
    gaps = torch.cdist(values, book).square().tolist()
    bound = -(-60 // 7) + 1
    room, codes = [bound] * 7, [-1] * 60
    while -1 in codes:
        asks: dict[int, list[tuple[float, int]]] = {}
        for row in (row for row in range(60) if codes[row] < 0):
            gap, code = min((gaps[row][code], code) for code in range(7) if room[code])
            asks.setdefault(code, []).append((gap, row))
        for code, rows in asks.items():
            for _, row in sorted(rows)[: room[code]]:
                codes[row] = code
        room = [bound - codes.count(code) for code in range(7)]
    assert assign_balanced(values, book).tolist() == codes


def test_balanced_assignment_with_room_everywhere_is_the_nearest() -> None:
    values = torch.arange(12.0)[:, None]
    book = torch.tensor([[1.5], [5.5], [9.5]])
    assert torch.equal(assign_balanced(values, book), nearest(values, book))


# PCA -----------------------------------------------------------------------------------------------------------------


def test_pca_keeps_the_first_components() -> None:
    items = one_level(clustered(120))
    tokenizer = fitted(items, levels=1, codebook_size=4, pca=3, collisions="none")
    values = fused(items)
    reduced = values @ tokenizer.basis.numpy()
    reference = PCA(3, svd_solver="full").fit_transform(values)
    assert np.allclose(np.abs(reduced), np.abs(reference), atol=1e-4)


def test_pca_is_clamped_and_whitened() -> None:
    flat = clustered(50, width=2) @ np.random.default_rng(0).normal(size=(2, 6))  # two directions in six dimensions
    values = (flat - flat.mean(0)).astype(np.float32)
    axes = principal_axes(values, 64, whiten=True, seed=0)
    assert axes.shape == (6, 2)
    assert np.allclose((values @ axes.numpy()).std(0, ddof=1), 1.0, atol=1e-3)
    assert principal_axes(values[:2] - values[:2].mean(0), 64, whiten=False, seed=0).shape == (6, 1)
    assert torch.equal(principal_axes(values, None, whiten=False, seed=0), torch.eye(6))


# Catalogues at the edge ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [{}, {"product": True}, {"balanced": True}, {"pca": None}, {"whiten": True}])
def test_one_item(extra: dict[str, Any]) -> None:
    tokenizer = fitted(item_features(1), **extra)
    assert tokenizer.codes.shape == (2, 3) and tokenizer.unique
    assert tokenizer.decode(tokenizer.codes[1:]).tolist() == [1]


@pytest.mark.parametrize("policy", ["nearest_free", "append", "random"])
def test_identical_items_get_codes_of_their_own(policy: Any) -> None:
    items = one_level(np.concatenate([np.ones((2, 4)), clustered(10, width=4)]))
    tokenizer = fitted(items, codebook_size=16, collisions=policy)
    assert tokenizer.unique and tokenizer.report is not None and tokenizer.report.collisions >= 2
    assert torch.equal(tokenizer.codes[1, :2], tokenizer.codes[2, :2])
    only = fitted(one_level(np.ones((2, 4))), codebook_size=16, collisions=policy)
    assert only.unique and only.report is not None and only.report.reconstruction == 0.0


def test_items_without_any_level_share_a_prefix() -> None:
    values, mask = one_level(clustered(12, width=4))["title"]
    mask[:] = False
    tokenizer = fitted({"title": (values, mask)}, codebook_size=16)
    assert tokenizer.unique and len(torch.unique(tokenizer.codes[1:, :2], dim=0)) == 1


def test_fewer_items_than_codes() -> None:
    tokenizer = fitted(one_level(clustered(5)), levels=2)
    assert tokenizer.level_sizes == (256, 256) and tokenizer.unique
    assert tokenizer.report is not None and tokenizer.report.reconstruction == pytest.approx(0.0, abs=1e-9)


def test_more_identical_items_than_last_codes_is_an_error_that_names_the_way_out() -> None:
    with pytest.raises(DataError, match="append"):
        fitted(one_level(np.ones((9, 4))), codebook_size=4)
    assert fitted(one_level(np.ones((9, 4))), codebook_size=4, collisions="append").unique


# New items -----------------------------------------------------------------------------------------------------------


def test_new_items_after_reloading_use_the_fitted_codebooks(tmp_path: Path) -> None:
    all_items = clustered(60)
    tokenizer = fitted(one_level(all_items[:50]), codebook_size=(6, 6, 40))
    tokenizer.save_pretrained(tmp_path)
    again = RQKMeans.from_pretrained(tmp_path)
    again.add(one_level(all_items))
    assert again.unique and torch.equal(again.codes[:51], tokenizer.codes)
    again.add(one_level(all_items))
    assert len(again.codes) == 61, "nothing to add the second time"
    center, scale = tokenizer.center.numpy(), tokenizer.scale.numpy()
    rest = torch.from_numpy(fused(one_level(all_items[50:]), center, scale)) @ tokenizer.basis
    for level in (0, 1):
        code = torch.cdist(rest, tokenizer.codebooks[level]).argmin(1)
        assert torch.equal(again.codes[51:, level], code)
        rest = rest - tokenizer.codebooks[level][code]


def test_new_items_with_other_features_are_refused() -> None:
    tokenizer = fitted(one_level(clustered(20)), codebook_size=8)
    with pytest.raises(DataError, match="8 dimensions"):
        tokenizer.add(one_level(clustered(30, width=7)))
    with pytest.raises(DataError, match="at least 20 items"):
        tokenizer.add(one_level(clustered(10)))


# Options -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"levels": 0}, "levels"),
        ({"iterations": 0}, "iterations"),
        ({"codebook_size": (8, 8)}, "codebook_size"),
        ({"codebook_size": 0}, "codebook_size"),
        ({"collisions": "suffix"}, "collisions"),
        ({"pca": 0}, "pca"),
        ({"pca": None, "whiten": True}, "whiten"),
        ({"product": True, "normalize_residuals": True}, "normalize_residuals"),
    ],
)
def test_options_that_cannot_mean_anything_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError, match=f"item_tokenizer.{named}: found"):
        RQKMeans(**options)
