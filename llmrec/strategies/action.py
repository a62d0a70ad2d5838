"""Action prediction: will this user like the item shown? The pointwise (ranking) task of generative recommenders.

Items and actions alternate in one sequence, i1, a1, i2, a2, ...; at each item the logit of its action is learned from
all earlier items and actions [HSTU, section 2.2; the ranking task of the scaling study]:

    loss = mean over events of BCE(sigmoid(w . h(i_t) + b), a_t),    h(i_t) a function of i_1, a_1, ..., a_{t-1}, i_t

The papers predict several actions by multi-task heads; here there is one binary action and a linear head (ours).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llmrec.blocks.readout import padding_mask
from llmrec.errors import DataError, RecipeError
from llmrec.paper import Paper
from llmrec.strategies.base import StepInfo, StepLoss, TrainContext, TrainingStrategy

if TYPE_CHECKING:
    from torch import nn

    from llmrec.data.schema import SequenceBatch

PAPER = Paper(
    title="Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for Generative Recommendations",
    venue="ICML 2024",
    url_id="2402.17152",
    system="HSTU",
)


@dataclass
class Action(TrainingStrategy):
    """Predict the action at each item of a history.

    Args:
        positive_weight: Weight of positive events; other values than 1 shift the predicted rates.
    """

    positive_weight: float = 1.0

    uses: ClassVar[frozenset[str]] = frozenset({"labels"})
    """Batch fields the strategy cannot do without; the examples are then windows with a label at each event."""

    def __post_init__(self) -> None:
        if not self.positive_weight > 0:
            raise RecipeError(
                f"strategy 'action', option 'positive_weight': found {self.positive_weight}, expected a number above 0"
            )

    def prepare(self, context: TrainContext, model: nn.Module, generator: torch.Generator) -> None:
        """Refuse a model without action tokens before training starts.

        Raises:
            RecipeError: It has none.
        """
        if not getattr(getattr(model, "config", None), "action_tokens", False):
            raise RecipeError(
                f"strategy 'action': {type(model).__name__} has no action tokens; set encoder.action_tokens: true"
            )

    def loss(self, model: Any, batch: SequenceBatch, step: StepInfo) -> StepLoss:
        """Binary cross-entropy of the actions.

        Args:
            model: A `SequenceEncoder` with action tokens.
            batch: `labels` [B, L], 1 positive and 0 negative.
            step: Not used; nothing is drawn.

        Raises:
            DataError: The batch has no labels.
        """
        if "labels" not in batch:
            raise DataError("nothing to learn from", found=f"fields {sorted(batch)}", expected="labels")
        output = model.encode_actions(batch)
        asked = asked_places(model, batch)
        logits = model.action_head(output.hidden[asked]).squeeze(-1).float()
        labels = batch["labels"][asked].to(logits)
        if not len(logits):
            return StepLoss(total=output.hidden.sum() * 0.0, count=0)
        weight = torch.full_like(logits, self.positive_weight).where(labels > 0.5, 1.0)
        total = F.binary_cross_entropy_with_logits(logits, labels, weight=weight)
        parts = {"positive_rate": labels.mean(), "predicted_rate": logits.detach().sigmoid().mean()}
        if output.auxiliary is not None:
            parts["auxiliary"] = output.auxiliary.detach()
            total = total + output.auxiliary
        return StepLoss(total=total, parts=parts, count=len(logits))


def asked_places(model: Any, batch: SequenceBatch) -> Tensor:
    """[B, L] bool: events whose action is learned.

    All of them for a causal model; the last one for a model whose other states have seen their own actions
    (`causal = False`) or do not exist (`supervises = "last"`).
    """
    width = batch["item_ids"].shape[1]
    asked = padding_mask(batch["lengths"], width)
    if not getattr(model, "causal", True) or getattr(model, "supervises", "all") == "last":
        return asked & ~padding_mask(batch["lengths"] - 1, width)
    return asked
