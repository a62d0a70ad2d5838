"""FuXi-alpha: the contract, and the properties of a correct implementation (test_1 to test_10, numbered as in our list;
bucket values of number 4 stand in tests/blocks/test_relative_bias.py)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmrec.blocks.event_times import gap_buckets, query_times
from llmrec.blocks.multi_stage import MultiStageFeedForward
from llmrec.blocks.relative_bias import causal_tiles
from llmrec.data.schema import SequenceBatch
from llmrec.encoders.fuxi_alpha import FuXiAlphaBlock, FuXiAlphaConfig, FuXiAlphaEncoder
from llmrec.encoders.hstu import HSTUBlock, HSTUConfig
from llmrec.errors import DataError, RecipeError
from llmrec.interfaces import IncrementalEncoder
from llmrec.strategies.base import StepInfo
from llmrec.strategies.next_item import NextItem
from tests.contracts.encoders import EncoderContract, same, take_rows

HOUR, START = 3600, 1_600_000_000


class TestFuXiAlpha(EncoderContract):
    config = FuXiAlphaConfig(
        num_items=30, hidden_size=16, max_history=16, num_heads=2, multiplier=2, feed_forward_init="xavier"
    )
    encoder_class = FuXiAlphaEncoder


class TestFuXiAlphaAskedAtTheLastEvent(EncoderContract):
    config = FuXiAlphaConfig(
        num_items=30, hidden_size=16, max_history=16, time="last", num_layers=1, initializer_range=0.2
    )
    encoder_class = FuXiAlphaEncoder


class TestFuXiAlphaSingleStageWithoutTime(EncoderContract):
    config = FuXiAlphaConfig(
        num_items=30, hidden_size=16, max_history=16, time="none", two_stages=False, num_layers=1, initializer_range=0.2
    )
    encoder_class = FuXiAlphaEncoder


def small(**options: object) -> FuXiAlphaEncoder:
    """Two layers with wide weights, so that every part shows in the outputs."""
    torch.manual_seed(0)
    chosen = {"num_items": 20, "hidden_size": 8, "max_history": 12, "dropout": 0.0, "num_heads": 2, **options}
    return FuXiAlphaEncoder(FuXiAlphaConfig(**{"initializer_range": 0.5, **chosen})).eval()  # type: ignore[arg-type]


def batch_of(rows: int = 3, width: int = 8) -> SequenceBatch:
    make = torch.Generator().manual_seed(4)
    times = START + torch.randint(1, 40 * HOUR, (rows, width + 1), generator=make).cumsum(1)
    return {
        "item_ids": torch.randint(1, 21, (rows, width), generator=make), "lengths": torch.full((rows,), width),
        "timestamps": times[:, :-1], "target_timestamps": times[:, -1],
    }  # type: ignore[typeddict-item]  # fmt: skip


def hidden(model: FuXiAlphaEncoder, batch: SequenceBatch) -> Tensor:
    with torch.no_grad():
        return model.encode(batch).hidden


def train(model: FuXiAlphaEncoder, batch: SequenceBatch, steps: int) -> None:
    weights = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
    for step in range(steps):
        optimizer.zero_grad()
        NextItem().loss(model, batch, StepInfo(step, steps, 0.0, torch.Generator())).total.backward()
        optimizer.step()
    model.eval()


def rms(x: Tensor) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


def drawn(block: nn.Module) -> None:
    torch.manual_seed(1)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)


@pytest.mark.parametrize("time", ["target", "none"])
def test_0_a_block_is_the_written_out_formula(time: str) -> None:
    """Order of split and channels, raw maps, division of the semantic one, norms, both stages: without tiles."""
    config = FuXiAlphaConfig(
        hidden_size=8, max_history=12, num_heads=2, attention_size=3, value_size=5, multiplier=2, dropout=0.0, time=time
    )  # type: ignore[arg-type]
    block, width = FuXiAlphaBlock(config), 6
    drawn(block)
    channels = 2 if time == "none" else 3
    x, batch, place = torch.randn(3, width, 8), batch_of(3, width), torch.arange(width)
    queries = query_times(batch["timestamps"], batch["lengths"], batch["target_timestamps"])
    mapped = F.silu(rms(x) @ block.projection.weight.T)
    gate, value, query, key = mapped.split([channels * 10, 10, 6, 6], -1)
    q, k, v = (part.view(3, width, 2, -1) for part in (query, key, value))
    past = torch.ones(width, width).tril()
    maps = [(block.position.weight[place[None] - place[:, None] + 11] * past).expand(3, 2, width, width)]
    if block.time is not None:
        maps.append((block.time.weight[gap_buckets(queries, batch["timestamps"])] * past)[:, None].expand_as(maps[0]))
    maps.append(F.silu(torch.einsum("bihd,bjhd->bhij", q, k)) / 12 * past)
    mixed = torch.cat([torch.einsum("bhij,bjhd->bihd", weights, v) for weights in maps], -1).flatten(2)
    mffn = block.feed_forward
    merged = (gate * rms(mixed)) @ mffn.merge.weight.T + mffn.merge.bias + x
    n = rms(merged)
    expected = (F.silu(n @ mffn.gate.weight.T) * (n @ mffn.value.weight.T)) @ mffn.output.weight.T + merged
    stamps = {} if time == "none" else {"queries": queries, "timestamps": batch["timestamps"]}
    for rows in (2, 64):
        same(block(x, causal_tiles(width, x.device, rows=rows, **stamps)), expected, atol=2e-4)


def test_1_causality_and_the_next_time() -> None:
    model, batch = small(), batch_of()
    before = hidden(model, batch)
    for i in range(7):
        later = {**batch, "item_ids": batch["item_ids"].clone(), "timestamps": batch["timestamps"].clone()}
        later["item_ids"][:, i + 1] = later["item_ids"][:, i + 1] % 20 + 1
        later["timestamps"][:, i + 2 :] += 1000 * HOUR
        if i < 6:
            later["target_timestamps"] = batch["target_timestamps"] + 1000 * HOUR
        same(hidden(model, later)[:, : i + 1], before[:, : i + 1], atol=1e-6)  # type: ignore[arg-type]
    next_time = {**batch, "target_timestamps": batch["target_timestamps"] + 1000 * HOUR}
    after = hidden(model, next_time)  # type: ignore[arg-type]
    same(after[:, :-1], before[:, :-1], atol=1e-6)
    assert (after[:, -1] - before[:, -1]).abs().max() > 1e-4
    for block in model.stack.blocks:
        block.time.weight.data.zero_()
    same(hidden(model, next_time), hidden(model, batch), atol=1e-6)  # type: ignore[arg-type]


def test_1_what_stands_in_padding_does_not_matter() -> None:
    model, batch = small(), batch_of()
    batch["lengths"] = torch.tensor([8, 5, 1])
    real = torch.arange(8)[None] < batch["lengths"][:, None]
    clean = {**batch, "item_ids": batch["item_ids"] * real, "timestamps": batch["timestamps"] * real}
    expected = hidden(model, clean)  # type: ignore[arg-type]
    torch.testing.assert_close(hidden(model, batch), expected, rtol=0, atol=0)
    assert not expected[~real].any()
    model.train()
    model.encode(clean).hidden.sum().backward()  # type: ignore[arg-type]
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)


def test_2_with_the_semantic_channel_alone_it_is_hstu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to RMSNorm, put into the HSTU block here, and the factor sqrt(3) of a norm over two thirds of zeros."""
    options = {"hidden_size": 8, "max_history": 12, "num_heads": 2, "dropout": 0.0}
    fuxi = FuXiAlphaBlock(FuXiAlphaConfig(two_stages=False, **options))  # type: ignore[arg-type]
    hstu = HSTUBlock(HSTUConfig(relative_bias=False, **options))  # type: ignore[arg-type]
    drawn(fuxi)
    semantic = torch.arange(24).view(2, 3, 4)[:, 2].flatten()  # head by head, the last of three channels
    with torch.no_grad():
        fuxi.projection.weight.mul_(3)  # the sums stay far above eps
        fuxi.position.weight.zero_()
        fuxi.time.weight.zero_()  # type: ignore[union-attr]
        keep = torch.zeros(24).index_fill(0, semantic, 1.0)
        fuxi.feed_forward.merge.weight.mul_(keep)
        hstu.projection.weight.copy_(torch.cat([fuxi.projection.weight[semantic], fuxi.projection.weight[24:]]))
        hstu.output.weight.copy_(fuxi.feed_forward.merge.weight[:, semantic] * 3**0.5)
        hstu.output.bias.copy_(fuxi.feed_forward.merge.bias)
    x, batch = torch.randn(3, 8, 8), batch_of()
    tiles = causal_tiles(8, x.device, queries=batch["timestamps"], timestamps=batch["timestamps"])
    monkeypatch.setattr(F, "layer_norm", lambda x, shape, eps: rms(x))
    torch.testing.assert_close(fuxi(x, tiles), hstu(x, tiles), rtol=1e-3, atol=1e-3)  # eps weighs three times as much


