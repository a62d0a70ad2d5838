"""Examples over event streams, index based: memory is O(events) however many examples there are.

`prefix_examples` gives one example per target event (evaluation, prompts); `window_examples` gives windows in which
every position is supervised (encoders, item_slots). `SequenceCollator` pads them into a `SequenceBatch`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrec.data.schema import ITEM, SPLITS, TIMESTAMP, USER
from llmrec.errors import DataError

if TYPE_CHECKING:
    from llmrec.data.dataset import InteractionDataset
    from llmrec.data.schema import SequenceBatch

# Which earlier events a target of a split may see. Later splits are never context of earlier ones.
CONTEXT_OF = {
    "train": ("train",),
    "valid": ("train", "history", "valid"),
    "calibration": ("train", "history", "valid", "calibration"),
    "test": ("train", "history", "valid", "calibration", "test"),
    "test_lapse": ("train", "history", "valid", "calibration", "test", "test_lapse"),
}


@dataclass(frozen=True)
class SequenceExamples:
    """Index-based examples over one event stream; a map-style data set for torch's DataLoader.

    Example i has inputs `items[start[i]:end[i]]`. Sparse examples (dense False) are supervised by `items[end[i]]`
    at their last position; dense ones at every position by the following event. With `labels` an example has no next
    item: what is asked for is the action at its last input (sparse) or at every input (dense).

    Args:
        items: [N] int64, item of each event of the stream, users one after the other.
        timestamps: [N] int64 seconds, or None.
        users, first, start, end, example_ids: [n] int64; `first` is the first event of the example's user.
        dense: Whether every position is supervised.
        candidates: [n, C] int64 candidate lists, aligned with the examples, or None.
        labels: [N] int64, 1 where the action at an event was positive, else 0 (`llmrec.data.labels`); None for
            next-item examples.
    """

    items: np.ndarray
    timestamps: np.ndarray | None
    users: np.ndarray
    first: np.ndarray
    start: np.ndarray
    end: np.ndarray
    example_ids: np.ndarray
    dense: bool
    candidates: np.ndarray | None = None
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, index: int) -> dict[str, Any]:
        first, start, end = int(self.first[index]), int(self.start[index]), int(self.end[index])
        inputs = self.items[start:end]
        targets = np.zeros(end - start, dtype=np.int64)
        if self.labels is None and self.dense:
            targets = self.items[start + 1 : end + 1]
        elif self.labels is None:
            targets[-1] = self.items[end]
        row: dict[str, Any] = {
            "user_id": int(self.users[index]),
            "example_id": int(self.example_ids[index]),
            "item_ids": inputs,
            "targets": targets,
            "seen": self.items[first:end],
        }
        if self.timestamps is not None:
            row["timestamps"] = self.timestamps[start:end]
            row["target_timestamp"] = int(self.timestamps[self._asked(end)])
        if self.labels is not None:
            row["labels"] = self.labels[start:end]
        if self.candidates is not None:
            row["candidates"] = self.candidates[index]
        return row

    def _asked(self, end: Any) -> Any:
        return end if self.labels is None else end - 1

    @property
    def targets(self) -> np.ndarray:
        """[n] int64: the event right after each example's inputs; with labels, the last input itself."""
        return self.items[self._asked(self.end)]

    @property
    def lengths(self) -> np.ndarray:
        """[n] int64: number of input events."""
        return self.end - self.start

    def subset(self, index: np.ndarray | Sequence[int]) -> SequenceExamples:
        """The examples at the given positions, in that order."""
        index = np.asarray(index)
        names = ("users", "first", "start", "end", "example_ids")
        chosen = None if self.candidates is None else self.candidates[index]
        return replace(self, **{n: getattr(self, n)[index] for n in names}, candidates=chosen)

    def with_candidates(self, candidates: np.ndarray) -> SequenceExamples:
        """The same examples with candidate lists [n, C]."""
        if len(candidates) != len(self):
            raise DataError("one candidate list per example is needed", found=len(candidates), expected=str(len(self)))
        return replace(self, candidates=candidates)


