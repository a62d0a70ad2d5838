"""Mamba4Rec: selective state spaces for sequential recommendation (arXiv 2024).

A history is read by a linear recurrence whose step size and whose maps into and out of the state depend on the event:

    [a, z] = x W_in,   a = SiLU(causal depthwise convolution of a over 4 events),   [dt, B_t, C_t] = a W_x
    Delta = softplus(dt W_dt + b_dt),   A = -exp(log_rates)
    S_t = exp(Delta_t A) S_{t-1} + (Delta_t a_t) B_t^T,   y_t = S_t C_t + D a_t,   out = (y * SiLU(z)) W_out
    x <- LN(x + dropout(Mamba(x)));   x <- LN(x + FFN(x)), GELU, width 4d

There are no positions, and any length can be read. From the paper: the layer, and that a single layer has no residual
around its Mamba part. Departures:
- The scan is plain PyTorch: a loop over time with a backward of its own that keeps one state per chunk of events and
  computes the others again. First derivatives only.
- A is stored as one vector, so that weight decay, which touches matrices, leaves the rates alone, as in Mamba.
- The recurrence is float32 whatever the type of the model or of autocast.

Shapes: item_ids [B, L], hidden [B, L, d], c = expand * d channels, n = state_size, states [B, n, c].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import initialization

from llmrec.blocks.feedforward import FeedForward
from llmrec.blocks.readout import padding_mask
from llmrec.encoders.base import EncoderOutput, SequenceEncoder, SequenceEncoderConfig, register
from llmrec.errors import RecipeError
from llmrec.paper import Paper

PAPER = Paper(
    title="Mamba4Rec: Towards Efficient Sequential Recommendation with Selective State Space Models",
    venue="arXiv 2024",
    url_id="2403.03900",
    system="Mamba4Rec",
)
CHUNK = 16
"""Events per chunk of the scan: the backward holds this many states at a time, the forward L / CHUNK."""
MIN_STEP, MAX_STEP = 1e-3, 0.1
"""Initial step sizes Delta are log-uniform between these."""


class Mamba4RecConfig(SequenceEncoderConfig):
    """Options of Mamba4Rec.

    Args:
        num_layers: Number of layers; a single one has no residual around its Mamba part.
        state_size: n, states per channel.
        conv_width: Events the convolution sees.
        expand: Channels as a multiple of hidden_size.
        inner_size: Width of the feed-forward layer; None is 4 hidden_size.
    """

    model_type = "llmrec_mamba4rec"

    dropout: float = 0.2
    num_layers: int = 1
    state_size: int = 32
    conv_width: int = 4
    expand: int = 2
    inner_size: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in ("num_layers", "state_size", "conv_width", "expand"):
            if getattr(self, name) < 1:
                raise RecipeError(f"encoder.{name}: found {getattr(self, name)}, expected at least 1")


class _SelectiveScan(torch.autograd.Function):
    """Loop over time; time-major inputs. The backward recomputes the states of one chunk at a time."""

    @staticmethod
    def forward(ctx: Any, drive: Tensor, delta: Tensor, rates: Tensor, write: Tensor, read: Tensor) -> Tensor:
        length, batch = drive.shape[:2]
        state = drive.new_zeros(batch, *rates.shape)
        decay, outputs, borders = torch.empty_like(state), torch.empty_like(drive), []
        for t in range(length):
            if t % CHUNK == 0:
                borders.append(state.clone())
            torch.mul(delta[t, :, None], rates, out=decay)
            state.mul_(decay.exp_()).addcmul_(write[t, :, :, None], drive[t, :, None])
            torch.bmm(read[t, :, None], state, out=outputs[t].unsqueeze(1))
        ctx.save_for_backward(drive, delta, rates, write, read, torch.stack(borders))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        drive, delta, rates, write, read, borders = ctx.saved_tensors
        grads = [torch.empty_like(tensor) for tensor in (drive, delta, write, read)]
        carry, summed, product = (torch.zeros_like(borders[0]) for _ in range(3))
        states, decays = (carry.new_empty(CHUNK + 1, *carry.shape) for _ in range(2))
        grad = grad.contiguous()
        for index in range(len(borders) - 1, -1, -1):
            start, stop = index * CHUNK, min((index + 1) * CHUNK, len(drive))
            states[0] = borders[index]
            torch.mul(delta[start:stop, :, None], rates, out=decays[: stop - start]).exp_()
            for t in range(start, stop):
                torch.mul(states[t - start], decays[t - start], out=states[t - start + 1])
                states[t - start + 1].addcmul_(write[t, :, :, None], drive[t, :, None])
            for t in range(stop - 1, start - 1, -1):
                # Products and sums: several times faster on a processor than einsum and thin matrix products.
                torch.sum(torch.mul(states[t - start + 1], grad[t, :, None], out=product), 2, out=grads[3][t])
                carry.addcmul_(read[t, :, :, None], grad[t, :, None])  # dL / dS_t
                torch.bmm(write[t, :, None], carry, out=grads[0][t].unsqueeze(1))
                torch.sum(torch.mul(carry, drive[t, :, None], out=product), 2, out=grads[2][t])
                carry.mul_(decays[t - start])
                torch.mul(carry, states[t - start], out=product)  # dL / d(Delta_t A)
                summed.addcmul_(product, delta[t, :, None])
                torch.sum(product.mul_(rates), 1, out=grads[1][t])
        return grads[0], grads[1], summed.sum(0), grads[2], grads[3]


def selective_scan(drive: Tensor, delta: Tensor, rates: Tensor, write: Tensor, read: Tensor) -> Tensor:
    """Outputs of S_t = exp(delta_t rates) S_{t-1} + write_t drive_t^T, y_t = read_t S_t, from an empty state.

    Args:
        drive: [B, L, c].
        delta: [B, L, c], positive.
        rates: [n, c], negative.
        write: [B, L, n].
        read: [B, L, n].

    Returns:
        [B, L, c]. First derivatives only.
    """
    first, second, third, fourth = (tensor.transpose(0, 1).contiguous() for tensor in (drive, delta, write, read))
    outputs: Tensor = _SelectiveScan.apply(first, second, rates, third, fourth)  # type: ignore[no-untyped-call]
    return outputs.transpose(0, 1)


class SelectiveStateSpace(nn.Module):
    """The Mamba block; the paper's symbols in brackets."""

    def __init__(self, config: Mamba4RecConfig) -> None:
        super().__init__()
        width, channels = config.hidden_size, config.expand * config.hidden_size
        self.states, self.rank, self.width = config.state_size, math.ceil(width / 16), config.conv_width
        self.input = nn.Linear(width, 2 * channels, bias=False)  # W_in
        self.conv_weight = nn.Parameter(torch.empty(config.conv_width, channels))
        self.conv_bias = nn.Parameter(torch.empty(channels))
        self.select = nn.Linear(channels, self.rank + 2 * self.states, bias=False)  # W_x
        self.step_size = nn.Linear(self.rank, channels)  # W_dt, b_dt
        self.log_rates = nn.Parameter(torch.empty(self.states * channels))  # ln(-A)
        self.skip = nn.Parameter(torch.empty(channels))  # D
        self.output = nn.Linear(channels, width, bias=False)  # W_out

    def reset(self) -> None:
        """Initial values of Mamba for everything but the four large maps."""
        for tensor, fan_in in ((self.conv_weight, self.width), (self.conv_bias, self.width)):
            nn.init.uniform_(tensor, -(fan_in**-0.5), fan_in**-0.5)
        nn.init.uniform_(self.step_size.weight, -(self.rank**-0.5), self.rank**-0.5)
        low, high = math.log(MIN_STEP), math.log(MAX_STEP)
        steps = torch.exp(torch.rand_like(self.step_size.bias) * (high - low) + low)
        initialization.copy_(self.step_size.bias, steps + torch.log(-torch.expm1(-steps)))  # inverse of softplus
        counts = torch.arange(1, self.states + 1, dtype=self.log_rates.dtype, device=self.log_rates.device)
        initialization.copy_(self.log_rates, counts.log().repeat_interleave(len(self.skip)))
        nn.init.ones_(self.skip)

    def rates(self) -> Tensor:
        """A, [n, c] float32, negative."""
        return -torch.exp(self.log_rates.float()).view(self.states, -1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, d] -> [B, L, d]."""
        signal, gate = self.input(x).chunk(2, dim=-1)
        signal = self._convolve(F.pad(signal, (0, 0, self.width - 1, 0)))
        delta, write, read = self._select(signal)
        return self._finish(selective_scan(delta * signal, delta, self.rates(), write, read), signal, gate)

    def step(self, x: Tensor, recent: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One event: [B, d], the last inputs of the convolution [B, w - 1, c], [B, n, c] -> the same three."""
        signal, gate = self.input(x[:, None]).chunk(2, dim=-1)
        window = torch.cat([recent, signal], dim=1)
        signal = self._convolve(window)
        delta, write, read = self._select(signal)
        state = torch.exp(delta * self.rates()) * state + write.transpose(1, 2) * (delta * signal)
        return self._finish(read @ state, signal, gate)[:, 0], window[:, 1:], state

    def _convolve(self, window: Tensor) -> Tensor:
        """[B, L + w - 1, c] -> [B, L, c] float32: each output sees its own input and the w - 1 before it."""
        length = window.shape[1] - self.width + 1
        total = self.conv_bias.float()
        for place, weight in enumerate(self.conv_weight.float()):
            total = torch.addcmul(total, window[:, place : place + length].float(), weight)
        return F.silu(total)

    def _select(self, signal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Delta [B, L, c], B_t and C_t [B, L, n], float32."""
        chosen = self.select(signal.to(self.select.weight.dtype))
        low_rank, write, read = chosen.split([self.rank, self.states, self.states], dim=-1)
        return F.softplus(self.step_size(low_rank).float()), write.float(), read.float()

    def _finish(self, y: Tensor, signal: Tensor, gate: Tensor) -> Tensor:
        y = torch.addcmul(y, signal, self.skip.float()) * F.silu(gate.float())
        return self.output(y.to(self.output.weight.dtype))


class MambaLayer(nn.Module):
    """Mamba and feed-forward, each with dropout and a norm behind it; the residual around Mamba is optional."""

    def __init__(self, config: Mamba4RecConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.residual = config.num_layers > 1
        self.mixer = SelectiveStateSpace(config)
        self.mixer_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(
            width, config.inner_size or 4 * width, activation="gelu", dropout=config.dropout
        )
        self.feed_forward_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, d] -> [B, L, d]."""
        return self._join(x, self.mixer(x))

    def step(self, x: Tensor, recent: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One event: see `SelectiveStateSpace.step`."""
        branch, recent, state = self.mixer.step(x, recent, state)
        return self._join(x, branch), recent, state

    def _join(self, x: Tensor, branch: Tensor) -> Tensor:
        branch = self.dropout(branch)
        x = self.mixer_norm(x + branch if self.residual else branch)
        return self.feed_forward_norm(x + self.feed_forward(x))


@dataclass(frozen=True)
class MambaState:
    """Everything that is kept of a history, whatever its length.

    Args:
        recent: [layers, B, w - 1, c], latest inputs of the convolutions.
        recurrent: [layers, B, n, c] float32.
        hidden: [B, d], the output after the latest event; zero before the first one.
    """

    recent: Tensor
    recurrent: Tensor
    hidden: Tensor


class Mamba4RecEncoder(SequenceEncoder):
    """Selective state spaces over tied item embeddings; an `IncrementalEncoder`."""

    config_class = Mamba4RecConfig
    config: Mamba4RecConfig

    def __init__(self, config: Mamba4RecConfig) -> None:
        super().__init__(config)
        self.item_embedding = nn.Embedding(config.num_items + 1, config.hidden_size, padding_idx=0)
        self.dropout = nn.Dropout(config.dropout)
        self.input_norm = nn.LayerNorm(config.hidden_size)
        self.layers = nn.ModuleList(MambaLayer(config) for _ in range(config.num_layers))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Normal maps and embeddings; Mamba's own values for rates, step sizes and convolution."""
        super()._init_weights(module)
        if isinstance(module, SelectiveStateSpace):
            module.reset()

    def forward(
        self, item_ids: Tensor, lengths: Tensor, *, item_embeds: Tensor | None = None, **features: Tensor
    ) -> EncoderOutput:
        """States of a batch of any length; see the base class."""
        items = self.item_embedding(item_ids) if item_embeds is None else item_embeds
        hidden = self.input_norm(self.dropout(items))
        for layer in self.layers:
            hidden = layer(hidden)
        # Padding stands right of every real position and the recurrence runs from left to right.
        hidden = hidden.masked_fill(~padding_mask(lengths, item_ids.shape[1]).unsqueeze(-1), 0.0)
        return EncoderOutput(hidden=hidden, user_repr=self.last_state(hidden, lengths))

    def init_state(self, batch_size: int) -> MambaState:
        """Empty states: zeros."""
        config, device = self.config, self.device
        layers, channels = config.num_layers, config.expand * config.hidden_size
        return MambaState(
            torch.zeros(layers, batch_size, config.conv_width - 1, channels, dtype=self.dtype, device=device),
            torch.zeros(layers, batch_size, config.state_size, channels, dtype=torch.float32, device=device),
            torch.zeros(batch_size, config.hidden_size, dtype=self.dtype, device=device),
        )

    @torch.no_grad()
    def step(self, state: MambaState, item_ids: Tensor, timestamps: Tensor | None = None) -> MambaState:
        """One more event per user, in time and memory that do not depend on the history; item 0 changes nothing.

        Args:
            state: Of `init_state` or an earlier step; it is left as it is.
            item_ids: [B].
            timestamps: Not read.
        """
        hidden, recent, recurrent = self.input_norm(self.dropout(self.item_embedding(item_ids))), [], []
        for layer, *before in zip(self.layers, state.recent, state.recurrent, strict=True):
            hidden, inputs, after = cast(MambaLayer, layer).step(hidden, *before)
            recent.append(inputs)
            recurrent.append(after)
        real = (item_ids > 0)[:, None]
        return MambaState(
            torch.where(real[..., None], torch.stack(recent), state.recent),
            torch.where(real[..., None], torch.stack(recurrent), state.recurrent),
            torch.where(real, hidden, state.hidden),
        )

    def read(self, state: MambaState, target_timestamps: Tensor | None = None) -> Tensor:
        """[B, d]: what `user_representation` gives for the events read so far."""
        return state.hidden


register(Mamba4RecConfig, Mamba4RecEncoder)
