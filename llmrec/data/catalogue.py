"""The items of a data set without its events: what a published run needs to recommend.

    items.parquet     item, key [, title]
    catalogue.json    fingerprint of the data set it stands for, hashes of the item index, counts and rules

Events, users and ratings belong to whoever collected them and are never part of it. What needs them (`history_of`,
`popular`, measuring) fails and says so; a data set of the same fingerprint brings it back.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmrec.data.dataset import DatasetMeta, InteractionDataset
from llmrec.data.schema import ITEM, KEY, ORDER, SPLIT, TITLE, USER
from llmrec.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from llmrec.data.schema import DataContext, ItemFeatures

FORMAT_VERSION = 1
ITEMS, RECORD = "items.parquet", "catalogue.json"
_NO_EVENTS = pa.schema([(USER, pa.int32()), (ITEM, pa.int32()), (ORDER, pa.int32()), (SPLIT, pa.string())])
_NO_USERS = pa.schema([(USER, pa.int32()), (KEY, pa.string())])


def item_index(dataset: InteractionDataset) -> dict[str, Any]:
    """What says which item each number means.

    Returns:
        {"items": I, "keys": SHA-256 over the original ids in order, "titles": the same over titles, None without}.
    """
    titles = dataset.items.column(TITLE).to_pylist() if TITLE in dataset.items.column_names else None
    return {
        "items": dataset.num_items,
        "keys": _hash(dataset.item_keys[1:]),
        "titles": None if titles is None else _hash(title or "" for title in titles),
    }


@dataclass(frozen=True)
class ItemCatalogue(InteractionDataset):
    """A data set of which only the items are at hand.

    Args:
        stored: catalogue.json: "dataset" (fingerprint), "item_index", "summary" of the whole data set.
    """

    stored: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, dataset: InteractionDataset, *, titles: bool) -> ItemCatalogue:
        """The catalogue of a data set; without `titles` it holds their hash alone."""
        columns = [ITEM, KEY, *([TITLE] if titles and TITLE in dataset.items.column_names else [])]
        if isinstance(dataset, ItemCatalogue):
            stored: Mapping[str, Any] = dataset.stored
        else:
            stored = {"dataset": dataset.fingerprint, "item_index": item_index(dataset), "summary": dataset.summary()}
        items = dataset.items.select(columns)
        return cls(_NO_EVENTS.empty_table(), items, _NO_USERS.empty_table(), dataset.meta, stored)

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """Fingerprint of the data set it stands for."""
        return str(self.stored["dataset"])

    @property
    def num_users(self) -> int:
        """U of the data set it stands for."""
        return int(self.stored["summary"]["users"])

    @property
    def fields(self) -> frozenset[str]:
        """Optional fields of the data set it stands for; titles only where they are at hand."""
        return frozenset(self.stored["summary"]["fields"]) - ({"titles"} - super().fields)

    def column(self, name: str) -> np.ndarray:
        """Not at hand.

        Raises:
            DataError: Always.
        """
        self._refuse()

    @property
    def split_codes(self) -> np.ndarray:  # type: ignore[override]
        """Not at hand."""
        self._refuse()

    def context(self, item_features: ItemFeatures | None = None) -> DataContext:
        """Not at hand.

        Raises:
            DataError: Always.
        """
        self._refuse()

    def user_id_of(self, key: str) -> int:
        """Not at hand.

        Raises:
            DataError: Always.
        """
        self._refuse()

    def summary(self) -> dict[str, Any]:
        """Counts and rules of the data set it stands for."""
        return dict(self.stored["summary"])

    def _refuse(self) -> NoReturn:
        raise DataError(
            f"the interactions of {self.meta.name!r} are not at hand",
            found="a published run: it holds the items, no users and no events",
            expected=f"the data set with the fingerprint {self.fingerprint}",
            remedy='prepare it and give its folder: Recommender.from_pretrained(..., dataset="FOLDER")',
        )

    def files(self) -> dict[str, bytes]:
        """The two files, by name."""
        sink = io.BytesIO()
        pq.write_table(self.items.replace_schema_metadata(None), sink, compression="zstd")
        record = {"format": FORMAT_VERSION, **self.stored, "meta": dataclasses.asdict(self.meta)}
        return {ITEMS: sink.getvalue(), RECORD: (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()}

    def save(self, folder: str | Path) -> Path:
        """Write the two files; the record comes last."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.files().items():
            (folder / name).write_bytes(data)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> ItemCatalogue:
        """Read a folder of `save`.

        Raises:
            CheckpointError: The items are not those of the record, naming both hashes.
            DataError: The folder is no catalogue.
        """
        folder = Path(folder)
        try:
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            version, meta = record.pop("format"), record.pop("meta")
            if version != FORMAT_VERSION:
                raise DataError("unknown format", file=folder / RECORD, found=version, expected=str(FORMAT_VERSION))
            found = DatasetMeta(**{**meta, "notes": tuple(meta["notes"])})
            items = pq.read_table(folder / ITEMS)
            catalogue = cls(_NO_EVENTS.empty_table(), items, _NO_USERS.empty_table(), found, record)
            check_item_index(str(folder / ITEMS), record["item_index"], catalogue, titles=TITLE in items.column_names)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
            raise DataError(
                f"not a catalogue: {type(error).__name__}: {error}", file=folder, expected=f"{ITEMS} and {RECORD}"
            ) from error
        return catalogue


def check_item_index(
    place: str, expected: Mapping[str, Any], dataset: InteractionDataset, *, titles: bool = False
) -> None:
    """Refuse items other than those a model was trained on.

    Args:
        place: What was trained on them, for the message.
        expected: A record of `item_index`.
        dataset: What is at hand.
        titles: Whether titles count too (models that read them).

    Raises:
        CheckpointError: Naming both hashes.
    """
    found = item_index(dataset)
    for name, what in (("keys", "item index"), *([("titles", "item titles")] if titles else [])):
        if found[name] != expected[name]:
            raise CheckpointError(
                f"{place}: expected the {what} {expected[name]} of {expected['items']:,} items, found "
                f"{found[name]} of {found['items']:,}; the numbers of the model would mean other items. "
                "Use the data set it was trained on"
            )


def _hash(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()
