"""Finished texts: a cache that survives any kill, and the two tables made from it.

    cache/000001.jsonl  one line per finished text, appended and flushed batch by batch; every run begins a new file
    items.parquet       item, key, text, status, reason
    users.parquet       user, key, split, example, events, text, blocks, status, reason
    summaries.json      which data set, which prompts and models, counts, and the hashes of both tables; written last

A text is kept under the hash of everything that decides it (`Summarizer.version` and the content), so a run reads what
an earlier one finished and nothing else. A line says how many lines of its batch follow: a batch whose last line is
missing or torn is dropped and made again as a whole, since a model's answers may depend on their batch. The tables are
written in order of ids by a temporary file and a rename, so their bytes do not depend on what finished first, or when.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from llmrec.data.summaries import FORMAT_VERSION, ITEMS, RECORD, USERS, Summaries, UserText, read_record, read_summaries
from llmrec.errors import CheckpointError
from llmrec.run_dir import write_json
from llmrec.summarizers.base import FAILED, KEPT, OK, UNFINISHED, Written

__all__ = ["Summaries", "TextStore", "UserText", "count_statuses", "read_record", "read_summaries", "write_results"]

if TYPE_CHECKING:
    import pyarrow as pa

    from llmrec.data.dataset import InteractionDataset


class TextStore:
    """The cache of one folder; use it in a `with` block, which keeps other processes out.

    Args:
        folder: Where the files are; made when needed.
        retry_failed: Forget texts for which no usable answer came, so that they are asked for again; of two texts of
            one key the later counts.

    Raises:
        CheckpointError: A line that is not the last of its file cannot be read, or another process has the folder.
    """

    def __init__(self, folder: Path, *, retry_failed: bool = False) -> None:
        self.folder, self._retry_failed = folder, retry_failed
        self.dropped = 0
        """Lines of batches that were cut off by a kill."""
        self._texts: dict[str, Written] = {}
        self._file: IO[bytes] | None = None
        self._lock: IO[str] | None = None

    def __enter__(self) -> TextStore:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder / ".lock", "a", encoding="utf-8")  # noqa: SIM115 - held until __exit__
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise CheckpointError(
                f"{self.folder} is in use by another process; wait for it, or give another folder"
            ) from error
        for path in self._shards():
            self._read(path)
        if self._retry_failed:
            self._texts = {key: text for key, text in self._texts.items() if text.status not in (FAILED, KEPT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._file, self._lock):
            if file is not None:
                file.close()

    def __len__(self) -> int:
        return len(self._texts)

    def __contains__(self, key: str) -> bool:
        return key in self._texts

    def __getitem__(self, key: str) -> Written:
        return self._texts[key]

    def append(self, batch: Mapping[str, Written]) -> None:
        """Keep a batch of finished texts; they are on disk when this returns. Unfinished ones are left out."""
        kept = {key: text for key, text in batch.items() if text.status != UNFINISHED and key not in self._texts}
        if not kept:
            return
        lines = [
            json.dumps({"key": key, **asdict(text), "left": len(kept) - number}, ensure_ascii=False)
            for number, (key, text) in enumerate(kept.items(), start=1)
        ]
        file = self._open()
        file.write("".join(f"{line}\n" for line in lines).encode())
        file.flush()
        os.fsync(file.fileno())
        self._texts.update(kept)

    def _shards(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.jsonl"))

    def _open(self) -> IO[bytes]:
        """The file of this run: a new one, so that nothing is ever written behind a torn line."""
        if self._file is None:
            number = max((int(path.stem) for path in self._shards()), default=0) + 1
            self._file = open(self.folder / f"{number:06d}.jsonl", "xb")  # noqa: SIM115 - closed by __exit__
            place = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(place)
            finally:
                os.close(place)
        return self._file

    def _read(self, path: Path) -> None:
        batch: dict[str, Written] = {}
        lines = path.read_bytes().split(b"\n")
        torn = lines.pop()  # what stands behind the last line's end
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                key, left = record.pop("key"), record.pop("left")
                batch[key] = Written(**{**record, "marks": tuple(record["marks"])})
            except (ValueError, KeyError, TypeError) as error:
                if number == len(lines):
                    torn = line
                    break
                raise CheckpointError(
                    f"{path}:{number}: found a line that is no finished text ({type(error).__name__}: {error}); a kill "
                    "damages the last line alone, so the file was changed. Delete it: its texts are then made again"
                ) from error
            if left == 0:
                self._texts |= batch
                batch = {}
        self.dropped += len(batch) + bool(torn)


# The tables ----------------------------------------------------------------------------------------------------------


def write_results(
    folder: Path,
    dataset: InteractionDataset,
    items: Mapping[int, Written],
    users: Sequence[UserText],
    record: Mapping[str, Any],
) -> None:
    """Write both tables and, last, the record that makes them valid.

    Args:
        folder: Where they go; an earlier result is replaced, and is invalid from the first file on.
        dataset: Whose items and users they are.
        items: Item id -> outcome.
        users: One row per user and split.
        record: What else the record says; must not depend on when or how often the job was started.
    """
    import pyarrow as pa

    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).unlink(missing_ok=True)
    keys = dataset.item_keys
    item_rows = [
        {"item": item, "key": keys[item], "text": done.text, "status": done.status, "reason": done.reason}
        for item, done in sorted(items.items())
    ]
    user_rows = [
        {**asdict(row), "key": dataset.user_keys[row.user]}
        for row in sorted(users, key=lambda row: (row.user, row.example))
    ]
    word, number = pa.string(), pa.int64()
    item_schema = pa.schema({"item": number, "key": word, "text": word, "status": word, "reason": word})
    user_schema = pa.schema({
        "user": number, "key": word, "split": word, "example": number, "events": number, "text": word,
        "blocks": number, "status": word, "reason": word,
    })  # fmt: skip
    hashes = {
        ITEMS: _write_table(folder / ITEMS, pa.Table.from_pylist(item_rows, schema=item_schema)),
        USERS: _write_table(folder / USERS, pa.Table.from_pylist(user_rows, schema=user_schema)),
    }
    about = {"name": dataset.meta.name, "fingerprint": dataset.fingerprint}
    write_json(folder / RECORD, {"format": FORMAT_VERSION, "dataset": about, **record, "files": hashes})


def _write_table(path: Path, table: pa.Table) -> str:
    import pyarrow.parquet as pq

    partial = path.with_name(f".{path.name}.partial")
    pq.write_table(table, partial, compression="zstd")
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    os.replace(partial, path)
    return digest


def count_statuses(statuses: Sequence[str]) -> dict[str, int]:
    """How often each status occurs, "ok" first, then by name."""
    return {name: statuses.count(name) for name in sorted(set(statuses), key=lambda name: (name != OK, name))}
