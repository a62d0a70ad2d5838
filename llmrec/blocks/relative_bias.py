"""Learned tables of relative position and of time gaps, read on causal tiles, and pointwise (SiLU) attention.

    position:   b[i, j]    = w[j - i + N - 1]                       one table per layer, shared by heads and rows
    time:       b[b, i, j] = w[bucket(query time of i - time of j)] one table per layer, shared by heads

Source: HSTU (ICML 2024) and its released code; FuXi-alpha (WWW 2025) uses the same tables as attention maps. Ours: both
are read at the width of the batch instead of N, so a batch need not be padded to N, and the causal triangle is cut
into tiles of rows. A tile holds the keys its rows may see, so little more than half of the square is ever computed, and
without gradients only one tile of scores exists at a time. Tiles carry the buckets, computed once for all layers.

Users: `encoders.hstu`, `encoders.fuxi_alpha`, `blocks.relative_stack`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmrec.blocks.event_times import LAST_BUCKET, gap_buckets

TILE_ROWS = 128
LATER = LAST_BUCKET + 1
"""Bucket of keys that are later than their query: one behind the table, where a zero is appended."""
HIDDEN = -3e4
"""Added to the scores of later events: SiLU(-3e4) is exactly 0, with gradient 0, in every float type.

-inf would give 0 * inf. Equal to multiplying by 0 after SiLU, without another pass over all scores.
"""


@dataclass(frozen=True)
class CausalTile:
    """Rows `start`..`stop` - 1 of a causal attention map, with keys 0..`stop` - 1.

    Args:
        start: First query position.
        stop: One behind the last query position, and the number of keys.
        future: [stop - start, stop] bool, True where the key is later than the query.
        buckets: [B, stop - start, stop] int32 gap buckets, `LATER` where the key is later than the query; None without
            a time channel.
    """

    start: int
    stop: int
    future: Tensor
    buckets: Tensor | None


def causal_tiles(
    width: int,
    device: torch.device,
    *,
    queries: Tensor | None = None,
    timestamps: Tensor | None = None,
    start: int = 0,
    rows: int = TILE_ROWS,
) -> list[CausalTile]:
    """Cut the rows `start`..`width` - 1 of a causal map into tiles of nearly equal height.

    Args:
        width: L, number of events.
        device: Where the masks are made.
        queries: [B, L - start] int64, the time each of the rows is asked at.
        timestamps: [B, L] int64, times of the events; needed with `queries`.
        start: First row; L - 1 for the latest state alone.
        rows: Greatest height of a tile.
    """
    count = -(-(width - start) // rows)
    edges = [start + (width - start) * part // count for part in range(count + 1)]
    places = torch.arange(width, device=device)
    tiles = []
    for first, stop in zip(edges[:-1], edges[1:], strict=True):
        future = places[None, :stop] > places[first:stop, None]
        buckets = None
        if queries is not None and timestamps is not None:
            # int32: looking values up is then several times faster than with int64.
            buckets = gap_buckets(queries[:, first - start : stop - start], timestamps[:, :stop]).int()
            buckets.masked_fill_(future, LATER)
        tiles.append(CausalTile(first, stop, future, buckets))
    return tiles


class PositionTable(nn.Module):
    """w of size 2N - 1; entry j - i + N - 1 belongs to key j of query i.

    The size is the published one. Only entries 0..N - 1 are ever read under a causal mask. An encoder draws the values
    in its `_init_weights`.

    Args:
        max_history: N.
    """

    def __init__(self, max_history: int) -> None:
        super().__init__()
        self.max_history = max_history
        self.weight = nn.Parameter(torch.zeros(2 * max_history - 1))

    def forward(self, tile: CausalTile) -> Tensor:
        """[rows, keys] of a tile; the entries of later keys mean nothing."""
        rows = tile.stop - tile.start
        # Row i is a window that starts at N - 1 - i, so consecutive rows are windows in reverse order.
        values = self.weight.narrow(0, self.max_history - tile.stop, rows + tile.stop - 1)
        return values.unfold(0, tile.stop, 1).flip(0)


class TimeTable(nn.Module):
    """w of size 129, one entry per gap bucket; an encoder draws the values in its `_init_weights`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(LAST_BUCKET + 1))

    def forward(self, tile: CausalTile) -> Tensor:
        """[B, rows, keys] float32 of a tile, 0 at later keys.

        float32 because the gradient of an entry is a sum over all pairs of events in its bucket. Selecting from a flat
        table has the fast gradient (one addition per pair); an embedding's is a hundred times slower for few rows.

        Raises:
            ValueError: The tile has no buckets.
        """
        if tile.buckets is None:
            raise ValueError("a time table needs tiles with buckets: give queries and timestamps to causal_tiles")
        values = F.pad(self.weight.float(), (0, 1))
        return values.index_select(0, tile.buckets.flatten()).view(tile.buckets.shape)


def silu_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """SiLU(q k^T + bias) v: pointwise attention, neither normalised nor scaled.

    Args:
        query: [B, H, R, d_qk].
        key: [B, H, S, d_qk].
        value: [B, H, S, d_v].
        bias: [R, S] or [B, R, S], shared by the heads; `HIDDEN` where a key must not be seen.

    Returns:
        [B, H, R, d_v].
    """
    bias = bias.to(query.dtype)
    if query.shape[1] == 1:
        scores = torch.baddbmm(bias, query[:, 0], key[:, 0].transpose(1, 2)).unsqueeze(1)
    else:
        scores = query @ key.transpose(-1, -2)
        scores = scores.add_(bias if bias.dim() == 2 else bias[:, None])
    return F.silu(scores) @ value
