"""Recommending for a file of users: shards that survive a kill, divided over processes or actors, merged into one file.

    OUT.parquet.shards/job.json        what is asked, of which weights, for which users
    OUT.parquet.shards/000000.parquet  answers for the first 256 users, and so on; each appears whole or not at all

The same command goes on with the shards that are missing. The shards, and the batches inside them, are the same
however the work is divided, so the merged file has the same bytes (given the same number of threads).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.commands.questions import Question
from llmrec.errors import CheckpointError, DataError

if TYPE_CHECKING:
    import pyarrow as pa

    from llmrec.recommender import Recommender

SHARD = 256
"""Users a shard: what a kill may cost."""
_GROUP = 100_000  # rows of a row group of the merged file


class ShardFolder:
    """The folder of one job.

    Args:
        out: The file that is made in the end.
        users: Original ids of all users, in the order of their rows.
    """

    def __init__(self, out: Path, users: Sequence[str]) -> None:
        self.out, self.users = out, list(users)
        self.folder = out.with_name(f"{out.name}.shards")
        self.count = -(-len(self.users) // SHARD)

    def names(self, number: int) -> list[str]:
        """Users of a shard."""
        return self.users[number * SHARD : (number + 1) * SHARD]

    def missing(self) -> list[int]:
        """Shards that are not written yet."""
        return [number for number in range(self.count) if not self._path(number).is_file()]

    def claim(self, question: Question, dataset: str) -> None:
        """Note what the shards answer, or make sure that those which are there answer the same.

        Raises:
            CheckpointError: They answer something else.
        """
        from llmrec.run_dir import write_json
        from llmrec.run_loading import find_run

        asked = {name: value for name, value in asdict(question).items() if name != "run"}
        job = {
            **json.loads(json.dumps(asked)),
            "users": hashlib.sha256("\n".join(self.users).encode()).hexdigest(),
            "shard": SHARD,
            "dataset": dataset,
            "weights": _weights(find_run(question.run)),
        }
        record = self.folder / "job.json"
        if record.is_file():
            found = json.loads(record.read_text(encoding="utf-8"))
            differ = sorted(name for name in job.keys() | found.keys() if job.get(name) != found.get(name))
            if differ:
                raise CheckpointError(
                    f"{self.folder} holds the shards of another question ({', '.join(differ)} differ); delete the "
                    "folder to begin anew, or give another --out"
                )
        write_json(record, job)

    def write(self, number: int, table: pa.Table) -> None:
        """Write one shard; it appears whole or not at all."""
        import pyarrow.parquet as pq

        partial = self.folder / f".{number:06d}.{os.getpid()}.partial"
        pq.write_table(table, partial)
        os.replace(partial, self._path(number))

    def merge(self) -> None:
        """Join the shards into the file, and delete them.

        Raises:
            CheckpointError: Some are missing.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        missing = self.missing()
        if missing:
            raise CheckpointError(
                f"{self.folder} lacks the shards {missing[:5]} ({len(missing)} of {self.count}); the processes of all "
                "machines must see the same folder"
            )
        partial = self.out.with_name(f".{self.out.name}.partial")
        with pq.ParquetWriter(partial, row_schema()) as writer:
            waiting: list[pa.Table] = []
            for number in range(self.count):
                waiting.append(pq.read_table(self._path(number)))
                if sum(table.num_rows for table in waiting) >= _GROUP:
                    writer.write_table(pa.concat_tables(waiting))
                    waiting = []
            if waiting:
                writer.write_table(pa.concat_tables(waiting))
        os.replace(partial, self.out)
        shutil.rmtree(self.folder)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.parquet"


