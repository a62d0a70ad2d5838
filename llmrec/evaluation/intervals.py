"""Uncertainty of a mean over users: bootstrap intervals and paired tests.

The unit that is drawn is the user. Where a user has several examples (several test events, several draws of
candidates) they are drawn together, because they are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
PERMUTATIONS = 10000
_BLOCK = 4_000_000  # random numbers drawn at a time


@dataclass(frozen=True)
class Interval:
    """A mean and its percentile bootstrap interval."""

    mean: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """{"mean", "low", "high"}."""
        return asdict(self)


@dataclass(frozen=True)
class PairedTest:
    """Difference a - b of two systems on the same users.

    Args:
        difference: Mean of a - b with its bootstrap interval.
        p_value: Two-sided sign-flip permutation p-value of "no difference".
        users: Number of users.
        mcnemar: Exact McNemar p-value where both are 0/1 per user, else None.
    """

    difference: Interval
    p_value: float
    users: int
    mcnemar: float | None


def user_sums(values: np.ndarray, users: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Sums [U, M] and numbers of examples [U] per user, users in ascending order.

    Args:
        values: [n] or [n, M].
        users: [n] user of each row; None when each row is a user.
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[:, None] if values.ndim == 1 else values
    if users is None:
        return values, np.ones(len(values))
    _, place, counts = np.unique(users, return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), values.shape[1]))
    np.add.at(sums, place, values)
    return sums, counts.astype(np.float64)


def bootstrap_means(
    values: np.ndarray,
    seed: int,
    *,
    users: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> list[Interval]:
    """Percentile bootstrap intervals of several means over the same resampled users.

    Args:
        values: [n, M] one column a metric, or [n].
        seed: Seed of the resampling.
        users: [n] user of each row; rows of a user are drawn together. None: each row is a user.
        resamples: Number of bootstrap samples.
        level: Coverage aimed at.

    Returns:
        One interval per column. The mean is over rows, so users weigh by their number of examples.

    Raises:
        ValueError: There are no values, or some are not finite.
    """
    sums, counts = user_sums(values, users)
    if not len(sums):
        raise ValueError("a mean over no users has no interval")
    if not np.isfinite(sums).all():
        raise ValueError("values must be finite")
    order = np.lexsort((*sums.T, counts))  # the interval must not depend on how users are numbered
    sums, counts = sums[order], counts[order]
    rng, drawn, total = np.random.default_rng(seed), [], len(sums)
    step = max(1, _BLOCK // total)
    for begin in range(0, resamples, step):
        size = min(step, resamples - begin)
        chosen = rng.integers(0, total, size=(size, total))
        chosen += np.arange(size)[:, None] * total
        weights = np.bincount(chosen.ravel(), minlength=size * total).reshape(size, total)
        drawn.append((weights @ sums) / (weights @ counts)[:, None])
    means = np.concatenate(drawn)
    tails = [(1 - level) / 2, 1 - (1 - level) / 2]
    low, high = np.quantile(means, tails, axis=0)
    centre = sums.sum(axis=0) / counts.sum()
    return [Interval(*map(float, triple)) for triple in zip(centre, low, high, strict=True)]


def bootstrap_mean(
    values: np.ndarray,
    seed: int,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    users: np.ndarray | None = None,
) -> Interval:
    """Percentile bootstrap interval of one mean; see `bootstrap_means`."""
    return bootstrap_means(values, seed, users=users, resamples=resamples, level=level)[0]


def bootstrap_statistic(
    statistic: Callable[[np.ndarray], np.ndarray],
    users: np.ndarray,
    seed: int,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """Percentile bootstrap interval over users of a figure that is no mean, such as AUC.

    Args:
        statistic: [R, n] how often each event was drawn -> [R] values; NaN where a draw has none.
        users: [n] user of each event; events of a user are drawn together.
        seed: Seed of the resampling.
        resamples: Number of bootstrap samples.
        level: Coverage aimed at.

    Raises:
        ValueError: There are no events, or the statistic has no value on them.
    """
    centre = float(statistic(np.ones((1, len(users))))[0]) if len(users) else math.nan
    if not math.isfinite(centre):
        raise ValueError("the statistic has no finite value on these events")
    _, place = np.unique(users, return_inverse=True)
    rng, drawn, total = np.random.default_rng(seed), [], int(place.max()) + 1
    step = max(1, _BLOCK // len(users))
    for begin in range(0, resamples, step):
        size = min(step, resamples - begin)
        weights = rng.multinomial(total, np.full(total, 1.0 / total), size=size)
        drawn.append(statistic(weights[:, place]))
    tails = [(1 - level) / 2, 1 - (1 - level) / 2]
    low, high = np.nanquantile(np.concatenate(drawn), tails)
    return Interval(centre, float(low), float(high))


def paired_test(
    a: np.ndarray,
    b: np.ndarray,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
    level: float = LEVEL,
) -> PairedTest:
    """Compare two systems on per-user values of one metric.

    Args:
        a, b: [U] values of the same users in the same order.
        seed: Seed of resampling and sign flips.
        resamples, permutations, level: Sizes of the bootstrap and of the permutation test, and coverage.

    Raises:
        ValueError: The arrays do not match.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"paired values must be two arrays [U], got {a.shape} and {b.shape}")
    binary = bool(np.isin(a, (0.0, 1.0)).all() and np.isin(b, (0.0, 1.0)).all())
    return PairedTest(
        difference=bootstrap_mean(a - b, seed, resamples, level),
        p_value=sign_flip_p_value(a - b, seed=seed, permutations=permutations),
        users=len(a),
        mcnemar=mcnemar_exact(int((a > b).sum()), int((a < b).sum())) if binary else None,
    )


def sign_flip_p_value(differences: np.ndarray, *, seed: int = 0, permutations: int = PERMUTATIONS) -> float:
    """Two-sided p-value of a zero mean: share of random sign flips with a sum at least as far from zero.

    Users of equal |difference| are flipped together as a binomial count, which has the same distribution and makes
    metrics with few values cheap. The observed signs count as one flip, so p is never 0.
    """
    nonzero = differences[differences != 0]
    if not len(nonzero):
        return 1.0
    # Differences of equal metric values come out a few units in the last place apart; one rounding makes them one.
    sizes, counts = np.unique(np.round(np.abs(nonzero), 12), return_counts=True)
    observed = abs(float(np.round(nonzero, 12).sum()))
    rng, extreme = np.random.default_rng(seed), 0
    step = max(1, _BLOCK // len(sizes))
    for begin in range(0, permutations, step):
        plus = rng.binomial(counts, 0.5, size=(min(step, permutations - begin), len(sizes)))
        sums = np.abs((2 * plus - counts) @ sizes)
        extreme += int((sums >= observed - 1e-9).sum())
    return (1 + extreme) / (1 + permutations)


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Exact two-sided McNemar p-value from the numbers of users only a, and only b, got right.

    p = min(1, 2 sum_{j <= min} C(n, j) / 2^n), n = only_a + only_b.
    """
    n = only_a + only_b
    if n == 0:
        return 1.0
    logs = [math.lgamma(n + 1) - math.lgamma(j + 1) - math.lgamma(n - j + 1) for j in range(min(only_a, only_b) + 1)]
    return min(1.0, 2.0 * math.fsum(math.exp(value - n * math.log(2.0)) for value in logs))
