"""BlossomRec: block-level fused sparse attention for sequential recommendation (WWW 2026).

A Transformer over item embeddings whose attention is two sparse patterns with shared queries, keys and values:

    long (LTIS):  softmax attention over the events of the n past blocks with the best summaries, and the own block
    short (STIS): softmax attention over the last `window` events and those 2^m steps back
    [g1, g2] = sigmoid(x Wg + bg) per head and event;    attention = Wo (g1 long + g2 short)

Keys are rotated by position (RoPE); there is no position table. A block's summary is an MLP over the keys of the block
and of the one before it, plus learned positions inside; query heads that share a key head share the selection. From
the paper and its release: all of this, the post-norm layer with a second linear map after attention, the
inner width of 2 d, gates that start at 1/2.

Departures, all ours:
- In the release no gradient reaches the summaries, so blocks are chosen by a random projection (`selection: literal`).
  By default a straight-through gate trains them; see `blocks.sparse_attention.select_blocks`.
- Histories of any length work: shorter than a block they leave nothing to select, and attention is causal in the block.
- The release's "sink" column is its last position, which causality hides; `sink: true` shows the first event instead.
- `norm: pre` is offered beside the published post-norm.
- Defaults fit d = 64: heads of width 16 as in the paper (there 8 over d = 128, here 4), its two key heads.

Shapes: item_ids [B, L], hidden [B, L, d]; H query heads, Hk key heads, G = H / Hk, d_h = d / H.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmrec.blocks.feedforward import FeedForward
from llmrec.blocks.readout import padding_mask
from llmrec.blocks.sparse_attention import Selection, SparsePattern, attend_dense, attend_gather, select_blocks
from llmrec.encoders.base import EncoderOutput, SequenceEncoder, SequenceEncoderConfig, check_history, register
from llmrec.errors import RecipeError
from llmrec.paper import Paper

PAPER = Paper(
    title="BlossomRec: Block-level Fused Sparse Attention Mechanism for Sequential Recommendations",
    venue="WWW 2026",
    url_id="2512.13368",
    system="BlossomRec",
)
CHOICES = {
    "selection": ("straight_through", "literal"),
    "norm": ("post", "pre"),
    "implementation": ("auto", "dense", "gather"),
}
POSITIVE = ("num_layers", "num_heads", "num_kv_heads", "block_size", "selected_blocks", "window")


class BlossomRecConfig(SequenceEncoderConfig):
    """Options of BlossomRec.

    Args:
        num_layers: Number of layers.
        num_heads: H; must divide hidden_size into even widths.
        num_kv_heads: Hk, heads of keys and values; must divide num_heads.
        inner_size: Width of the feed-forward layer; None is 2 hidden_size.
        norm: "post" (published) or "pre" (ours).
        block_size: Events per selectable block; a summary reads twice as many.
        selected_blocks: n, past blocks a query may read besides its own.
        summary_size: Inner width of the MLP that summarises a block; None is its input width 2 block_size d_h.
        window: Latest events the short-term pattern sees.
        sink: The short-term pattern also sees the first event.
        selection: "straight_through" (trained, ours) or "literal" (untrained, as released).
        implementation: "gather" (linear in the length), "dense" (quadratic, faster for short histories), or "auto":
            dense for up to `dense_until` events. All give the same states.
        dense_until: Longest padded batch for which "auto" is dense.
    """

    model_type = "llmrec_blossomrec"

    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    inner_size: int | None = None
    norm: Literal["post", "pre"] = "post"
    block_size: int = 16
    selected_blocks: int = 4
    summary_size: int | None = None
    window: int = 8
    sink: bool = False
    selection: Literal["straight_through", "literal"] = "straight_through"
    implementation: Literal["auto", "dense", "gather"] = "auto"
    dense_until: int = 512

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise RecipeError(f"encoder.{name}: found {getattr(self, name)!r}, expected one of {', '.join(known)}")
        for name in POSITIVE:
            if getattr(self, name) < 1:
                raise RecipeError(f"encoder.{name}: found {getattr(self, name)}, expected at least 1")
        if self.hidden_size % (2 * self.num_heads):
            raise RecipeError(
                f"encoder.num_heads: found {self.num_heads}, expected a number that cuts hidden_size "
                f"{self.hidden_size} into heads of even width (rotary positions turn pairs)"
            )
        if self.num_heads % self.num_kv_heads:
            raise RecipeError(
                f"encoder.num_kv_heads: found {self.num_kv_heads}, expected a divisor of num_heads {self.num_heads}"
            )

    @property
    def pattern(self) -> SparsePattern:
        """Which keys a query sees."""
        return SparsePattern(self.block_size, self.selected_blocks, self.window, self.sink)


def rotations(length: int, width: int, device: torch.device, base: float = 10000.0) -> Tensor:
    """[length, width / 2] complex: e^{i t base^(-2 m / width)} for position t and pair m."""
    rates = base ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * rates
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary positions: neighbouring pairs of the last dimension turned; products then depend on distances only.

    Args:
        x: [B, L, heads, d_h].
        turns: [L, d_h / 2] complex, from `rotations`.
    """
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    turned = torch.view_as_complex(wide.unflatten(-1, (-1, 2))) * turns[:, None]
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