def test_3_without_queries_and_keys_only_values_count() -> None:
    block, batch = small().stack.blocks[0], batch_of()
    tiles = causal_tiles(8, torch.device("cpu"), queries=batch["timestamps"], timestamps=batch["timestamps"])
    with torch.no_grad():
        block.projection.weight[-16:].zero_()
        _, query, key, value = block.project(torch.randn(3, 8, 8))
        mixed = block.attend(query, key, value, tiles[0]).view(3, 8, 2, 3, 4)
        assert not mixed[..., 2, :].any() and (mixed[..., :2, :].abs().amax((0, 1, 2, 4)) > 0).all()
        # Scores of another content change nothing as long as the values are the same.
        again = block.attend(query.flip(2), key.flip(2), value, tiles[0]).view_as(mixed)
    torch.testing.assert_close(again, mixed, rtol=0, atol=0)


def test_4_a_common_shift_of_all_times_changes_nothing() -> None:
    model, batch = small(), batch_of()
    shifted = {**batch, "timestamps": batch["timestamps"] + 999_999}
    shifted["target_timestamps"] = batch["target_timestamps"] + 999_999
    torch.testing.assert_close(hidden(model, shifted), hidden(model, batch), rtol=0, atol=0)  # type: ignore[arg-type]


def test_5_the_position_map_is_everybodys() -> None:
    model, batch = small(), batch_of()
    order = torch.tensor([2, 0, 1])
    same(hidden(model, take_rows(batch, order)), hidden(model, batch)[order], atol=1e-6)
    block = model.stack.blocks[0]
    with torch.no_grad():
        block.time.weight.zero_()
        block.projection.weight[-16:].zero_()
        value = torch.randn(1, 1, 8, 4, generator=torch.Generator().manual_seed(0)).expand(3, 2, 8, 4)
        tiles = causal_tiles(8, torch.device("cpu"), queries=batch["timestamps"], timestamps=batch["timestamps"])
        zeros = torch.zeros(3, 2, 8, 4)
        position = block.attend(zeros, zeros, value, tiles[0]).view(3, 8, 2, 3, 4)[..., 0, :]
    # Equal values of users and heads stay equal.
    same(position, position[:1, :, :1].expand_as(position), atol=1e-6)
    assert position.abs().max() > 0.1


