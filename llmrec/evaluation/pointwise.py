"""The pointwise question: will the action at this event be positive? Every event of the split is asked.

A system sees all earlier events with their actions (also earlier ones of the same split: that is the order of time) and
the item of the event, never its action. The table has one row an event:

    user, user_key    id in the data set, original id
    example_id        row of the interactions
    item, item_key    the item, its original id
    label             1 positive, 0 negative
    score             logit that the action is positive

Beside a trained system stand the rates a table of counts gives (`RATES`): of the item in the training split, of the
user's earlier events, and both added as logits. A rate is (positive + 10 g) / (events + 10), g the rate of the whole
training split (ours), so that new items and users start from g.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from llmrec.data.labels import event_labels, labelled_events
from llmrec.data.schema import ITEM, SPLITS
from llmrec.discovery import nearest
from llmrec.errors import DataError, RecipeError
from llmrec.evaluation.intervals import bootstrap_means, bootstrap_statistic
from llmrec.evaluation.metrics import auc, log_loss, user_auc
from llmrec.evaluation.results import LOGITS, EvalResult

if TYPE_CHECKING:
    from llmrec.data.dataset import InteractionDataset
    from llmrec.data.sequences import SequenceExamples
    from llmrec.evaluation.protocol import EvalProtocol
    from llmrec.evaluation.results import Estimate

METRICS = ("auc", "gauc", "logloss")
RATES = ("item_rate", "user_rate", "item_user_rate")
PRIOR_EVENTS = 10.0
"""Events of the average rate added to each item and user."""
_LEAST_RATE = 1e-6
SCHEMA = pa.schema(
    {
        "user": pa.int64(),
        "user_key": pa.string(),
        "example_id": pa.int64(),
        "item": pa.int64(),
        "item_key": pa.string(),
        "label": pa.int8(),
        "score": pa.float32(),
    }
)


def asked_events(dataset: InteractionDataset, protocol: EvalProtocol) -> SequenceExamples:
    """The events of the protocol's split, each behind its history.

    Raises:
        DataError: There are none, or all have one label, so that no pair can be ordered.
    """
    examples = labelled_events(dataset, protocol.split, protocol.max_history, protocol.label_rule)
    labels = answers(examples)
    if not len(labels) or labels.min() == labels.max():
        raise DataError(
            f"split {protocol.split!r} of data set {dataset.meta.name!r} has no two kinds of actions to tell apart",
            found=f"{int(labels.sum()):,} positive of {len(labels):,} events",
            expected="positive and negative events",
            remedy="choose another label rule or split, and keep all events (positive: all) when preparing",
        )
    return examples


def answers(examples: SequenceExamples) -> np.ndarray:
    """[n] int64 labels of the events that are asked."""
    assert examples.labels is not None
    return examples.labels[examples.end - 1]


def pointwise_result(
    name: str,
    dataset: InteractionDataset,
    protocol: EvalProtocol,
    examples: SequenceExamples,
    scores: np.ndarray,
    *,
    interval_seed: int = 0,
) -> EvalResult:
    """AUC, GAUC and log loss of one system, with 95% bootstrap intervals over users.

    Args:
        name: The system.
        dataset: Gives original ids.
        protocol: The question.
        examples: From `asked_events`.
        scores: [n] logits.
        interval_seed: Seed of the resampling.
    """
    users, labels, scores = examples.users, answers(examples), scores.astype(np.float32)
    within = user_auc(scores, labels, users)
    both = np.isfinite(within)
    metrics: dict[str, Estimate] = {
        "auc": {**bootstrap_statistic(lambda drawn: auc(scores, labels, drawn), users, interval_seed).to_dict()}
    }
    if both.any():
        metrics["gauc"] = {**bootstrap_means(within[both], interval_seed, users=users[both])[0].to_dict()}
    metrics["logloss"] = {**bootstrap_means(log_loss(scores, labels), interval_seed, users=users)[0].to_dict()}
    asked, ordered = len(np.unique(users)), len(np.unique(users[both]))
    note = (
        f"gauc: {ordered:,} of {asked:,} users ({int(both.sum()):,} of {len(both):,} events); the others have one label"
    )
    return EvalResult(
        name=name,
        predictions=_table(dataset, examples, labels, scores),
        metrics=metrics,
        protocol=protocol,
        fingerprint=protocol.fingerprint(dataset),
        dataset=dataset.fingerprint,
        users=asked,
        measured=LOGITS,
        notes=(note,),
    )


def _table(dataset: InteractionDataset, examples: SequenceExamples, labels: np.ndarray, scores: np.ndarray) -> pa.Table:
    user_keys, item_keys = np.array(dataset.user_keys, dtype=object), np.array(dataset.item_keys, dtype=object)
    users, items = examples.users, examples.targets
    columns = (users, user_keys[users], examples.example_ids, items, item_keys[items], labels, scores)
    arrays = [pa.array(values, kind.type) for values, kind in zip(columns, SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def rate_results(
    names: Sequence[str], dataset: InteractionDataset, protocol: EvalProtocol, *, train: InteractionDataset
) -> dict[str, EvalResult]:
    """The baselines of `RATES`.

    Args:
        names: Which.
        dataset: Whose events are asked.
        protocol: The question.
        train: Whose training split is counted; the same data set, or the whole one where `dataset` is a draw of users.

    Raises:
        RecipeError: No such baseline.
    """
    for name in names:
        if name not in RATES:
            raise RecipeError(
                f"evaluate.baselines: {name!r} gives no rates of actions{nearest(name, list(RATES))}; "
                f"for mode pointwise there are {', '.join(RATES)}"
            )
    if not names:
        return {}
    examples = asked_events(dataset, protocol)
    scores = rate_logits(examples, train, protocol.label_rule)
    return {name: pointwise_result(name, dataset, protocol, examples, scores[name]) for name in names}


def rate_logits(examples: SequenceExamples, train: InteractionDataset, rule: str | None) -> dict[str, np.ndarray]:
    """[n] logits of each of `RATES` for the events that are asked."""
    assert examples.labels is not None
    rows = train.split_codes == SPLITS.index("train")
    labels, items = event_labels(train, rule)[rows], train.column(ITEM)[rows]
    overall = float(labels.mean()) if len(labels) else 0.5
    shown = np.bincount(items, minlength=train.num_items + 1)
    liked = np.bincount(items, weights=labels, minlength=train.num_items + 1)
    asked, before = examples.end - 1, np.concatenate([[0], np.cumsum(examples.labels)])
    item = _logit(liked, shown, overall)[examples.targets]
    user = _logit(before[asked] - before[examples.first], asked - examples.first, overall)
    general = _logit(np.zeros(1), np.zeros(1), overall)
    return {"item_rate": item, "user_rate": user, "item_user_rate": item + user - general}


def _logit(positive: np.ndarray, events: np.ndarray, overall: float) -> np.ndarray:
    rate = (positive + PRIOR_EVENTS * overall) / (events + PRIOR_EVENTS)
    rate = np.clip(rate, _LEAST_RATE, 1 - _LEAST_RATE)
    return np.log(rate) - np.log1p(-rate)
