from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.evaluation.metrics import auc, hit_rate, list_statistics, log_loss, ndcg, reciprocal_rank, user_auc

INF = float("inf")


def test_metrics_by_hand():
    ranks = np.array([1.0, 2.5, 10.0, 11.0, np.nan, np.inf])
    assert hit_rate(ranks, 10).tolist() == [1, 1, 1, 0, 0, 0]
    assert ndcg(ranks, 10) == pytest.approx([1, 1 / math.log2(3.5), 1 / math.log2(11), 0, 0, 0])
    assert reciprocal_rank(ranks, 10) == pytest.approx([1, 0.4, 0.1, 0, 0, 0])


@given(st.lists(st.floats(1, 50) | st.just(INF) | st.just(float("nan")), min_size=1, max_size=30))
def test_metrics_lie_in_the_unit_interval_and_grow_with_k(values):
    ranks = np.array(values)
    for metric in (hit_rate, ndcg, reciprocal_rank):
        series = np.stack([metric(ranks, k) for k in range(1, 60)])
        assert (series >= 0).all() and (series <= 1).all() and (np.diff(series, axis=0) >= 0).all()
    assert (ndcg(ranks, 9) <= hit_rate(ranks, 9)).all() and (reciprocal_rank(ranks, 9) <= ndcg(ranks, 9)).all()


def test_list_statistics_by_hand():
    counts = np.array([0, 3, 1, 0, 0])  # N + I = 8, shares 4/8, 2/8, 1/8, 1/8 -> 1, 2, 3, 3 bits
    got = list_statistics(np.array([[1, 2], [1, 3], [0, 0]]), counts)
    assert got.coverage == 0.75
    assert got.novelty[:2].tolist() == [1.5, 2.0] and np.isnan(got.novelty[2])
    # counts of recommendations sorted 0 1 1 2: (-3*0 - 1*1 + 1*1 + 3*2) / (4 * 4)
    assert got.gini == pytest.approx(6 / 16)


def test_gini_of_equal_and_of_one_sided_lists():
    assert list_statistics(np.array([[1], [2], [3]]), np.zeros(4)).gini == pytest.approx(0)
    assert list_statistics(np.array([[2], [2], [2]]), np.zeros(4)).gini == pytest.approx(2 / 3)  # (I - 1) / I


def pairs_auc(scores, labels):
    """AUC by its definition, pair by pair."""
    good, bad = scores[labels > 0], scores[labels == 0]
    wins = (good[:, None] > bad).sum() + 0.5 * (good[:, None] == bad).sum()
    return wins / (len(good) * len(bad)) if len(good) and len(bad) else float("nan")


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans(), st.integers(1, 4)), min_size=1, max_size=40))
def test_auc_counts_pairs_and_ties_half(events):
    scores, labels, users = (np.array(column) for column in zip(*events, strict=True))
    scores, labels = scores.astype(float), labels.astype(int)
    assert auc(scores, labels)[0] == pytest.approx(pairs_auc(scores, labels), nan_ok=True)
    within = user_auc(scores, labels, users)
    for user in set(users):
        own = users == user
        assert within[own] == pytest.approx(pairs_auc(scores[own], labels[own]), nan_ok=True)


def test_weights_count_events_several_times():
    scores, labels = np.array([0.3, 0.1, 0.3, 0.9]), np.array([1, 0, 0, 1])
    drawn = np.array([[1, 1, 1, 1], [2, 0, 3, 1], [1, 0, 0, 1]])
    expected = [pairs_auc(np.repeat(scores, times), np.repeat(labels, times)) for times in drawn]
    assert auc(scores, labels, drawn) == pytest.approx(expected, nan_ok=True)
    assert np.isnan(auc(scores, labels, drawn)[2])


def test_log_loss_by_hand():
    found = log_loss(np.array([0.0, math.log(3), -1000.0], dtype=np.float32), np.array([1, 0, 1]))
    assert found == pytest.approx([math.log(2), math.log(4), 1000.0])
