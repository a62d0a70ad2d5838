"""Slices: metrics on a part of the examples, such as users with a short history or targets that were rare in training.

A slice is a text of one or several conditions that must all hold: "history<=5", "history>5 and history<=10",
"target_events<=3". What can be asked of an example:

    history        events of the user that stand before the target, all of them, however many of them a model reads
                   (`max_history`). With leave_one_out the validation event is part of a test target's history.
    target_events  events of the target item in the training split

Slices describe examples for a report; no system sees them.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from llmrec.errors import RecipeError
from llmrec.evaluation.results import summarise
from llmrec.evaluation.tables import example_places

if TYPE_CHECKING:
    from llmrec.data.dataset import InteractionDataset
    from llmrec.data.sequences import SequenceExamples
    from llmrec.evaluation.results import EvalResult

FIELDS = ("history", "target_events")
SIGNS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
    "==": operator.eq,
}
_CONDITION = re.compile(rf"({'|'.join(FIELDS)})\s*({'|'.join(SIGNS)})\s*([0-9]{{1,18}})")  # 18 digits fit int64


@dataclass(frozen=True)
class Slice:
    """Conditions (field, sign, bound) that all hold; as text it reads "history>5 and history<=10"."""

    conditions: tuple[tuple[str, str, int], ...]

    def __str__(self) -> str:
        return " and ".join(f"{field}{sign}{bound}" for field, sign, bound in self.conditions)

    def holds(self, counts: Mapping[str, np.ndarray]) -> np.ndarray:
        """[n] bool, the rows inside.

        Args:
            counts: [n] values of each of `FIELDS`, from `row_counts`.
        """
        return np.all([SIGNS[sign](counts[field], bound) for field, sign, bound in self.conditions], axis=0)


def parse_slice(text: str) -> Slice:
    """A slice from its text.

    Raises:
        RecipeError: The text is no condition, or not several joined by " and ".
    """
    parts = re.split(r"\s+and\s+", text.strip())
    found = [_CONDITION.fullmatch(part) for part in parts]
    wrong = next((part for part, match in zip(parts, found, strict=True) if match is None), None)
    if wrong is not None:
        raise RecipeError(
            f"slice {text!r}: {wrong!r} is no condition; expected {' or '.join(FIELDS)}, one of {' '.join(SIGNS)}, and "
            "a whole number, such as history<=5; several are joined by ' and ': history>5 and history<=10"
        )
    return Slice(tuple((match[1], match[2], int(match[3])) for match in found if match is not None))


def row_counts(table: pa.Table, examples: SequenceExamples, train_counts: np.ndarray) -> dict[str, np.ndarray]:
    """What slices ask of each row of a per-user table: [n] counts for each of `FIELDS`.

    Args:
        table: Per-user table; an example has one row for each draw of candidates.
        examples: The examples of its split; any `max_history` gives the same counts.
        train_counts: [I+1] training events of each item.

    Raises:
        DataError: The table has rows of other examples or targets.
    """
    places = example_places(table, examples)
    return {
        "history": (examples.end - examples.first)[places],
        "target_events": train_counts[examples.targets[places]],
    }


def slices_record(
    results: Mapping[str, EvalResult],
    slices: Sequence[str],
    dataset: InteractionDataset,
    train_counts: np.ndarray,
) -> dict[str, Any]:
    """Metrics of several systems on each slice, with intervals over its users; none where a slice is empty.

    Args:
        results: Systems measured under one protocol, ranking or answering (not pointwise).
        slices: Texts of slices.
        dataset: The data set they were measured on.
        train_counts: [I+1] training events of each item, of the whole data set where `dataset` is a draw of users.

    Returns:
        {text: {"examples": n, "users": u, "models": {system: metrics}}}, n in rows like the whole record.

    Raises:
        RecipeError: A text is no slice.
        DataError: A table does not belong to the data set.
    """
    split = next(iter(results.values())).protocol.split
    examples = dataset.histories(split, 1)  # type: ignore[arg-type]
    counts = {name: row_counts(result.predictions, examples, train_counts) for name, result in results.items()}
    record: dict[str, Any] = {}
    for part in map(parse_slice, slices):
        inside = {name: part.holds(values) for name, values in counts.items()}
        tables = {name: result.predictions.filter(inside[name]) for name, result in results.items()}
        first = next(iter(tables.values()))
        models = {
            name: summarise(
                tables[name],
                result.protocol,
                exact=None if result.exact is None else result.exact[inside[name]],
            )
            for name, result in results.items()
            if len(first)
        }
        users = len(np.unique(first.column("user").to_numpy()))
        record[str(part)] = {"examples": len(first), "users": users, "models": models}
    return record
