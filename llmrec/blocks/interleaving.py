"""Histories of items and actions as one sequence of tokens: i1, a1, i2, a2, ..., iL.

Users: `encoders.base`, for every encoder that takes `item_embeds`.

The action a_t (was the item liked, clicked, bought?) stands right behind its item, so a causal state at an item token
has seen all earlier actions and not its own [HSTU, section 2.2]. The last action has no place: it is the question.

Shapes: [B, L, ...] right padded histories of items become [B, 2L - 1, ...] tokens, still right padded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmrec.blocks.readout import padding_mask

NO_ACTION, NEGATIVE, POSITIVE = 0, 1, 2
"""Ids of actions; 0 is padding and the action that is asked for."""


def interleave(items: Tensor, actions: Tensor) -> Tensor:
    """Two [B, L, ...] of one shape and type -> [B, 2L - 1, ...]: items at even places, actions between them."""
    return torch.stack((items, actions), dim=2).flatten(1, 2)[:, :-1]


def item_places(tokens: Tensor) -> Tensor:
    """[B, 2L - 1, ...] -> [B, L, ...]: what stands at the item tokens."""
    return tokens[:, ::2]


def known_actions(lengths: Tensor, width: int) -> Tensor:
    """[B, L] bool: events whose action is an input, which are all but each row's last one."""
    return padding_mask(lengths - 1, width)


def action_ids(labels: Tensor, lengths: Tensor) -> Tensor:
    """[B, L] int64 ids of the actions that are inputs.

    Args:
        labels: [B, L], 1 positive and 0 negative; a row's last label and those of padding are not read.
        lengths: [B].
    """
    chosen = torch.where(labels > 0.5, POSITIVE, NEGATIVE)
    return chosen.masked_fill(~known_actions(lengths, labels.shape[1]), NO_ACTION)


def token_lengths(lengths: Tensor) -> Tensor:
    """[B]: tokens of histories with these many items."""
    return 2 * lengths - 1
