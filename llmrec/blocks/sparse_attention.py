"""Two sparse causal attention patterns over one history, mixed by gates: selected past blocks, and offsets 2^m.

Users: `encoders.blossomrec`; planned: encoders of long histories that take it in place of `blocks.attention`.

Positions are cut into blocks of `block` events. Query i sees, in the long-term pattern, the events of a few selected
earlier blocks and its own block up to itself; in the short-term pattern, itself, the window - 1 events before it and
the events at distances that are powers of two. Each pattern is a softmax attention of its own over the same queries,
keys and values; gates weigh the two results.

`attend_dense` computes every product of a row and masks: simple, quadratic in L, fastest for short histories.
`attend_gather` touches visible keys only: linear in L. Both work in pieces that are computed again in the backward
pass, so no attention weights outlive a piece. They agree to rounding.

Shapes: query [B, Hk, G, L, d_h] (already divided by sqrt(d_h); G query heads share a key head), key and value
[B, Hk, L, d_h], gates [B, Hk, G, L, 2] (long, short), result like query. L is a multiple of the block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

DUMMY_LOGIT = -1000.0  # of a block nobody attends to, so that a query without a past has a softmax too
VOID = 1e-10  # importance from which on a block counts as selected
# Attention weights (dense) or gathered keys (gather) of one piece: small enough for a cache, large enough that calls do
# not matter.
DENSE_PIECE, GATHER_PIECE = 1 << 20, 1 << 16
DENSE_PARTS = 4


@dataclass(frozen=True)
class SparsePattern:
    """Which keys a query sees.

    Args:
        block: Events per block.
        selected: n, the largest number of selected past blocks per query and key head.
        window: The short-term pattern sees distances 0 .. window - 1, and powers of two from there on.
        sink: The short-term pattern also sees the first event.
    """

    block: int = 16
    selected: int = 4
    window: int = 8
    sink: bool = False

    def offsets(self, length: int) -> list[int]:
        """Distances the short-term pattern sees in a history of `length` events."""
        powers = [1 << m for m in range(length.bit_length()) if self.window <= 1 << m < length]
        return [*range(min(self.window, length)), *powers]

    def short_keys(self, length: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Keys of the short-term pattern: index [L, T], and visible [L, T] bool (invisible entries point at key 0)."""
        offsets = torch.tensor(self.offsets(length), device=device)
        index = torch.arange(length, device=device)[:, None] - offsets
        visible = index >= 0
        if self.sink:
            first = torch.zeros_like(index[:, :1])
            visible = torch.cat([visible, ~(index == 0).any(1, keepdim=True)], 1)
            index = torch.cat([index, first], 1)
        return index.clamp(min=0), visible


class Selection(NamedTuple):
    """The long-term pattern's choice.

    Args:
        blocks: [B, Hk, L, n] ids of blocks, distinct per query; void entries included.
        bias: [B, Hk, L, n], added to the logits of all keys of a block: -inf for void entries, else 0, with the
            gradient of the block's importance when selection is trained.
    """

    blocks: Tensor
    bias: Tensor


def select_blocks(scores: Tensor, pattern: SparsePattern, *, straight_through: bool) -> Selection:
    """The blocks of largest importance, an importance being a softmax over the past blocks' scores.

    The straight-through gate multiplies the unnormalised attention weights of a chosen block by 1 + p - stop(p): a
    forward value of 1, and a gradient that raises the importance p of blocks whose events help. (Multiplying the keys
    instead, as the released option does, would turn the sign of that gradient around wherever a logit is negative.)

    Args:
        scores: [B, Hk, L, W], query against summary of each block; W = L / block.
        pattern: Block size and number of selected blocks.
        straight_through: Give importances a gradient.
    """
    length, windows = scores.shape[-2:]
    own = torch.arange(length, device=scores.device) // pattern.block
    future = torch.arange(windows, device=scores.device) >= own[:, None]
    logits = F.pad(scores.float().masked_fill(future, float("-inf")), (0, 1), value=DUMMY_LOGIT)
    best, blocks = logits.softmax(-1)[..., :-1].topk(min(pattern.selected, windows), dim=-1)
    gate = best - best.detach() if straight_through else torch.zeros_like(best)
    return Selection(blocks, gate.masked_fill(best <= VOID, float("-inf")).to(scores.dtype))


