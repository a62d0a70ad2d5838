"""Relative tables on causal tiles, against the full square written out; pointwise attention; the buckets themselves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llmrec.blocks.event_times import LOG_WIDTH, gap_buckets
from llmrec.blocks.relative_bias import HIDDEN, LATER, PositionTable, TimeTable, causal_tiles, silu_attention

WIDTH, CPU = 11, torch.device("cpu")


def clocks() -> tuple[Tensor, Tensor]:
    """Event times [2, WIDTH] and query times: the next event's."""
    steps = torch.randint(1, 10**6, (2, WIDTH + 1), generator=torch.Generator().manual_seed(0)).cumsum(1)
    return steps[:, :-1], steps[:, 1:]


def buckets_of(*gaps: int) -> list[int]:
    return gap_buckets(torch.tensor([gaps]), torch.zeros(1, 1, dtype=torch.long)).flatten().tolist()


def test_buckets_of_known_gaps() -> None:
    assert buckets_of(0, 1, 2, 60, 86_400, 31_536_000, -60) == [0, 0, 2, 13, 37, 57, 13]
    assert buckets_of(2**62) == [128]


def test_a_factor_of_e_to_the_width_is_one_bucket() -> None:
    for bucket in (20, 33, 50):
        middle = math.exp(LOG_WIDTH * (bucket + 0.5))  # away from the edges
        assert buckets_of(round(middle), round(middle * math.exp(LOG_WIDTH))) == [bucket, bucket + 1]


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_tiles_cover_the_causal_triangle_once(rows: int) -> None:
    times, queries = clocks()
    full = gap_buckets(queries, times)
    seen = torch.zeros(WIDTH, WIDTH, dtype=torch.long)
    for tile in causal_tiles(WIDTH, CPU, queries=queries, timestamps=times, rows=rows):
        assert tile.stop - tile.start <= rows and tile.buckets is not None
        seen[tile.start : tile.stop, : tile.stop] += (~tile.future).long()
        wanted = full[:, tile.start : tile.stop, : tile.stop].masked_fill(tile.future, LATER)
        assert torch.equal(tile.buckets.long(), wanted)
    assert torch.equal(seen, torch.ones_like(seen).tril())


def test_tiles_can_start_late() -> None:
    times, queries = clocks()
    (tile,) = causal_tiles(WIDTH, CPU, queries=queries[:, -1:], timestamps=times, start=WIDTH - 1)
    whole = gap_buckets(queries, times)
    assert (tile.start, tile.stop) == (WIDTH - 1, WIDTH) and tile.buckets is not None
    assert torch.equal(tile.buckets.long(), whole[:, -1:])


@pytest.mark.parametrize("max_history", [WIDTH, WIDTH + 5])
def test_positions_depend_on_the_distance_only(max_history: int) -> None:
    table = PositionTable(max_history)
    table.weight.data.normal_()
    places = torch.arange(WIDTH)
    square = table.weight[places[None, :] - places[:, None] + max_history - 1]
    for tile in causal_tiles(WIDTH, CPU, rows=4):
        torch.testing.assert_close(table(tile), square[tile.start : tile.stop, : tile.stop], rtol=0, atol=0)
    (whole,) = causal_tiles(WIDTH, CPU)
    assert torch.equal(table(whole)[3:, 3:], table(whole)[:-3, :-3])


def test_only_past_positions_get_a_gradient() -> None:
    table = PositionTable(WIDTH)
    for tile in causal_tiles(WIDTH, CPU, rows=4):
        table(tile).masked_fill(tile.future, 0.0).sum().backward()
    assert table.weight.grad is not None
    # A distance of d occurs WIDTH - d times; entries of later keys never.
    expected = [float(n) for n in range(1, WIDTH + 1)] + [0.0] * (WIDTH - 1)
    assert table.weight.grad.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_time_values_and_gradients_are_those_of_an_embedding(dtype: torch.dtype) -> None:
    times, queries = clocks()
    table = TimeTable().to(dtype)
    table.weight.data.normal_()
    weight = F.pad(table.weight.detach().float(), (0, 1)).requires_grad_()
    (tile,) = causal_tiles(WIDTH, CPU, queries=queries, timestamps=times)
    assert tile.buckets is not None
    found, expected = table(tile), F.embedding(tile.buckets, weight[:, None]).squeeze(-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not found[:, tile.future].any()
    pull = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    found.backward(pull)
    expected.backward(pull)
    assert table.weight.grad is not None and weight.grad is not None
    torch.testing.assert_close(table.weight.grad, weight.grad[:-1].to(dtype), rtol=1e-2, atol=1e-5)
    assert torch.equal(table.weight.grad != 0, weight.grad[:-1] != 0)


def test_time_tables_want_buckets() -> None:
    (tile,) = causal_tiles(WIDTH, CPU)
    with pytest.raises(ValueError, match="queries and timestamps"):
        TimeTable()(tile)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("per_row", [False, True])
def test_attention_is_masked_after_silu(heads: int, per_row: bool) -> None:
    """The hidden score gives what a product with 0 after SiLU gives, and its gradients, bit for bit where masked."""
    make = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(2, heads, WIDTH, 5, generator=make) * 3 for _ in range(3))
    bias = torch.randn((2, WIDTH, WIDTH) if per_row else (WIDTH, WIDTH), generator=make)
    (tile,) = causal_tiles(WIDTH, CPU)
    results = []
    for hidden in (True, False):
        parts = [part.clone().requires_grad_() for part in (query, key, value, bias)]
        q, k, v, b = parts
        if hidden:
            mixed = silu_attention(q, k, v, b.masked_fill(tile.future, HIDDEN))
        else:
            mixed = (F.silu(q @ k.transpose(-1, -2) + (b[:, None] if per_row else b)) * ~tile.future) @ v
        mixed.pow(2).sum().backward()
        results.append((mixed, *(part.grad for part in parts)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert not results[0][-1][..., tile.future].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hidden_scores_vanish_in_every_type(dtype: torch.dtype) -> None:
    score = torch.tensor([HIDDEN - 900, HIDDEN + 900]).to(dtype).requires_grad_()
    weight = F.silu(score)
    weight.sum().backward()
    assert not weight.any() and score.grad is not None and not score.grad.any()
