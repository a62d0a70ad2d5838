"""HSTU: hierarchical sequential transduction units (Actions Speak Louder than Words, ICML 2024).

A decoder-only stack without softmax and without feed-forward layers. One block, H heads:

    [u | v | q | k] = SiLU(LN(x) W)
    a[h,i,j] = SiLU(q[i,h] . k[j,h] + b[i,j]) / N     for j <= i, 0 otherwise
    y = x + Wo dropout(u * LN(sum_j a[.,i,j] v[j,.]))

LN has no parameters. b is the sum of a table of relative positions and a table of time gaps, one pair per layer, shared
by the heads; the gap runs from event j to the time the state is asked at (`time`: the target's time, as published).
N is `max_history`, a constant. States are L2-normalised and scored by cosine similarity at temperature 0.05. All of
this is the paper's and its released code's; the objective (sampled softmax in the paper) is the recipe's choice.

Departures: the tables are read at the width of the batch, and later events are hidden by a large negative score instead
of a product with 0, which is equal (`blocks.relative_bias`); item vectors start normal, not truncated normal; `time`
"last" and "none" are ours. Not here: candidate masks of M-FALCON, stochastic length, the softmax ablation, and the
production variant of the block.

Shapes: item_ids [B, L], hidden [B, L, d].
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmrec.blocks.relative_bias import HIDDEN, CausalTile, PositionTable, TimeTable, silu_attention
from llmrec.blocks.relative_stack import Projected, RelativeBlock, RelativeStack, StackState
from llmrec.encoders.base import EncoderOutput, SequenceEncoder, TimeAware, TimeAwareConfig, check_history, register
from llmrec.errors import RecipeError
from llmrec.paper import Paper

PAPER = Paper(
    title="Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for Generative Recommendations",
    venue="ICML 2024",
    url_id="2402.17152",
    system="HSTU",
)
NORM_EPS = 1e-6


class HSTUConfig(TimeAwareConfig):
    """Options of HSTU.

    Args:
        num_layers: Number of blocks.
        num_heads: H.
        attention_size: Width of queries and keys per head; None is hidden_size / num_heads.
        value_size: Width of values per head; None is hidden_size / num_heads.
        relative_bias: False leaves out both tables (and with them the need for times).
        concat_gate: The output map reads [u, LN(o), u * LN(o)] instead of the product alone.
    """

    model_type = "llmrec_hstu"

    dropout: float = 0.2
    similarity: Literal["dot", "cosine"] = "cosine"
    temperature: float = 0.05
    num_layers: int = 2
    num_heads: int = 1
    attention_size: int | None = None
    value_size: int | None = None
    relative_bias: bool = True
    concat_gate: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.num_layers < 1:
            raise RecipeError(f"encoder.num_layers: found {self.num_layers}, expected a whole number from 1")
        if self.num_heads < 1 or self.hidden_size % self.num_heads:
            raise RecipeError(
                f"encoder.num_heads: found {self.num_heads}, expected a divisor of hidden_size {self.hidden_size}"
            )
        for name in ("attention_size", "value_size"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise RecipeError(f"encoder.{name}: found {size}, expected a whole number from 1, or null")


class HSTUBlock(RelativeBlock):
    """Projection, biased SiLU attention, gate."""

    def __init__(self, config: HSTUConfig) -> None:
        super().__init__()
        heads, per_head = config.num_heads, config.hidden_size // config.num_heads
        keys, values = heads * (config.attention_size or per_head), heads * (config.value_size or per_head)
        self.num_heads, self.max_history, self.concat_gate = heads, config.max_history, config.concat_gate
        self.widths = (values, values, keys, keys)  # u, v, q, k
        self.projection = nn.Linear(config.hidden_size, sum(self.widths), bias=False)
        self.output = nn.Linear((3 if config.concat_gate else 1) * values, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.position = PositionTable(config.max_history) if config.relative_bias else None
        self.time = TimeTable() if config.relative_bias and config.time != "none" else None

    def project(self, x: Tensor) -> Projected:
        """SiLU on all four parts."""
        mapped = F.silu(self.projection(F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)))
        gate, value, query, key = mapped.split(self.widths, dim=-1)
        return Projected(gate, self._heads(query), self._heads(key), self._heads(value))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, tile: CausalTile) -> Tensor:
        """[B, rows, H d_v]: sum_j a[i, j] v[j]."""
        if self.position is None:
            bias = torch.zeros(tile.future.shape, dtype=query.dtype, device=query.device)
        else:
            bias = self.position(tile)
        bias = bias.masked_fill(tile.future, HIDDEN)
        if self.time is not None:
            bias = self.time(tile) + bias
        # 1/N on the few mixed values instead of on every weight.
        return silu_attention(query, key, value, bias).transpose(1, 2).flatten(2) / self.max_history

    def finish(self, x: Tensor, gate: Tensor, mixed: Tensor) -> Tensor:
        """Norm, gate, output map, residual."""
        normed = F.layer_norm(mixed, mixed.shape[-1:], eps=NORM_EPS)
        gated = gate * normed
        if self.concat_gate:
            gated = torch.cat([gate, normed, gated], dim=-1)
        return x + self.output(self.dropout(gated))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class HSTUEncoder(TimeAware, SequenceEncoder):
    """HSTU blocks over item and position embeddings; the item table is tied.

    Also an `IncrementalEncoder` whose state grows with the history (keys and values of every block), up to
    `max_history` events: one more event costs O(t) instead of O(t^2).
    """

    config_class = HSTUConfig
    config: HSTUConfig

    def __init__(self, config: HSTUConfig) -> None:
        super().__init__(config)
        self.item_embedding = nn.Embedding(config.num_items + 1, config.hidden_size, padding_idx=0)
        self.stack = RelativeStack(
            (HSTUBlock(config) for _ in range(config.num_layers)),
            hidden_size=config.hidden_size,
            max_history=config.max_history,
            dropout=config.dropout,
            time=config.time if config.relative_bias else "none",
        )
        self.post_init()

    @classmethod
    def fields_read(cls, config: HSTUConfig) -> frozenset[str]:  # type: ignore[override]  # its own config
        """No times without the tables that read them."""
        return super().fields_read(config) if config.relative_bias else frozenset()

    def _init_weights(self, module: nn.Module) -> None:
        """Normal projections and tables, Xavier normal positions, Xavier uniform output maps."""
        super()._init_weights(module)
        if isinstance(module, PositionTable | TimeTable):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif module is self.stack.position_embedding:
            nn.init.xavier_normal_(self.stack.position_embedding.weight)
        elif isinstance(module, nn.Linear) and module in [block.output for block in self.stack.blocks]:
            nn.init.xavier_uniform_(module.weight)

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
            timestamps: [B, L] int64 seconds, unless `time` is "none" or `relative_bias` is off.
            target_timestamps: [B] int64 seconds, for `time` "target".
            **features: Further batch fields, not read.

        Raises:
            DataError: The batch is longer than `max_history`.
        """
        check_history(item_ids, self.config.max_history)
        items = self.item_embedding(item_ids) if item_embeds is None else item_embeds
        queries = self.query_times(lengths, timestamps, target_timestamps) if self.config.relative_bias else None
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


register(HSTUConfig, HSTUEncoder)
