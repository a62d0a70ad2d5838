"""Next-item prediction: the objective of sequence encoders, dense LLM recommenders and answer-writing LLMs.

At every supervised position the true next item is set against the catalogue (full softmax) or against sampled items
(sampled softmax; BCE of SASRec; gBCE of gSASRec): see `llmrec.blocks.losses`. A batch with `token_labels` belongs to an
LLM that answers in words; its objective is the cross-entropy of the answer. A generative head has its own objective.
`mask_history` is our addition: items already in the history do not compete with the target, as they do not when seen
items are removed in evaluation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from llmrec.blocks.losses import (
    accidental_hits,
    binary_cross_entropy,
    calibrated_cross_entropy,
    draw_negatives,
    full_softmax,
    gbce_beta,
    mean_scores,
    sampled_softmax,
)
from llmrec.errors import DataError, RecipeError
from llmrec.heads.base import GenerativeHead
from llmrec.strategies.base import StepInfo, StepLoss, TrainContext, TrainingStrategy

if TYPE_CHECKING:
    from torch import nn

    from llmrec.data.schema import SequenceBatch

LossName = Literal["full_softmax", "sampled_softmax", "bce", "gbce"]


class NextItem(TrainingStrategy):
    """Predict the next item.

    Written with its own `__init__` because the option `loss` carries the name of the method every strategy has.

    Args:
        loss: "full_softmax", "sampled_softmax", "bce" or "gbce".
        negatives: K, sampled items per place; not used by full_softmax.
        shared_negatives: One draw of K items for the whole batch instead of K per place.
        gbce_t: Calibration of gBCE, 0 (plain BCE) to 1.
        label_smoothing: For full_softmax.
        mask_history: Items of the history up to a place are neither classes nor negatives there.

    Raises:
        RecipeError: A value is out of range, or two options exclude each other.
    """

    def __init__(
        self,
        loss: LossName = "full_softmax",
        negatives: int = 256,
        shared_negatives: bool = True,
        gbce_t: float = 0.75,
        label_smoothing: float = 0.0,
        mask_history: bool = False,
    ) -> None:
        _check("loss", loss, loss in get_args(LossName), f"one of {', '.join(get_args(LossName))}")
        _check("negatives", negatives, type(negatives) is int and negatives >= 1, "a whole number from 1")
        _check("shared_negatives", shared_negatives, type(shared_negatives) is bool, "true or false")
        _check("gbce_t", gbce_t, _is_number(gbce_t) and 0 <= gbce_t <= 1, "a number from 0 to 1")
        _check(
            "label_smoothing", label_smoothing, _is_number(label_smoothing) and 0 <= label_smoothing < 1, "0 to below 1"
        )
        _check("mask_history", mask_history, type(mask_history) is bool, "true or false")
        if label_smoothing and (mask_history or loss != "full_softmax"):
            raise RecipeError(
                "strategy 'next_item', option 'label_smoothing': found together with "
                f"{'mask_history' if mask_history else f'loss {loss}'}; it spreads mass over the whole catalogue: "
                "use it with loss full_softmax and mask_history false, or leave it at 0"
            )
        self.objective: LossName = loss
        self.negatives, self.shared_negatives, self.gbce_t = negatives, shared_negatives, gbce_t
        self.label_smoothing, self.mask_history = label_smoothing, mask_history
        self._num_items: int | None = None

    def prepare(self, context: TrainContext, model: nn.Module, generator: torch.Generator) -> None:
        """Remember the size of the catalogue negatives are drawn from."""
        self._num_items = context.data.num_items

    def loss(self, model: Any, batch: SequenceBatch, step: StepInfo) -> StepLoss:
        """Loss of a batch: of the answer where there is one, of the next items otherwise.

        Args:
            model: A `DenseScorer`, or an `AnswerModel` for batches with `token_labels`.
            batch: `targets` [B, L] or `token_labels` [B, S]; `negatives` [K] or [B, L, K] replace the draw.
            step: Its generator draws the negatives.

        Raises:
            DataError: The batch carries neither kind of target.
        """
        if isinstance(model, GenerativeHead):
            found = model(batch)
            count = 1 if found.count is None else found.count
            return StepLoss(total=found.loss, parts=dict(found.parts or {}), count=count)
        if "token_labels" in batch:
            # The first token of a sequence is predicted by nothing.
            count = int((batch["token_labels"][:, 1:] != -100).sum())
            return StepLoss(total=model.answer_loss(batch), count=count)
        if callable(getattr(model, "window_loss", None)):
            total, parts, count = model.window_loss(batch)
            return StepLoss(total=total, parts=parts, count=count)
        if "targets" not in batch:
            raise DataError(
                "nothing to learn from", found=f"fields {sorted(batch)}", expected="targets or token_labels"
            )
        hidden, auxiliary, parts = _represent(model, batch)
        rows, places = supervised_places(model, batch)
        count = len(rows)
        if not count:
            return StepLoss(total=hidden.sum() * 0.0, count=0)
        states, targets = hidden[rows, places], batch["targets"][rows, places]
        if self.objective == "full_softmax":
            total, found = self._against_catalogue(model, states, targets, batch["item_ids"], rows, places)
        else:
            negatives = self._negatives_at(model, batch, rows, places, step)
            hits = self._hits(negatives, targets, batch["item_ids"], rows, places)
            total, found = self._against_samples(model, states, targets, negatives, hits)
        if auxiliary is not None:
            total = total + auxiliary
        return StepLoss(total=total, parts=parts | found, count=count)

    def _against_catalogue(
        self, model: Any, states: Tensor, targets: Tensor, item_ids: Tensor, rows: Tensor, places: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        scores = model.score(states)
        excluded = None
        if self.mask_history:
            everything = torch.arange(scores.shape[1], device=scores.device)
            excluded = seen_so_far(item_ids, rows, places, everything)
        total = full_softmax(scores, targets, excluded=excluded, label_smoothing=self.label_smoothing)
        return total, {"perplexity": total.detach().exp()}

    def _hits(self, negatives: Tensor, targets: Tensor, item_ids: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        """[N, K] bool: sampled items that must not count as negatives."""
        if not self.mask_history:
            return accidental_hits(negatives, targets)
        if negatives.dim() == 1:
            return accidental_hits(negatives, targets) | seen_so_far(item_ids, rows, places, negatives)
        return accidental_hits(negatives, targets, _history_at(item_ids, rows, places))

    def _against_samples(
        self, model: Any, states: Tensor, targets: Tensor, negatives: Tensor, hits: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        positive = model.score(states, targets[:, None])[:, 0]
        scores = model.score(states, negatives)
        if self.objective == "sampled_softmax":
            total = sampled_softmax(positive, scores, hits=hits)
        elif self.objective == "bce":
            total = binary_cross_entropy(positive, scores, hits=hits)
        else:
            beta = gbce_beta(negatives.shape[-1], self._catalogue_size(model), self.gbce_t)
            total = calibrated_cross_entropy(positive, scores, beta, hits=hits)
        return total, mean_scores(positive, scores, hits)

    def _negatives_at(self, model: Any, batch: SequenceBatch, rows: Tensor, places: Tensor, step: StepInfo) -> Tensor:
        """[K] or [N, K] item ids."""
        if "negatives" in batch:
            given = batch["negatives"]
            return given if given.dim() == 1 else given[rows, places]
        shape = (self.negatives,) if self.shared_negatives else (len(rows), self.negatives)
        return draw_negatives(self._catalogue_size(model), shape, step.generator, rows.device)

    def _catalogue_size(self, model: Any) -> int:
        found = self._num_items or getattr(getattr(model, "config", None), "num_items", None)
        if not found:
            raise RecipeError(
                f"loss {self.objective}: the size of the catalogue is unknown; call prepare() before the first step, "
                "or use a model whose config carries num_items"
            )
        return int(found)


def _represent(model: Any, batch: SequenceBatch) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """States [B, L, d], the model's own addition to the loss, and scalars for the log."""
    if not hasattr(model, "encode"):
        return model.represent(batch), None, {}
    output = model.encode(batch)
    parts = {name: value.detach() for name, value in (output.parts or {}).items() if value.dim() == 0}
    if output.auxiliary is not None:
        parts["auxiliary"] = output.auxiliary.detach()
    return output.hidden, output.auxiliary, parts