def recommend_users(
    question: Question, users: Sequence[str], out: Path, *, engine: str = "local", actors: int = 1
) -> dict[str, Any]:
    """Write the recommendations for all users to a Parquet file.

    Args:
        question: What is asked.
        users: Original ids.
        out: The file.
        engine: "local", divided over the processes of a launcher where there are several, or "ray".
        actors: Actors on Ray.

    Returns:
        {"system", "users", "shards", "resumed"}, where `resumed` counts shards that were there already.

    Raises:
        DataError: No such user.
        CheckpointError: Another job is at it, or left shards of another question.
    """
    from llmrec.commands.output import note
    from llmrec.evaluation.shards import ranks, wait_for_all
    from llmrec.training.lock import lock

    recommender: Recommender | None = question.open()
    assert recommender is not None
    name, fingerprint = recommender.name, recommender.dataset.fingerprint
    for user in users:
        recommender.dataset.user_id_of(user)
    job, here = ShardFolder(out, users), ranks()
    out.parent.mkdir(parents=True, exist_ok=True)
    with lock(job.folder) if here.is_first else nullcontext():
        if here.is_first:
            job.claim(question, fingerprint)
        wait_for_all()
        # Owners are fixed by number: a list of what is missing could differ between processes that look at it in turn.
        present = job.count - len(job.missing())
        todo = sorted(set(here.own(range(job.count))) & set(job.missing()))
        wait_for_all()
        if present:
            note(f"{present} of {job.count} shards are there already")
        if engine == "ray":
            from llmrec.commands.ray_actors import answer_shards

            recommender = None  # the actors have their own
            found: Iterable[tuple[int, pa.Table]] = answer_shards(question, [(n, job.names(n)) for n in todo], actors)
        else:
            found = ((n, answer_shard(question, recommender, job.names(n))) for n in todo)
        for number, table in _shown(found, len(todo), f"recommend {name}"):
            job.write(number, table)
        wait_for_all()
        if here.is_first:
            job.merge()
    return {"system": name, "users": len(users), "shards": job.count, "resumed": present}


def answer_shard(question: Question, recommender: Recommender, users: Sequence[str]) -> pa.Table:
    """The rows of one shard."""
    import pyarrow as pa

    histories = [recommender.history_of(user) for user in users]
    rows = question.answer(recommender, users, histories, times_of(recommender, users))
    return pa.Table.from_pylist(rows, schema=row_schema())


def times_of(recommender: Recommender, users: Sequence[str]) -> list[list[int]] | None:
    """Times of the histories of users, where the system reads them and the data set has them."""
    if "timestamps" not in recommender.reads:
        return None
    found = [recommender.times_of(user) for user in users]
    return None if any(times is None for times in found) else found  # type: ignore[return-value]


def row_schema() -> pa.Schema:
    """Columns of the file."""
    import pyarrow as pa

    kinds = {"user": pa.string(), "rank": pa.int64(), "item": pa.string(), "title": pa.string(),
             "score": pa.float64(), "because": pa.string()}  # fmt: skip
    return pa.schema(kinds)


def read_users(path: Path) -> list[str]:
    """Original user ids of a file with one a line.

    Raises:
        DataError: No such file, or nothing in it.
    """
    if not path.is_file():
        raise DataError(f"no file {path}", expected="one original user id a line")
    users = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not users:
        raise DataError("names no user", file=path, expected="one original user id a line")
    return users


def _weights(run: Path) -> str:
    """SHA-256 over everything that decides a run's answers."""
    digest = hashlib.sha256()
    parts = [run / "recipe.yaml", *sorted((run / "encoder").rglob("*")), *sorted((run / "model").rglob("*"))]
    for path in parts:
        if path.is_file():
            digest.update(f"{path.relative_to(run)}\0".encode())
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _shown(found: Iterable[tuple[int, pa.Table]], count: int, text: str) -> Iterator[tuple[int, pa.Table]]:
    """The same, with a progress bar of shards on the terminal of the first process."""
    from rich.console import Console
    from rich.progress import track

    from llmrec.evaluation.shards import ranks

    console = Console(stderr=True)
    hide = not (console.is_terminal and ranks().is_first)
    yield from track(found, description=text, total=count, console=console, transient=True, disable=hide)
