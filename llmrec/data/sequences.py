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
    at their last position; dense ones at every position by the following event.

    Args:
        items: [N] int64, item of each event of the stream, users one after the other.
        timestamps: [N] int64 seconds, or None.
        users, first, start, end, example_ids: [n] int64; `first` is the first event of the example's user.
        dense: Whether every position is supervised.
        candidates: [n, C] int64 candidate lists, aligned with the examples, or None.
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

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, index: int) -> dict[str, Any]:
        first, start, end = int(self.first[index]), int(self.start[index]), int(self.end[index])
        inputs = self.items[start:end]
        if self.dense:
            targets = self.items[start + 1 : end + 1]
        else:
            targets = np.zeros(end - start, dtype=np.int64)
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
            row["target_timestamp"] = int(self.timestamps[end])
        if self.candidates is not None:
            row["candidates"] = self.candidates[index]
        return row

    @property
    def targets(self) -> np.ndarray:
        """[n] int64: the event right after each example's inputs."""
        return self.items[self.end]

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


def prefix_examples(dataset: InteractionDataset, split: str, max_history: int) -> SequenceExamples:
    """See `InteractionDataset.histories`; `example_ids` are rows of the interactions table."""
    if split not in CONTEXT_OF:
        raise DataError(f"no targets in split {split!r}", expected=", ".join(CONTEXT_OF))
    keep = np.isin(dataset.split_codes, [SPLITS.index(name) for name in CONTEXT_OF[split]])
    rows = np.flatnonzero(keep)
    users = dataset.column(USER)[rows].astype(np.int64)
    first_of_user = np.searchsorted(users, users, side="left")
    position = np.flatnonzero(dataset.split_codes[rows] == SPLITS.index(split))
    position = position[position > first_of_user[position]]  # a target without history cannot be asked for
    first = first_of_user[position]
    return SequenceExamples(
        items=dataset.column(ITEM)[rows].astype(np.int64),
        timestamps=dataset.column(TIMESTAMP)[rows].astype(np.int64) if "timestamps" in dataset.fields else None,
        users=users[position],
        first=first,
        start=np.maximum(first, position - max_history),
        end=position,
        example_ids=rows[position],
        dense=False,
    )


def window_examples(dataset: InteractionDataset, split: str, max_history: int) -> SequenceExamples:
    """Windows of at most `max_history` inputs that supervise every event but each user's first, exactly once.

    Windows are laid from the end of the history, so the latest window is full; `example_ids` count the windows.
    """
    rows = np.flatnonzero(dataset.split_codes == SPLITS.index(split))
    users = dataset.column(USER)[rows].astype(np.int64)
    first = np.flatnonzero(np.r_[True, users[1:] != users[:-1]]) if len(users) else np.zeros(0, np.int64)
    last = np.r_[first[1:], len(users)] - 1  # the last event of a user is a target only
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
            batch["target_timestamps"] = torch.tensor([row["target_timestamp"] for row in rows])
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


def history_batch(
    histories: Sequence[Sequence[int]], max_history: int, *, user_ids: Sequence[int] | None = None
) -> SequenceBatch:
    """A batch for recommending to given histories of item ids (the latest `max_history` are the inputs).

    Raises:
        DataError: A history is empty.
    """
    import torch

    for number, history in enumerate(histories):
        if not len(history):
            raise DataError(
                f"history {number} is empty",
                expected="at least one item of the catalogue",
                remedy="give a history, or ask for the popular list (--on-empty popular)",
            )
    windows = [np.asarray(history, dtype=np.int64)[-max_history:] for history in histories]
    return {
        "item_ids": pad_right(windows),
        "lengths": torch.tensor([len(window) for window in windows]),
        "user_ids": torch.tensor(list(user_ids) if user_ids is not None else [0] * len(windows)),
        "seen": pad_right([np.asarray(history, dtype=np.int64) for history in histories]),
    }
