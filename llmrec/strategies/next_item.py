"""Next-item prediction: the objective of sequence encoders, dense LLM recommenders and answer-writing LLMs.

At every supervised position the true next item is set against the catalogue (full softmax) or against sampled items
(sampled softmax, BCE of SASRec, gBCE of gSASRec); see `llmrec.blocks.losses`. A batch with `token_labels` belongs to an
LLM that answers in words, and its objective is the cross-entropy of the answer. `mask_history` is our addition: items
already in the history do not compete with the target, as they do not when seen items are removed in evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

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
from llmrec.strategies.base import StepInfo, StepLoss, TrainContext, TrainingStrategy

if TYPE_CHECKING:
    from torch import Tensor, nn

    from llmrec.data.schema import SequenceBatch

Loss = Literal["full_softmax", "sampled_softmax", "bce", "gbce"]


@dataclass
class NextItem(TrainingStrategy):
    """Predict the next item.

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

    loss_name = property(lambda self: self._loss)  # placeholder