def test_6_where_gradients_arrive() -> None:
    model, batch = small(max_history=8).train(), batch_of()
    batch["targets"] = batch["item_ids"].roll(1, 1)
    NextItem().loss(model, batch, StepInfo(0, 1, 0.0, torch.Generator())).total.backward()
    queries = query_times(batch["timestamps"], batch["lengths"], batch["target_timestamps"])
    past = torch.ones(8, 8, dtype=torch.bool).tril()
    occurring = gap_buckets(queries, batch["timestamps"])[:, past].unique().tolist()
    for block in model.stack.blocks:
        position, time = block.position.weight.grad, block.time.weight.grad
        assert (position[:8] != 0).all() and not position[8:].any()
        assert time.nonzero().flatten().tolist() == occurring
        for part in (block.projection, *block.feed_forward.children()):
            if isinstance(part, nn.Linear):
                assert part.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("multiplier", [1, 4])
def test_7_and_10_parameters_of_a_block(multiplier: int) -> None:
    def count(**options: object) -> int:
        block = small(multiplier=multiplier, **options).stack.blocks[0]
        return sum(parameter.numel() for parameter in block.parameters())

    both = (9 + 3 * multiplier) * 8**2 + 8 + (2 * 12 - 1) + 129
    assert count() == both
    assert count(two_stages=False) == both - 3 * multiplier * 8**2


