"""Labels of events for pointwise tasks: was the action at an event positive?

A rule is written like the positive rule of preparing (`rating >= 4`), but nothing is dropped: events that fail it are
the negative ones.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from llmrec.data.schema import ITEM, LABEL, ORDER, SPLIT, USER
from llmrec.data.sequences import SequenceExamples, prefix_examples, window_examples
from llmrec.errors import DataError, RecipeError

if TYPE_CHECKING:
    from llmrec.data.dataset import InteractionDataset

OWN_LABEL = f"{LABEL} > 0"
"""The rule where none is given: the data set's own column of labels."""
_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq, "=": operator.eq,
    "!=": operator.ne,
}  # fmt: skip


def event_labels(dataset: InteractionDataset, rule: str | None = None) -> np.ndarray:
    """[N] int64, one for each row of the interactions: 1 where the rule holds, else 0.

    Args:
        dataset: Has the column the rule names.
        rule: `column operator number`; None reads the column "label" (positive above 0).

    Raises:
        RecipeError: The rule is not understood.
        DataError: There is no such column of numbers, or some events have no value.
    """
    from llmrec.data.filters import parse_positive

    parsed = parse_positive(rule or OWN_LABEL)
    if parsed is None:
        raise RecipeError("label rule 'all' makes every action positive; expected a rule such as 'rating >= 4'")
    column, sign, number = parsed
    extra = [name for name in dataset.interactions.column_names if name not in (USER, ITEM, ORDER, SPLIT)]
    if column not in extra:
        raise DataError(
            f"the label rule {rule or OWN_LABEL!r} needs a column {column!r}",
            found=f"columns {', '.join(extra) or 'none besides ids and order'}",
            expected=column,
            remedy="give a rule over a column that is there, such as dataset.label: 'rating >= 4'",
        )
    try:
        values = dataset.interactions.column(column).cast(pa.float64())
    except pa.ArrowException as error:
        raise DataError("labels come from numbers", column=column, found=str(error)) from error
    if values.null_count:
        raise DataError(
            "events without a label cannot be asked",
            column=column,
            found=f"{values.null_count:,} empty values of {len(values):,}",
            expected="a value for each event",
            remedy="leave these events out of the source",
        )
    return _OPERATORS[sign](values.to_numpy(), number).astype(np.int64)


def labelled_windows(
    dataset: InteractionDataset, max_history: int, rule: str | None = None, *, split: str = "train"
) -> SequenceExamples:
    """Windows over each user's `split` events; every event is an input once, and its label is asked for."""
    return window_examples(dataset, split, max_history, event_labels(dataset, rule))


def labelled_events(
    dataset: InteractionDataset, split: str, max_history: int, rule: str | None = None
) -> SequenceExamples:
    """One example for each event of `split`: the event behind all earlier ones, at most `max_history` in all.

    Which earlier events may be seen is the rule of `InteractionDataset.histories`; earlier events of the same split are
    inputs, as they are when a system is asked in the order of time.
    """
    return prefix_examples(dataset, split, max_history, event_labels(dataset, rule))
