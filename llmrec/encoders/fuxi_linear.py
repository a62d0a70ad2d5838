"""FuXi-Linear: time-aware sequences of thousands of events in linear time, and a state of constant size per user.

A block runs three channels of decayed linear attention (`llmrec.blocks.linear_attention`) over the same normalised
input, normalises each, gates them with u and merges them:

    retention   q, k, v of the content, decay exp(-lambda_h) an event and head
    temporal    q.k = sin or cos of omega_h (tau_i - t_j), decay gamma_h^(omega_h (tau_i - t_j)), values x Wv
    positional  q.k = P_i . P_j / (p / 2) with a learned table P, no decay, values x Wp

    xn = LN(x);  [u | q | k | v] = SiLU(xn W);  g = u * [LN(Y_r), LN(Y_t), LN(Y_p)];  x <- MFFN(g, x)

State i is asked at tau_i, the time of the event it predicts (`time: target`), or at its own time (`time: last`).
`time: none` removes the temporal channel: two channels, a gate 2d wide. Queries, keys and decays of the temporal
channel depend on times alone (`llmrec.blocks.periodic_time`): they are built once and shared by all blocks.

Three forms give the same states: quadratic (`chunk_size: null`, the reference), chunked, and recurrent (`init_state`,
`step`, `read`). What an event means to deeper blocks depends on when the next one happens, which is not known when it
arrives. A state therefore holds the sums BEFORE the latest event, and the event itself: `read` runs it through the
blocks for the time asked, `step` first commits it with the new event's time. A user who outgrows `max_history` is
refused: positions were never learned there, and a sum cannot forget its oldest event; call `prefill` with the latest
events instead (with half of them, the cost is constant per event).

Ours: the recurrent form (the release has none); the temporal channel as a scan over its two features instead of a
matrix of pairs; states are not L2-normalised here, cosine scores do it; periods are in seconds (as on ML-20M);
gaps of unsorted events count as 0. RoPE in the retention channel, off in every published setting, is left out.

Shapes: item_ids [B, L], hidden [B, L, d]; H heads, G = 2 num_periods groups (sin, then cos), p position_width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmrec.blocks.linear_attention import (
    channel_scan,
    chunked_form,
    final_state,
    quadratic_form,
    read_state,
    step_state,
)
from llmrec.blocks.multi_stage import MultiStageFeedForward
from llmrec.blocks.periodic_time import PeriodicTime, TimeFeatures, event_steps, repeat_channels
from llmrec.blocks.readout import padding_mask, top_items
from llmrec.data.schema import Ranking
from llmrec.encoders.base import (
    EncoderOutput,
    SequenceEncoder,
    TimeAware,
    TimeAwareConfig,
    check_history,
    register,
)
from llmrec.errors import DataError, RecipeError
from llmrec.paper import Paper

if TYPE_CHECKING:
    from llmrec.data.schema import SequenceBatch

PAPER = Paper(
    title="FuXi-Linear: Unleashing the Power of Linear Attention in Long-term Time-aware Sequential Recommendation",
    venue="arXiv 2026",
    url_id="2602.23671",
    system="FuXi-Linear",
)
NORM_EPS = 1e-6


class FuXiLinearConfig(TimeAwareConfig):
    """Options of FuXi-Linear.

    Args:
        num_layers: Number of blocks.
        num_heads: H, heads of the retention channel; must divide hidden_size.
        qk_size: Width of a head's queries and keys; None is hidden_size / num_heads.
        chunk_size: c, the longest chunk; None computes every channel as a matrix of pairs (slow, the reference).
        num_periods: Periods of the temporal channel; twice as many groups must divide hidden_size.
        period_base, period_start, period_stride: Period h lasts base^(start + stride h) seconds. The default is 1 s,
            16 s, 4 min, 68 min, 18 h, 12 d, 194 d and 8.5 years.
        learnable_decay: Learn gamma_h, from 0.5, instead of keeping it there.
        augment_current: Add the current value to the temporal and positional channels, with learned weights.
        position_width: p; even.
        multiplier: Width of the feed-forward layer in units of hidden_size.
    """

    model_type = "llmrec_fuxi_linear"

    dropout: float = 0.2
    similarity: Literal["dot", "cosine"] = "cosine"
    temperature: float = 0.05
    num_layers: int = 2
    num_heads: int = 2
    qk_size: int | None = None
    chunk_size: int | None = 128
    num_periods: int = 8
    period_base: int = 16
    period_start: int = 0
    period_stride: int = 1
    learnable_decay: bool = False
    augment_current: bool = False
    position_width: int = 32
    multiplier: int = 1

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        d, groups = self.hidden_size, 2 * self.num_periods
        last = self.period_start + self.period_stride * (self.num_periods - 1)
        _check(self.num_heads >= 1 and d % self.num_heads == 0, "num_heads", self.num_heads, f"a divisor of {d}")
        _check(self.qk_size is None or self.qk_size >= 1, "qk_size", self.qk_size, "a width from 1, or null")
        _check(self.chunk_size is None or self.chunk_size >= 1, "chunk_size", self.chunk_size, "1 or more, or null")
        _check(self.position_width >= 2 and self.position_width % 2 == 0, "position_width", self.position_width, "even")
        _check(self.multiplier >= 1, "multiplier", self.multiplier, "a whole number from 1")
        if self.time == "none":
            return
        _check(self.num_periods >= 1 and d % groups == 0, "num_periods", self.num_periods, f"a divisor of {d} / 2")
        _check(self.period_base >= 2, "period_base", self.period_base, "a whole number of seconds from 2")
        _check(self.period_start >= 0, "period_start", self.period_start, "0 or more")
        _check(self.period_stride >= 1, "period_stride", self.period_stride, "1 or more")
        _check(self.period_base**last < 2**62, "period_base", self.period_base, "periods below 2^62 seconds")

    @property
    def periods(self) -> tuple[int, ...]:
        """T_h in seconds."""
        steps = range(self.num_periods)
        return tuple(self.period_base ** (self.period_start + self.period_stride * h) for h in steps)

    @property
    def channels(self) -> int:
        """3, or 2 without the temporal channel."""
        return 2 if self.time == "none" else 3


def _given(value: Any) -> Any:
    """A part that exists whenever the caller's channel does."""
    assert value is not None
    return value