def test_8_rows_have_unit_length() -> None:
    same(hidden(small(), batch_of()).norm(dim=-1), torch.ones(3, 8))


def tiny(**options: object) -> FuXiAlphaEncoder:
    return small(hidden_size=16, num_heads=1, num_layers=1, initializer_range=0.02, **options)


def best(model: FuXiAlphaEncoder, batch: SequenceBatch) -> Tensor:
    """[B, L] best item at every position."""
    return model.score(hidden(model, batch))[..., 1:].argmax(-1) + 1


def test_9a_the_position_channel_alone_repeats_the_item_of_three_steps_ago() -> None:
    def periods(rows: int, seed: int) -> SequenceBatch:
        three = torch.randint(1, 13, (rows, 3), generator=torch.Generator().manual_seed(seed))
        items = three.repeat(1, 4)
        targets = items[:, 1:].clone()
        targets[:, :2] = 0  # the first three items are free
        return {"item_ids": items[:, :-1], "targets": targets, "lengths": torch.full((rows,), 11)}  # type: ignore[typeddict-item]

    model = tiny(num_items=12, time="none")
    # Zero queries and keys stay zero: each other's gradient is their factor.
    model.stack.blocks[0].projection.weight.data[-32:].zero_()
    train(model, periods(96, 1), 120)
    assert not model.stack.blocks[0].projection.weight[-32:].any()
    asked = periods(100, 2)
    assert (best(model, asked) == asked["targets"])[:, 2:].float().mean() > 0.99


def test_9b_only_the_time_channel_knows_the_gap() -> None:
    """The next item is 1 within the hour and 2 after it; nothing else tells."""

    def gaps(rows: int, seed: int) -> SequenceBatch:
        make = torch.Generator().manual_seed(seed)
        long = torch.randint(0, 2, (rows, 9), generator=make)
        noise = torch.rand(rows, 9, generator=make) + 0.5
        times = START + (torch.where(long > 0, 48 * HOUR, 300) * noise).long().cumsum(1)
        return {
            "item_ids": long[:, :-1] + 1, "targets": long[:, 1:] + 1, "lengths": torch.full((rows,), 8),
            "timestamps": times[:, :-1], "target_timestamps": times[:, -1],
        }  # type: ignore[typeddict-item]  # fmt: skip

    found = {}
    for time in ("target", "none"):
        model, asked = tiny(num_items=2, time=time), gaps(200, 2)
        train(model, gaps(64, 1), 80)
        found[time] = (best(model, asked) == asked["targets"]).float().mean()
    assert found["target"] > 0.98 and found["none"] < 0.6


