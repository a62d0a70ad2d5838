"""Cloze: fill in masked events of a sequence, the objective of BERT4Rec (CIKM 2019).

Every training row is the whole sequence of its window: the input events and the target behind the last one. A share of
its events is masked, the model fills them in from both sides, and the loss counts the masked places only. Since a
recommendation asks behind the last event, a share of the rows masks its last event alone.

Paper: masking each event with probability p, and additional rows with only the last event masked (one in eleven in
its release). Ours: masks are drawn anew in every step instead of beforehand; rows with only the last event masked are
first cut behind an event drawn at random, so that every event is asked for in the form of a recommendation and not the
last one of each window only; a row where chance picks nothing masks its last event; the first event of a window is
context, so that events are masked exactly where `next_item` would supervise them.

How a masked place is learned (full or sampled softmax, BCE, gBCE, with or without the history) is `NextItem`'s; its
`targets` are thinned to the masked places and its states are those of the cloze form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmrec.errors import RecipeError
from llmrec.paper import Paper
from llmrec.strategies.base import TrainingStrategy
from llmrec.strategies.next_item import LossName, NextItem

if TYPE_CHECKING:
    from torch import nn

    from llmrec.data.schema import SequenceBatch
    from llmrec.encoders.base import EncoderOutput
    from llmrec.strategies.base import StepInfo, StepLoss, TrainContext

PAPER = Paper(
    title="BERT4Rec: Sequential Recommendation with Bidirectional Encoder Representations from Transformer",
    venue="CIKM 2019",
    url_id="1904.06690",
    system="BERT4Rec",
)


class Cloze(NextItem, TrainingStrategy):  # the second base again, because discovery reads it without importing
    """Fill in masked events.

    Args:
        mask_probability: p, chance of each supervised event to be masked; 0.2 is the paper's for MovieLens, up to 0.6
            for short histories.
        last_only: Share of rows that are cut behind a random event and mask that event alone.
        loss: As in `NextItem`, like all options below.
        negatives: K, sampled items per place; not used by full_softmax.
        shared_negatives: One draw of K items for the whole batch instead of K per place.
        gbce_t: Calibration of gBCE, 0 (plain BCE) to 1.
        label_smoothing: For full_softmax.
        mask_history: Items before a place are neither classes nor negatives there.

    Raises:
        RecipeError: A value is out of range, or two options exclude each other.
    """

    def __init__(
        self,
        mask_probability: float = 0.2,
        last_only: float = 0.1,
        loss: LossName = "full_softmax",
        negatives: int = 256,
        shared_negatives: bool = True,
        gbce_t: float = 0.75,
        label_smoothing: float = 0.0,
        mask_history: bool = False,
    ) -> None:
        super().__init__(loss, negatives, shared_negatives, gbce_t, label_smoothing, mask_history)
        for option, share in (("mask_probability", mask_probability), ("last_only", last_only)):
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
                raise RecipeError(
                    f"strategy 'cloze', option {option!r}: found {share!r}, expected a number from 0 to 1"
                )
        self.mask_probability, self.last_only = mask_probability, last_only

    def prepare(self, context: TrainContext, model: nn.Module, generator: torch.Generator) -> None:
        """Refuse a model that cannot fill in; remember the size of the catalogue."""
        _check_model(model)
        super().prepare(context, model, generator)

    def loss(self, model: Any, batch: SequenceBatch, step: StepInfo) -> StepLoss:
        """Loss at the masked places of a batch.

        Args:
            model: A scorer with `cloze(item_ids, lengths, masked)`, such as BERT4Rec.
            batch: With `targets` [B, L]; an event is masked only where it is a target (not 0). `negatives` as in
                `NextItem`.
            step: Its generator draws the masks, then the negatives.

        Raises:
            RecipeError: The model cannot fill in masked events.
        """
        _check_model(model)
        if "targets" not in batch:
            return super().loss(model, batch, step)  # which says what is missing
        chosen, ends = self.choose(batch, step.generator)
        thinned: SequenceBatch = {**batch, "targets": batch["targets"] * chosen}
        return super().loss(_FillingIn(model, batch["targets"], chosen, ends), thinned, step)

    def choose(self, batch: SequenceBatch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """What is masked, and what is cut off.

        The draws belong to examples, not to places in the batch: neither the order of rows nor padding changes them.

        Returns:
            [B, L] bool, where the next event is masked: at least one place in every row that has targets. And [B], how
            many positions of the row are used; the next event of the last of them is part of the sequence.
        """
        supervised, lengths = batch["targets"] > 0, batch["lengths"]
        examples = batch.get("example_ids")
        rows = torch.arange(len(lengths), device=lengths.device)
        order = rows if examples is None else examples.argsort(stable=True)
        ordered = supervised[order]
        count = ordered.sum(1)
        draws = torch.rand(2 * len(rows) + int(count.sum()), generator=generator, device=generator.device)
        kind, cut, each = draws.to(lengths.device).split([len(rows), len(rows), len(draws) - 2 * len(rows)])
        alone = kind < self.last_only
        picked = torch.zeros_like(ordered)
        picked[ordered] = each < self.mask_probability
        picked &= ~alone[:, None]
        # The place asked for where a row has no other: a random one if the row is cut, else its last.
        number = torch.where(alone, (cut * count).long() + 1, count).minimum(count)  # the product may round up
        asked = ordered & (ordered.cumsum(1) == number[:, None])
        picked |= asked & ~picked.any(1, keepdim=True)
        ends = torch.where(alone & (count > 0), asked.int().argmax(1) + 1, lengths[order])
        back = order.argsort()
        return picked[back], ends[back]


class _FillingIn:
    """A model as `NextItem` wants it: state i predicts event i + 1, here from the events on both sides of it."""

    causal = True  # a masked place has not seen its own target
    supervises = "all"

    def __init__(self, model: Any, targets: Tensor, chosen: Tensor, ends: Tensor) -> None:
        self.model, self.targets, self.chosen, self.ends = model, targets, chosen, ends
        self.score, self.config = model.score, getattr(model, "config", None)

    def encode(self, batch: SequenceBatch) -> EncoderOutput:
        """States at events 1, 2, ... of the whole sequence, the masked ones hidden."""
        end = self.ends[:, None]
        last = self.targets.gather(1, end - 1)
        places = torch.arange(batch["item_ids"].shape[1] + 1, device=end.device)
        events = F.pad(batch["item_ids"], (0, 1)).masked_fill(places > end, 0).scatter(1, end, last)
        lengths = self.ends + (last[:, 0] > 0)
        output: EncoderOutput = self.model.cloze(events, lengths, F.pad(self.chosen, (1, 0)))
        output.hidden = output.hidden[:, 1:]
        return output


def _check_model(model: Any) -> None:
    if not callable(getattr(model, "cloze", None)):
        raise RecipeError(
            f"strategy 'cloze': found {type(model).__name__}, expected an encoder that fills in masked events, such as "
            "bert4rec; use strategy next_item"
        )