def attend_dense(
    query: Tensor, key: Tensor, value: Tensor, gates: Tensor, selection: Selection, pattern: SparsePattern
) -> Tensor:
    """Both patterns by masks over all products of a row; see the module for shapes."""
    length = query.shape[-2]
    index, visible = pattern.short_keys(length, query.device)
    # Causality makes most of the upper triangle superfluous: later parts of a row see more keys than earlier ones.
    step = -(-length // DENSE_PARTS // pattern.block) * pattern.block
    rows = max(1, DENSE_PIECE // (query.shape[1] * query.shape[2] * step * length))

    def piece(*tensors: Tensor) -> Tensor:
        return _dense_piece(*tensors, block=pattern.block, windows=length // pattern.block)

    done = []
    for q, k, v, g, *chosen in zip(*(t.split(rows) for t in (query, key, value, gates, *selection)), strict=True):
        parts = []
        for start in range(0, length, step):
            end = min(start + step, length)
            mine = (t[..., start:end, :] for t in (q, g, *chosen))
            parts.append(_recomputed(piece, k[:, :, :end], v[:, :, :end], *mine, index[start:end], visible[start:end]))
        done.append(torch.cat(parts, dim=-2))
    return torch.cat(done)


def _dense_piece(
    key: Tensor,
    value: Tensor,
    query: Tensor,
    gates: Tensor,
    blocks: Tensor,
    bias: Tensor,
    index: Tensor,
    visible: Tensor,
    *,
    block: int,
    windows: int,
) -> Tensor:
    """Attention of the queries at the end of the keys."""
    rows, kv_heads, group, queries, _ = query.shape
    length = key.shape[2]
    scores = (query.flatten(2, 3) @ key.transpose(-1, -2)).unflatten(2, (group, queries))  # [b, Hk, G, Q, K]
    index = index.expand(rows, kv_heads, group, -1, -1)
    short = scores.gather(-1, index).masked_fill(~visible, float("-inf")).softmax(-1)
    # Void entries may name any block, so that the table has room for each.
    chosen = bias.new_full((rows, kv_heads, queries, windows), float("-inf"))
    chosen = chosen.scatter(-1, blocks, bias)[..., : length // block]
    step = torch.arange(length, device=query.device) // block
    chosen = chosen.masked_fill(step[-queries:, None] == step[::block], 0.0)[:, :, None, :, :, None]
    scores = (scores.unflatten(-1, (-1, block)) + chosen).flatten(-2)
    later = torch.ones(block, block, dtype=torch.bool, device=query.device).triu(1)
    tiles = scores.unflatten(-1, (-1, block)).unflatten(3, (-1, block))  # a view, as is its diagonal of own blocks
    own = tiles.diagonal(offset=(length - queries) // block, dim1=3, dim2=5)
    own.masked_fill_(later[..., None], float("-inf"))
    weights = scores.softmax(-1) * gates[..., :1]
    weights = weights.scatter_add_(-1, index, short * gates[..., 1:])
    return (weights.flatten(2, 3) @ value).unflatten(2, (group, queries))


def attend_gather(
    query: Tensor, key: Tensor, value: Tensor, gates: Tensor, selection: Selection, pattern: SparsePattern
) -> Tensor:
    """Both patterns from visible keys only; see the module for shapes."""
    long = _long_term(query, key, value, selection, pattern.block)
    return gates[..., :1] * long + gates[..., 1:] * _short_term(query, key, value, pattern)


def _long_term(query: Tensor, key: Tensor, value: Tensor, selection: Selection, block: int) -> Tensor:
    """Selected blocks and the own block, in pieces of a few rows or a part of one row."""
    kv_heads, length = query.shape[1], query.shape[-2]
    per_query = kv_heads * (selection.blocks.shape[-1] + 1) * block
    queries = max(block, GATHER_PIECE // per_query // block * block)
    rows = max(1, queries // length)

    def piece(*tensors: Tensor) -> Tensor:
        return _gather_piece(*tensors, block=block)

    done = []
    for q, k, v, ids, bias in zip(*(t.split(rows) for t in (query, key, value, *selection)), strict=True):
        parts = zip(*(t.split(queries, dim=-2) for t in (q, k, v, ids, bias)), strict=True)
        done.append(
            torch.cat([_recomputed(piece, q_, k, v, k_, v_, ids_, bias_) for q_, k_, v_, ids_, bias_ in parts], dim=-2)
        )
    return torch.cat(done)


def _gather_piece(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    ids: Tensor,
    bias: Tensor,
    *,
    block: int,
) -> Tensor:
    """Long-term attention of some queries: all keys of their rows, and those of their own blocks."""
    rows, kv_heads, group, queries, width = query.shape
    many = key.shape[2] // block
    first = torch.arange(rows * kv_heads, device=query.device).view(rows, kv_heads, 1, 1) * many
    flat = (ids + first).flatten()

    def chosen(x: Tensor) -> Tensor:
        """[b, Hk, L, d_h] -> [b, Hk, C, n block, d_h]."""
        return x.reshape(-1, block * width).index_select(0, flat).view(rows, kv_heads, queries, -1, width)

    per_query = query.transpose(2, 3)  # [b, Hk, C, G, d_h]
    far = per_query @ chosen(key).transpose(-1, -2)  # [b, Hk, C, G, n block]
    far = (far.unflatten(-1, (-1, block)) + bias[:, :, :, None, :, None]).flatten(-2)
    per_block = query.unflatten(3, (-1, block)).transpose(2, 3)  # [b, Hk, c, G, block, d_h]
    own = per_block.flatten(3, 4) @ own_key.unflatten(2, (-1, block)).transpose(-1, -2)
    later = torch.ones(block, block, dtype=torch.bool, device=query.device).triu(1)
    own = own.unflatten(3, (group, block)).masked_fill(later, float("-inf"))  # [b, Hk, c, G, block, block]
    weights = torch.cat([far, own.transpose(3, 4).flatten(2, 3)], -1).softmax(-1)
    far, own = weights.split([far.shape[-1], block], -1)
    own = own.unflatten(2, (-1, block)).transpose(3, 4).flatten(3, 4) @ own_value.unflatten(2, (-1, block))
    own = own.unflatten(3, (group, block)).transpose(2, 3).flatten(3, 4)  # [b, Hk, G, C, d_h]
    return own + (far @ chosen(value)).transpose(2, 3)


def _short_term(query: Tensor, key: Tensor, value: Tensor, pattern: SparsePattern) -> Tensor:
    """One shifted product per offset: [B, Hk, G, L, d_h] each, no [L, L]."""
    length = query.shape[-2]
    offsets = pattern.offsets(length)
    logits = [
        F.pad((query[..., o:, :] * key[:, :, None, : length - o]).sum(-1), (o, 0), value=float("-inf")) for o in offsets
    ]
    if pattern.sink:
        seen = ~pattern.short_keys(length, query.device)[1][:, -1]
        logits.append((query * key[:, :, None, :1]).sum(-1).masked_fill(seen, float("-inf")))
    weights = torch.stack(logits, -1).softmax(-1)
    mixed = weights[..., :1] * value[:, :, None]
    for place, o in enumerate(offsets[1:], start=1):
        part = weights[..., o:, place, None] * value[:, :, None, : length - o]
        mixed = mixed + F.pad(part, (0, 0, o, 0))
    return mixed + weights[..., -1:] * value[:, :, None, :1] if pattern.sink else mixed


def _recomputed(piece: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`piece(*tensors)`, keeping only its inputs for the backward pass."""
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return piece(*tensors)
    result: Tensor = checkpoint(piece, *tensors, use_reentrant=False, preserve_rng_state=False)
    return result
