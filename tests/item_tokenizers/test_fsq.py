"""FSQ: the contract, the grid against the paper's formulas, straight-through rounding, catalogues at the edge."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmrec.errors import DataError, RecipeError
from llmrec.item_tokenizers.fsq import FSQ, FSQNetwork, Grid, Mode, round_through
from tests.contracts.item_tokenizers import ItemTokenizerContract, item_features

QUICK: dict[str, Any] = {"hidden": (24,), "epochs": 20, "learning_rate": 1e-2}


class TestFSQ(ItemTokenizerContract):
    tokenizer_class = FSQ
    options = {"levels": 2, "shape": (6, 5, 3), **QUICK}


class TestResidual(ItemTokenizerContract):
    tokenizer_class = FSQ
    options = {"levels": 2, "shape": ((4, 3), (8, 8)), "mode": "residual", **QUICK}


def network(mode: Mode, shapes: tuple[tuple[int, ...], ...] = ((4, 5), (3, 8)), seed: int = 0) -> FSQNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return FSQNetwork(6, shapes, mode, (16,))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# The grid, card property 6 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 6, 5), (8, 5, 5, 5), (2,), (3, 2), (7, 5, 5, 5, 5), (1000,)])
def test_index_to_code_to_index_is_the_identity(shape: tuple[int, ...]) -> None:
    grid = Grid(shape)
    codes = torch.arange(grid.size)
    assert grid.size == math.prod(shape)
    points = grid.rounded(codes)
    assert torch.equal(grid.index(points), codes)
    assert len(torch.unique(points, dim=0)) == grid.size
    for dimension, steps in enumerate(shape):
        assert len(torch.unique(points[:, dimension])) == steps


@pytest.mark.parametrize("shape", [(8, 6, 5), (2, 3, 4), (1000, 999)])
@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
def test_bounded_numbers_round_onto_the_grid(shape: tuple[int, ...], scale: float) -> None:
    grid = Grid(shape)
    points = grid.bound(normal(500, len(shape)) * scale).round()
    codes = grid.index(points)
    assert codes.min() >= 0 and codes.max() < grid.size
    assert torch.equal(grid.rounded(codes), points)
    assert grid.values(points).abs().max() <= 1 and grid.even_values(points).abs().max() <= 1


def test_every_step_can_be_reached() -> None:
    grid = Grid((8, 5, 2))
    sweep = torch.linspace(-12, 12, 20_001)[:, None].expand(-1, 3)
    reached = [sorted(set(column.tolist())) for column in grid.bound(sweep).round().T]
    assert reached == [list(range(-4, 4)), list(range(-2, 3)), [-1, 0]]


def test_index_follows_the_formula_of_the_paper() -> None:
    shape, z = (8, 5, 6), normal(200, 3) * 2
    grid = Grid(shape)
    codes = grid.index(grid.bound(z).round())
    for row, code in zip(z.tolist(), codes.tolist(), strict=True):
        index, stride = 0, 1
        for steps, number in zip(shape, row, strict=True):
            half, off = (steps - 1) * (1 + 1e-3) / 2, 0.0 if steps % 2 else 0.5
            value = round(math.tanh(number + math.atanh(off / half)) * half - off) / (steps // 2)
            index += round(value * (steps // 2) + steps // 2) * stride
            stride *= steps
        assert index == code


def test_evenly_spaced_values_reach_both_ends() -> None:
    grid = Grid((4, 5))
    ends = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    assert torch.allclose(grid.even_values(grid.spread(ends).round()), ends)
    grid = Grid((4,))
    points = grid.even_values(grid.rounded(torch.arange(4)))[:, 0]
    assert points.tolist() == pytest.approx([-1, -1 / 3, 1 / 3, 1])


def test_rounding_has_the_gradient_of_the_identity() -> None:
    x = normal(50).mul(3).requires_grad_()
    y = round_through(x)
    assert torch.equal(y.detach(), x.detach().round())
    weights = normal(50, seed=1)
    assert torch.equal(torch.autograd.grad((y * weights).sum(), x)[0], weights)


# The network ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["group", "residual"])
def test_latent_of_the_codes_is_what_the_decoder_received(mode: Mode) -> None:
    module = network(mode)
    latent, codes, _ = module.quantize(normal(64, 6) * 3)
    assert torch.allclose(module.latent(codes), latent, atol=1e-6)
    every = module.latent(torch.tensor(list(itertools.product(range(20), range(24)))))
    # A residual grid of 4 and then 3 values per cell has 9 points, of 5 and then 8 values 36: cells share borders.
    distinct = {"group": 20 * 24, "residual": 9 * 36}[mode]
    assert len(torch.unique((every * 1e4).round(), dim=0)) == distinct, "codes mean different things"
    assert mode == "residual" or every.abs().max() <= 1


@pytest.mark.parametrize("mode", ["group", "residual"])
def test_gradient_passes_the_rounding(mode: Mode) -> None:
    """The gradient that reaches the encoder is that of the same latent without rounding."""
    module, x = network(mode), normal(32, 6)
    weights = normal(32, sum(module.split), seed=2)
    module.zero_grad()
    (module.quantize(x)[0] * weights).sum().backward()
    found = [parameter.grad.clone() for parameter in module.encoder.parameters() if parameter.grad is not None]
    module.zero_grad()
    z = module.encoder(x)
    if mode == "group":
        parts = zip(module.grids, z.split(module.split, dim=-1), strict=True)
        smooth = torch.cat([grid.values(grid.bound(part)) for grid, part in parts], dim=-1)
    else:
        smooth = torch.tanh(z)
    (smooth * weights).sum().backward()
    expected = [parameter.grad for parameter in module.encoder.parameters() if parameter.grad is not None]
    assert len(found) == len(expected) == 4
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


def test_residual_levels_refine_one_another() -> None:
    module = network("residual", ((5, 4), (3, 6), (7, 4)))
    x = normal(200, 6) * 3
    unit, codes = torch.tanh(module.encoder(x)), module.quantize(x)[1]
    finest = torch.ones(2)
    for level in range(3):
        part = FSQNetwork(6, [grid.steps.tolist() for grid in module.grids[: level + 1]], "residual", (16,))
        gaps = (part.latent(codes[:, : level + 1]) - unit).abs()
        finest = finest / (module.grids[level].steps - 1)
        assert (gaps <= finest + 1e-5).all(), "half a step of the level is the most that is left"


# Fits ----------------------------------------------------------------------------------------------------------------


def fitted(items: Any, seed: int = 0, **options: Any) -> FSQ:
    tokenizer = FSQ(**{**QUICK, **options})
    tokenizer.fit(items, seed=seed)
    return tokenizer


@pytest.mark.parametrize("mode", ["group", "residual"])
def test_training_reconstructs_and_separates_clusters(mode: Mode) -> None:
    """Five clusters: far more is explained than by the mean, and the first items of two clusters differ in code."""
    items = item_features(200)
    tokenizer = fitted(items, levels=2, shape=(5, 5, 5), mode=mode, collisions="none", epochs=80)
    report = tokenizer.report
    assert report is not None and report.reconstruction < 0.5, "features have mean square 1"
    assert report.details["last_loss"] < report.details["first_loss"]
    first = tokenizer.codes[1:].tolist()
    owners: dict[tuple[int, ...], set[int]] = {}
    for item, code in enumerate(first, start=1):
        owners.setdefault(tuple(code), set()).add(item % 5)
    assert len(owners) >= 5 and all(len(clusters) == 1 for clusters in owners.values())


@pytest.mark.parametrize("mode", ["group", "residual"])
def test_collided_items_stay_near_their_point_of_the_last_grid(mode: Mode) -> None:
    """One dimension with 64 steps: a move is a difference of codes, and a random free code is further away."""
    policies = ("none", "nearest_free", "random")
    options: dict[str, Any] = {"levels": 2, "shape": ((3,), (64,)), "mode": mode}
    raw, near, anywhere = (fitted(item_features(60), collisions=policy, **options) for policy in policies)
    assert near.unique and anywhere.unique and not raw.unique
    assert torch.equal(near.codes[:, 0], raw.codes[:, 0])
    moves = [(tokenizer.codes[1:, 1] - raw.codes[1:, 1]).abs().sum() for tokenizer in (near, anywhere)]
    assert 0 < moves[0] < 0.6 * moves[1]


@pytest.mark.parametrize("mode", ["group", "residual"])
def test_one_item(mode: Mode) -> None:
    tokenizer = fitted(item_features(1), mode=mode, epochs=2)
    assert tokenizer.codes.shape == (2, 3) and tokenizer.level_sizes == (240, 240, 240) and tokenizer.unique


@pytest.mark.parametrize("policy", ["nearest_free", "append", "random"])
def test_items_without_any_level_get_codes_of_their_own(policy: str) -> None:
    items = {"title": (np.full((5, 3), 7.0, dtype=np.float32), np.zeros(5, dtype=bool))}
    tokenizer = fitted(items, collisions=policy, epochs=2)
    assert tokenizer.unique and len(torch.unique(tokenizer.codes[1:, :2], dim=0)) == 1
    assert tokenizer.report is not None and tokenizer.report.collisions == 4


def test_new_items_after_reloading_use_the_fitted_network(tmp_path: Path) -> None:
    """A copy of an old item gets its code; what is stored holds no pickled module."""
    items = item_features(40)
    tokenizer = fitted(items, collisions="none")
    tokenizer.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codes.safetensors", "tokenizer.json"]
    again = FSQ.from_pretrained(tmp_path)
    grown = {
        name: (np.concatenate([values, values[1:]]), np.concatenate([mask, mask[1:]]))
        for name, (values, mask) in items.items()
    }
    again.add(grown)
    assert len(again.codes) == 81 and torch.equal(again.codes[41:], tokenizer.codes[1:])
    again.add(grown)
    assert len(again.codes) == 81, "nothing to add the second time"
    with pytest.raises(DataError, match="dimensions"):
        again.add({"title": grown["title"]})


def test_nested_shapes_survive_saving(tmp_path: Path) -> None:
    tokenizer = fitted(item_features(10), levels=2, shape=[[4, 3], [20]], epochs=2, collisions="append")
    assert tokenizer.shapes == ((4, 3), (20,)) and tokenizer.level_sizes[:2] == (12, 20)
    tokenizer.save_pretrained(tmp_path)
    assert FSQ.from_pretrained(tmp_path) == tokenizer


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"levels": 0}, "levels"),
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"mode": "product"}, "mode"),
        ({"collisions": "suffix"}, "collisions"),
        ({"shape": ()}, "shape"),
        ({"shape": (8, 1)}, "shape"),
        ({"shape": (8, 1001)}, "shape"),
        ({"shape": ((8, 5), (8, 5))}, "shape"),
        ({"shape": ((8, 5), 8, 5)}, "shape"),
        ({"levels": 2, "shape": ((8,), (8, 5)), "mode": "residual"}, "shape"),
    ],
)
def test_options_that_cannot_mean_anything_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError, match=f"item_tokenizer.{named}: found"):
        FSQ(**options)
