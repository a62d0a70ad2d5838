"""BERT4Rec: bidirectional Transformer over event sequences (CIKM 2019).

Every place sees all others. A [mask] vector stands where an item is asked for, and the state there is scored:

    x_t = dropout(LN(E[i_t] + P[t]));   x <- LN(x + attention(x));   x <- LN(x + FFN(x)), FFN = 4d, GELU
    h = LN(GELU(W x));   r_t = h_t . E[j] + b_j

Training is the cloze task (`llmrec.strategies.cloze`): some items are masked and only their places are supervised. A
recommendation appends [mask] to the history and reads there. The mask is a vector of its own, not a row of the item
table, so it has no score and cannot be recommended.

Departures (ours): positions count backwards from the latest place, so the asked place has the same position vector
whatever the length of a history; attention weights are not dropped. Under `next_item` only the last event of a row is
supervised, because the other states have seen their own targets: windows of training data then give one target each.

State i of `forward` stands at event i + 1, the one it predicts; the last one at the appended [mask]. The states are
not causal, and per-position gates are refused. A new event means a new pass over the history.

Shapes: item_ids [B, L], hidden [B, L, d].
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmrec.blocks.attention import IMPLEMENTATIONS, MultiHeadAttention
from llmrec.blocks.feedforward import FeedForward
from llmrec.blocks.readout import padding_mask
from llmrec.encoders.base import EncoderOutput, SequenceEncoder, SequenceEncoderConfig, check_history, register
from llmrec.errors import RecipeError
from llmrec.paper import Paper

PAPER = Paper(
    title="BERT4Rec: Sequential Recommendation with Bidirectional Encoder Representations from Transformer",
    venue="CIKM 2019",
    url_id="1904.06690",
    system="BERT4Rec",
)


class BERT4RecConfig(SequenceEncoderConfig):
    """Options of BERT4Rec.

    Args:
        num_layers: Number of blocks.
        num_heads: Attention heads; must divide hidden_size.
        inner_size: Width of the feed-forward layer; None is 4 hidden_size.
        implementation: Attention by "sdpa", or "math" where second derivatives are needed.
    """

    model_type = "llmrec_bert4rec"

    num_layers: int = 2
    num_heads: int = 2
    inner_size: int | None = None
    implementation: Literal["sdpa", "math"] = "sdpa"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.implementation not in IMPLEMENTATIONS:
            raise RecipeError(
                f"encoder.implementation: found {self.implementation!r}, expected one of {', '.join(IMPLEMENTATIONS)}"
            )
        if self.num_heads < 1 or self.hidden_size % self.num_heads:
            raise RecipeError(
                f"encoder.num_heads: found {self.num_heads}, expected a divisor of hidden_size {self.hidden_size}"
            )


class BERT4RecBlock(nn.Module):
    """Attention and feed-forward, each LN(x + f(x))."""

    def __init__(self, config: BERT4RecConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.attention = MultiHeadAttention(width, config.num_heads, causal=False, implementation=config.implementation)
        self.feed_forward = FeedForward(
            width, config.inner_size or 4 * width, activation="gelu", dropout=config.dropout
        )
        self.attention_norm = nn.LayerNorm(width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """[B, N, d], [B, N] bool -> [B, N, d]."""
        x = self.attention_norm(x + self.dropout(self.attention(x, key_mask=real)))
        x = self.feed_forward_norm(x + self.feed_forward(x))
        return x


class BERT4RecEncoder(SequenceEncoder):
    """Bidirectional Transformer that is asked at a [mask]; tied item embeddings and an item bias."""

    config_class = BERT4RecConfig
    config: BERT4RecConfig
    causal: ClassVar[bool] = False

    def __init__(self, config: BERT4RecConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.item_embedding = nn.Embedding(config.num_items + 1, width, padding_idx=0)
        self.mask_embedding = nn.Parameter(torch.zeros(width))
        self.item_bias = nn.Parameter(torch.zeros(config.num_items + 1))
        # One place more than events: the appended [mask].
        self.position_embedding = nn.Embedding(config.max_history + 1, width)
        self.input_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(BERT4RecBlock(config) for _ in range(config.num_layers))
        self.transform = nn.Linear(width, width)
        self.output_norm = nn.LayerNorm(width)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """As the base class; the [mask] vector like an item, the item bias zero."""
        super()._init_weights(module)
        if module is self:
            nn.init.normal_(self.mask_embedding, std=self.config.initializer_range)
            nn.init.zeros_(self.item_bias)

    def forward(
        self,
        item_ids: Tensor,
        lengths: Tensor,
        *,
        item_embeds: Tensor | None = None,
        masked: Tensor | None = None,
        **features: Tensor,
    ) -> EncoderOutput:
        """States of a batch.

        Args:
            item_ids: [B, L] right padded with 0, L at most `max_history`, or one more with `masked`.
            lengths: [B].
            item_embeds: [B, L, d] used instead of the item table.
            masked: [B, L] bool, the cloze form: items to hide. Nothing is appended, and state i stands at event i.
                Without it [mask] is appended, and state i stands at event i + 1.
            **features: Not read.

        Raises:
            DataError: The batch is too long.
        """
        items = self.item_embedding(item_ids) if item_embeds is None else item_embeds
        if masked is not None:
            check_history(item_ids, self.config.max_history + 1)
            hidden = self._states(items, lengths, masked)
        else:
            check_history(item_ids, self.config.max_history)
            places = torch.arange(item_ids.shape[1] + 1, device=lengths.device)
            asked = places[None, :] == lengths[:, None]
            hidden = self._states(F.pad(items, (0, 0, 0, 1)), lengths + 1, asked)[:, 1:]
        return EncoderOutput(hidden=hidden, user_repr=self.last_state(hidden, lengths))

    def cloze(self, item_ids: Tensor, lengths: Tensor, masked: Tensor) -> EncoderOutput:
        """States at the events themselves, those at `masked` [B, L] not knowing their item; for `strategies.cloze`."""
        output: EncoderOutput = self(item_ids=item_ids, lengths=lengths, masked=masked)
        return output

    def _states(self, items: Tensor, lengths: Tensor, masked: Tensor) -> Tensor:
        """[B, N, d] item vectors -> [B, N, d] states, zero at padding."""
        width = items.shape[1]
        real = padding_mask(lengths, width)
        age = (lengths[:, None] - 1 - torch.arange(width, device=lengths.device)).clamp(min=0)
        items = torch.where(masked[..., None], self.mask_embedding, items)
        hidden = self.dropout(self.input_norm(items + self.position_embedding(age)))
        for block in self.blocks:
            hidden = block(hidden, real)
        hidden = self.output_norm(F.gelu(self.transform(hidden)))
        return hidden.masked_fill(~real.unsqueeze(-1), 0.0)

    def score(self, user_repr: Tensor, item_ids: Tensor | None = None) -> Tensor:
        """As the base class, plus the bias of each item."""
        bias = self.item_bias if item_ids is None else self.item_bias[item_ids]
        return super().score(user_repr, item_ids) + bias


register(BERT4RecConfig, BERT4RecEncoder)
