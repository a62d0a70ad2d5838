"""Popularity: every user gets the items with the most training events.

The floor any recommender has to clear. Nothing is trained: the counts of the training part are the model. Every user
has the same representation, the number 1, and an item's vector is its count.

Shapes: hidden [B, L, 1], user_repr [B, 1], item_vectors [I+1, 1].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from llmrec.encoders.base import EncoderOutput, SequenceEncoder, SequenceEncoderConfig, register
from llmrec.errors import DataError

if TYPE_CHECKING:
    from typing import Self

    from llmrec.data.schema import DataContext


class PopularityConfig(SequenceEncoderConfig):
    """No options of its own; `hidden_size` is always 1."""

    model_type = "llmrec_popularity"

    hidden_size: int = 1


class PopularityEncoder(SequenceEncoder):
    """Counts as a model."""

    config_class = PopularityConfig
    trainable: ClassVar[bool] = False

    counts: Tensor

    def __init__(self, config: PopularityConfig) -> None:
        super().__init__(config)
        # Whole numbers, so that casting the model to bfloat16 does not turn neighbouring counts into ties.
        self.register_buffer("counts", torch.zeros(config.num_items + 1, dtype=torch.long))
        self.post_init()

    @classmethod
    def from_context(cls, config: SequenceEncoderConfig, context: DataContext) -> Self:
        """A finished model.

        Raises:
            DataError: The counts are not those of `config.num_items` items.
        """
        assert isinstance(config, PopularityConfig)
        if len(context.train_counts) != config.num_items + 1:
            raise DataError(
                "the training counts belong to another catalogue",
                found=f"{len(context.train_counts) - 1} items",
                expected=f"num_items = {config.num_items}",
            )
        model = cls(config)
        model.counts.copy_(torch.from_numpy(context.train_counts))
        return model.eval()

    def forward(
        self, item_ids: Tensor, lengths: Tensor, *, item_embeds: Tensor | None = None, **features: Tensor
    ) -> EncoderOutput:
        """Ones; the history is not looked at."""
        hidden = torch.ones(*item_ids.shape, 1, device=item_ids.device)
        return EncoderOutput(hidden=hidden, user_repr=hidden[:, 0])

    @property
    def gate_dim(self) -> int:
        """1: a router fed by this encoder can only learn one gate for everybody."""
        return 1

    @property
    def device(self) -> torch.device:
        """Where the counts are; there are no parameters to ask."""
        return self.counts.device

    @property
    def dtype(self) -> torch.dtype:
        """Scores are float32 whatever the model was cast to."""
        return torch.float32

    def item_vectors(self) -> Tensor:
        """[I+1, 1] float32 counts."""
        return self.counts.float().unsqueeze(1)

    def score(self, user_repr: Tensor, item_ids: Tensor | None = None) -> Tensor:
        """[..., 1] -> counts [..., I+1], or [..., C] for item_ids [..., C] (or [C])."""
        counts = self.counts.float() if item_ids is None else self.counts[item_ids].float()
        return user_repr * counts


register(PopularityConfig, PopularityEncoder)
