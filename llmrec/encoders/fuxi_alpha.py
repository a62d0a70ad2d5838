"""FuXi-alpha: feature interaction enhanced Transformer (WWW 2025).

Position and time are no longer added to the semantic scores, as in HSTU, but have attention maps of their own, and the
feed-forward network comes back in two gated stages. One block, H heads:

    [u | v | q | k] = SiLU(RMSNorm(x) W)                    u is as wide as all channels together
    A_p[i,j] = w_pos[j - i + N - 1]        A_t[i,j] = w_ts[bucket(query time of i - time of j)]
    A_s[h,i,j] = SiLU(q[i,h] . k[j,h]) / N                  all three for j <= i, 0 otherwise
    o = per head [A_p v | A_t v | A_s v]                    g = u * RMSNorm(o), over all heads and channels
    y = MFFN(g, x)                                          `blocks.multi_stage`

A_p and A_t are used raw: no activation, no division by N. RMSNorm has no parameters. Each block owns its tables. States
are L2-normalised and scored by cosine similarity at temperature 0.05. All of this is the paper's and its released
code's; the objective (sampled softmax in the paper) is the recipe's choice.

Departures: feed-forward maps start normal, not Xavier (`feed_forward_init`); N is `max_history` and tables are read at
the width of the batch (`blocks.relative_bias`); item vectors start normal, not truncated normal; `time` "last" and
"none" are ours, and "none" leaves the time channel out, so that u and W0 are as wide as two channels.

Shapes: item_ids [B, L], hidden [B, L, d].
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmrec.blocks.multi_stage import MultiStageFeedForward
from llmrec.blocks.relative_bias import HIDDEN, CausalTile, PositionTable, TimeTable, silu_attention
from llmrec.blocks.relative_stack import Projected, RelativeBlock, RelativeStack, StackState
from llmrec.encoders.base import EncoderOutput, SequenceEncoder, TimeAware, TimeAwareConfig, check_history, register
from llmrec.errors import RecipeError
from llmrec.paper import Paper

PAPER = Paper(
    title="FuXi-alpha: Scaling Recommendation Model with Feature Interaction Enhanced Transformer",
    venue="WWW 2025",
    url_id="2502.03036",
    system="FuXi-alpha",
)
NORM_EPS = 1e-6


class FuXiAlphaConfig(TimeAwareConfig):
    """Options of FuXi-alpha.

    Args:
        num_layers: Number of blocks.
        num_heads: H.
        attention_size: Width of queries and keys per head; None is hidden_size / num_heads.
        value_size: Width of values per head; None is hidden_size / num_heads.
        multiplier: m, the second stage of the feed-forward network works at width m d.
        two_stages: False leaves out that second stage.
        feed_forward_init: Starting values of W0..W3. "normal" with initializer_range, as FuXi-Linear's release (ours
            here): the item vectors start small, and the residual stream carries them from the first step on. "xavier"
            is the published start: the transformed part then outweighs the item vectors, and learning begins hundreds
            of steps later.
    """

    model_type = "llmrec_fuxi_alpha"

    dropout: float = 0.2
    similarity: Literal["dot", "cosine"] = "cosine"
    temperature: float = 0.05
    num_layers: int = 2
    num_heads: int = 1
    attention_size: int | None = None
    value_size: int | None = None
    multiplier: int = 1
    two_stages: bool = True
    feed_forward_init: Literal["normal", "xavier"] = "normal"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.feed_forward_init not in ("normal", "xavier"):
            raise RecipeError(f"encoder.feed_forward_init: found {self.feed_forward_init!r}, expected normal or xavier")
        for name in ("num_layers", "multiplier"):
            if getattr(self, name) < 1:
                raise RecipeError(f"encoder.{name}: found {getattr(self, name)}, expected a whole number from 1")
        if self.num_heads < 1 or self.hidden_size % self.num_heads:
            raise RecipeError(
                f"encoder.num_heads: found {self.num_heads}, expected a divisor of hidden_size {self.hidden_size}"
            )
        for name in ("attention_size", "value_size"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise RecipeError(f"encoder.{name}: found {size}, expected a whole number from 1, or null")


class FuXiAlphaBlock(RelativeBlock):
    """Multi-channel attention and multi-stage feed-forward."""

    def __init__(self, config: FuXiAlphaConfig) -> None:
        super().__init__()
        heads, per_head = config.num_heads, config.hidden_size // config.num_heads
        keys, values = heads * (config.attention_size or per_head), heads * (config.value_size or per_head)
        self.num_heads, self.max_history = heads, config.max_history
        self.position = PositionTable(config.max_history)
        self.time = TimeTable() if config.time != "none" else None
        inner = (2 if self.time is None else 3) * values
        self.widths = (inner, values, keys, keys)  # u, v, q, k
        self.projection = nn.Linear(config.hidden_size, sum(self.widths), bias=False)
        self.feed_forward = MultiStageFeedForward(
            inner,
            config.hidden_size,
            multiplier=config.multiplier,
            dropout=config.dropout,
            bias=True,
            two_stages=config.two_stages,
        )

    def project(self, x: Tensor) -> Projected:
        """SiLU on all four parts."""
        mapped = F.silu(self.projection(F.rms_norm(x, x.shape[-1:], eps=NORM_EPS)))
        gate, value, query, key = mapped.split(self.widths, dim=-1)
        return Projected(gate, self._heads(query), self._heads(key), self._heads(value))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, tile: CausalTile) -> Tensor:
        """[B, rows, channels H d_v], head by head [position | time | semantic]."""
        # The maps of position and time are shared by the heads: one product for the values of all heads.
        flat = value.transpose(1, 2).flatten(2)  # [B, keys, H d_v]
        maps = [self.position(tile).masked_fill(tile.future, 0.0).to(flat.dtype)]
        if self.time is not None:
            maps.append(self.time(tile).to(flat.dtype))
        channels = [(weights @ flat).unflatten(-1, (self.num_heads, -1)) for weights in maps]
        hidden = torch.zeros(tile.future.shape, device=query.device).masked_fill_(tile.future, HIDDEN)
        semantic = silu_attention(query, key, value, hidden).transpose(1, 2) / self.max_history
        return torch.stack([*channels, semantic], dim=3).flatten(2)

    def finish(self, x: Tensor, gate: Tensor, mixed: Tensor) -> Tensor:
        """Norm over all channels, gate, feed-forward with its residuals."""
        finished: Tensor = self.feed_forward(gate * F.rms_norm(mixed, mixed.shape[-1:], eps=NORM_EPS), x)
        return finished

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class FuXiAlphaEncoder(TimeAware, SequenceEncoder):
    """FuXi-alpha blocks over item and position embeddings; the item table is tied.

    Also an `IncrementalEncoder` whose state grows with the history (keys and values of every block), up to
    `max_history` events: one more event costs O(t) instead of O(t^2).
    """

    config_class = FuXiAlphaConfig
    config: FuXiAlphaConfig

    def __init__(self, config: FuXiAlphaConfig) -> None:
        super().__init__(config)
        self.item_embedding = nn.Embedding(config.num_items + 1, config.hidden_size, padding_idx=0)
        self.stack = RelativeStack(
            (FuXiAlphaBlock(config) for _ in range(config.num_layers)),
            hidden_size=config.hidden_size,
            max_history=config.max_history,
            dropout=config.dropout,
            time=config.time,
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Normal projections and tables, Xavier normal positions; feed-forward maps as the option says."""
        super()._init_weights(module)
        if isinstance(module, PositionTable | TimeTable):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif module is self.stack.position_embedding:
            nn.init.xavier_normal_(self.stack.position_embedding.weight)
        elif self.config.feed_forward_init == "xavier" and isinstance(module, nn.Linear):
            if module in self._feed_forward_maps():
                nn.init.xavier_uniform_(module.weight)

    def _feed_forward_maps(self) -> list[nn.Module]:
        """W0..W3 of every block."""
        parts = [part for part in self.stack.modules() if isinstance(part, MultiStageFeedForward)]
        return [layer for part in parts for layer in part.children()]

    def forward(
        self,
        item_ids: Tensor,
        lengths: Tensor,
        *,
        item_embeds: Tensor | None = None,
        timestamps: Tensor | None = None,
        target_timestamps: Tensor | None = None,
        **features: Tensor,
    ) -> EncoderOutput:
        """States of a batch; see the base class.

        Args:
            item_ids: [B, L] right padded with 0.
            lengths: [B].
            item_embeds: [B, L, d] used instead of the item table.
            timestamps: [B, L] int64 seconds, unless `time` is "none".
            target_timestamps: [B] int64 seconds, for `time` "target".
            **features: Further batch fields, not read.

        Raises:
            DataError: The batch is longer than `max_history`.
        """
        check_history(item_ids, self.config.max_history)
        items = self.item_embedding(item_ids) if item_embeds is None else item_embeds
        queries = self.query_times(lengths, timestamps, target_timestamps)
        hidden = self._readout(self.stack(items, lengths, queries, timestamps))
        return EncoderOutput(hidden=hidden, user_repr=self.last_state(hidden, lengths))

    def init_state(self, batch_size: int) -> StackState:
        """An empty state for `batch_size` users."""
        return self.stack.init_state(batch_size)

    def step(self, state: StackState, item_ids: Tensor, timestamps: Tensor | None = None) -> StackState:
        """The state after one more event per user.

        Args:
            state: The state before; it stays valid.
            item_ids: [B], no padding.
            timestamps: [B] int64 seconds, with a time channel.

        Raises:
            ValueError: The state is full, belongs to another number of users, or a time is missing.
        """
        return self.stack.step(state, self.item_embedding(item_ids), timestamps)

    def read(self, state: StackState, target_timestamps: Tensor | None = None) -> Tensor:
        """[B, d]: `user_repr` of the history so far, asked at `target_timestamps` [B] for `time` "target".

        Raises:
            ValueError: There is no event yet, or the time is missing.
        """
        return self._readout(self.stack.read(state, target_timestamps))

    def _readout(self, hidden: Tensor) -> Tensor:
        """Unit rows for cosine similarity (rows below 1e-6 are left shorter, padding is 0)."""
        return F.normalize(hidden, dim=-1, eps=NORM_EPS) if self.config.similarity == "cosine" else hidden


register(FuXiAlphaConfig, FuXiAlphaEncoder)
