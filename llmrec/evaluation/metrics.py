"""Metrics of ranks and of top-k lists, one formula each.

Glossary (r the rank of the only target of an example, k the cut):

    hr@k        1 if r <= k else 0; with one target this is recall@k too
    ndcg@k      1 / log2(1 + r) if r <= k else 0
    mrr@k       1 / r if r <= k else 0
    coverage@k  share of the catalogue that stands in at least one top-k list
    novelty@k   mean over list entries of -log2((c_i + 1) / (N + I)), c_i training events of item i, N their sum
    gini@k      inequality of how often each item of the catalogue is recommended: 0 equal, near 1 a few items only

Pointwise (s the logit of an event, y its label, 1 or 0):

    auc         share of pairs of a positive and a negative event in which the positive one has the greater s; ties half
    gauc        mean over events of the AUC within the event's user, so users weigh by their events; users whose events
                have one label are left out
    logloss     mean of -log sigmoid(s) for positive and -log sigmoid(-s) for negative events, in nats

A rank of NaN or infinity means that the target was not found. Ties give half ranks, and the formulas hold for them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def hit_rate(ranks: np.ndarray, k: int) -> np.ndarray:
    """[n] 1 if r <= k else 0. With one target per example this is recall@k as well."""
    return (ranks <= k).astype(np.float64)


def ndcg(ranks: np.ndarray, k: int) -> np.ndarray:
    """[n] 1 / log2(1 + r) if r <= k else 0; the ideal list holds the one target first, so the ideal gain is 1."""
    found = ranks <= k
    return np.where(found, 1.0 / np.log2(1.0 + np.where(found, ranks, 1.0)), 0.0)


def reciprocal_rank(ranks: np.ndarray, k: int) -> np.ndarray:
    """[n] 1 / r if r <= k else 0; its mean is MRR@k."""
    found = ranks <= k
    return np.where(found, 1.0 / np.where(found, ranks, 1.0), 0.0)


@dataclass(frozen=True)
class ListStatistics:
    """What top-k lists say about the use of the catalogue.

    Args:
        coverage: |items in at least one list| / I.
        gini: sum_j (2 j - I - 1) x_(j) / (I sum_j x_(j)), x_(j) the j-th smallest count of recommendations.
        novelty: [n] mean -log2((c_i + 1) / (N + I)) over each list's items; NaN for an empty list.
    """

    coverage: float
    gini: float
    novelty: np.ndarray


def list_statistics(lists: np.ndarray, train_counts: np.ndarray) -> ListStatistics:
    """Coverage, Gini index and novelty of top-k lists.

    Args:
        lists: [n, k] item ids, 0 = empty place.
        train_counts: [I+1] training events per item, row 0 zero. One is added to each item, so that items without
            a training event have a finite novelty (our choice).
    """
    num_items = len(train_counts) - 1
    used = np.bincount(lists.ravel(), minlength=num_items + 1)[1:]
    share = (train_counts + 1.0) / (train_counts[1:].sum() + num_items)
    information, filled = -np.log2(share), lists > 0
    size = filled.sum(axis=1)
    total = np.where(filled, information[lists], 0.0).sum(axis=1)
    weights = 2.0 * np.arange(1, num_items + 1) - num_items - 1
    gini = float((weights * np.sort(used)).sum() / (num_items * used.sum())) if used.sum() else 0.0
    novelty = np.divide(total, size, out=np.full(len(lists), np.nan), where=size > 0)
    return ListStatistics(float((used > 0).mean()), gini, novelty)


def auc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Area under the ROC curve: P(s+ > s-) + P(s+ = s-) / 2 over pairs of a positive and a negative event.

    Args:
        scores: [n].
        labels: [n], 1 positive and 0 negative.
        weights: [R, n] how often each event counts, R times; None is once.

    Returns:
        [R] (R = 1 without weights); NaN where all events have one label.
    """
    order = np.argsort(scores, kind="stable")
    scores, positive = scores[order], labels[order] > 0
    counts = np.ones((1, len(scores))) if weights is None else weights[:, order].astype(np.float64)
    if not len(scores):
        return np.full(len(counts), np.nan)
    ties = np.flatnonzero(np.r_[True, scores[1:] != scores[:-1]])
    good = np.add.reduceat(counts * positive, ties, axis=1)
    bad = np.add.reduceat(counts * ~positive, ties, axis=1)
    below = np.cumsum(bad, axis=1) - bad
    won, pairs = (good * (below + 0.5 * bad)).sum(axis=1), good.sum(axis=1) * bad.sum(axis=1)
    return np.divide(won, pairs, out=np.full(len(counts), np.nan), where=pairs > 0)


def list_auc(ranks: np.ndarray, num_ranked: np.ndarray) -> np.ndarray:
    """[n] share of the other candidates that stand behind the target, ties by half: AUC of a list with one positive.

    Args:
        ranks: [n] rank of the target among the candidates, ties counted by half; NaN gives NaN.
        num_ranked: [n] number of candidates.
    """
    return (num_ranked - ranks) / (num_ranked - 1)


def user_auc(scores: np.ndarray, labels: np.ndarray, users: np.ndarray) -> np.ndarray:
    """[n] AUC within the user of each event, NaN where that user has one label; the mean of the others is GAUC."""
    values = np.full(len(users), np.nan)
    order = np.argsort(users, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(users[order])) + 1):
        values[rows] = auc(scores[rows], labels[rows])[0]
    return values


def log_loss(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[n] log(1 + exp(-s)) for positive events, log(1 + exp(s)) for negative ones."""
    return np.logaddexp(0.0, np.where(labels > 0, -1.0, 1.0) * scores.astype(np.float64))
