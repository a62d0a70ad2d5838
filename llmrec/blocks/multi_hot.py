"""Histories as multi-hot vectors over the catalogue.

Users: `encoders.ease` and `encoders.itemknn`, through `encoders.base.MultiHotHistories`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def multi_hot(item_ids: Tensor, num_items: int) -> Tensor:
    """[B, S] item ids padded with 0 -> [B, I+1] float32 of zeros and ones; column 0 stays zero."""
    hot = torch.zeros(len(item_ids), num_items + 1, device=item_ids.device)
    hot.scatter_(1, item_ids, 1.0)
    hot[:, 0] = 0.0
    return hot


def running_multi_hot(item_ids: Tensor, num_items: int) -> Tensor:
    """[B, L] -> [B, L, I+1]: row t holds the items up to and including position t."""
    events = torch.zeros(*item_ids.shape, num_items + 1, device=item_ids.device)
    events.scatter_(2, item_ids.unsqueeze(-1), 1.0)
    events[..., 0] = 0.0
    return events.cumsum(1).clamp(max=1.0)
