"""Shards answered by actors of Ray Data, on one machine or many (extra `ray`).

Each actor loads the run once and answers shard after shard; the process that asked writes them down. The run has to be
readable under the same path on every machine. A cluster is found by Ray's own variable RAY_ADDRESS; without it Ray
starts on this machine and stops at the end.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llmrec.commands.questions import Question
from llmrec.errors import CheckpointError, DependencyError, LlmrecError

if TYPE_CHECKING:
    import pyarrow as pa


class ShardActor:
    """Answers shards with a run it loads when it starts.

    Args:
        question: Fields of the `Question`.
    """

    def __init__(self, question: dict[str, Any]) -> None:
        self.question = Question(**question)
        self.recommender = self.question.open()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """A shard a row: {"shard", "users"} -> {"shard", "answers"}, the answers as one Arrow stream each."""
        import pyarrow as pa

        from llmrec.commands.user_shards import answer_shard

        answers = [
            _to_bytes(answer_shard(self.question, self.recommender, users))
            for users in batch.column("users").to_pylist()
        ]
        return pa.table({"shard": batch.column("shard"), "answers": pa.array(answers, pa.binary())})


def require_ray() -> None:
    """Make sure that Ray can be used.

    Raises:
        DependencyError: It is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise DependencyError("ray", extra="ray", purpose="--engine ray")


def answer_shards(
    question: Question, shards: Sequence[tuple[int, list[str]]], actors: int
) -> Iterator[tuple[int, pa.Table]]:
    """Answers of shards in the order they get ready.

    Args:
        question: What is asked.
        shards: (number, users) of each.
        actors: How many load the run; each takes one processor, and one accelerator where Ray has as many.

    Raises:
        DependencyError: Ray is not installed.
        CheckpointError: The actors cannot work.
    """
    require_ray()
    if not shards:
        return
    with _cluster(actors) as ray:
        data = importlib.import_module("ray.data")
        data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # plans and traces; errors are raised
        rows = [{"shard": number, "users": users} for number, users in shards]
        has_gpus = ray.cluster_resources().get("GPU", 0) >= actors
        answered = data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            ShardActor,
            fn_constructor_kwargs={"question": asdict(question)},
            batch_size=1,
            batch_format="pyarrow",
            compute=data.ActorPoolStrategy(size=min(actors, len(rows))),
            num_cpus=1,
            num_gpus=1 if has_gpus else 0,
        )
        try:
            for block in answered.iter_batches(batch_size=None, batch_format="pyarrow"):
                for row in block.to_pylist():
                    yield row["shard"], _from_bytes(row["answers"])
        except ray.exceptions.RayError as error:
            raise _explained(error) from error


@contextmanager
def _cluster(actors: int) -> Iterator[Any]:
    """Ray, started for this job unless it runs already."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported and by what it starts
    import ray

    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"logging_level": "WARNING", "log_to_driver": False}
    if "RAY_ADDRESS" not in os.environ:
        cores = max(actors, len(os.sched_getaffinity(0)))
        options |= {"num_cpus": cores, "include_dashboard": False}
    ray.init(**options)
    try:
        yield ray
    finally:
        ray.shutdown()


def _explained(error: Exception) -> LlmrecError:
    """The first line of the error an actor met; Ray hands on its text, with many lines around it."""
    text = str(error).strip()
    ours = re.findall(r"^llmrec\.errors\.\w+: (.+)$", text, re.MULTILINE)
    met = ours[-1] if ours else text.splitlines()[-1]
    return CheckpointError(
        f"Ray could not answer the shards: {met}\n  The run must be readable under the same path on every machine. "
        "Finished shards are kept; the same command goes on with the rest"
    )


def _to_bytes(table: pa.Table) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _from_bytes(content: bytes) -> pa.Table:
    import pyarrow as pa

    with pa.ipc.open_stream(content) as reader:
        return reader.read_all()
