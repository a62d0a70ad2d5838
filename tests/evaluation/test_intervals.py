from __future__ import annotations

import math

import numpy as np
import pytest

from llmrec.evaluation.intervals import (
    bootstrap_mean,
    bootstrap_means,
    bootstrap_statistic,
    mcnemar_exact,
    paired_test,
    sign_flip_p_value,
)


def test_interval_holds_the_mean_and_has_the_normal_width():
    values = np.random.default_rng(0).normal(3.0, 2.0, 1000)
    got = bootstrap_mean(values, seed=1)
    assert got.low < got.mean < got.high and got.mean == pytest.approx(values.mean())
    assert got.high - got.low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(1000), rel=0.08)


def test_intervals_cover():
    rng = np.random.default_rng(2)
    hits = 0
    for trial in range(200):
        got = bootstrap_mean((rng.random(80) < 0.3).astype(float), seed=trial, resamples=400)
        hits += got.low <= 0.3 <= got.high
    assert 0.88 <= hits / 200 <= 0.99


def test_same_seed_same_interval_and_users_may_be_renumbered():
    rng = np.random.default_rng(3)
    values, users = rng.random(200), rng.integers(0, 50, 200)
    first = bootstrap_mean(values, seed=5, users=users)
    assert bootstrap_mean(values, seed=5, users=users) == first
    names, order = rng.permutation(50), rng.permutation(200)
    again = bootstrap_mean(values[order], seed=5, users=names[users][order])
    assert again.to_dict() == pytest.approx(first.to_dict(), abs=1e-12)
    assert bootstrap_mean(values, seed=6, users=users) != first


def test_examples_of_a_user_are_drawn_together():
    once = np.random.default_rng(4).normal(size=300)
    ten_times, users = np.repeat(once, 10), np.repeat(np.arange(300), 10)
    alone = bootstrap_mean(once, seed=0)
    clustered, naive = bootstrap_mean(ten_times, seed=0, users=users), bootstrap_mean(ten_times, seed=0)
    assert clustered.high - clustered.low == pytest.approx(alone.high - alone.low, rel=0.01)
    assert naive.high - naive.low < 0.5 * (alone.high - alone.low)


def test_users_weigh_by_their_examples():
    assert bootstrap_mean(np.array([1.0, 1.0, 1.0, 0.0]), 0, users=np.array([7, 7, 7, 9])).mean == 0.75


def test_columns_are_resampled_together():
    values = np.random.default_rng(5).random((60, 2))
    both = bootstrap_means(np.c_[values, values.sum(1)], seed=1)
    assert both[2].mean == pytest.approx(both[0].mean + both[1].mean)


def test_impossible_values_are_refused():
    with pytest.raises(ValueError, match="no users"):
        bootstrap_mean(np.zeros(0), 0)
    with pytest.raises(ValueError, match="finite"):
        bootstrap_mean(np.array([1.0, np.nan]), 0)
    with pytest.raises(ValueError, match="paired"):
        paired_test(np.zeros(3), np.zeros(4))


def test_a_planted_difference_is_found():
    rng = np.random.default_rng(6)
    base = rng.random(400)
    got = paired_test(base + 0.05 + 0.1 * rng.normal(size=400), base)
    assert got.p_value < 0.001 and got.difference.low > 0 and got.users == 400 and got.mcnemar is None
    swapped = paired_test(base, base + 0.05)
    assert swapped.difference.mean == pytest.approx(-0.05) and swapped.p_value < 0.001


def test_pairing_finds_what_separate_intervals_hide():
    rng = np.random.default_rng(7)
    easy = rng.random(300)
    a, b = easy + 0.02, easy + 0.01 * rng.normal(size=300)
    separate_a, separate_b = bootstrap_mean(a, 0), bootstrap_mean(b, 0)
    assert separate_a.low < separate_b.high  # the intervals overlap
    assert paired_test(a, b).p_value < 0.001


def test_p_values_are_uniform_without_a_difference():
    rng = np.random.default_rng(8)
    p = np.array([sign_flip_p_value(rng.normal(size=30), seed=s, permutations=400) for s in range(400)])
    assert abs(p.mean() - 0.5) < 0.06
    for level in (0.05, 0.25, 0.5, 0.75):
        assert abs((p <= level).mean() - level) < 0.075
    assert p.min() > 0


def test_sign_flips_agree_with_all_sign_patterns():
    d = np.array([0.5, 0.5, -0.25, 1.0, 0.0, 0.75, -0.1])
    signs = np.array(np.meshgrid(*[[-1, 1]] * len(d))).reshape(len(d), -1)
    exact = (np.abs(signs.T @ d) >= abs(d.sum()) - 1e-12).mean()
    assert sign_flip_p_value(d, permutations=40000) == pytest.approx(exact, abs=0.01)


def test_equal_systems():
    same = paired_test(np.array([0.0, 1.0, 1.0]), np.array([0.0, 1.0, 1.0]))
    assert same.p_value == 1.0 and same.mcnemar == 1.0 and same.difference.mean == 0.0


@pytest.mark.parametrize(
    "only_a, only_b, expected",
    [(0, 0, 1.0), (5, 0, 2 / 32), (1, 9, 2 * 11 / 1024), (4, 4, 1.0), (2000, 2300, None)],
)
def test_mcnemar(only_a, only_b, expected):
    from scipy.stats import binomtest

    reference = binomtest(only_a, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0
    assert mcnemar_exact(only_a, only_b) == pytest.approx(expected if expected is not None else reference, rel=1e-6)
    assert mcnemar_exact(only_a, only_b) == pytest.approx(reference, rel=1e-6)
    assert mcnemar_exact(only_a, only_b) == mcnemar_exact(only_b, only_a)


def test_a_statistic_that_is_a_mean_has_the_interval_of_a_mean():
    rng = np.random.default_rng(4)
    users = np.repeat(np.arange(150), 4)
    values = rng.normal(size=600) + np.repeat(rng.normal(size=150), 4)
    mean = bootstrap_mean(values, seed=0, users=users)
    other = bootstrap_statistic(lambda drawn: drawn @ values / drawn.sum(axis=1), users, seed=0)
    assert other.mean == pytest.approx(mean.mean)
    assert (other.low, other.high) == pytest.approx((mean.low, mean.high), abs=0.02)
    assert other.high - other.low > 1.5 * (2 * 1.96 * values.std() / math.sqrt(600)), "users are drawn, not events"


def test_draws_without_a_value_are_left_out_and_events_without_one_refused():
    def ratio(drawn):
        return np.divide(drawn[:, 0], drawn[:, 1], out=np.full(len(drawn), np.nan), where=drawn[:, 1] > 0)

    got = bootstrap_statistic(ratio, np.array([1, 2, 3]), seed=0)
    assert math.isfinite(got.low) and math.isfinite(got.high)
    with pytest.raises(ValueError, match="no finite value"):
        bootstrap_statistic(lambda drawn: np.full(len(drawn), np.nan), np.array([1, 2]), seed=0)