def supervised_places(model: Any, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
    """Rows and positions whose next item is learned: two LongTensors [N].

    A model that is not causal, or that has one state per history (`supervises = "last"`), learns at the last event
    only: its other states have seen their own targets, or do not exist.
    """
    supervised = batch["targets"] > 0
    if not getattr(model, "causal", True) or getattr(model, "supervises", "all") == "last":
        positions = torch.arange(supervised.shape[1], device=supervised.device)
        supervised = supervised & (positions[None, :] == batch["lengths"][:, None] - 1)
    rows, places = supervised.nonzero(as_tuple=True)
    return rows, places


def seen_so_far(item_ids: Tensor, rows: Tensor, places: Tensor, items: Tensor) -> Tensor:
    """Whether items stand in each place's row up to that place.

    Costs O(B L log C) for the first occurrences and one comparison per place and item, whatever the history's length.

    Args:
        item_ids: [B, L], right padded.
        rows, places: [N].
        items: [C], the items asked for; repeats are allowed.

    Returns:
        [N, C] bool.
    """
    known, inverse = items.unique(return_inverse=True)
    index = torch.searchsorted(known, item_ids).clamp_(max=len(known) - 1)
    index = torch.where(known[index] == item_ids, index, len(known))  # what is not asked for goes to a spare column
    width = item_ids.shape[1]
    positions = torch.arange(width, device=item_ids.device).expand_as(item_ids)
    first = positions.new_full((len(item_ids), len(known) + 1), width)
    first = first.scatter_reduce_(1, index, positions, "amin")[:, inverse]
    return first[rows] <= places[:, None]


def _history_at(item_ids: Tensor, rows: Tensor, places: Tensor) -> Tensor:
    """[N, L]: the items of each place's row up to that place, 0 after it."""
    later = torch.arange(item_ids.shape[1], device=item_ids.device)[None, :] > places[:, None]
    return item_ids[rows].masked_fill(later, 0)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check(option: str, found: Any, fine: bool, expected: str) -> None:
    if not fine:
        raise RecipeError(f"strategy 'next_item', option {option!r}: found {found!r}, expected {expected}")
