"""Evaluation candidates: seeded, stored, and the same for a row whoever its neighbours are.

Every row draws from its own stream of a counter-based generator keyed by (seed, example id, counter), so neither the
order of rows nor a subset changes what a row gets. Draws are made without replacement, either uniformly or in
proportion to training counts; items the user ever met, in any split, are left out.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmrec.data.leaks import CandidateLists
from llmrec.data.schema import ITEM, SPLITS, USER
from llmrec.errors import DataError, RecipeError

if TYPE_CHECKING:
    from llmrec.data.dataset import InteractionDataset
    from llmrec.data.schema import Split
    from llmrec.data.sequences import SequenceExamples

CandidateKind = Literal["uniform", "popularity"]
_ROUNDS = 4
_CHUNK_CELLS = 4_000_000
# Streams of one row: places of targets, sequential draws, keys of the exact completion.
_PLACE, _DRAW, _KEY = (np.uint64(n) for n in (0x50, 0xD1, 0x4B))


class TrainingHistories:
    """What each user met in the training split, for drawing other items into prompts of training.

    Args:
        dataset: Supplies the events.
    """

    def __init__(self, dataset: InteractionDataset) -> None:
        self._offsets, self._items = dataset.user_offsets, dataset.column(ITEM)
        self._in_training = dataset.split_codes == SPLITS.index("train")

    def met(self, row: dict[str, Any]) -> set[int]:
        """Items that are no negatives of an example: of the user's training, of its history, and its target.

        Args:
            row: Of `SequenceExamples`, with one target.
        """
        events = slice(self._offsets[row["user_id"]], self._offsets[row["user_id"] + 1])
        training = self._items[events][self._in_training[events]]
        return {*training.tolist(), *row["seen"].tolist(), int(row["targets"][-1])}


def candidate_lists(
    dataset: InteractionDataset, examples: SequenceExamples, size: int, kind: CandidateKind = "uniform", seed: int = 0
) -> np.ndarray:
    """The target at a random place among `size - 1` distinct negatives, for each example.

    Args:
        dataset: Supplies the catalogue, whole histories (all splits) and training counts.
        examples: The rows; their `example_ids` name the streams.
        size: Length of a list, the target included (20 = 1 + 19).
        kind: "uniform", or "popularity" (chance proportional to training events; items without any are never drawn).
        seed: Another seed is another draw of negatives and places.

    Returns:
        int64 [n, size].

    Raises:
        DataError: The catalogue has too few other items for some row.
        RecipeError: Unknown kind or impossible size.
    """
    if kind not in get_args(CandidateKind):
        raise RecipeError(f"unknown kind of candidates {kind!r}; expected one of {', '.join(get_args(CandidateKind))}")
    if size < 2:
        raise RecipeError(f"a candidate list of {size} has no negatives; expected at least 2 (the target counts)")
    weights = np.ones(dataset.num_items + 1) if kind == "uniform" else dataset.context().train_counts.astype(np.float64)
    weights[0] = 0.0
    known = np.unique(dataset.column(USER).astype(np.int64) * len(weights) + dataset.column(ITEM))
    _check_size(dataset, examples, size, weights, known)
    draw = _Draw(weights, known, size - 1)
    lists = np.empty((len(examples), size), dtype=np.int64)
    step = max(1, _CHUNK_CELLS // (size + 8))
    for start in range(0, len(examples), step):
        part = slice(start, start + step)
        stream = _mix(_mix(np.uint64(seed & 0xFFFFFFFFFFFFFFFF)) ^ examples.example_ids[part].astype(np.uint64))
        negatives = draw.rows(stream, examples.users[part].astype(np.int64))
        lists[part] = _place_targets(stream, examples.targets[part], negatives)
    return lists


def stored_candidates(
    folder: str | Path,
    dataset: InteractionDataset,
    split: Split,
    size: int,
    kind: CandidateKind = "uniform",
    seed: int = 0,
) -> np.ndarray:
    """Candidate lists of `dataset.histories(split, ...)`, read from the data set folder or drawn and written there.

    Returns:
        int64 [n, size], aligned with the examples of the split.

    Raises:
        DataError: The stored file belongs to another data set.
    """
    examples = dataset.histories(split, 1)
    path = Path(folder) / "candidates" / f"{split}-{kind}-{size}-{seed}.parquet"
    if path.is_file():
        return _read(path, dataset, examples, size)
    lists = candidate_lists(dataset, examples, size, kind, seed)
    table = pa.table(
        {
            "example_id": examples.example_ids,
            "user": examples.users,
            "target": examples.targets,
            "candidates": pa.FixedSizeListArray.from_arrays(pa.array(lists.ravel()), size),
        }
    )
    record = {"fingerprint": dataset.fingerprint, "split": split, "kind": kind, "size": size, "seed": seed}
    record["fitted_on"] = "train"
    table = table.replace_schema_metadata({f"llmrec.{key}": str(value) for key, value in record.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    pq.write_table(table, partial, compression="zstd")
    os.replace(partial, path)
    return lists


def read_stored(folder: str | Path) -> tuple[list[CandidateLists], dict[str, list[str]]]:
    """All stored lists of a data set folder, and what their statistics were fitted on, for the leak checks."""
    lists, fitted = [], {}
    for path in sorted((Path(folder) / "candidates").glob("*.parquet")):
        table = pq.read_table(path)
        users, targets = (table.column(c).to_numpy() for c in ("user", "target"))
        lists.append(CandidateLists(path.name, users, targets, _matrix(table)))
        fitted[path.name] = [(table.schema.metadata or {}).get(b"llmrec.fitted_on", b"unknown").decode()]
    return lists, fitted


def _read(path: Path, dataset: InteractionDataset, examples: SequenceExamples, size: int) -> np.ndarray:
    table = pq.read_table(path)
    found = (table.schema.metadata or {}).get(b"llmrec.fingerprint", b"none").decode()
    if found != dataset.fingerprint or not np.array_equal(table.column("example_id").to_numpy(), examples.example_ids):
        raise DataError(
            "stored candidates belong to another data set",
            file=path,
            found=f"fingerprint {found}",
            expected=dataset.fingerprint,
            remedy="delete the file; it is drawn again from the same seed",
        )
    lists = _matrix(table)
    if lists.shape != (len(examples), size):
        shape = f"{(len(examples), size)}"
        raise DataError("stored candidates have another shape", file=path, found=lists.shape, expected=shape)
    return lists


def _matrix(table: pa.Table) -> np.ndarray:
    column = table.column("candidates").combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1) if len(column) else np.zeros((0, 0), dtype=np.int64)


def _check_size(
    dataset: InteractionDataset, examples: SequenceExamples, size: int, weights: np.ndarray, known: np.ndarray
) -> None:
    drawable = weights > 0
    met = np.bincount(known // len(weights), weights=drawable[known % len(weights)], minlength=dataset.num_users + 1)
    free = int(drawable.sum()) - met[examples.users]
    if len(free) and free.min() < size - 1:
        user = int(examples.users[np.argmin(free)])
        raise DataError(
            f"the catalogue is too small for candidate lists of {size}",
            found=f"user {dataset.user_keys[user]!r} leaves {int(free.min())} items to draw from",
            expected=f"at least {size - 1}",
            remedy="ask for fewer candidates, or rank the full catalogue (--protocol full)",
        )


class _Draw:
    """Weighted draws without replacement, many rows at once.

    Sequential draws with rejection fill nearly every row; what is still missing after a fixed number of draws is
    completed with the smallest exponential keys -log(u) / weight among the items left, which follows the same law.

    Args:
        weights: [I+1] float64, entry 0 zero.
        known: Sorted user * (I+1) + item of every event.
        wanted: Negatives a row.
    """

    def __init__(self, weights: np.ndarray, known: np.ndarray, wanted: int) -> None:
        self.weights, self.known, self.wanted = weights, known, wanted
        self.cumulative = np.cumsum(weights)

    def rows(self, stream: np.ndarray, users: np.ndarray) -> np.ndarray:
        """Negatives [n, wanted] for streams [n] and users [n]."""
        chosen = np.zeros((len(stream), self.wanted), dtype=np.int64)
        filled = np.zeros(len(stream), dtype=np.int64)
        width = self.wanted + 8
        for turn in range(_ROUNDS):
            open_rows = np.flatnonzero(filled < self.wanted)
            if not len(open_rows):
                return chosen
            counters = np.arange(turn * width, (turn + 1) * width, dtype=np.uint64)
            u = _uniform(_mix(stream[open_rows, None] ^ _mix(counters ^ (_DRAW << np.uint64(56)))[None, :]))
            drawn = np.searchsorted(self.cumulative, u * self.cumulative[-1], side="right")
            chosen[open_rows], filled[open_rows] = self._accept(chosen[open_rows], drawn, users[open_rows])
        rest = np.flatnonzero(filled < self.wanted)
        step = max(1, _CHUNK_CELLS // len(self.weights))
        for start in range(0, len(rest), step):
            part = rest[start : start + step]
            chosen[part] = self._complete(chosen[part], filled[part], stream[part], users[part])
        return chosen

    def _is_known(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        keys = users[:, None] * len(self.weights) + items
        where = np.minimum(np.searchsorted(self.known, keys), len(self.known) - 1)
        return self.known[where] == keys

    def _accept(self, chosen: np.ndarray, drawn: np.ndarray, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Append the first distinct, unknown draws to what a row has (zeros of `chosen` are free places)."""
        both = np.concatenate([chosen, drawn], axis=1)
        good = np.concatenate([chosen > 0, ~self._is_known(users, drawn)], axis=1)
        order = np.argsort(both, axis=1, kind="stable")
        ordered = np.take_along_axis(both, order, axis=1)
        again = np.zeros_like(good)
        np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
        good &= ~again
        place = np.cumsum(good, axis=1) - 1
        rows, columns = np.nonzero(good & (place < self.wanted))
        result = np.zeros_like(chosen)
        result[rows, place[rows, columns]] = both[rows, columns]
        return result, np.minimum(good.sum(axis=1), self.wanted)

    def _complete(self, chosen: np.ndarray, filled: np.ndarray, stream: np.ndarray, users: np.ndarray) -> np.ndarray:
        items = np.arange(len(self.weights), dtype=np.uint64)
        u = _uniform(_mix(stream[:, None] ^ _mix(items ^ (_KEY << np.uint64(56)))[None, :]))
        with np.errstate(divide="ignore"):
            keys = -np.log(1.0 - u) / self.weights[None, :]
        keys[:, self.weights == 0] = np.inf
        keys[self._is_known(users, np.broadcast_to(items.astype(np.int64), keys.shape))] = np.inf
        # places still free hold item 0, whose key is infinite anyway
        np.put_along_axis(keys, chosen, np.inf, axis=1)
        order = np.argsort(keys, axis=1, kind="stable")[:, : self.wanted]
        place = np.arange(self.wanted)[None, :] - filled[:, None]
        return np.where(place < 0, chosen, np.take_along_axis(order, np.maximum(place, 0), axis=1))


def _place_targets(stream: np.ndarray, targets: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    size = negatives.shape[1] + 1
    place = (_uniform(_mix(stream ^ (_PLACE << np.uint64(56)))) * size).astype(np.int64)
    columns = np.arange(size)[None, :]
    source = np.clip(columns - (columns > place[:, None]), 0, size - 2)
    return np.where(columns == place[:, None], targets[:, None], np.take_along_axis(negatives, source, axis=1))


def _mix(value: np.ndarray | np.uint64) -> np.ndarray:
    """A bijection of 64-bit integers that scatters neighbours (the finaliser of the splitmix64 generator)."""
    with np.errstate(over="ignore"):
        z = np.asarray(value, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _uniform(bits: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) from the upper 53 bits."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
