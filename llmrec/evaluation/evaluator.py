"""`Evaluator`: one piece of code measures every system.

A `CatalogueScorer` gets exact ranks by counting; candidate lists are scored by `score_candidates`; a system that can
only recommend is measured on its list, and the result's label says so. With mode "generate" a system gives one answer
per example, with mode "pointwise" one logit per event. The target (or the event's own action) never reaches the system:
its place in every row is blanked before the batch is made.

Under a launcher the batches are divided over the processes (`llmrec.evaluation.shards`); all end with the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from llmrec.data.sequences import SequenceCollator, pad_right
from llmrec.errors import DataError
from llmrec.evaluation.found import Found, with_drawn_candidates
from llmrec.evaluation.measuring import Job, choose_step, judge
from llmrec.evaluation.pointwise import asked_events, pointwise_result
from llmrec.evaluation.protocol import EvalProtocol
from llmrec.evaluation.results import EvalResult, print_results, results_record, summarise
from llmrec.evaluation.shards import exchange, ranks
from llmrec.evaluation.tables import prediction_table

if TYPE_CHECKING:
    from llmrec.data.dataset import InteractionDataset
    from llmrec.data.schema import SequenceBatch
    from llmrec.interfaces import Recommender

__all__ = ["EvalResult", "Evaluator", "print_results", "results_record"]

SCORE_BYTES = 512 << 20
"""Memory of the scores of one batch: with a large catalogue batches shrink until they fit."""


class Evaluator:
    """Measures recommenders under one protocol.

    Args:
        protocol: The question.
        batch_size: Examples at a time, fewer where the catalogue is large.
        device: Where batches are put; the recommender has to be there already.
        progress: Show a progress bar on standard error when it is a terminal.
    """

    def __init__(
        self, protocol: EvalProtocol, batch_size: int = 256, device: str | torch.device = "cpu", progress: bool = True
    ) -> None:
        self.protocol, self.batch_size, self.device, self.progress = protocol, batch_size, device, progress

    def run(
        self, recommender: Recommender, dataset: InteractionDataset, *, name: str = "model", seed: int | None = None
    ) -> EvalResult:
        """Measure one system.

        Args:
            recommender: The system; put in evaluation mode meanwhile. Its own `collate(rows)` makes the batches if it
                has one, `SequenceCollator` otherwise.
            dataset: Where histories and targets come from.
            name: Name of the system.
            seed: Use only this draw of candidates instead of the protocol's seeds.

        Raises:
            DataError: The split holds no examples, a score is NaN, or the system's output has a wrong shape.
        """
        protocol = self.protocol.resolve(dataset)
        if protocol.mode == "pointwise":
            return self._run_pointwise(recommender, dataset, protocol, name)
        if seed is not None:
            protocol = replace(protocol, seeds=(seed,))
        examples = dataset.histories(protocol.split, protocol.max_history)  # type: ignore[arg-type]
        if not len(examples):
            raise DataError(
                f"split {protocol.split!r} of data set {dataset.meta.name!r} holds no target with a history",
                found=str(dataset.summary()["splits"]),
                remedy="choose another split, or prepare the data set with a split rule that fills this one",
            )
        draws = protocol.seeds if protocol.num_candidates is not None else protocol.seeds[:1]
        length = max(protocol.cuts)
        if protocol.mode == "score" and any(hasattr(recommender, name) for name in ("score_candidates", "score_items")):
            length = max(length, protocol.num_candidates or 0)  # every score is kept where every candidate has one
        jobs = [
            Job(recommender, dataset, drawn, protocol, Found.empty(len(drawn), length))
            for drawn in (with_drawn_candidates(dataset, examples, protocol, draw) for draw in draws)
        ]
        with _evaluation_mode(recommender):
            measured = [self._measure(job, draw, name) for job, draw in zip(jobs, draws, strict=True)]
        judged = [job.found.exact for job in jobs if job.found.exact is not None]
        exact = np.concatenate(judged) if judged else None
        predictions = pa.concat_tables([table for table, _ in measured]).combine_chunks()
        return EvalResult(
            name=name,
            predictions=predictions,
            metrics=summarise(
                predictions,
                protocol,
                train_counts=dataset.context().train_counts,
                exact=exact,
            ),
            protocol=protocol,
            fingerprint=protocol.fingerprint(dataset),
            dataset=dataset.fingerprint,
            users=len(np.unique(examples.users)),
            measured=measured[0][1],
            exact=exact,
        )

    def _run_pointwise(
        self, recommender: Recommender, dataset: InteractionDataset, protocol: EvalProtocol, name: str
    ) -> EvalResult:
        examples = asked_events(dataset, protocol)
        job = Job(recommender, dataset, examples, protocol, Found.empty(len(examples), 1))
        with _evaluation_mode(recommender):
            self._fill(job, name)
        return pointwise_result(name, dataset, protocol, examples, job.found.scores[:, 0])

    def _fill(self, job: Job, name: str) -> str:
        """Measure all examples of a job; how they were measured."""
        step, measured = choose_step(job)
        rows = self.batch_size
        if callable(getattr(job.recommender, "score_items", None)):
            rows = max(1, min(rows, SCORE_BYTES // (12 * (job.num_items + 1))))  # the scores and two copies
        order = np.argsort(-job.examples.lengths, kind="stable")  # longest first: memory runs out at once or never
        parts = [order[first : first + rows] for first in range(0, len(order), rows)]
        for index in self._shown(ranks().turns(parts), name):
            step(job, self._batch(job, index), index)
        exchange(job.found, parts)
        return measured

    def _measure(self, job: Job, seed: int, name: str) -> tuple[pa.Table, str]:
        measured = self._fill(job, name)
        found, examples = job.found, job.examples
        if job.protocol.mode == "generate" and found.texts is not None and examples.candidates is not None:
            judge(job)
        table = prediction_table(
            job.dataset,
            users=examples.users,
            example_ids=examples.example_ids,
            targets=examples.targets,
            ranks=found.ranks,
            num_ranked=found.num_ranked,
            items=found.items,
            scores=found.scores,
            texts=found.texts,
            seed=seed,
        )
        return table, measured

    def _shown(self, parts: list[np.ndarray], name: str) -> Iterator[np.ndarray]:
        from rich.console import Console
        from rich.progress import track

        console = Console(stderr=True)
        hide = not (self.progress and console.is_terminal and ranks().is_first)
        yield from track(parts, description=f"evaluate {name}", console=console, transient=True, disable=hide)

    def _batch(self, job: Job, index: np.ndarray) -> Any:
        examples = job.examples
        rows = [examples[i] for i in index]
        for row in rows:
            row["targets"] = np.zeros_like(row["targets"])
            if "labels" in row:
                row["labels"] = np.append(row["labels"][:-1], 0)
        own: Callable[[list[dict[str, Any]]], SequenceBatch] | None = getattr(job.recommender, "collate", None)
        batch: dict[str, Any] = dict((own or SequenceCollator(with_seen=True))(rows))
        batch.setdefault("seen", pad_right([row["seen"] for row in rows]))
        if examples.candidates is not None:
            batch.setdefault("candidates", torch.from_numpy(examples.candidates[index]))
        return _to_device(batch, self.device)


def _to_device(value: Any, device: str | torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _to_device(part, device) for name, part in value.items()}
    return value


@contextmanager
def _evaluation_mode(recommender: Any) -> Iterator[None]:
    # Flags are restored one by one: train() on the whole would switch on the dropout of parts that are kept frozen.
    modules = list(recommender.modules()) if isinstance(recommender, torch.nn.Module) else []
    flags = [module.training for module in modules]
    if isinstance(recommender, torch.nn.Module):
        recommender.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag
