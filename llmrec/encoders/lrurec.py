"""LRURec: linear recurrent units for sequential recommendation (WSDM 2024).

A history is read by a complex diagonal linear recurrence, so that training runs in parallel over positions while a new
event costs one step from a state of constant size:

    lambda = exp(-exp(nu) + i exp(theta)),   h_t = lambda h_{t-1} + exp(gamma) (B x_t + b),   y_t = Re(C h_t) + c
    x <- LN(x + dropout(y));   x <- LN(x + FFN(x)), GELU, width 4d;   r_t = x_t . E[j] + bias_j

There are no positions: the recurrence knows the order, and any length can be read. From the paper: the block, the state
of 2d complex numbers, |lambda| uniform in area in a ring, truncated normal weights, the bias per item, full softmax.

Departures:
- Batches are right padded. The paper pads on the left because its scan reads a mask at the borders of segments only; in
  a causal recurrence padding on the right reaches no real state. `diagonal_scan` takes left padded input with `valid`.
- The scan works in place on any length (no padding to a power of two) and has a backward of its own: one scan in
  reverse, which stores the states and nothing per doubling.
- Nothing complex is stored: B and C are real maps to and from pairs (re, im), which is the same function (the imaginary
  part of the published output bias never reaches the output, and is absent). The recurrence itself is complex64
  whatever the type of the model or of autocast.
- |lambda| stays below 1 in float32 too: exp(nu) is at least 1e-6.

Shapes: item_ids [B, L], hidden [B, L, d], n = state_expansion * d complex states per layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import initialization

from llmrec.blocks.feedforward import FeedForward
from llmrec.blocks.readout import padding_mask
from llmrec.encoders.base import EncoderOutput, SequenceEncoder, SequenceEncoderConfig, register
from llmrec.errors import RecipeError
from llmrec.paper import Paper

PAPER = Paper(
    title="Linear Recurrent Units for Sequential Recommendation",
    venue="WSDM 2024",
    url_id="2310.02367",
    system="LRURec",
)
SLOWEST_RATE = 1e-6
"""Smallest -ln |lambda|: exp(-x) of anything below 6e-8 is 1 in float32."""


class LRURecConfig(SequenceEncoderConfig):
    """Options of LRURec.

    Args:
        num_layers: Number of blocks.
        state_expansion: Complex states per layer, as a multiple of hidden_size.
        inner_size: Width of the feed-forward layer; None is 4 hidden_size.
        min_radius: Smallest initial |lambda|.
        max_radius: Largest initial |lambda|.
        item_bias: Add a learned bias per item to the scores.
    """

    model_type = "llmrec_lrurec"

    dropout: float = 0.2
    num_layers: int = 2
    state_expansion: int = 2
    inner_size: int | None = None
    min_radius: float = 0.8
    max_radius: float = 0.99
    item_bias: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in ("num_layers", "state_expansion"):
            if getattr(self, name) < 1:
                raise RecipeError(f"encoder.{name}: found {getattr(self, name)}, expected at least 1")
        if not 0 <= self.min_radius < self.max_radius < 1:
            raise RecipeError(
                f"encoder.min_radius, max_radius: found {self.min_radius} and {self.max_radius}, "
                "expected 0 <= min_radius < max_radius < 1"
            )


class _DiagonalScan(torch.autograd.Function):
    """h_t = decay h_{t-1} + v_t; its gradient is the same recurrence with the conjugate decay, backwards in time."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, decay: Tensor) -> Tensor:
        states = _double_up(values.clone(memory_format=torch.contiguous_format), decay)
        ctx.save_for_backward(states, decay)
        return states

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        states, decay = ctx.saved_tensors
        inner: Tensor = _DiagonalScan.apply(grad.flip(1), decay.conj().resolve_conj()).flip(1)  # type: ignore[no-untyped-call]
        return inner, torch.einsum("bln,bln->n", inner[:, 1:], states[:, :-1].conj())


