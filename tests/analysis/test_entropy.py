"""Entropy of item sequences: anchors, invariances and the aggregation over users."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llmrec.analysis.entropy import (
    approximate_entropy,
    chunks,
    dataset_entropy,
    joint_entropy,
    real_entropy,
    shannon_bits,
    zlib_ratio,
)
from llmrec.errors import DataError


@pytest.mark.parametrize(
    ("sequence", "expected"),
    [
        ([1, 2, 1, 2, 3], 1.1496),
        (list(range(50)), math.log(50)),
        ([1] * 50, 0.2898),
        ([1, 2] * 25, 0.4271),
        ([], 0.0),
        ([7], 0.0),
    ],
)
def test_real_entropy_anchors(sequence: list[int], expected: float) -> None:
    assert real_entropy(sequence) == pytest.approx(expected, abs=1e-4)


def test_real_entropy_of_a_uniform_source() -> None:
    found = [real_entropy(np.random.default_rng(seed).integers(0, 4, 2000).tolist()) for seed in range(3)]
    assert np.mean(found) == pytest.approx(1.45, abs=0.02)


@pytest.mark.parametrize("n", [2, 3, 17, 400])
def test_all_distinct_items_give_ln_n(n: int) -> None:
    assert real_entropy(list(range(n))) == pytest.approx(math.log(n), rel=1e-14)


def test_relabelling_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    sequence = rng.integers(1, 30, 300)
    names = rng.permutation(10_000)[:30]
    assert real_entropy(names[sequence].tolist()) == real_entropy(sequence.tolist())


def test_constant_below_periodic_below_random() -> None:
    rng = np.random.default_rng(1)
    constant, periodic, random = [3] * 120, [1, 2, 3, 4] * 30, rng.integers(0, 40, 120).tolist()
    assert real_entropy(constant) < real_entropy(periodic) < real_entropy(random)


@pytest.mark.parametrize("seed", range(5))
def test_a_history_written_twice_carries_less_than_twice_as_much(seed: int) -> None:
    once = np.random.default_rng(seed).permutation(500)[:80].tolist()
    assert real_entropy(once + once) < real_entropy(once)
    assert 160 * real_entropy(once + once) < 2 * 80 * real_entropy(once)


def test_phrases_do_not_cross_users_and_separators_do_not_count() -> None:
    assert joint_entropy([[1, 2, 1, 2, 3]]) == real_entropy([1, 2, 1, 2, 3])
    # Phrases: "1", "2"; then "1 |" (length 2, closed by the separator). ln 3 * 3 / 4.
    assert joint_entropy([[1, 2], [1]]) == pytest.approx(3 * math.log(3) / 4)
    assert joint_entropy([[1, 2], [], [1]]) == joint_entropy([[1, 2], [1]])


def test_users_who_are_alike_lower_the_joint_entropy() -> None:
    rng = np.random.default_rng(2)
    alike = [list(range(20))] * 30
    strangers = [rng.integers(0, 600, 20).tolist() for _ in range(30)]
    assert joint_entropy(alike) < joint_entropy(strangers)


def test_a_long_constant_sequence_takes_no_quadratic_memory_of_slices() -> None:
    assert real_entropy([5] * 4000) < 0.01  # phrases of length 1, 2, 3, ...


@pytest.mark.parametrize("m", [1, 2, 4, 8])
def test_apen_of_constant_and_of_distinct_sequences(m: int) -> None:
    n = 40
    assert approximate_entropy([9] * n, m) == pytest.approx(0.0, abs=1e-12)
    assert approximate_entropy(range(n), m) == pytest.approx(math.log((n - m + 1) / (n - m)), abs=1e-12)


def test_apen_of_ids_is_equality_for_every_radius_below_one() -> None:
    sequence = np.random.default_rng(3).integers(0, 5, 60)
    assert approximate_entropy(sequence, 2, 0.0) == approximate_entropy(sequence, 2, 0.99)
    assert approximate_entropy(sequence, 2, 1.0) != approximate_entropy(sequence, 2, 0.0)
    # Below zero nothing is near, not even a window itself: every share counts as 1e-10.
    assert approximate_entropy(sequence, 1, -1) == 0.0


def test_apen_borders() -> None:
    assert approximate_entropy([1], 1) == 0.0 and approximate_entropy([], 1) == 0.0
    with pytest.raises(DataError, match="m >= 1"):
        approximate_entropy([1, 2], 0)


def test_shannon_bits_and_zlib() -> None:
    assert shannon_bits([1, 2, 3, 4] * 10) == pytest.approx(2.0)
    assert shannon_bits([6] * 10) == 0.0 and shannon_bits([]) == 0.0
    rng = np.random.default_rng(4)
    assert zlib_ratio([6] * 1000) < 0.05 < zlib_ratio(rng.integers(0, 2**31, 1000))
    assert zlib_ratio([]) == 1.0


def test_chunks_hold_every_event_once_in_order() -> None:
    parts = chunks([np.arange(7), np.arange(7, 9), np.arange(9, 21)], size=5)
    assert [sum(map(len, part)) for part in parts] == [5, 5, 5, 5, 1]
    assert np.array_equal(np.concatenate([piece for part in parts for piece in part]), np.arange(21))
    assert [len(piece) for piece in parts[1]] == [2, 2, 1]


def test_the_data_set_is_measured_on_chunks() -> None:
    rng = np.random.default_rng(5)
    users = [rng.integers(0, 50, 90).tolist() for _ in range(250)]  # 22,500 events: three chunks
    found = dataset_entropy(users)
    parts = chunks([np.array(user) for user in users])
    assert found.tokens == 22_500 and len(parts) == 3
    expected = np.average([joint_entropy(part) for part in parts], weights=[10_000, 10_000, 2_500])
    assert found.real == pytest.approx(expected)
    assert found.real_per_user == pytest.approx(np.mean([real_entropy(user) for user in users]))
    assert found.approximate == pytest.approx(np.mean([approximate_entropy(user) for user in users]))
    assert 5.6 < found.shannon_bits <= math.log2(50)


def test_a_data_set_without_events_is_refused() -> None:
    with pytest.raises(DataError, match="no event"):
        dataset_entropy([[], []])
