"""The steps of a measurement: exact ranks over the catalogue, candidate scores, lists, answers, logits of actions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llmrec.errors import DataError
from llmrec.evaluation.found import Found, list_ranks
from llmrec.evaluation.protocol import EvalProtocol
from llmrec.evaluation.ranking import rank_by_count, rank_of_column, top_k
from llmrec.evaluation.results import ANSWERS, EXACT_RANKS, LOGITS
from llmrec.evaluation.text_answers import judge_answers

if TYPE_CHECKING:
    from llmrec.data.dataset import InteractionDataset
    from llmrec.data.sequences import SequenceExamples


@dataclass
class Job:
    """One system under one draw of candidates."""

    recommender: Any
    dataset: InteractionDataset
    examples: SequenceExamples
    protocol: EvalProtocol
    found: Found

    @property
    def num_items(self) -> int:
        """I."""
        return self.dataset.num_items


Step = Callable[[Job, Any, np.ndarray], None]


def choose_step(job: Job) -> tuple[Step, str]:
    """How a system is measured, from what it can do: the step and its name ("exact ranks", "top-20 lists", ...)."""
    if job.protocol.mode == "pointwise":
        return _action_step, LOGITS
    scores_items = callable(getattr(job.recommender, "score_items", None))
    if job.protocol.mode == "generate":
        return _answer_step, ANSWERS
    if job.protocol.num_candidates is None:
        if scores_items:
            return _catalogue_step, EXACT_RANKS
    elif scores_items or callable(getattr(job.recommender, "score_candidates", None)):
        return _candidate_step, EXACT_RANKS
    return _list_step, f"top-{max(job.protocol.cuts)} lists"


def _catalogue_step(job: Job, batch: Any, index: np.ndarray) -> None:
    scores, found = job.recommender.score_items(batch), job.found
    _expect_shape(scores, (len(index), job.num_items + 1), "score_items")
    targets = torch.from_numpy(job.examples.targets[index]).to(scores.device)
    seen = batch["seen"].to(scores.device) if job.protocol.remove_seen else None
    found.ranks[index] = rank_by_count(scores, targets, seen).cpu().numpy()
    found.num_ranked[index] = job.num_items - _removed(job, index)
    items, best = top_k(scores, found.items.shape[1], seen, keep=targets)
    found.items[index], found.scores[index] = items.cpu().numpy(), best.cpu().numpy()


def _candidate_step(job: Job, batch: Any, index: np.ndarray) -> None:
    pool, found = batch["candidates"], job.found
    if callable(getattr(job.recommender, "score_candidates", None)):
        scores = job.recommender.score_candidates(batch).float()
    else:
        scores = job.recommender.score_items(batch).float().gather(1, pool)
    _expect_shape(scores, tuple(pool.shape), "score_candidates")
    pool = pool.to(scores.device)
    is_target = pool == torch.from_numpy(job.examples.targets[index]).to(scores.device)[:, None]
    if bool((is_target.sum(dim=1) != 1).any()):
        raise DataError("the batch's candidates no longer hold each target once", remedy="mend the system's `collate`")
    column = is_target.long().argmax(dim=1)
    found.ranks[index] = rank_of_column(scores, column, pool > 0).cpu().numpy()
    found.num_ranked[index] = (pool > 0).sum(dim=1).cpu().numpy()
    scores = scores.masked_fill(pool == 0, float("-inf"))
    order = scores.argsort(dim=1, descending=True, stable=True)[:, : found.items.shape[1]]
    found.items[index, : order.shape[1]] = pool.gather(1, order).cpu().numpy()
    found.scores[index, : order.shape[1]] = scores.gather(1, order).cpu().numpy()


def _list_step(job: Job, batch: Any, index: np.ndarray) -> None:
    found = job.found
    ranking = job.recommender.recommend(_allowed(batch, job.protocol), k=found.items.shape[1])
    items, scores = _listed(ranking, len(index), found.items.shape[1])
    found.items[index, : items.shape[1]] = items
    found.scores[index, : items.shape[1]] = scores
    found.ranks[index] = list_ranks(items, job.examples.targets[index])
    found.num_ranked[index] = (items > 0).sum(axis=1)
    if ranking.texts is not None:
        _keep_texts(job, ranking.texts, index)


def _answer_step(job: Job, batch: Any, index: np.ndarray) -> None:
    _list_step(job, batch, index)  # the cuts of mode "generate" are (1,), so the list has one place


def _action_step(job: Job, batch: Any, index: np.ndarray) -> None:
    score_actions = getattr(job.recommender, "score_actions", None)
    if not callable(score_actions):
        raise DataError(
            f"{type(job.recommender).__name__} gives no logits of actions",
            expected="score_actions(batch) -> [B, L]",
            remedy="train an encoder with action_tokens by the strategy 'action'",
        )
    logits = score_actions(batch).float()
    _expect_shape(logits, tuple(batch["item_ids"].shape), "score_actions")
    asked = logits.gather(1, batch["lengths"].to(logits.device)[:, None] - 1)[:, 0]
    if bool(asked.isnan().any()):
        raise DataError("the model's logits hold NaN", remedy="look for a diverged training run (loss NaN)")
    job.found.scores[index, 0] = asked.cpu().numpy()


def _keep_texts(job: Job, texts: list[str], index: np.ndarray) -> None:
    if len(texts) != len(index):
        raise DataError("recommend must return one text per row", found=len(texts), expected=str(len(index)))
    if job.found.texts is None:
        job.found.texts = [""] * len(job.examples)
    for row, text in zip(index, texts, strict=True):
        job.found.texts[row] = text


def judge(job: Job) -> None:
    """Texts over candidates are read by one rule for every system, whatever the system made of them itself."""
    found, examples = job.found, job.examples
    assert found.texts is not None and examples.candidates is not None
    judged = judge_answers(found.texts, examples.candidates, examples.targets, job.dataset.item_titles)
    found.items[:, 0], found.num_ranked[:] = judged.items, judged.valid
    found.ranks[:] = np.where(judged.correct, 1.0, np.nan)
    found.exact = judged.exact


def _removed(job: Job, index: np.ndarray) -> np.ndarray:
    """[n] number of seen items that do not compete; the target always does."""
    if not job.protocol.remove_seen:
        return np.zeros(len(index), dtype=np.int64)
    examples = job.examples
    spans = zip(examples.first[index], examples.end[index], examples.targets[index], strict=True)
    return np.array([len(set(examples.items[first:end].tolist()) - {int(target)}) for first, end, target in spans])


def _allowed(batch: Any, protocol: EvalProtocol) -> Any:
    # `recommend` never lists seen items; where the protocol keeps them, or names the candidates, it gets no such list.
    if protocol.num_candidates is None and protocol.remove_seen:
        return batch
    return {name: value for name, value in batch.items() if name != "seen"}


def _listed(ranking: Any, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    _expect_shape(ranking.item_ids, (rows, None), "recommend")
    items = torch.where(ranking.valid, ranking.item_ids, 0)[:, :length].cpu().numpy()
    return items, ranking.scores[:, :length].float().cpu().numpy()


def _expect_shape(values: Tensor, shape: tuple[int | None, ...], name: str) -> None:
    if values.ndim != len(shape) or any(b is not None and a != b for a, b in zip(values.shape, shape, strict=True)):
        raise DataError(f"{name} returned a wrong shape", found=str(tuple(values.shape)), expected=str(shape))
