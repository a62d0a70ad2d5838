"""The planner: what it measures, when it refuses, what it recommends within a budget."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest

from llmrec.analysis.entropy import joint_entropy
from llmrec.analysis.performance_law import fit_performance_law, term
from llmrec.analysis.planner import Budget, PilotRun, make_plan, measure, recommend, refusals, seed_noise
from llmrec.commands.output import to_json
from llmrec.data.dataset import DatasetMeta, InteractionDataset
from llmrec.errors import DataError, RecipeError

DEPTHS, WIDTHS = (2, 4, 8, 16), (32, 64, 128)
Law = Callable[[float, float], float]


def peaked(depth: float, width: float) -> float:
    """Rises and falls: best at depth 2^(1/0.4) = 5.66 and width 2^(1/0.18) = 47."""
    return 0.3 * float(term(depth, -0.4)) + 0.3 * float(term(width, -0.18)) + 0.75


def rising(depth: float, width: float) -> float:
    return -0.02 * float(term(depth, 0.6)) - 0.02 * float(term(width, 0.5)) + 0.1


def pilot(law: Law, noise: float = 0.0, depths: tuple[int, ...] = DEPTHS, seed: int = 0) -> list[PilotRun]:
    rng = np.random.default_rng(seed)
    return [PilotRun(n, h, law(n, h) + noise * float(rng.standard_normal())) for n in depths for h in WIDTHS]


def parameters(depth: int, width: int) -> float:
    return float(12 * depth * width**2)


def dataset(sequences: list[list[int]], items: int) -> InteractionDataset:
    """Training events of each user, then one validation and one test event (item 1 and item 2)."""
    rows = [
        (user, item, order, split)
        for user, sequence in enumerate(sequences, start=1)
        for order, (item, split) in enumerate(
            [*((item, "train") for item in sequence), (1, "valid"), (2, "test")], start=1
        )
    ]
    columns = dict(zip(("user", "item", "order", "split"), map(list, zip(*rows, strict=True)), strict=True))
    item_table = pa.table({"item": list(range(1, items + 1)), "key": [f"i{i}" for i in range(1, items + 1)]})
    users = list(range(1, len(sequences) + 1))
    user_table = pa.table({"user": users, "key": [f"u{u}" for u in users]})
    return InteractionDataset(pa.table(columns), item_table, user_table, DatasetMeta("made", "table", "given"))


def test_measures_training_events_cut_to_the_latest() -> None:
    rng = np.random.default_rng(0)
    sequences = [rng.permutation(np.arange(3, 90))[:length].tolist() for length in (10, 30, 60, 60)]
    found = measure(dataset(sequences, 100))
    assert (found.users, found.items, found.events) == (4, 100, 160)
    assert [row.history for row in found.rows] == [25, 50, 100, 200]
    assert [row.entropy.tokens for row in found.rows] == [85, 140, 160, 160]
    assert found.rows[0].mean_length == pytest.approx(85 / 4)
    assert found.rows[1].entropy.real == pytest.approx(joint_entropy([s[-50:] for s in sequences]))
    assert found.rows[1].novelty == pytest.approx(found.rows[1].entropy.real / math.log(100))
    assert any("longer than 100 events" in line for line in found.warnings)


def test_redundant_histories_are_warned_of() -> None:
    repeating = measure(dataset([[1, 2] * 100] * 5, 500))
    assert repeating.rows[0].novelty < 0.3
    (warning,) = [line for line in repeating.warnings if "redundant" in line]
    assert "repeats: first" in warning
    rng = np.random.default_rng(1)
    fresh = measure(dataset([rng.permutation(np.arange(1, 500))[:120].tolist() for _ in range(5)], 500))
    assert not [line for line in fresh.warnings if "redundant" in line]


def test_recommends_the_peak_of_the_law() -> None:
    plan = make_plan(pilot(peaked))
    assert plan.status == "determined" and plan.choice.source == "fitted law"
    grid = [(n, h) for n in range(1, 33) for h in range(16, 257, 16)]
    assert (plan.choice.depth, plan.choice.width) == max(grid, key=lambda size: peaked(*size)) == (6, 48)
    assert plan.choice.predicted == pytest.approx(peaked(6, 48), abs=1e-6)
    assert plan.fit is not None and plan.scaling_r2 is not None
    assert plan.fit.left_out_r2 > plan.scaling_r2[1]


@pytest.mark.parametrize("limit", [30_000, 60_000, 130_000, 400_000])
@pytest.mark.parametrize("law", [peaked, rising])
def test_the_recommendation_never_exceeds_the_budget(law: Law, limit: float) -> None:
    plan = make_plan(pilot(law), Budget(limit, parameters, "parameters"))
    assert plan.choice.cost == parameters(plan.choice.depth, plan.choice.width) <= limit


def test_a_budget_gives_the_best_size_it_allows() -> None:
    limit = 60_000
    plan = make_plan(pilot(peaked), Budget(limit, parameters, "parameters"))
    feasible = [(n, h) for n in range(1, 33) for h in range(16, 257, 16) if parameters(n, h) <= limit]
    assert (
        parameters(2, 32) > make_plan(pilot(peaked), Budget(15_000, parameters, "parameters")).choice.cost
    )  # no pilot fits
    assert (plan.choice.depth, plan.choice.width) == max(feasible, key=lambda size: peaked(*size))


def test_a_peak_beyond_the_pilot_is_clipped_to_twice_its_largest() -> None:
    def far(depth: float, width: float) -> float:  # depth 2^(1/0.12) = 322
        return 0.3 * float(term(depth, -0.12)) + 0.3 * float(term(width, -0.18)) + 0.75

    runs = pilot(far)
    choice = recommend(fit_performance_law(*np.array([(r.depth, r.width, r.metric) for r in runs]).T), runs)
    assert choice.depth == 2 * max(DEPTHS)


def test_a_monotone_law_takes_the_largest_feasible_pilot_and_says_so() -> None:
    plan = make_plan(pilot(rising))
    assert plan.status == "determined" and plan.choice.source == "pilot sizes"
    assert (plan.choice.depth, plan.choice.width) == (16, 128)
    assert all("largest feasible value" in words for words in plan.regimes)
    # With a budget: the best predicted of the pilot's sizes that fit.
    limit = 12 * 8 * 64**2
    bounded = make_plan(pilot(rising), Budget(limit, parameters, "parameters"))
    feasible = [(n, h) for n in DEPTHS for h in WIDTHS if parameters(n, h) <= limit]
    assert (bounded.choice.depth, bounded.choice.width) == max(feasible, key=lambda size: rising(*size))


def test_one_size_can_be_held_fixed() -> None:
    runs = pilot(peaked)
    fit = fit_performance_law(*np.array([(r.depth, r.width, r.metric) for r in runs]).T)
    # The terms add up: the best width is the same at every depth.
    assert {recommend(fit, runs, depth=n).width for n in (2, 6, 16)} == {48}
    assert {recommend(fit, runs, width=h).depth for h in (32, 128)} == {6}


def test_noise_without_a_law_is_undetermined() -> None:
    runs = pilot(lambda n, h: 0.2, noise=0.01)
    plan = make_plan(runs)
    assert plan.status == "undetermined" and plan.expansion is None
    assert "R^2" in plan.reasons[0]
    best = max(runs, key=lambda run: run.metric)
    assert plan.choice.source == "best pilot"
    assert (plan.choice.depth, plan.choice.width, plan.choice.predicted) == (best.depth, best.width, best.metric)


def test_a_depth_interval_of_more_than_four_is_undetermined() -> None:
    def flat_in_depth(depth: float, width: float) -> float:  # width explains nearly everything
        return 0.01 * float(term(depth, -0.3)) + 0.5 * float(term(width, -0.18)) + 0.75

    found = []
    for seed in range(6):
        runs = pilot(flat_in_depth, noise=2e-4, seed=seed)
        fit = fit_performance_law(*np.array([(r.depth, r.width, r.metric) for r in runs]).T)
        if fit.depth.regime == "peak" and fit.depth.spread > 4:
            assert fit.left_out_r2 > 0.5
            assert any("interval of the best depth" in reason for reason in refusals(fit))
            assert make_plan(runs).status == "undetermined"
            found.append(seed)
    assert found


def test_eleven_runs_are_undetermined() -> None:
    plan = make_plan(pilot(peaked)[:-1])
    assert plan.status == "undetermined" and "at least 12" in plan.reasons[0] and plan.fit is None


def test_the_fallback_keeps_to_the_budget_too() -> None:
    runs = pilot(lambda n, h: 0.2, noise=0.01)
    limit = 12 * 4 * 64**2
    plan = make_plan(runs, Budget(limit, parameters, "parameters"))
    assert plan.status == "undetermined"
    feasible = [run for run in runs if parameters(run.depth, run.width) <= limit]
    assert plan.choice.predicted == max(run.metric for run in feasible)


def test_a_budget_below_every_size_is_refused() -> None:
    with pytest.raises(RecipeError, match="even depth 1 with width 16 takes 3072"):
        make_plan(pilot(peaked), Budget(100, parameters, "parameters"))
    with pytest.raises(RecipeError, match="no finished run"):
        make_plan([])


def test_sizes_that_cannot_be_built_are_left_out() -> None:
    plan = make_plan(pilot(peaked), allowed=lambda depth, width: width % 32 == 0)
    assert plan.choice.width % 32 == 0 and plan.choice.depth == 6


def test_costs_are_asked_once_and_not_above_what_is_too_large() -> None:
    asked: list[tuple[int, int]] = []

    def cost(depth: int, width: int) -> float:
        asked.append((depth, width))
        return parameters(depth, width)

    make_plan(pilot(peaked), Budget(30_000, cost, "ms"))
    assert len(asked) < 80  # of 32 x 16 sizes: a latency takes a measurement


def test_expansion_predicts_twice_the_size() -> None:
    plan = make_plan(pilot(peaked, noise=2e-4))
    assert plan.expansion is not None and plan.expansion.data is None
    n, h = plan.choice.depth, plan.choice.width
    gain, low, high = plan.expansion.model
    assert low <= gain <= high and gain < 0  # past the peak
    assert gain == pytest.approx(peaked(2 * n, 2 * h) - peaked(n, h), abs=5e-3)


def test_three_amounts_of_data_predict_twice_the_data() -> None:
    def constant(amount: float) -> float:
        return float(term(0.01 * amount, -0.05)) + 0.75

    runs = [
        PilotRun(n, h, peaked(n, h) - 0.2 + constant(amount), amount)
        for amount in (2e4, 1e5, 4e5)
        for n in DEPTHS
        for h in WIDTHS
    ]
    plan = make_plan(runs)
    assert plan.status == "determined" and plan.expansion is not None
    assert plan.expansion.data == pytest.approx(constant(8e5) - constant(4e5), abs=1e-5)
    assert any("sign of w5" in line for line in plan.caveats) and not any("D, w5" in line for line in plan.caveats)
    with pytest.raises(DataError, match="cannot be told apart"):
        make_plan([run for run in runs if run.amount < 4e5])


def test_seed_noise_is_the_pooled_deviation() -> None:
    runs = [
        PilotRun(2, 32, 0.1),
        PilotRun(2, 32, 0.12),
        PilotRun(4, 32, 0.2),
        PilotRun(4, 32, 0.2),
        PilotRun(8, 64, 0.5),
    ]
    assert seed_noise(runs) == pytest.approx(math.sqrt(2e-4 / 2))
    assert seed_noise(runs[2:3]) is None


def test_the_record_says_what_is_unidentified_and_is_json() -> None:
    plan = make_plan(pilot(peaked, noise=1e-4))
    record = json.loads(json.dumps(to_json(plan.record())))
    assert record["fit"]["unidentified"] == ["D", "w5", "b"]
    assert any("not identified" in line and "D, w5, b" in line for line in record["caveats"])
    assert len(record["fit"]["residuals"]) == 12 and record["choice"]["depth"] == plan.choice.depth
