"""What a measurement fills in for each example, whether a system or a file is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmrec.errors import DataError

if TYPE_CHECKING:
    from llmrec.data.dataset import InteractionDataset
    from llmrec.data.sequences import SequenceExamples
    from llmrec.evaluation.protocol import EvalProtocol


@dataclass
class Found:
    """Arrays of all examples, filled batch by batch in any order."""

    ranks: np.ndarray
    num_ranked: np.ndarray
    items: np.ndarray
    scores: np.ndarray
    texts: list[str] | None = None
    exact: np.ndarray | None = None

    @classmethod
    def empty(cls, count: int, length: int) -> Found:
        """Nothing found yet for `count` examples with lists of `length`."""
        return cls(
            ranks=np.full(count, np.nan),
            num_ranked=np.zeros(count, dtype=np.int64),
            items=np.zeros((count, length), dtype=np.int64),
            scores=np.full((count, length), -np.inf, dtype=np.float32),
        )


def with_drawn_candidates(
    dataset: InteractionDataset, examples: SequenceExamples, protocol: EvalProtocol, seed: int
) -> SequenceExamples:
    """The examples with the candidate lists of one draw; unchanged for full ranking.

    Raises:
        DataError: A list does not hold its target exactly once.
    """
    size = protocol.num_candidates
    if size is None:
        return examples
    from llmrec.data.negatives import candidate_lists

    lists = np.asarray(candidate_lists(dataset, examples, size, protocol.kind, seed), dtype=np.int64)
    wrong = int(((lists == examples.targets[:, None]).sum(axis=1) != 1).sum())
    if wrong:
        raise DataError("candidate lists must hold the target exactly once", found=f"{wrong} lists that do not")
    return examples.with_candidates(lists)


def list_ranks(items: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """[n] first position (from 1) of each target in its list [n, K]; NaN where it is not listed."""
    hits = items == targets[:, None]
    return np.where(hits.any(axis=1), hits.argmax(axis=1) + 1.0, np.nan)