def _double_up(states: Tensor, decay: Tensor) -> Tensor:
    """The scan in place, by log2(L) doublings: the end of each first half is carried through the second half."""
    length, half = states.shape[1], 1
    powers = decay[None]  # [half, n]: decay^1 .. decay^half
    while half < length:
        whole = length // (2 * half) * 2 * half
        pairs = states[:, :whole].unflatten(1, (-1, 2 * half))
        pairs[:, :, half:].addcmul_(powers, pairs[:, :, half - 1 : half])
        if length - whole > half:  # a last segment whose second half is cut short
            rest = states[:, whole + half :]
            rest.addcmul_(powers[: rest.shape[1]], states[:, whole + half - 1 : whole + half])
        powers = torch.cat([powers, powers * powers[-1:]])
        half *= 2
    return states


def diagonal_scan(values: Tensor, decay: Tensor, valid: Tensor | None = None) -> Tensor:
    """All states of h_t = decay * h_{t-1} + values_t, h_0 = 0, in log2(L) parallel steps.

    Args:
        values: [B, L, n] complex.
        decay: [n] complex, |decay| < 1.
        valid: [B, L] bool; values at other positions count as 0, so that left padding leaves the state empty.

    Returns:
        [B, L, n] complex. Differentiable twice.
    """
    if valid is not None:
        values = values.masked_fill(~valid.unsqueeze(-1), 0.0)
    states: Tensor = _DiagonalScan.apply(values, decay)  # type: ignore[no-untyped-call]
    return states


