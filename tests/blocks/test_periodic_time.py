"""Times as periodic features with decay."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llmrec.blocks.periodic_time import PeriodicTime, event_steps

PERIODS = (1000, 8192, 65536, 86_400_000)
NOW = 1_700_000_000_000  # the size of milliseconds


def products(times: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """q.k of all pairs, sin and cos groups, each [H, queries, keys], without decay."""
    module = PeriodicTime(PERIODS, learnable=True)
    torch.nn.init.constant_(module.decay_logit, 200.0)  # gamma = 1
    asked, known = (module(x[None], x[None], torch.zeros_like(x)[None]) for x in (queries, times))
    pairs = torch.einsum("iuh,juh->hij", asked.query[0], known.key[0])
    return pairs[: len(PERIODS)], pairs[len(PERIODS) :]


def test_products_are_sin_and_cos_of_the_gap_for_large_times() -> None:
    generator = torch.Generator().manual_seed(0)
    times, queries = (NOW + torch.randint(0, 10**9, (40,), generator=generator) for _ in range(2))
    sin, cos = products(times, queries)
    gaps = (queries[:, None] - times).double()
    for h, period in enumerate(PERIODS):
        angle = 2 * math.pi * gaps / period
        assert (sin[h] - angle.sin()).abs().max() < 1e-4
        assert (cos[h] - angle.cos()).abs().max() < 1e-4


def test_decay_is_gamma_to_the_angle_of_the_gap() -> None:
    times = torch.tensor([[NOW, NOW + 500, NOW + 1700]])
    queries = times + 250
    found = PeriodicTime((1000, 5000))(times, queries, event_steps(times))
    omega = 2 * math.pi / torch.tensor([1000.0, 5000.0]).repeat(2)
    gaps = torch.tensor([0.0, 500.0, 1200.0])[:, None]
    torch.testing.assert_close(found.log_decay[0], gaps * omega * math.log(2))
    waiting = found.query[0].norm(dim=1)
    torch.testing.assert_close(waiting, (0.5 ** (250 * omega)).expand(3, -1))
    left = PeriodicTime((1000, 5000)).left_at(times, torch.tensor([1]))
    torch.testing.assert_close(left[0], (0.5 ** (torch.tensor([500.0, 0.0, 0.0]) * omega[:, None])))


def test_the_learned_decay_starts_near_one_half_and_has_a_gradient() -> None:
    module = PeriodicTime(PERIODS, learnable=True)
    module.reset_parameters(0.02)
    fixed = PeriodicTime(PERIODS).rates(torch.device("cpu"))
    assert (module.rates(torch.device("cpu")) / fixed - 1).abs().max() < 0.1
    times = torch.tensor([[0, 400, 900]])
    found = module(times, times + 100, event_steps(times))
    (found.log_decay.sum() + found.query.pow(2).sum()).backward()
    assert module.decay_logit is not None and (module.decay_logit.grad != 0).all()
    assert not list(PeriodicTime(PERIODS).parameters())


def test_gaps_are_never_negative() -> None:
    times = torch.tensor([[50, 20, 30, 0]])
    assert event_steps(times).tolist() == [[0, 0, 10, 0]]
    found = PeriodicTime((60,))(times, torch.tensor([[10, 10, 10, 10]]), event_steps(times))
    assert found.query.norm(dim=2).max() <= 1 + 1e-6


@pytest.mark.parametrize("width", [8, 24])
def test_spread_gives_each_value_channel_its_group(width: int) -> None:
    times = torch.tensor([[0, 400, 900]])
    found = PeriodicTime(PERIODS)(times, times + 100, event_steps(times)).spread_over(width)
    assert found.spread is not None
    query, key, kept = found.spread
    for channel in range(width):
        group = channel // (width // 8)
        assert torch.equal(query[..., channel], found.query[..., group])
        assert torch.equal(key[..., channel], found.key[..., group])
        torch.testing.assert_close(kept[..., channel], found.log_decay[..., group].neg().exp())