def prefix_examples(
    dataset: InteractionDataset, split: str, max_history: int, labels: np.ndarray | None = None
) -> SequenceExamples:
    """See `InteractionDataset.histories`; `example_ids` are rows of the interactions table.

    With `labels` (one for each row of the table) the event itself is the last input, and a user's first event counts.
    """
    if split not in CONTEXT_OF:
        raise DataError(f"no targets in split {split!r}", expected=", ".join(CONTEXT_OF))
    keep = np.isin(dataset.split_codes, [SPLITS.index(name) for name in CONTEXT_OF[split]])
    rows = np.flatnonzero(keep)
    users = dataset.column(USER)[rows].astype(np.int64)
    first_of_user = np.searchsorted(users, users, side="left")
    position = np.flatnonzero(dataset.split_codes[rows] == SPLITS.index(split))
    if labels is None:
        position = position[position > first_of_user[position]]  # a target without history cannot be asked for
    first, end = first_of_user[position], position if labels is None else position + 1
    return SequenceExamples(
        items=dataset.column(ITEM)[rows].astype(np.int64),
        timestamps=dataset.column(TIMESTAMP)[rows].astype(np.int64) if "timestamps" in dataset.fields else None,
        users=users[position],
        first=first,
        start=np.maximum(first, end - max_history),
        end=end,
        example_ids=rows[position],
        dense=False,
        labels=None if labels is None else labels[rows],
    )


def window_examples(
    dataset: InteractionDataset, split: str, max_history: int, labels: np.ndarray | None = None
) -> SequenceExamples:
    """Windows of at most `max_history` inputs that supervise every event but each user's first, exactly once.

    Windows are laid from the end of the history, so the latest window is full; `example_ids` count the windows.
    With `labels` (one for each row of the table) every event is an input exactly once, and its label is asked for.
    """
    rows = np.flatnonzero(dataset.split_codes == SPLITS.index(split))
    users = dataset.column(USER)[rows].astype(np.int64)
    first = np.flatnonzero(np.r_[True, users[1:] != users[:-1]]) if len(users) else np.zeros(0, np.int64)
    # Without labels the last event of a user is a target only.
    last = np.r_[first[1:], len(users)] - (1 if labels is None else 0)
    windows = np.maximum(0, -(-(last - first) // max_history))
    owner = np.repeat(np.arange(len(first)), windows)
    number = np.arange(windows.sum()) - np.repeat(np.cumsum(windows) - windows, windows)
    end = last[owner] - number * max_history
    order = np.lexsort((end, owner))
    owner, end = owner[order], end[order]
    return SequenceExamples(
        items=dataset.column(ITEM)[rows].astype(np.int64),
        timestamps=dataset.column(TIMESTAMP)[rows].astype(np.int64) if "timestamps" in dataset.fields else None,
        users=users[first][owner],
        first=first[owner],
        start=np.maximum(first[owner], end - max_history),
        end=end,
        example_ids=np.arange(len(owner)),
        dense=True,
        labels=None if labels is None else labels[rows],
    )


@dataclass
class SequenceCollator:
    """Pads examples on the right into a `SequenceBatch` of LongTensors.

    Args:
        with_seen: Add `seen` [B, S] (evaluation needs it, training does not).
        extras: Called with (rows, batch) to add fields, such as precomputed user vectors.
    """

    with_seen: bool = False
    extras: Callable[[list[dict[str, Any]], SequenceBatch], None] | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> SequenceBatch:
        import torch

        batch: SequenceBatch = {
            "item_ids": pad_right([row["item_ids"] for row in rows]),
            "lengths": torch.tensor([len(row["item_ids"]) for row in rows]),
            "targets": pad_right([row["targets"] for row in rows]),
            "user_ids": torch.tensor([row["user_id"] for row in rows]),
            "example_ids": torch.tensor([row["example_id"] for row in rows]),
        }
        if "timestamps" in rows[0]:
            batch["timestamps"] = pad_right([row["timestamps"] for row in rows])
        if "target_timestamp" in rows[0]:
            batch["target_timestamps"] = torch.tensor([row["target_timestamp"] for row in rows])
        if "labels" in rows[0]:
            batch["labels"] = pad_right([row["labels"] for row in rows]).float()
        if "candidates" in rows[0]:
            batch["candidates"] = torch.from_numpy(np.stack([row["candidates"] for row in rows]))
        if self.with_seen:
            batch["seen"] = pad_right([row["seen"] for row in rows])
        if self.extras is not None:
            self.extras(rows, batch)
        return batch


def pad_right(rows: Sequence[np.ndarray], fill: int = 0) -> Any:
    """LongTensor [B, longest] from integer arrays of different lengths."""
    import torch

    padded = np.full((len(rows), max(1, max((len(row) for row in rows), default=1))), fill, dtype=np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return torch.from_numpy(padded)