def _check(fine: bool, option: str, found: object, expected: str) -> None:
    if not fine:
        raise RecipeError(f"encoder.{option}: found {found!r}, expected {expected}")


@dataclass(frozen=True)
class BlockState:
    """Sums of one block over committed events: H q v + 2 d + p d numbers, whatever the length of the history.

    Args:
        retention: [B, H, q, d / H].
        temporal: [B, G, 2, d / G]; None without a temporal channel.
        positional: [B, p, d].
    """

    retention: Tensor
    temporal: Tensor | None
    positional: Tensor


@dataclass(frozen=True)
class FuXiLinearState:
    """What is kept of B growing histories.

    Args:
        item_ids: [B], the latest event; 0 before the first one.
        times: [B] int64, its time.
        previous: [B] int64, the time of the event before it.
        counts: [B], events so far.
        blocks: The sums of all events before the latest one.
    """

    item_ids: Tensor
    times: Tensor
    previous: Tensor
    counts: Tensor
    blocks: tuple[BlockState, ...]


class PositionTable(nn.Embedding):
    """P: one learned vector per position, sinusoidal at first (`_init_weights` fills it)."""

    def unit(self, width: int) -> Tensor:
        """[L, p]: the first rows divided by sqrt(p / 2); queries and keys alike, unit length at first."""
        return self.weight[:width] / math.sqrt(self.embedding_dim / 2)

    def reset_to_sinusoids(self) -> None:
        """[sin(n theta_m), cos(n theta_m)] with theta_m = 10000^(-m / (p / 2)), so that P_i . P_i = p / 2."""
        half = self.embedding_dim // 2
        rates = 10000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
        angles = torch.arange(self.num_embeddings, dtype=torch.float32)[:, None] * rates
        with torch.no_grad():
            self.weight.copy_(torch.cat([angles.sin(), angles.cos()], dim=1))


@dataclass(frozen=True)
class Projected:
    """What a block computes event by event: gate u [..., n d], heads [..., H, width], values of channels [..., d]."""

    gate: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    temporal: Tensor | None
    positional: Tensor


