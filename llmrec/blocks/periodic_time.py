"""Times of events as periodic queries and keys with exponential decay: a linear attention that reads clocks only.

For periods T_h, with omega_h = 2 pi / T_h and theta_h(t) = (t mod T_h) omega_h, two groups per period:

    key          [cos theta(t), sin theta(t)]                    the same in both groups
    sin query    [sin theta(tau), -cos theta(tau)]               q.k = sin(omega (tau - t))
    cos query    [cos theta(tau),  sin theta(tau)]               q.k = cos(omega (tau - t))
    decay        gamma_h^(omega_h (tau - t))                     gamma_h = sigmoid(c_h), 1/2 unless learned

Groups 0..H-1 are sin, H..2H-1 are cos. The operator is that of `llmrec.blocks.linear_attention`; decay between the last
event and the query time is part of the query.

Users: `encoders.fuxi_linear` (temporal channel); planned: other encoders with a clock and a constant-size state.

Source: FuXi-Linear (arXiv 2602.23671), temporal retention channel. Gaps of unsorted events count as 0 in every form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class TimeFeatures:
    """Queries, keys and decays of B histories, to be shared by all blocks of an encoder; float32.

    Args:
        query: [B, L, 2, G]; what decays between an event and its query time is in it.
        key: [B, L, 2, G].
        log_decay: [B, L, G] since the event before.
        spread: Query, key [B, L, 2, d] and exp(-log_decay) [B, L, d] for every value channel, for `channel_scan`.
    """

    query: Tensor
    key: Tensor
    log_decay: Tensor
    spread: tuple[Tensor, Tensor, Tensor] | None = None

    def spread_over(self, width: int) -> TimeFeatures:
        """These features with `spread` for d value channels, d / G neighbours to a group."""
        times = width // self.key.shape[-1]
        query, key, kept = (repeat_channels(x, times) for x in (self.query, self.key, self.log_decay.neg().exp()))
        return replace(self, spread=(query, key, kept))


def repeat_channels(x: Tensor, times: int) -> Tensor:
    """[..., G] -> [..., G times], each entry beside its copies."""
    return x.unsqueeze(-1).expand(*x.shape, times).flatten(-2)


def event_steps(timestamps: Tensor) -> Tensor:
    """[B, L] int64 -> [B, L]: seconds since the event before; 0 for the first one and where time runs backwards."""
    return F.pad(timestamps.diff(dim=1).clamp(min=0), (1, 0))


class PeriodicTime(nn.Module):
    """Features of times; an encoder calls `reset_parameters` from its `_init_weights`.

    Args:
        periods: T_h in seconds.
        learnable: Learn c_h instead of keeping gamma_h at 1/2.
    """

    def __init__(self, periods: tuple[int, ...], *, learnable: bool = False) -> None:
        super().__init__()
        self.periods = periods
        self.decay_logit = nn.Parameter(torch.empty(len(periods))) if learnable else None

    def reset_parameters(self, std: float) -> None:
        """c_h normal around 0, gamma_h around 1/2."""
        if self.decay_logit is not None:
            nn.init.normal_(self.decay_logit, std=std)

    def rates(self, device: torch.device) -> Tensor:
        """[H] float32: -omega_h ln gamma_h, decay a second."""
        omega = self._omega(device)
        return omega * (math.log(2) if self.decay_logit is None else F.softplus(-self.decay_logit.float()))

    def forward(self, timestamps: Tensor, queries: Tensor, steps: Tensor) -> TimeFeatures:
        """Features of histories, or of single events (L = 1).

        Args:
            timestamps: [B, L] int64 seconds, t.
            queries: [B, L] int64 seconds, tau.
            steps: [B, L] int64, seconds since the event before (`event_steps`).
        """
        rates = self.rates(timestamps.device)
        at, asked = self._angles(timestamps), self._angles(queries)
        sin, cos = asked.sin(), asked.cos()
        query = torch.stack([torch.cat([sin, cos], dim=-1), torch.cat([-cos, sin], dim=-1)], dim=2)
        waiting = (-rates * (queries - timestamps).clamp(min=0).float().unsqueeze(-1)).exp()
        key = torch.stack([at.cos(), at.sin()], dim=2)
        log_decay = rates * steps.float().unsqueeze(-1)
        return TimeFeatures(query * _both(waiting).unsqueeze(2), _both(key), _both(log_decay))

    def left_at(self, timestamps: Tensor, places: Tensor) -> Tensor:
        """What decay leaves of each event at a later one.

        Args:
            timestamps: [B, L] int64.
            places: [B], positions of the later events.

        Returns:
            [B, G, L]; 1 behind the place.
        """
        clock = event_steps(timestamps).cumsum(1)
        gaps = (clock.gather(1, places[:, None]) - clock).clamp(min=0).float().unsqueeze(-1)
        return _both((-self.rates(timestamps.device) * gaps).exp()).transpose(1, 2)

    def _omega(self, device: torch.device) -> Tensor:
        return torch.tensor([2 * math.pi / period for period in self.periods], dtype=torch.float32, device=device)

    def _angles(self, times: Tensor) -> Tensor:
        """[B, L] int64 -> [B, L, H]; the remainder is taken in int64, before anything is rounded."""
        periods = torch.tensor(self.periods, device=times.device)
        return (times.unsqueeze(-1) % periods).float() * self._omega(times.device)


def _both(x: Tensor) -> Tensor:
    """[..., H] -> [..., G]: the sin groups, then the cos groups."""
    return torch.cat([x, x], dim=-1)
