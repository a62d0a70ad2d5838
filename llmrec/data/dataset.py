"""`InteractionDataset`: the one immutable form every verb reads and writes.

A data set is a folder::

    interactions.parquet   user, item, order, split [, timestamp, rating, label, domain, ...]; sorted by user, order
    items.parquet          item, key [, title, description, categories, brand, image, domain, ...]; one row an item
    users.parquet          user, key [, ...]; one row a user
    meta.json              counts, rules and the fingerprint
    README.md              the data card
    candidates/            stored candidate lists (llmrec.data.negatives)

Tables are memory-mapped Arrow; nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llmrec.data.schema import ITEM, KEY, LABEL, ORDER, RATING, SPLIT, SPLITS, TIMESTAMP, TITLE, USER, DataContext
from llmrec.errors import DataError

if TYPE_CHECKING:
    from llmrec.data.schema import ItemFeatures, Split
    from llmrec.data.sequences import SequenceExamples

FORMAT_VERSION = 1


@dataclass(frozen=True)
class DatasetMeta:
    """How a data set came to be; every rule that changes a number is written down here.

    Args:
        name: Name people use ("movielens-100k").
        source: Source kind ("movielens", "table", ...).
        split: Split rule ("leave_one_out", "temporal_80_10_10", "user_80_10_10", "gap_30", "given").
        tie_rule: How events of equal time are ordered.
        repeats: "keep", "first" or "last" for repeated (user, item) events.
        has_repeats: Whether repeated (user, item) events are present after that.
        positive: The positive rule as written ("rating >= 4"), or "all".
        filters: Minimum counts and other filters, name -> value.
        columns: Which source column became which of ours.
        parent: Fingerprint of the data set this one was transformed from.
        notes: One line for each transform or notice, oldest first.
        counts: Rows read, rejected and dropped by each step, for the data card.
    """

    name: str
    source: str
    split: str
    tie_rule: str = "source row"
    repeats: str = "keep"
    has_repeats: bool = False
    positive: str = "all"
    filters: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    parent: str | None = None
    notes: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def remove_seen(self) -> bool:
        """Default of the evaluator: seen items are removed unless the data set has repeated items."""
        return not self.has_repeats


@dataclass(frozen=True)
class InteractionDataset:
    """Immutable tables with a fingerprint.

    Args:
        interactions: user, item, order, split and optional columns; sorted by (user, order); ids from 1.
        items: item, key and optional text fields; row i describes item i + 1.
        users: user, key; row i describes user i + 1.
        meta: The rules that produced it.

    Raises:
        DataError: A table breaks these rules.
    """

    interactions: pa.Table
    items: pa.Table
    users: pa.Table
    meta: DatasetMeta

    def __post_init__(self) -> None:
        _check_tables(self.interactions, self.items, self.users)

    @property
    def num_items(self) -> int:
        """I, the size of the catalogue left after filtering."""
        return self.items.num_rows

    @property
    def num_users(self) -> int:
        """U."""
        return self.users.num_rows

    @property
    def fields(self) -> frozenset[str]:
        """Optional fields present: "timestamps", "ratings", "labels", "titles" and the names of other item columns."""
        names = {TIMESTAMP: "timestamps", RATING: "ratings", LABEL: "labels"}
        found = {names[c] for c in names if c in self.interactions.column_names}
        if TITLE in self.items.column_names:
            found.add("titles")
        return frozenset(found | (set(self.items.column_names) - {ITEM, KEY, TITLE}))

    @cached_property
    def fingerprint(self) -> str:
        """First 16 hex digits of a SHA-256 over ids, order, split, times and original keys (not over text)."""
        digest = hashlib.sha256(f"llmrec-dataset-{FORMAT_VERSION}".encode())
        for name in (USER, ITEM, ORDER, TIMESTAMP, LABEL):
            if name in self.interactions.column_names:
                digest.update(name.encode())
                digest.update(np.ascontiguousarray(self.column(name)).tobytes())
        digest.update(self.split_codes.tobytes())
        for table in (self.items, self.users):
            for key in table.column(KEY).to_pylist():
                digest.update(str(key).encode() + b"\0")
        return digest.hexdigest()[:16]

    def column(self, name: str) -> np.ndarray:
        """One interaction column as a numpy array [N]."""
        if name not in self.interactions.column_names:
            raise DataError(
                f"data set {self.meta.name!r} has no column {name!r}",
                found=", ".join(self.interactions.column_names),
                expected=f"a column {name!r}",
                remedy="prepare it again from a source with this column, or choose a model that does not use it",
            )
        return self.interactions.column(name).to_numpy()

    @cached_property
    def split_codes(self) -> np.ndarray:
        """[N] int8, index into `schema.SPLITS`."""
        codes = pc.index_in(self.interactions.column(SPLIT).cast(pa.string()), value_set=pa.array(SPLITS))
        return codes.to_numpy().astype(np.int8)

    @cached_property
    def user_offsets(self) -> np.ndarray:
        """[U+2] int64: events of user u are rows user_offsets[u] : user_offsets[u + 1] (user 0 has none)."""
        counts = np.bincount(self.column(USER), minlength=self.num_users + 1)
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def histories(self, split: Split, max_history: int) -> SequenceExamples:
        """One example for each event of `split` that has an earlier event: history -> that event.

        The history of a validation target holds training and history events only; that of a test target holds
        every earlier event. The latest `max_history` events are the inputs, the whole history is `seen`.
        """
        from llmrec.data.sequences import prefix_examples

        return prefix_examples(self, split, max_history)

    def windows(self, max_history: int, *, split: Split = "train") -> SequenceExamples:
        """Windows over each user's `split` events in which every position is supervised by the next event."""
        from llmrec.data.sequences import window_examples

        return window_examples(self, split, max_history)

    def context(self, item_features: ItemFeatures | None = None) -> DataContext:
        """Counts and edges of the training split, as plain arrays."""
        train = self.split_codes == SPLITS.index("train")
        users, items = self.column(USER)[train].astype(np.int64), self.column(ITEM)[train].astype(np.int64)
        return DataContext(
            num_items=self.num_items,
            num_users=self.num_users,
            train_counts=np.bincount(items, minlength=self.num_items + 1),
            train_edges=np.stack([users, items]),
            item_features=item_features or {},
            fields=self.fields,
        )

    def with_interactions(self, table: pa.Table, note: str) -> InteractionDataset:
        """A new data set with other interactions over the same items and users; `note` says what was done."""
        meta = dataclasses.replace(self.meta, parent=self.fingerprint, notes=(*self.meta.notes, note))
        return InteractionDataset(table, self.items, self.users, meta)

    @cached_property
    def item_keys(self) -> list[str]:
        """Original ids as text, index = item id; entry 0 is empty."""
        return ["", *map(str, self.items.column(KEY).to_pylist())]

    @cached_property
    def item_titles(self) -> list[str]:
        """Titles, index = item id; an item without a title is called by its key; entry 0 is empty."""
        if TITLE not in self.items.column_names:
            return self.item_keys
        titles = self.items.column(TITLE).to_pylist()
        return ["", *(title or key for title, key in zip(titles, self.item_keys[1:], strict=True))]

    @cached_property
    def user_keys(self) -> list[str]:
        """Original user ids as text, index = user id; entry 0 is empty."""
        return ["", *map(str, self.users.column(KEY).to_pylist())]

    def item_ids_of(self, keys: list[str]) -> np.ndarray:
        """Item ids [n] of original ids; 0 where a key is not in the catalogue."""
        index = self._item_index
        return np.array([index.get(str(key), 0) for key in keys], dtype=np.int64)

    @cached_property
    def _item_index(self) -> dict[str, int]:
        return {key: item for item, key in enumerate(self.item_keys) if item}

    @cached_property
    def _user_index(self) -> dict[str, int]:
        return {key: user for user, key in enumerate(self.user_keys) if user}

    def user_id_of(self, key: str) -> int:
        """User id of an original id.

        Raises:
            DataError: No such user.
        """
        if str(key) not in self._user_index:
            raise DataError(
                f"no user {key!r} in data set {self.meta.name!r}",
                expected=f"one of {self.num_users} user ids, such as {self.user_keys[1:4]}",
                remedy="give --history instead of a user id to recommend for somebody new",
            )
        return self._user_index[str(key)]

    def summary(self) -> dict[str, Any]:
        """Counts and rules as a JSON-ready record."""
        split_counts = np.bincount(self.split_codes, minlength=len(SPLITS))
        lengths = np.diff(self.user_offsets)[1:]
        return {
            "name": self.meta.name,
            "fingerprint": self.fingerprint,
            "users": self.num_users,
            "items": self.num_items,
            "interactions": self.interactions.num_rows,
            "density": self.interactions.num_rows / max(1, self.num_users * self.num_items),
            "history_length": {
                "min": int(lengths.min()) if lengths.size else 0,
                "median": float(np.median(lengths)) if lengths.size else 0.0,
                "max": int(lengths.max(initial=0)),
            },
            "splits": {name: int(n) for name, n in zip(SPLITS, split_counts, strict=True) if n},
            "fields": sorted(self.fields),
            "remove_seen": self.meta.remove_seen,
            **{key: value for key, value in dataclasses.asdict(self.meta).items() if key not in {"name"}},
        }

    def save(self, folder: str | Path) -> Path:
        """Write the folder; an interrupted write never leaves a folder that `load` accepts (meta.json comes last)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "meta.json").unlink(missing_ok=True)
        for name in ("interactions", "items", "users"):
            partial = folder / f".{name}.parquet.partial"
            pq.write_table(getattr(self, name), partial, compression="zstd")
            os.replace(partial, folder / f"{name}.parquet")
        record = {"format": FORMAT_VERSION, "fingerprint": self.fingerprint, **dataclasses.asdict(self.meta)}
        partial = folder / ".meta.json.partial"
        partial.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, folder / "meta.json")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> InteractionDataset:
        """Read a folder written by `save`.

        Raises:
            DataError: The folder is incomplete, or its tables no longer match the recorded fingerprint.
        """
        folder = Path(folder)
        if not (folder / "meta.json").is_file():
            raise DataError(
                "not a prepared data set",
                file=folder,
                found=f"files: {sorted(p.name for p in folder.glob('*'))[:8]}" if folder.is_dir() else "no such folder",
                expected="a folder with meta.json, written by `llmrec prepare`",
                remedy="run: llmrec prepare SOURCE --out DIR",
            )
        record = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        stored, version = record.pop("fingerprint"), record.pop("format")
        if version != FORMAT_VERSION:
            raise DataError("unknown data set format", file=folder, found=version, expected=str(FORMAT_VERSION))
        record["notes"] = tuple(record["notes"])
        interactions, items, users = (
            pq.read_table(folder / f"{name}.parquet", memory_map=True) for name in ("interactions", "items", "users")
        )
        dataset = cls(interactions, items, users, DatasetMeta(**record))
        if dataset.fingerprint != stored:
            raise DataError(
                "tables and meta.json do not belong together",
                file=folder,
                found=f"fingerprint {dataset.fingerprint}",
                expected=stored,
                remedy="prepare the data set again",
            )
        return dataset


def _check_tables(interactions: pa.Table, items: pa.Table, users: pa.Table) -> None:
    for table, name, required in (
        (interactions, "interactions", (USER, ITEM, ORDER, SPLIT)),
        (items, "items", (ITEM, KEY)),
        (users, "users", (USER, KEY)),
    ):
        missing = [column for column in required if column not in table.column_names]
        if missing:
            raise DataError(
                f"table {name!r} lacks {', '.join(missing)}",
                found=", ".join(table.column_names),
                expected=", ".join(required),
            )
    for table, name, column in ((items, "items", ITEM), (users, "users", USER)):
        ids = table.column(column).to_numpy()
        if not np.array_equal(ids, np.arange(1, len(ids) + 1)):
            raise DataError(f"table {name!r} must have ids 1..{len(ids)} in order", column=column)
    user, item, order = (interactions.column(c).to_numpy() for c in (USER, ITEM, ORDER))
    if len(user) and (np.any(np.diff(user) < 0) or np.any((np.diff(user) == 0) & (np.diff(order) <= 0))):
        raise DataError("interactions must be sorted by user, then by strictly increasing order")
    for ids, limit, column in ((user, users.num_rows, USER), (item, items.num_rows, ITEM)):
        if len(ids) and (ids.min() < 1 or ids.max() > limit):
            raise DataError(
                "id outside its table", column=column, found=f"{ids.min()}..{ids.max()}", expected=f"1..{limit}"
            )
    strange = set(pc.unique(interactions.column(SPLIT)).to_pylist()) - set(SPLITS)
    if strange:
        raise DataError(
            "unknown split value", column=SPLIT, found=sorted(map(str, strange)), expected=", ".join(SPLITS)
        )