class FuXiLinearBlock(nn.Module):
    """Channels, gate and feed-forward; `forward` over whole histories, `advance` by one event."""

    def __init__(self, config: FuXiLinearConfig) -> None:
        super().__init__()
        width, heads, channels = config.hidden_size, config.num_heads, config.channels
        qk_width = heads * (config.qk_size or width // heads)
        self.width, self.heads, self.groups, self.chunk_size = width, heads, 2 * config.num_periods, config.chunk_size
        self.splits = (channels * width, qk_width, qk_width, width)
        self.content = nn.Linear(width, sum(self.splits), bias=False)  # W
        self.values = nn.Linear(width, (channels - 1) * width, bias=False)  # [Wv |] Wp
        self.forgetting = nn.Parameter(torch.empty(heads))  # g
        self.positions = PositionTable(config.max_history, config.position_width)
        self.current: nn.ParameterDict | None = None
        if config.augment_current:
            sizes = {"positional": 1} | ({"temporal": self.groups} if channels == 3 else {})
            self.current = nn.ParameterDict({name: nn.Parameter(torch.empty(2, n)) for name, n in sizes.items()})
        self.feed_forward = MultiStageFeedForward(
            channels * width, width, multiplier=config.multiplier, dropout=config.dropout, bias=False
        )

    def initialise(self, std: float) -> None:
        """Fresh values of what is not a plain weight; the values' maps start as in the release."""
        nn.init.normal_(self.forgetting, std=std)
        nn.init.kaiming_uniform_(self.values.weight, a=math.sqrt(5))
        for weights in (self.current or {}).values():
            nn.init.normal_(weights[0], std=std)
            nn.init.ones_(weights[1])

    def rates(self) -> Tensor:
        """[H]: lambda_h = exp(-(softplus(g_0) + ... + softplus(g_h))), about 0.5^(h+1) at first; float32."""
        return F.softplus(self.forgetting.float()).cumsum(0).neg().exp()

    def project(self, x: Tensor) -> Projected:
        """[..., d] -> gate, queries, keys and values. The query carries the retention channel's exp(-lambda)."""
        normed = F.layer_norm(x.float(), (self.width,), eps=NORM_EPS).to(x.dtype)
        gate, query, key, value = F.silu(self.content(normed)).split(self.splits, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)) for part in (query, key, value))
        values = self.values(normed).split(self.width, dim=-1)
        query = query * self.rates().neg().exp()[:, None].to(query.dtype)
        return Projected(gate, query, key, value, values[0] if len(values) == 2 else None, values[-1])

    def merge(self, x: Tensor, parts: Projected, mixed: Tensor, timed: Tensor | None, placed: Tensor) -> Tensor:
        """Outputs of the channels, each [..., d], -> the block's output [..., d]."""
        if self.current is not None:
            placed = self._with_current("positional", placed, parts.positional)
            timed = None if timed is None else self._with_current("temporal", timed, parts.temporal)
        outputs = [mixed, placed] if timed is None else [mixed, timed, placed]
        # Sums grow with the history: normalised in float32, channel by channel.
        joined = torch.stack([output.float() for output in outputs], dim=-2)
        normed = F.layer_norm(joined, (self.width,), eps=NORM_EPS).flatten(-2)
        return self.feed_forward(parts.gate * normed.to(x.dtype), x)

    def _with_current(self, name: str, output: Tensor, value: Tensor | None) -> Tensor:
        weights = _given(self.current)[name]
        scale, skip = repeat_channels(weights, self.width // weights.shape[1])
        return scale * output + skip * _given(value)

    def forward(self, x: Tensor, time: TimeFeatures | None) -> Tensor:
        """[B, L, d] -> [B, L, d]."""
        return self.mix(x, self.project(x), time)

    def mix(self, x: Tensor, parts: Projected, time: TimeFeatures | None) -> Tensor:
        """[B, L, d] and its projections -> [B, L, d]."""
        query, key, value = (part.transpose(1, 2) for part in (parts.query, parts.key, parts.value))
        mixed = self._attend(query, key, value, self.rates()[:, None]).transpose(1, 2).flatten(2)
        timed = None
        if time is not None and time.spread is not None and self.chunk_size is not None:
            query, key, kept = time.spread
            timed = channel_scan(query, key, _given(parts.temporal).float(), kept, self.chunk_size)
        elif time is not None:
            query, key = (y.permute(0, 3, 1, 2) for y in (time.query, time.key))
            timed = quadratic_form(query, key, self._grouped(parts.temporal), time.log_decay.transpose(1, 2))
            timed = timed.transpose(1, 2).flatten(2)
        table = self.positions.unit(x.shape[1])
        placed = self._attend(table, table, parts.positional)
        return self.merge(x, parts, mixed, timed, placed)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None = None) -> Tensor:
        if self.chunk_size is None:
            return quadratic_form(query, key, value, log_decay)
        return chunked_form(query, key, value, log_decay, chunk_size=self.chunk_size)

    def _grouped(self, value: Tensor | None) -> Tensor:
        """[B, L, d] -> [B, G, L, d / G], float32."""
        return _given(value).float().unflatten(-1, (self.groups, -1)).transpose(1, 2)

    def empty_state(self, rows: int) -> BlockState:
        """Zeros in float32."""
        zeros = self.positions.weight.new_zeros((), dtype=torch.float32)
        _, qk_width, _, width = self.splits
        timed = zeros.new_zeros(rows, self.groups, 2, width // self.groups) if self.splits[0] == 3 * width else None
        retention = zeros.new_zeros(rows, self.heads, qk_width // self.heads, width // self.heads)
        return BlockState(retention, timed, zeros.new_zeros(rows, self.positions.embedding_dim, width))

    def state_of(self, parts: Projected, ages: Tensor, time: TimeFeatures | None, left: Tensor | None) -> BlockState:
        """Sums of whole histories, each at its own end.

        Args:
            parts: Of [B, L, d] inputs.
            ages: [B, L], events between this one and the end; negative outside the history.
            time, left: Features, and [B, G, L] what is left of each event by decay in time.
        """
        inside = (ages >= 0).float()
        kept = (-self.rates()[:, None] * ages[:, None].clamp(min=0)).exp() * inside[:, None]
        retention = final_state(parts.key.float().transpose(1, 2), parts.value.float().transpose(1, 2), kept)
        timed = None
        if time is not None and left is not None:
            timed = final_state(time.key.permute(0, 3, 1, 2), self._grouped(parts.temporal), left * inside[:, None])
        table = self.positions.unit(ages.shape[1]).float()
        return BlockState(retention, timed, final_state(table, parts.positional.float(), inside))

    def advance(
        self, state: BlockState, x: Tensor, positions: Tensor, time: TimeFeatures | None
    ) -> tuple[Tensor, BlockState]:
        """One event per row: [B, d] and the sums before it -> [B, d] and the sums with it.

        Args:
            state: Sums before the event.
            x: [B, d].
            positions: [B], from 0.
            time: Features of one position, L = 1.
        """
        parts = self.project(x)
        retention = step_state(state.retention, parts.key.float(), parts.value.float(), self.rates())
        mixed = read_state(retention, parts.query.float()).flatten(1)
        timed, temporal = None, None
        if time is not None and state.temporal is not None:
            value = self._grouped(_given(parts.temporal)[:, None])[:, :, 0]
            key, query = time.key[:, 0].transpose(1, 2), time.query[:, 0].transpose(1, 2)
            temporal = step_state(state.temporal, key, value, time.log_decay[:, 0])
            timed = read_state(temporal, query).flatten(1)
        place = self.positions(positions).float() / math.sqrt(self.positions.embedding_dim / 2)
        positional = step_state(state.positional, place, parts.positional.float())
        placed = read_state(positional, place)
        return self.merge(x, parts, mixed, timed, placed), BlockState(retention, temporal, positional)


class FuXiLinearEncoder(TimeAware, SequenceEncoder):
    """Blocks over item and position embeddings; also an `IncrementalEncoder`.

    Call `eval()` before streaming: `prefill`, `step` and `read` would apply dropout in training mode.
    """

    config_class = FuXiLinearConfig
    config: FuXiLinearConfig

    def __init__(self, config: FuXiLinearConfig) -> None:
        super().__init__(config)
        self.item_embedding = nn.Embedding(config.num_items + 1, config.hidden_size, padding_idx=0)
        self.position_embedding = nn.Embedding(config.max_history, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.clock = PeriodicTime(config.periods, learnable=config.learnable_decay) if config.time != "none" else None
        self.blocks = nn.ModuleList(FuXiLinearBlock(config) for _ in range(config.num_layers))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights (no Xavier in the feed-forward, as in the release), sinusoidal tables; see the block."""
        if isinstance(module, PositionTable):
            module.reset_to_sinusoids()
            return
        super()._init_weights(module)
        if isinstance(module, FuXiLinearBlock):
            module.initialise(self.config.initializer_range)
        elif isinstance(module, PeriodicTime):
            module.reset_parameters(self.config.initializer_range)

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
            timestamps: [B, L] int64 seconds; not with `time: none`.
            target_timestamps: [B] int64 seconds; with `time: target`.

        Raises:
            DataError: The batch is longer than `max_history`.
        """
        check_history(item_ids, self.config.max_history)
        real = padding_mask(lengths, item_ids.shape[1]).unsqueeze(-1)
        places = torch.arange(item_ids.shape[1], device=item_ids.device)
        hidden = self._embed(item_ids, places, item_embeds).masked_fill(~real, 0.0)
        time = self._history_features(timestamps, self.query_times(lengths, timestamps, target_timestamps))
        for block in self.blocks:
            hidden = block(hidden, time)
        hidden = hidden.masked_fill(~real, 0.0)
        return EncoderOutput(hidden=hidden, user_repr=self.last_state(hidden, lengths))

    def _history_features(self, timestamps: Tensor | None, queries: Tensor | None) -> TimeFeatures | None:
        if self.clock is None or timestamps is None or queries is None:
            return None
        features: TimeFeatures = self.clock(timestamps, queries, event_steps(timestamps))
        return features if self.config.chunk_size is None else features.spread_over(self.config.hidden_size)

    def _layers(self) -> list[FuXiLinearBlock]:
        return [cast(FuXiLinearBlock, block) for block in self.blocks]

    def _embed(self, item_ids: Tensor, places: Tensor, item_embeds: Tensor | None = None) -> Tensor:
        items = self.item_embedding(item_ids) if item_embeds is None else item_embeds
        embedded: Tensor = self.dropout(items * math.sqrt(self.config.hidden_size) + self.position_embedding(places))
        return embedded

    # Growing histories -----------------------------------------------------------------------------------------------

    def init_state(self, batch_size: int) -> FuXiLinearState:
        """Nothing has happened yet."""
        none = torch.zeros(batch_size, dtype=torch.long, device=self.item_embedding.weight.device)
        return FuXiLinearState(none, none, none, none, tuple(block.empty_state(batch_size) for block in self._layers()))

    @torch.no_grad()
    def prefill(self, batch: SequenceBatch) -> FuXiLinearState:
        """The state after whole histories, in one parallel pass; each row ends at its own length.

        Args:
            batch: `item_ids`, `lengths` and, unless `time: none`, `timestamps`.

        Raises:
            DataError: The batch is longer than `max_history`, or has no times.
        """
        item_ids, lengths = batch["item_ids"], batch["lengths"]
        check_history(item_ids, self.config.max_history)
        times = self._times(batch.get("timestamps"), item_ids)
        places = torch.arange(item_ids.shape[1], device=item_ids.device)
        latest, before = lengths - 1, (lengths - 2).clamp(min=0)
        # The latest event is not committed, so the time it would be asked at (any) reaches no sum.
        queries = self.query_times(lengths, times, _at(times, latest))
        time = self._history_features(None if queries is None else times, queries)
        left = None if self.clock is None else self.clock.left_at(times, before)
        hidden = self._embed(item_ids, places)
        states = []
        for block in self._layers():
            parts = block.project(hidden)
            states.append(block.state_of(parts, (lengths - 2)[:, None] - places, time, left))
            hidden = block.mix(hidden, parts, time)
        return FuXiLinearState(_at(item_ids, latest), _at(times, latest), _at(times, before), lengths, tuple(states))

    @torch.no_grad()
    def step(self, state: FuXiLinearState, item_ids: Tensor, timestamps: Tensor | None = None) -> FuXiLinearState:
        """The state after one more event per row.

        Args:
            state: It is left as it was.
            item_ids: [B]; a row with 0 has no new event and keeps its state.
            timestamps: [B] int64 seconds; not needed with `time: none`.

        Raises:
            DataError: A history would be longer than `max_history`, an item is outside the catalogue, or times are
                missing.
        """
        times = self._times(timestamps, item_ids)
        arrived = item_ids > 0
        counts = state.counts + arrived
        self._check_step(item_ids, counts)
        commits = arrived & (state.counts > 0)
        _, committed = self._advance(state, state.times if self.config.time == "last" else times)
        return FuXiLinearState(
            item_ids=torch.where(arrived, item_ids, state.item_ids),
            times=torch.where(arrived, times, state.times),
            previous=torch.where(commits, state.times, state.previous),
            counts=counts,
            blocks=tuple(_choose(commits, new, old) for new, old in zip(committed, state.blocks, strict=True)),
        )

    @torch.no_grad()
    def read(self, state: FuXiLinearState, target_timestamps: Tensor | None = None) -> Tensor:
        """[B, d]: the representation of the histories, asked at a time.

        Args:
            state: With one event per row at least.
            target_timestamps: [B] int64 seconds; with `time: target`.

        Raises:
            DataError: A row has no event yet, or `target_timestamps` is missing.
        """
        if not bool((state.counts > 0).all()):
            raise DataError("nothing to read", found="a row without events", expected="one event or more in every row")
        if self.config.time == "target" and target_timestamps is None:
            raise DataError("target_timestamps is missing", expected="the time of the question, as time: target asks")
        asked = target_timestamps if self.config.time == "target" else state.times
        return self._advance(state, _given(asked))[0]

    def recommend_from(
        self, state: FuXiLinearState, k: int, target_timestamps: Tensor | None = None, seen: Tensor | None = None
    ) -> Ranking:
        """The k best items per row of a state, without reading the history again.

        Args:
            state, target_timestamps: As for `read`.
            k: How many.
            seen: [B, S] item ids never to recommend, padded with 0; the state does not remember single items.
        """
        return Ranking(*top_items(self.score(self.read(state, target_timestamps)), k, seen=seen))

    def _advance(self, state: FuXiLinearState, asked: Tensor) -> tuple[Tensor, list[BlockState]]:
        """Run the latest events through the blocks, asked at [B] times; the sums with those events in them."""
        places = (state.counts - 1).clamp(min=0)
        hidden, blocks = self._embed(state.item_ids, places), []
        time = None
        if self.clock is not None:
            steps = (state.times - state.previous).clamp(min=0)
            time = self.clock(state.times[:, None], asked[:, None], steps[:, None])
        for block, sums in zip(self._layers(), state.blocks, strict=True):
            hidden, advanced = block.advance(sums, hidden, places, time)
            blocks.append(advanced)
        return hidden, blocks

    def _times(self, timestamps: Tensor | None, item_ids: Tensor) -> Tensor:
        """The given times; zeros where the encoder reads none."""
        if self.config.time == "none":
            return torch.zeros_like(item_ids)
        if timestamps is None:
            raise DataError("timestamps is missing", expected=f"a time per event, as time: {self.config.time} asks")
        return timestamps

    def _check_step(self, item_ids: Tensor, counts: Tensor) -> None:
        """Refuse items outside the catalogue and histories that outgrow the positions."""
        if bool(((item_ids < 0) | (item_ids > self.config.num_items)).any()):
            largest = int(item_ids.max())
            raise DataError(
                "item_ids: an item is outside the catalogue",
                found=f"ids {int(item_ids.min())} to {largest}",
                expected=f"1 to {self.config.num_items}, or 0 for no event",
            )
        if bool((counts > self.config.max_history).any()):
            raise DataError(
                "a history has outgrown the encoder's positions",
                found=f"{int((counts > self.config.max_history).sum())} rows with {int(counts.max())} events",
                expected=f"at most max_history = {self.config.max_history}",
                remedy="prefill those rows with their latest events (half of max_history, say) and go on from there",
            )


def _at(x: Tensor, places: Tensor) -> Tensor:
    """[B, L], [B] -> [B]."""
    return x.gather(1, places[:, None])[:, 0]


def _choose(rows: Tensor, new: BlockState, old: BlockState) -> BlockState:
    """The new sums in the chosen rows, the old ones elsewhere."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(rows[:, None, None] if a.dim() == 3 else rows[:, None, None, None], a, b)

    temporal = None if new.temporal is None else pick(new.temporal, _given(old.temporal))
    return BlockState(pick(new.retention, old.retention), temporal, pick(new.positional, old.positional))


register(FuXiLinearConfig, FuXiLinearEncoder)
