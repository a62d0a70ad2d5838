"""Groups of equal codes, the five collision policies, and Sinkhorn's transport."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmrec.blocks.collisions import collision_groups, resolve, sinkhorn, sinkhorn_plan

SIZES = (2, 3, 30)


def table(seed: int, rows: int, width: int) -> Callable[[Tensor], Tensor]:
    """Costs as a fixed random matrix."""
    matrix = torch.rand(rows, width, generator=torch.Generator().manual_seed(seed))
    return lambda asked: matrix[asked]


def never(asked: Tensor) -> Tensor:
    raise AssertionError("no cost is needed here")


def loop_groups(codes: Tensor) -> tuple[list[tuple[int, ...]], list[int]]:
    """Distinct codes and the place of each row, by a dictionary."""
    seen: dict[tuple[int, ...], int] = {}
    place = []
    for row in codes.tolist():
        place.append(seen.get(tuple(row), 0))
        seen[tuple(row)] = place[-1] + 1
    return list(seen), place


def unique_rows(codes: Tensor) -> bool:
    return len(torch.unique(codes, dim=0)) == len(codes)


# Groups --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "levels", "size"), [(5000, 4, 6), (2000, 1, 50), (500, 9, 2), (300, 3, 2**40)])
def test_groups_equal_a_dict_loop(rows: int, levels: int, size: int) -> None:
    codes = torch.randint(0, size, (rows, levels), generator=torch.Generator().manual_seed(rows))
    codes = torch.cat([codes, codes[: rows // 3]])
    group, place = collision_groups(codes)
    distinct, expected = loop_groups(codes)
    assert place.tolist() == expected
    assert sorted(set(group.tolist())) == list(range(len(distinct)))
    pairs = {(number, tuple(row)) for number, row in zip(group.tolist(), codes.tolist(), strict=True)}
    assert len(pairs) == len(distinct), "a group is one code, and a code is one group"
    assert [code for _, code in sorted(pairs)] == sorted(distinct), "groups are numbered in the order of codes"


def test_groups_of_nothing_and_of_rows_without_levels() -> None:
    assert [len(part) for part in collision_groups(torch.zeros(0, 3, dtype=torch.long))] == [0, 0]
    group, place = collision_groups(torch.zeros(4, 0, dtype=torch.long))
    assert group.tolist() == [0, 0, 0, 0] and place.tolist() == [0, 1, 2, 3]


def test_a_million_codes_are_numbered_as_a_small_part_says() -> None:
    codes = torch.randint(0, 40, (10**6, 4), generator=torch.Generator().manual_seed(0))
    part = collision_groups(codes[:20_000])[1]
    group, place = collision_groups(codes)
    assert torch.equal(place[:20_000], part), "places count in row order: later rows change nothing"
    assert place.tolist()[:20_000] == loop_groups(codes[:20_000])[1]
    count = torch.bincount(group)
    assert int(count.sum()) == 10**6 and torch.equal(place == 0, place == place.clamp(max=0))
    assert int((place == 0).sum()) == len(count) and int(place.max()) == int(count.max()) - 1


# Policies (tiger-family property 5) ----------------------------------------------------------------------------------

catalogues = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(rows=catalogues, policy=st.sampled_from(["nearest_free", "append", "random"]), seed=st.integers(0, 9))
def test_policies_make_any_catalogue_unique(rows: list[tuple[int, int, int]], policy: str, seed: int) -> None:
    codes = torch.tensor(rows)
    before = codes.clone()
    found, sizes = resolve(codes, SIZES, policy, costs=table(seed, len(rows), SIZES[-1]), seed=seed)
    again, _ = resolve(codes, SIZES, policy, costs=table(seed, len(rows), SIZES[-1]), seed=seed)
    assert torch.equal(codes, before) and torch.equal(found, again), "deterministic, and without touching its input"
    assert unique_rows(found) and bool((found >= 0).all()) and bool((found < torch.tensor(sizes)).all())
    assert torch.equal(found[:, :2], codes[:, :2]), "levels before the last never change"
    if policy == "append":
        assert torch.equal(found[:, :3], codes) and sizes == (*SIZES, int(found[:, 3].max()) + 1)
    else:
        assert sizes == SIZES
        kept = {tuple(row) for row in codes.tolist()}
        assert kept <= {tuple(row) for row in found.tolist()}, "of the items of a code, one keeps it"


@settings(max_examples=40, deadline=None)
@given(rows=catalogues, seed=st.integers(0, 9))
def test_nearest_free_does_not_depend_on_the_order_of_rows(rows: list[tuple[int, int, int]], seed: int) -> None:
    codes = torch.tensor(rows)
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randint(0, 4, (len(rows), SIZES[-1]), generator=generator) + 1e-3 * torch.arange(len(rows))[:, None]
    order = torch.randperm(len(rows), generator=generator)
    plain, _ = resolve(codes, SIZES, "nearest_free", costs=lambda asked: matrix[asked], seed=0)
    shuffled, _ = resolve(codes[order], SIZES, "nearest_free", costs=lambda asked: matrix[order][asked], seed=0)
    assert torch.equal(plain[order], shuffled), "ties between codes included"


@settings(max_examples=40, deadline=None)
@given(last=st.lists(st.integers(0, 5), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_nearest_free_is_greedy_over_pairs_by_cost(last: list[int], seed: int) -> None:
    codes = torch.tensor(last)[:, None]
    matrix = torch.rand(len(last), 12, generator=torch.Generator().manual_seed(seed))
    found, _ = resolve(codes, (12,), "nearest_free", costs=lambda rows: matrix[rows], seed=0)
    expected: dict[int, int] = {}
    for code in set(last):
        expected[min((row for row, own in enumerate(last) if own == code), key=lambda row: matrix[row, code])] = code
    pairs = sorted((float(matrix[row, code]), row, code) for row in range(len(last)) for code in range(12))
    for _, row, code in pairs:
        if row not in expected and code not in expected.values():
            expected[row] = code
    assert found.flatten().tolist() == [expected[row] for row in range(len(last))]


def test_nearest_free_in_many_parts_equals_one(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 4, (300, 3), generator=torch.Generator().manual_seed(3))
    costs = table(0, 300, 32)
    whole, _ = resolve(codes, (4, 4, 32), "nearest_free", costs=costs, seed=0)
    monkeypatch.setattr("llmrec.blocks.collisions._CELLS", 100)
    parts, _ = resolve(codes, (4, 4, 32), "nearest_free", costs=costs, seed=0)
    assert torch.equal(whole, parts) and unique_rows(whole)


def test_unique_codes_need_no_costs() -> None:
    codes = torch.tensor([[0, 1], [0, 2], [1, 1]])
    for policy in ("nearest_free", "sinkhorn", "none"):
        assert torch.equal(resolve(codes, (2, 3), policy, costs=never, seed=0)[0], codes)
    appended, sizes = resolve(codes, (2, 3), "append", costs=never, seed=0)
    assert appended[:, 2].tolist() == [0, 0, 0] and sizes == (2, 3, 1)


@pytest.mark.parametrize("policy", ["nearest_free", "random"])
def test_a_prefix_that_is_too_full_is_refused_with_numbers(policy: str) -> None:
    codes = torch.tensor([[1, 0], [1, 0], [1, 1], [0, 0]])
    with pytest.raises(ValueError, match=r"3 items share the prefix \(1,\), and the last level has 2 codes"):
        resolve(codes, (2, 2), policy, costs=table(0, 4, 2), seed=0)


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="found policy 'closest', expected nearest_free"):
        resolve(torch.zeros(1, 1, dtype=torch.long), (1,), "closest", costs=never, seed=0)


def test_costs_that_are_not_finite_still_give_unique_codes() -> None:
    matrix = torch.full((4, 4), torch.nan)
    matrix[:, 1] = torch.inf
    found, _ = resolve(torch.zeros(4, 1, dtype=torch.long), (4,), "nearest_free", costs=lambda r: matrix[r], seed=0)
    assert sorted(found.flatten().tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("policy", ["nearest_free", "append", "random"])
def test_kept_codes_stay_and_count_as_taken(policy: str) -> None:
    codes = torch.randint(0, 2, (40, 3), generator=torch.Generator().manual_seed(1))
    matrix = torch.rand(40, 20, generator=torch.Generator().manual_seed(2))

    def new_rows_only(asked: Tensor) -> Tensor:
        assert bool((asked >= 25).all()), "kept rows have no costs"
        return matrix[asked]

    first, sizes = resolve(codes[:25], (2, 2, 20), policy, costs=lambda asked: matrix[asked], seed=0)
    found, grown = resolve(codes, (2, 2, 20), policy, costs=new_rows_only, seed=0, kept=first)
    assert torch.equal(found[:25], first) and unique_rows(found)
    assert torch.equal(found[25:, :2], codes[25:, :2])
    assert len(grown) == len(sizes) and grown[-1] > int(found[:, -1].max())


def test_append_goes_on_after_the_greatest_number_kept() -> None:
    kept = torch.tensor([[0, 4], [1, 0]])
    found, sizes = resolve(torch.tensor([[0], [1], [0], [0]]), (2,), "append", costs=never, seed=0, kept=kept)
    assert found.tolist() == [[0, 4], [1, 0], [0, 5], [0, 6]] and sizes == (2, 7)


def test_sinkhorn_repairs_what_it_can_and_identical_items_stay_shared() -> None:
    codes = torch.zeros(6, 2, dtype=torch.long)
    codes[3:, 0] = 1
    matrix = torch.rand(6, 8, generator=torch.Generator().manual_seed(0))
    matrix[3:] = matrix[3]
    found, sizes = resolve(codes, (2, 8), "sinkhorn", costs=lambda rows: matrix[rows], seed=0)
    assert sizes == (2, 8) and torch.equal(found[:, 0], codes[:, 0])
    assert unique_rows(found[:3]), "different items of one code are told apart"
    assert len(torch.unique(found[3:], dim=0)) == 1, "transport treats equal items equally; nearest_free does not"
    assert unique_rows(resolve(codes, (2, 8), "nearest_free", costs=lambda rows: matrix[rows], seed=0)[0])


# Sinkhorn (tiger-family property 4) ----------------------------------------------------------------------------------


def test_masses_of_the_plan() -> None:
    distances = torch.rand(60, 12, generator=torch.Generator().manual_seed(0))
    plan = sinkhorn_plan(distances, 0.05, 50)
    assert plan.dtype == torch.float64
    assert torch.allclose(plan.sum(0), torch.full((12,), 5.0, dtype=torch.float64), rtol=1e-12)
    assert bool(((plan.sum(1) - 1).abs() < 0.01).all())
    sharp = sinkhorn_plan(distances, 0.003, 50)
    assert torch.allclose(sharp.sum(0), torch.full((12,), 5.0, dtype=torch.float64), rtol=1e-12)


def test_the_plan_is_the_published_iteration() -> None:
    distances = torch.rand(20, 6, generator=torch.Generator().manual_seed(4)).double()
    middle = (distances.max() + distances.min()) / 2
    plan = torch.exp(-(distances - middle) / (distances.max() - middle + 1e-5) / 0.003)
    plan = plan / plan.sum()
    for _ in range(50):
        plan = plan / (plan.sum(1, keepdim=True) * 20)
        plan = plan / (plan.sum(0, keepdim=True) * 6)
    assert torch.allclose(sinkhorn_plan(distances, 0.003, 50), plan * 20, rtol=1e-9)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-3, 1.0, 1e8, 1e38])
@pytest.mark.parametrize("epsilon", [1e-6, 0.003, 1.0])
def test_no_scale_gives_nan(scale: float, epsilon: float) -> None:
    distances = torch.rand(16, 8, generator=torch.Generator().manual_seed(1)) * scale
    distances[0] = distances.max() * 3
    plan = sinkhorn_plan(distances, epsilon, 50)
    assert bool(torch.isfinite(plan).all()) and torch.allclose(plan.sum(0), torch.full((8,), 2.0).double())


def test_without_entropy_it_is_the_nearest_code() -> None:
    distances = torch.rand(30, 5, generator=torch.Generator().manual_seed(2))
    assert torch.equal(sinkhorn(distances, 0.0, 50), distances.argmin(1))
    assert torch.equal(sinkhorn(distances, -1.0, 50), distances.argmin(1))
    with pytest.raises(ValueError, match="epsilon > 0"):
        sinkhorn_plan(distances, 0.0, 50)


def test_codes_are_used_evenly() -> None:
    distances = torch.rand(64, 8, generator=torch.Generator().manual_seed(3)) + torch.arange(8)
    assert (distances.argmin(1) == 0).all()
    count = torch.bincount(sinkhorn(distances, 0.003, 50), minlength=8)
    assert int(count.max()) <= 12 and int(count.min()) >= 4
