"""Stack of gated attention blocks with relative tables: whole histories at once, or one event at a time.

Input layer, causal tiles, loop over blocks and cached decoding are the same for every block that projects an event to
(gate, query, key, value), mixes values along a `CausalTile` and finishes position by position. The input layer is
HSTU's (ICML 2024): x_i = dropout(sqrt(d) E[item_i] + P[i]), zero at padding. Initial weights are the encoder's to draw.

Cached decoding (ours, checked against the whole forward): keys and values of past events are kept, so one more event
costs O(t) per block. The state grows with the history. With the target's time as query time, what block 2 keeps of
event i depends on the time of event i + 1; the latest event therefore stays pending until the next one tells its time.

Users: `encoders.hstu`, `encoders.fuxi_alpha`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmrec.blocks.readout import padding_mask
from llmrec.blocks.relative_bias import CausalTile, causal_tiles


class Projected(NamedTuple):
    """What a block makes of its input: gate [B, L, inner], query and key [B, H, L, d_qk], value [B, H, L, d_v]."""

    gate: Tensor
    query: Tensor
    key: Tensor
    value: Tensor


class RelativeBlock(nn.Module):
    """One block; subclasses define `project`, `attend` and `finish`."""

    @abstractmethod
    def project(self, x: Tensor) -> Projected:
        """[B, L, d] -> gate, query, key, value."""

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, tile: CausalTile) -> Tensor:
        """Mixed values [B, rows, inner] of a tile: queries of its rows, keys and values of its keys."""

    @abstractmethod
    def finish(self, x: Tensor, gate: Tensor, mixed: Tensor) -> Tensor:
        """[B, L, d]: gate, output map and residual."""

    def forward(self, x: Tensor, tiles: list[CausalTile]) -> Tensor:
        """[B, L, d] -> [B, L, d]."""
        gate, query, key, value = self.project(x)
        mixed = [
            self.attend(query[:, :, tile.start : tile.stop], key[:, :, : tile.stop], value[:, :, : tile.stop], tile)
            for tile in tiles
        ]
        return self.finish(x, gate, torch.cat(mixed, dim=1))

    def step(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None, tile: CausalTile
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Output [B, 1, d] of the latest event, and keys and values that now include it.

        Args:
            x: [B, 1, d].
            past: Keys and values [B, H, t - 1, ...] of the events before; None for the first one.
            tile: The last row of a map of t events.
        """
        gate, query, key, value = self.project(x)
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        return self.finish(x, gate, self.attend(query, key, value, tile)), (key, value)


@dataclass(frozen=True)
class StackState:
    """Histories of the same length that grow together; steps make a new state and leave the old one alone.

    Args:
        batch_size: B.
        past: Keys and values of every block for all events but the latest.
        latest: [B, d] input of the latest event; None before the first one.
        timestamps: [B, t]; None without a time channel.
        count: t, number of events.
    """

    batch_size: int
    past: tuple[tuple[Tensor, Tensor] | None, ...]
    latest: Tensor | None = None
    timestamps: Tensor | None = None
    count: int = 0


class RelativeStack(nn.Module):
    """Input layer and blocks.

    Args:
        blocks: The blocks.
        hidden_size: d.
        max_history: N, number of positions.
        dropout: Dropout probability of the input.
        time: "target", "last" or "none": the time a state is asked at while stepping.
    """

    def __init__(
        self, blocks: Iterable[RelativeBlock], *, hidden_size: int, max_history: int, dropout: float, time: str
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.position_embedding = nn.Embedding(max_history, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.scale, self.max_history, self.time = math.sqrt(hidden_size), max_history, time

    def forward(
        self, items: Tensor, lengths: Tensor, queries: Tensor | None = None, timestamps: Tensor | None = None
    ) -> Tensor:
        """States of whole histories.

        Args:
            items: [B, L, d] item vectors, right padded.
            lengths: [B].
            queries: [B, L] int64, the time each state is asked at; None without a time channel.
            timestamps: [B, L] int64; needed with `queries`.

        Returns:
            [B, L, d], zero at padding.
        """
        width = items.shape[1]
        padding = ~padding_mask(lengths, width).unsqueeze(-1)
        positions = self.position_embedding.weight[:width]
        x = self.dropout(items * self.scale + positions).masked_fill(padding, 0.0)
        tiles = causal_tiles(width, items.device, queries=queries, timestamps=timestamps)
        for block in self.blocks:
            x = block(x, tiles)
        return x.masked_fill(padding, 0.0)

    def init_state(self, batch_size: int) -> StackState:
        """No events yet."""
        return StackState(batch_size, (None,) * len(self.blocks))

    def step(self, state: StackState, items: Tensor, timestamps: Tensor | None) -> StackState:
        """The state after one more event per row.

        Args:
            state: The state before.
            items: [B, d] item vectors.
            timestamps: [B] int64; needed with a time channel.

        Raises:
            ValueError: The state is full, belongs to another number of rows, or a time is missing.
        """
        if state.count >= self.max_history:
            raise ValueError(
                f"the state holds {state.count} events, as many as there are positions: start a new one from the "
                "latest events, or train with a larger max_history"
            )
        if len(items) != state.batch_size:
            raise ValueError(f"the state belongs to {state.batch_size} rows, found {len(items)} events")
        if state.latest is not None:
            state = replace(state, past=self._advance(state, self._query(state, timestamps))[1])
        latest = self.dropout(items * self.scale + self.position_embedding.weight[state.count])
        times = state.timestamps
        if self.time != "none":
            if timestamps is None:
                raise ValueError(f"time: {self.time} needs the timestamp of every event")
            times = timestamps[:, None] if times is None else torch.cat([times, timestamps[:, None]], dim=1)
        return replace(state, latest=latest, timestamps=times, count=state.count + 1)

    def read(self, state: StackState, target_timestamps: Tensor | None) -> Tensor:
        """[B, d]: the state of the latest event, asked at the target's time where the time channel wants one.

        Raises:
            ValueError: There is no event yet, or the target's time is missing.
        """
        if state.latest is None:
            raise ValueError("the state holds no event yet: step() before read()")
        return self._advance(state, self._query(state, target_timestamps))[0]

    def _query(self, state: StackState, following: Tensor | None) -> Tensor | None:
        """[B, 1], the time the latest event's state is asked at."""
        if self.time == "none" or state.timestamps is None:
            return None
        if self.time == "last":
            return state.timestamps[:, -1:]
        if following is None:
            raise ValueError("time: target needs the time of the event to predict")
        return following[:, None].to(state.timestamps.dtype)

    def _advance(
        self, state: StackState, queries: Tensor | None
    ) -> tuple[Tensor, tuple[tuple[Tensor, Tensor] | None, ...]]:
        """Run the latest event through the blocks: its output [B, d], and keys and values that include it."""
        assert state.latest is not None  # both callers have looked
        x, past = state.latest[:, None], []
        (tile,) = causal_tiles(
            state.count, x.device, queries=queries, timestamps=state.timestamps, start=state.count - 1
        )
        for block, before in zip(self.blocks, state.past, strict=True):
            assert isinstance(block, RelativeBlock)
            x, kept = block.step(x, before, tile)
            past.append(kept)
        return x[:, 0], tuple(past)
