"""SASRec: self-attentive sequential recommendation (ICDM 2018).

A causal Transformer over item and position embeddings; the state after an event is scored against the item table that
also embeds the inputs:

    x_t = dropout(sqrt(d) E[i_t] + P[t]);   blocks of attention and feed-forward;   r_t = h_t . E[j]

The published block ("classic") takes the attention residual from the normalised input and leaves keys and values
unnormalised. `norm` chooses between it, the pre-norm block (our default: deep models stay trainable) and the post-norm
block of later libraries. Departures: batches are right padded, and positions count from the oldest event of the window,
so that padding changes nothing; initial weights are normal with standard deviation 0.02.

Shapes: item_ids [B, L], hidden [B, L, d].
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmrec.blocks.attention import IMPLEMENTATIONS, MultiHeadAttention
from llmrec.blocks.feedforward import ACTIVATIONS, FeedForward
from llmrec.blocks.readout import padding_mask
from llmrec.encoders.base import (
    EncoderOutput,
    SequenceEncoder,
    SequenceEncoderConfig,
    check_history,
    register,
)
from llmrec.errors import RecipeError
from llmrec.paper import Paper

PAPER = Paper(title="Self-Attentive Sequential Recommendation", venue="ICDM 2018", url_id="1808.09781", system="SASRec")
NORMS = ("pre", "classic", "post")


class SASRecConfig(SequenceEncoderConfig):
    """Options of SASRec.

    Args:
        num_layers: Number of blocks.
        num_heads: Attention heads; must divide hidden_size.
        norm: "pre" (x + f(LN x), LN at the end), "classic" (the published block) or "post" (LN(x + f(x)), LN at the
            input, embeddings not scaled by sqrt(d)).
        attention_dropout: Dropout of attention weights; None is `dropout`. 0 is twice as fast on long histories (no
            random number per pair of events).
        inner_size: Width of the feed-forward layer; None is hidden_size, and 4 hidden_size for "post".
        activation: "relu", "gelu" or "silu".
        implementation: Attention by "sdpa", or "math" where second derivatives are needed.
    """

    model_type = "llmrec_sasrec"

    num_layers: int = 2
    num_heads: int = 2
    norm: Literal["pre", "classic", "post"] = "pre"
    attention_dropout: float | None = None
    inner_size: int | None = None
    activation: Literal["relu", "gelu", "silu"] = "relu"
    implementation: Literal["sdpa", "math"] = "sdpa"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name, known in (("norm", NORMS), ("activation", tuple(ACTIVATIONS)), ("implementation", IMPLEMENTATIONS)):
            if getattr(self, name) not in known:
                raise RecipeError(f"encoder.{name}: found {getattr(self, name)!r}, expected one of {', '.join(known)}")
        if self.num_heads < 1 or self.hidden_size % self.num_heads:
            raise RecipeError(
                f"encoder.num_heads: found {self.num_heads}, expected a divisor of hidden_size {self.hidden_size}"
            )


class SASRecBlock(nn.Module):
    """Attention and feed-forward with the residuals and norms of one variant."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        width = config.hidden_size
        inner = config.inner_size or (4 * width if config.norm == "post" else width)
        self.norm = config.norm
        drop = config.dropout if config.attention_dropout is None else config.attention_dropout
        self.attention = MultiHeadAttention(width, config.num_heads, dropout=drop, implementation=config.implementation)
        self.feed_forward = FeedForward(width, inner, activation=config.activation, dropout=config.dropout)
        self.attention_norm = nn.LayerNorm(width)
        self.feed_forward_norm = nn.LayerNorm(width)
        # The published block drops attention weights only; the other two drop the branch as well.
        self.branch_dropout = nn.Dropout(0.0 if config.norm == "classic" else config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, d] -> [B, L, d]."""
        if self.norm == "pre":
            x = x + self.branch_dropout(self.attention(self.attention_norm(x)))
            return x + self.feed_forward(self.feed_forward_norm(x))
        if self.norm == "classic":
            query = self.attention_norm(x)
            x = self.feed_forward_norm(query + self.branch_dropout(self.attention(query, x)))
            return x + self.feed_forward(x)
        x = self.attention_norm(x + self.branch_dropout(self.attention(x)))
        return self.feed_forward_norm(x + self.feed_forward(x))


class SASRecEncoder(SequenceEncoder):
    """Causal Transformer with tied item embeddings and learned positions."""

    config_class = SASRecConfig
    config: SASRecConfig

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__(config)
        self.item_embedding = nn.Embedding(config.num_items + 1, config.hidden_size, padding_idx=0)
        self.position_embedding = nn.Embedding(config.max_history, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(SASRecBlock(config) for _ in range(config.num_layers))
        # One LayerNorm in every variant: of the input for "post", of the output for the others.
        self.outer_norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def forward(
        self, item_ids: Tensor, lengths: Tensor, *, item_embeds: Tensor | None = None, **features: Tensor
    ) -> EncoderOutput:
        """States of a batch; see the base class.

        Raises:
            DataError: The batch is longer than `max_history`.
        """
        check_history(item_ids, self.config.max_history)
        real = padding_mask(lengths, item_ids.shape[1]).unsqueeze(-1)
        hidden = self._embed(item_ids, item_embeds).masked_fill(~real, 0.0)
        for block in self.blocks:
            hidden = block(hidden)
        if self.config.norm != "post":
            hidden = self.outer_norm(hidden)
        # Padding stands right of every real position, so the causal mask alone keeps it out of their states.
        hidden = hidden.masked_fill(~real, 0.0)
        return EncoderOutput(hidden=hidden, user_repr=self.last_state(hidden, lengths))

    def _embed(self, item_ids: Tensor, item_embeds: Tensor | None) -> Tensor:
        items = self.item_embedding(item_ids) if item_embeds is None else item_embeds
        positions = self.position_embedding(torch.arange(item_ids.shape[1], device=item_ids.device))
        if self.config.norm == "post":
            return self.dropout(self.outer_norm(items + positions))
        return self.dropout(items * math.sqrt(self.config.hidden_size) + positions)


register(SASRecConfig, SASRecEncoder)
