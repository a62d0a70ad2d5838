"""Times of events: when a state is asked, and buckets of gaps on a logarithmic scale.

Users: `encoders.base` (time-aware encoders), the relative bias of HSTU and FuXi-alpha.

Times are int64 seconds and stay int64 until they are gaps: float32 would round them to minutes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmrec.blocks.readout import padding_mask

LAST_BUCKET = 128
LOG_WIDTH = 0.301
"""One bucket per factor e^0.301 = 1.351: about 2.3 buckets per doubling, one year in seconds is bucket 57 [HSTU]."""


def query_times(timestamps: Tensor, lengths: Tensor, target_timestamps: Tensor | None = None) -> Tensor:
    """The time each state is asked at.

    Args:
        timestamps: [B, L] int64, right padded.
        lengths: [B].
        target_timestamps: [B] int64, the time the latest state is asked at. With it, state i is asked at the time of
            event i + 1, the one it predicts; without it, at its own event's time.

    Returns:
        [B, L] int64. Padding positions repeat the latest query, so that no gap is computed from their time 0.
    """
    width = timestamps.shape[1]
    real = padding_mask(lengths, width)
    if target_timestamps is None:
        latest = timestamps.gather(1, lengths[:, None] - 1)
        return torch.where(real, timestamps, latest)
    target = target_timestamps[:, None].to(timestamps.dtype)
    following = torch.cat([timestamps[:, 1:], target], dim=1)
    inner = padding_mask(lengths - 1, width)
    return torch.where(inner, following, target)


def gap_buckets(queries: Tensor, timestamps: Tensor) -> Tensor:
    """[B, L] and [B, L] int64 -> [B, L, L] int64 buckets of the gap between query i and event j.

    bucket(x) = clamp(floor(ln(max(1, |x|)) / 0.301), 0, 128): bucket(1) = 0, bucket(60) = 13, a day 37, a year 57.
    """
    gaps = (queries[:, :, None] - timestamps[:, None, :]).abs_().clamp_(min=1)
    # float32 after the subtraction: 15 times faster than exact edges, and one gap in 10^5 falls into the next bucket.
    return gaps.float().log_().mul_(1 / LOG_WIDTH).long().clamp_(0, LAST_BUCKET)
