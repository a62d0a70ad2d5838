"""Texts of items and users that `llmrec summarize` wrote, read back by id for the data set they are of.

items.parquet    item, key, text, status, reason
users.parquet    user, key, split, example, events, text, blocks, status, reason
summaries.json   which data set, which prompts and models, counts, and the hashes of both tables
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from llmrec.data.dataset import InteractionDataset

FORMAT_VERSION = 1
ITEMS, USERS, RECORD = "items.parquet", "users.parquet", "summaries.json"


@dataclass(frozen=True)
class UserText:
    """The text of a user before one held-out event.

    Args:
        user: Its id.
        split: Split of the held-out event.
        example: Row of the held-out event in the interactions table; nothing from it on was read.
        events: Events that were read.
        text: The text after the last block.
        blocks: Blocks read.
        status: "ok"; "partial", where the text lacks some blocks; "failed", without any text; "unfinished".
        reason: Why it is not "ok".
    """

    user: int
    split: str
    example: int
    events: int
    text: str
    blocks: int
    status: str
    reason: str = ""


@dataclass(frozen=True)
class Summaries:
    """The texts of a folder, by id.

    Args:
        items: Item id -> text, of the items that have one.
        users: Split -> user id -> text before the held-out event, of the users that have one.
        rows: Every user's row, those without a text included.
        record: What summaries.json says.
    """

    items: dict[int, str]
    users: dict[str, dict[int, str]]
    rows: tuple[UserText, ...]
    record: dict[str, Any]

    def by_target(self, dataset: InteractionDataset) -> dict[tuple[int, int], str]:
        """(user id, number of events before the target) -> the text in front of that target.

        A text of validation or test is made before the first target of its user in that split, so it serves the later
        ones too; one of training serves its own target alone.
        """
        own = {row.example: row.text for row in self.rows if row.text}
        found: dict[tuple[int, int], str] = {}
        for split, texts in self.users.items():
            examples = dataset.histories(split, 1)  # type: ignore[arg-type]
            places = (examples.users, examples.end - examples.first, examples.example_ids)
            for user, before, example in zip(*(place.tolist() for place in places), strict=True):
                text = own.get(example) if split == "train" else texts.get(user)
                if text:
                    found[user, before] = text
        return found


def read_summaries(folder: str | Path, dataset: InteractionDataset) -> Summaries:
    """Read what `llmrec summarize` wrote.

    Args:
        folder: The folder.
        dataset: The data set the texts must belong to.

    Raises:
        DataError: There is no finished result, or its tables are not those of its record.
        CheckpointError: The texts are of another data set; both fingerprints are named.
    """
    import pyarrow.parquet as pq

    folder = Path(folder)
    record = read_record(folder)
    found = record["dataset"]["fingerprint"]
    if found != dataset.fingerprint:
        raise CheckpointError(
            f"{folder} holds summaries of data set {record['dataset']['name']!r} with fingerprint {found}, this one is "
            f"{dataset.meta.name!r} with {dataset.fingerprint}; summarise this one, or name the data set they are of"
        )
    for name, digest in record["files"].items():
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise DataError(
                "is missing or not the table of its record", file=path, expected=f"sha256 {digest}",
                remedy="run the same `llmrec summarize` again: it writes the tables anew from its cache",
            )  # fmt: skip
    items = pq.read_table(folder / ITEMS).to_pylist()
    rows = []
    for line in pq.read_table(folder / USERS).to_pylist():
        line.pop("key")
        rows.append(UserText(**line))
    users: dict[str, dict[int, str]] = {split: {} for split in record.get("splits", [])}
    for row in rows:
        if row.text:
            users.setdefault(row.split, {})[row.user] = row.text
    return Summaries({line["item"]: line["text"] for line in items if line["text"]}, users, tuple(rows), record)


def read_record(folder: Path) -> dict[str, Any]:
    """summaries.json of a folder.

    Raises:
        DataError: There is none, or it has another format.
    """
    path = folder / RECORD
    if not path.is_file():
        raise DataError(
            "holds no finished summaries", file=folder, found=f"no {RECORD}",
            expected="a folder `llmrec summarize` has finished", remedy="run the same command again: it goes on",
        )  # fmt: skip
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if record.get("format") != FORMAT_VERSION:
        raise DataError("unknown format of summaries", file=path, found=record.get("format"), expected="1")
    return record