class BlossomAttention(nn.Module):
    """Both patterns, the block selector, the gates and the output projection."""

    def __init__(self, config: BlossomRecConfig) -> None:
        super().__init__()
        width = config.hidden_size // config.num_heads
        span = 2 * config.block_size
        self.config, self.head_width = config, width
        self.projection = nn.Linear(
            config.hidden_size, (config.num_heads + 2 * config.num_kv_heads) * width, bias=False
        )
        self.block_positions = nn.Parameter(torch.zeros(config.num_kv_heads, span, width))
        inner = config.summary_size or span * width
        self.summary = nn.Sequential(nn.Linear(span * width, inner), nn.ReLU(), nn.Linear(inner, width))
        self.gate = nn.Linear(config.hidden_size, 2 * config.num_heads)
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """[B, L, d] -> [B, L, d]; L is a multiple of the block, `turns` from `rotations`."""
        query, key, value = self._heads(x, turns)
        gates = torch.sigmoid(self.gate(x)).unflatten(-1, (self.config.num_kv_heads, -1, 2)).permute(0, 2, 3, 1, 4)
        dense = {"dense": True, "gather": False, "auto": x.shape[1] <= self.config.dense_until}
        attend = attend_dense if dense[self.config.implementation] else attend_gather
        mixed = attend(query, key, value, gates, self.select(query, key), self.config.pattern)
        return self.output(mixed.permute(0, 3, 1, 2, 4).flatten(2))

    def _heads(self, x: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, Hk, G, L, d_h] divided by sqrt(d_h), keys and values [B, Hk, L, d_h]."""
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        both, value = self.projection(x).unflatten(-1, (-1, self.head_width)).split([heads + kv_heads, kv_heads], 2)
        query, key = rotate(both, turns).split([heads, kv_heads], 2)
        query = (query / math.sqrt(self.head_width)).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
        return query.contiguous(), key.transpose(1, 2).contiguous(), value.transpose(1, 2).contiguous()

    def select(self, query: Tensor, key: Tensor) -> Selection:
        """The past blocks each query reads; the same for the query heads of a key head.

        Blocks are numbered as the keys are, so that summary w reads blocks w - 1 and w. The last block's is never
        used: no query comes after it.
        """
        trained = self.config.selection == "straight_through"
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            block = self.config.block_size
            spans = F.pad(key, (0, 0, block, 0)).unfold(2, 2 * block, block).transpose(-1, -2)  # [B, Hk, W, l, d_h]
            summaries = self.summary((spans + self.block_positions[:, None]).flatten(3))
            # The mean over query heads of their scores is the score of the mean query.
            scores = query.mean(2) @ summaries.transpose(-1, -2)
            return select_blocks(scores, self.config.pattern, straight_through=trained)


class BlossomRecLayer(nn.Module):
    """Attention, a linear map and the feed-forward part with residuals and norms."""

    def __init__(self, config: BlossomRecConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm = config.norm
        self.attention = BlossomAttention(config)
        self.dense = nn.Linear(width, width)
        self.feed_forward = FeedForward(width, config.inner_size or 2 * width, activation="gelu")
        self.attention_norm = nn.LayerNorm(width, eps=1e-12)
        self.feed_forward_norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """[B, L, d] -> [B, L, d]."""
        if self.norm == "pre":
            x = x + self.dropout(self.dense(self.attention(self.attention_norm(x), turns)))
            return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        x = self.attention_norm(x + self.dropout(self.dense(self.attention(x, turns))))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class BlossomRecEncoder(SequenceEncoder):
    """Causal Transformer with two sparse attention patterns and a tied item table."""

    config_class = BlossomRecConfig
    config: BlossomRecConfig

    def __init__(self, config: BlossomRecConfig) -> None:
        super().__init__(config)
        self.item_embedding = nn.Embedding(config.num_items + 1, config.hidden_size, padding_idx=0)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(BlossomRecLayer(config) for _ in range(config.num_layers))
        # Of the input for "post", of the output for "pre".
        self.outer_norm = nn.LayerNorm(config.hidden_size, eps=1e-12)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BlossomAttention):
            nn.init.zeros_(module.block_positions)

    def forward(
        self, item_ids: Tensor, lengths: Tensor, *, item_embeds: Tensor | None = None, **features: Tensor
    ) -> EncoderOutput:
        """States of a batch; see the base class.

        Raises:
            DataError: The batch is longer than `max_history`.
        """
        check_history(item_ids, self.config.max_history)
        length, block = item_ids.shape[1], self.config.block_size
        items = self.item_embedding(item_ids) if item_embeds is None else item_embeds
        hidden = self._embed(F.pad(items, (0, 0, 0, -length % block)))
        turns = rotations(hidden.shape[1], self.config.hidden_size // self.config.num_heads, hidden.device)
        # Padding stands right of every real event, so causality alone keeps it out of their states; a padding query
        # always sees itself, and its state is dropped.
        for layer in self.layers:
            hidden = layer(hidden, turns)
        if self.config.norm == "pre":
            hidden = self.outer_norm(hidden)
        real = padding_mask(lengths, length).unsqueeze(-1)
        hidden = hidden[:, :length].masked_fill(~real, 0.0)
        return EncoderOutput(hidden=hidden, user_repr=self.last_state(hidden, lengths))

    def _embed(self, items: Tensor) -> Tensor:
        if self.config.norm == "post":
            return self.dropout(self.outer_norm(items))
        return self.dropout(items * math.sqrt(self.config.hidden_size))


register(BlossomRecConfig, BlossomRecEncoder)