def test_9c_a_function_of_the_previous_item() -> None:
    follower = torch.randperm(20, generator=torch.Generator().manual_seed(3)) + 1
    walk = [torch.arange(1, 21)]
    for _ in range(8):
        walk.append(follower[walk[-1] - 1])
    items = torch.stack(walk, 1)
    batch: SequenceBatch = {"item_ids": items[:, :-1], "targets": items[:, 1:], "lengths": torch.full((20,), 8)}  # type: ignore[typeddict-item]
    model = tiny(time="none")
    train(model, batch, 80)
    assert (best(model, batch) == batch["targets"]).float().mean() > 0.99


def test_10_a_single_stage_only_merges() -> None:
    torch.manual_seed(0)
    merge = MultiStageFeedForward(12, 8, dropout=0.0, bias=True, two_stages=False)
    gated, residual = torch.randn(2, 3, 12), torch.randn(2, 3, 8)
    same(merge(gated, residual), gated @ merge.merge.weight.T + merge.merge.bias + residual)
    assert [name for name, _ in merge.named_parameters()] == ["merge.weight", "merge.bias"]


def test_dropout_of_the_feed_forward_stands_before_the_merge_and_behind_the_norm() -> None:
    stages = MultiStageFeedForward(12, 8, dropout=1.0, bias=False).train()
    residual = torch.randn(2, 8)
    same(stages(torch.randn(2, 12), residual), residual)  # all dropped: g before W0, n before W1 and W3
    with pytest.raises(ValueError, match="multiplier: found 0"):
        MultiStageFeedForward(12, 8, multiplier=0, dropout=0.0, bias=True)


@pytest.mark.parametrize("time", ["target", "last", "none"])
def test_event_by_event_equals_the_whole_history(time: str) -> None:
    model, batch = small(time=time), batch_of()
    assert isinstance(model, IncrementalEncoder)
    times = torch.cat([batch["timestamps"], batch["target_timestamps"][:, None]], 1)
    whole, state = hidden(model, batch), model.init_state(3)
    with torch.no_grad():
        for t in range(8):
            state = model.step(state, batch["item_ids"][:, t], times[:, t])
            same(model.read(state, times[:, t + 1]), whole[:, t])


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = FuXiAlphaEncoder(FuXiAlphaConfig(num_items=500, hidden_size=64, max_history=100))
    block = model.stack.blocks[0]
    for weight in (block.projection.weight, block.position.weight, block.time.weight, model.item_embedding.weight[1:]):
        assert 0.017 < weight.std() < 0.023
    assert abs(model.stack.position_embedding.weight.std() - (2 / 164) ** 0.5) < 0.005  # Xavier normal


def test_too_long_batches_and_bad_options_are_refused() -> None:
    with pytest.raises(DataError, match="max_history = 12"):
        small()(**batch_of(width=13))
    with pytest.raises(RecipeError, match="num_heads: found 3, expected a divisor of hidden_size 8"):
        FuXiAlphaConfig(hidden_size=8, num_heads=3)
    with pytest.raises(RecipeError, match="attention_size: found 0"):
        FuXiAlphaConfig(attention_size=0)
    with pytest.raises(RecipeError, match="multiplier: found 0"):
        FuXiAlphaConfig(multiplier=0)


@pytest.mark.parametrize(("start", "least", "most"), [("normal", 0.018, 0.022), ("xavier", 0.08, 0.3)])
def test_feed_forward_maps_start_as_the_option_says(start: str, least: float, most: float) -> None:
    torch.manual_seed(0)
    config = FuXiAlphaConfig(num_items=9, hidden_size=64, max_history=8, feed_forward_init=start)  # type: ignore[arg-type]
    for block in FuXiAlphaEncoder(config).stack.blocks:
        for layer in block.feed_forward.children():  # type: ignore[union-attr]
            if isinstance(layer, nn.Linear):
                assert least < float(layer.weight.std()) < most


def test_an_unknown_start_is_refused() -> None:
    with pytest.raises(RecipeError, match="feed_forward_init"):
        FuXiAlphaConfig(feed_forward_init="zeros")  # type: ignore[arg-type]
