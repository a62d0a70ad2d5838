"""Multi-head attention over event sequences, with two interchangeable implementations.

Users: `encoders.sasrec`, `encoders.bert4rec` (not causal), `encoders.caseq`; planned: generative heads.

`sdpa` calls PyTorch's fused kernel. `math` writes the same product out, softmax(Q K^T / sqrt(d_h)) V: the fused kernel
has no second derivative on CPU, which methods that differentiate through a training step need.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMPLEMENTATIONS = ("sdpa", "math")


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    key_mask: Tensor | None = None,
    dropout: float = 0.0,
    implementation: str = "sdpa",
) -> Tensor:
    """Scaled dot-product attention.

    Args:
        query, key, value: [B, H, L, d_h].
        causal: Position t sees keys <= t only.
        key_mask: [B, L] bool, False at keys nobody may see. Every query must be left with one visible key.
        dropout: Dropout probability of the attention weights; the caller passes 0 outside training.
        implementation: "sdpa" or "math".

    Returns:
        [B, H, L, d_h].
    """
    if implementation == "sdpa" and key_mask is None:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=causal)
    visible = _visible(query.shape[-2], key.shape[-2], causal, key_mask, query.device)
    if implementation == "sdpa":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, dropout_p=dropout)
    logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if visible is not None:
        logits = logits.masked_fill(~visible, float("-inf"))
    weights = logits.softmax(-1)
    return F.dropout(weights, dropout, training=dropout > 0) @ value


def _visible(queries: int, keys: int, causal: bool, key_mask: Tensor | None, device: torch.device) -> Tensor | None:
    """[1 or B, 1, queries, keys] bool, or None where everything is visible."""
    visible = torch.ones(queries, keys, dtype=torch.bool, device=device).tril()[None, None] if causal else None
    if key_mask is None:
        return visible
    masked = key_mask[:, None, None, :]
    return masked.expand(-1, 1, queries, -1) if visible is None else masked & visible


class MultiHeadAttention(nn.Module):
    """Projections, heads and `attend`.

    Args:
        hidden_size: d.
        num_heads: H; must divide d.
        dropout: Dropout probability of the attention weights.
        causal: Position t sees keys <= t only.
        implementation: "sdpa" or "math"; a plain attribute, it may be changed on a finished model.

    Raises:
        ValueError: Heads do not divide the width, or the implementation is unknown.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        dropout: float = 0.0,
        causal: bool = True,
        implementation: str = "sdpa",
    ) -> None:
        super().__init__()
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(f"num_heads: found {num_heads}, expected a divisor of hidden_size {hidden_size}")
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(f"implementation: found {implementation!r}, expected one of {', '.join(IMPLEMENTATIONS)}")
        self.num_heads, self.dropout, self.causal, self.implementation = num_heads, dropout, causal, implementation
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, memory: Tensor | None = None, key_mask: Tensor | None = None) -> Tensor:
        """Attention of `x` over `memory` (over itself where none is given).

        Args:
            x: [B, L, d], source of the queries.
            memory: [B, L, d], source of keys and values.
            key_mask: [B, L] bool, False at keys nobody may see.

        Returns:
            [B, L, d].
        """
        memory = x if memory is None else memory
        mixed = attend(
            self._heads(self.query(x)),
            self._heads(self.key(memory)),
            self._heads(self.value(memory)),
            causal=self.causal,
            key_mask=key_mask,
            dropout=self.dropout if self.training else 0.0,
            implementation=self.implementation,
        )
        return self.output(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, L, d] -> [B, H, L, d / H]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