class LinearRecurrentUnit(nn.Module):
    """One diagonal recurrence with its maps into and out of the state; the paper's symbols in brackets."""

    def __init__(self, config: LRURecConfig) -> None:
        super().__init__()
        width, states = config.hidden_size, config.state_expansion * config.hidden_size
        self.log_rate = nn.Parameter(torch.empty(states))  # nu
        self.log_phase = nn.Parameter(torch.empty(states))  # theta
        self.log_scale = nn.Parameter(torch.empty(states))  # gamma
        self.input = nn.Linear(width, 2 * states)  # B and b, pairs (re, im)
        self.output = nn.Linear(2 * states, width)  # C and c

    def decay(self) -> Tensor:
        """lambda, [n] complex64."""
        radius = torch.exp(-torch.exp(self.log_rate.float()).clamp(min=SLOWEST_RATE))
        return torch.polar(radius, torch.exp(self.log_phase.float()))

    def drive(self, x: Tensor) -> Tensor:
        """exp(gamma) (B x + b): [..., d] -> [..., n] complex64."""
        scale = torch.exp(self.log_scale.float()).repeat_interleave(2)
        return torch.view_as_complex((self.input(x).float() * scale).unflatten(-1, (-1, 2)))

    def read(self, states: Tensor) -> Tensor:
        """Re(C h) + c: [..., n] complex64 -> [..., d]."""
        return self.output(torch.view_as_real(states).flatten(-2).to(self.output.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, d] -> [B, L, d]."""
        return self.read(diagonal_scan(self.drive(x), self.decay()))

    def step(self, x: Tensor, state: Tensor) -> Tensor:
        """One event: [B, d] and [B, n] -> [B, n]."""
        return self.decay() * state + self.drive(x)


class LRUBlock(nn.Module):
    """Recurrence and feed-forward, each with dropout, residual and a norm behind it."""

    def __init__(self, config: LRURecConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.unit = LinearRecurrentUnit(config)
        self.unit_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(
            width, config.inner_size or 4 * width, activation="gelu", dropout=config.dropout
        )
        self.feed_forward_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, d] -> [B, L, d]."""
        return self._join(x, self.unit(x))

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One event: [B, d] and [B, n] -> the same."""
        state = self.unit.step(x, state)
        return self._join(x, self.unit.read(state)), state

    def _join(self, x: Tensor, branch: Tensor) -> Tensor:
        x = self.unit_norm(x + self.dropout(branch))
        return self.feed_forward_norm(x + self.feed_forward(x))


@dataclass(frozen=True)
class LRUState:
    """Everything that is kept of a history, whatever its length.

    Args:
        recurrent: [layers, B, n] complex64.
        hidden: [B, d], the output after the latest event; zero before the first one.
    """

    recurrent: Tensor
    hidden: Tensor


class LRURecEncoder(SequenceEncoder):
    """Linear recurrent units over tied item embeddings; an `IncrementalEncoder`."""

    config_class = LRURecConfig
    config: LRURecConfig

    def __init__(self, config: LRURecConfig) -> None:
        super().__init__(config)
        self.item_embedding = nn.Embedding(config.num_items + 1, config.hidden_size, padding_idx=0)
        self.dropout = nn.Dropout(config.dropout)
        self.input_norm = nn.LayerNorm(config.hidden_size)
        self.blocks = nn.ModuleList(LRUBlock(config) for _ in range(config.num_layers))
        self.item_bias = nn.Parameter(torch.empty(config.num_items + 1)) if config.item_bias else None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Truncated normal matrices; eigenvalues uniform in area in the ring; scales that keep the state's variance."""
        super()._init_weights(module)
        std, inner, outer = self.config.initializer_range, self.config.min_radius**2, self.config.max_radius**2
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        if isinstance(module, nn.Embedding) and not getattr(module.weight, "_is_hf_initialized", False):
            with torch.no_grad():
                module.weight[0].zero_()
        elif isinstance(module, LinearRecurrentUnit):
            area, angle = torch.rand_like(module.log_rate), torch.rand_like(module.log_phase).clamp(min=1e-6)
            squared = area * (outer - inner) + inner  # |lambda|^2
            initialization.copy_(module.log_rate, torch.log(-0.5 * torch.log(squared)))
            initialization.copy_(module.log_phase, torch.log(2 * math.pi * angle))
            initialization.copy_(module.log_scale, 0.5 * torch.log1p(-squared))
        elif module is self and self.item_bias is not None:
            nn.init.zeros_(self.item_bias)

    def forward(
        self, item_ids: Tensor, lengths: Tensor, *, item_embeds: Tensor | None = None, **features: Tensor
    ) -> EncoderOutput:
        """States of a batch of any length; see the base class."""
        items = self.item_embedding(item_ids) if item_embeds is None else item_embeds
        hidden = self.input_norm(self.dropout(items))
        for block in self.blocks:
            hidden = block(hidden)
        # Padding stands right of every real position and the recurrence runs from left to right.
        hidden = hidden.masked_fill(~padding_mask(lengths, item_ids.shape[1]).unsqueeze(-1), 0.0)
        return EncoderOutput(hidden=hidden, user_repr=self.last_state(hidden, lengths))

    def score(self, user_repr: Tensor, item_ids: Tensor | None = None) -> Tensor:
        """Products with the item table plus the bias of each item; see the base class."""
        scores = super().score(user_repr, item_ids)
        if self.item_bias is None:
            return scores
        return scores + (self.item_bias if item_ids is None else self.item_bias[item_ids]).to(scores.dtype)

    def init_state(self, batch_size: int) -> LRUState:
        """Empty states: [layers, B, n] and [B, d] zeros."""
        width, layers = self.config.hidden_size, self.config.num_layers
        shape = (layers, batch_size, self.config.state_expansion * width)
        recurrent = torch.zeros(shape, dtype=torch.complex64, device=self.device)
        return LRUState(recurrent, torch.zeros(batch_size, width, dtype=self.dtype, device=self.device))

    @torch.no_grad()
    def step(self, state: LRUState, item_ids: Tensor, timestamps: Tensor | None = None) -> LRUState:
        """One more event per user, in time and memory that do not depend on the history; item 0 changes nothing.

        Args:
            state: Of `init_state` or an earlier step; it is left as it is.
            item_ids: [B].
            timestamps: Not read.
        """
        hidden, recurrent = self.input_norm(self.dropout(self.item_embedding(item_ids))), []
        for block, before in zip(self.blocks, state.recurrent, strict=True):
            hidden, after = cast(LRUBlock, block).step(hidden, before)
            recurrent.append(after)
        real = (item_ids > 0)[:, None]
        return LRUState(
            torch.where(real, torch.stack(recurrent), state.recurrent), torch.where(real, hidden, state.hidden)
        )

    def read(self, state: LRUState, target_timestamps: Tensor | None = None) -> Tensor:
        """[B, d]: what `user_representation` gives for the events read so far."""
        return state.hidden


register(LRURecConfig, LRURecEncoder)
