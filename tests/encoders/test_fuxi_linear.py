"""FuXi-Linear: the contract for each time option, the checkable properties 1, 2 and 4-11 of the method, the state size
of property 3 (its timing is a benchmark), and streaming."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llmrec.blocks.linear_attention import quadratic_form
from llmrec.data.schema import SequenceBatch
from llmrec.encoders.fuxi_linear import FuXiLinearBlock, FuXiLinearConfig, FuXiLinearEncoder, FuXiLinearState
from llmrec.errors import DataError, RecipeError
from llmrec.interfaces import IncrementalEncoder
from llmrec.strategies.base import StepInfo
from llmrec.strategies.next_item import NextItem
from tests.contracts.encoders import EncoderContract, same

HOUR, DAY, NOW = 3600, 86400, 1_700_000_000
SMALL: dict[str, Any] = {"num_items": 20, "hidden_size": 32, "max_history": 16, "initializer_range": 0.2}


class TestFuXiLinear(EncoderContract):
    config = FuXiLinearConfig(**SMALL)
    encoder_class = FuXiLinearEncoder

    def test_is_an_incremental_encoder(self) -> None:
        assert isinstance(self.model(), IncrementalEncoder)


class TestFuXiLinearChunkedLast(TestFuXiLinear):
    config = FuXiLinearConfig(
        **SMALL, time="last", chunk_size=3, learnable_decay=True, augment_current=True, num_layers=1, qk_size=8
    )


class TestFuXiLinearWithoutTime(TestFuXiLinear):
    config = FuXiLinearConfig(**SMALL, time="none", augment_current=True)


def small(**options: object) -> FuXiLinearEncoder:
    torch.manual_seed(0)
    chosen: dict[str, Any] = {**SMALL, "max_history": 48, "num_periods": 4, "period_stride": 2, **options}
    return FuXiLinearEncoder(FuXiLinearConfig(**chosen)).eval()


def twin(model: FuXiLinearEncoder, **options: object) -> FuXiLinearEncoder:
    """The same weights under other options."""
    other = FuXiLinearEncoder(FuXiLinearConfig(**{**model.config.to_diff_dict(), **options})).eval()
    other.load_state_dict(model.state_dict())
    return other


def histories(lengths: tuple[int, ...] = (37, 1, 20, 2, 36), seed: int = 3) -> SequenceBatch:
    """Irregular gaps from a second to a year."""
    generator = torch.Generator().manual_seed(seed)
    rows, width, ends = len(lengths), max(lengths), torch.tensor(lengths)
    gaps = (torch.rand(rows, width + 1, generator=generator) * 17).exp().long()
    clock = NOW + gaps.cumsum(1)
    real = torch.arange(width) < ends[:, None]
    return {
        "item_ids": torch.randint(1, 21, (rows, width), generator=generator) * real,
        "lengths": ends,
        "timestamps": clock[:, :-1] * real,
        "target_timestamps": clock.gather(1, ends[:, None])[:, 0],
    }  # type: ignore[typeddict-item]


def hidden(model: FuXiLinearEncoder, batch: SequenceBatch) -> Tensor:
    return model(**model.inputs(batch)).hidden


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Relative to the largest expected value."""
    assert (found - expected).abs().max() <= tolerance * float(expected.detach().abs().max())


def temporal(model: FuXiLinearEncoder, times: Tensor, queries: Tensor, values: Tensor) -> Tensor:
    """Y_t of one row: [L], [L], [L, d] -> [L, d], by the quadratic form."""
    steps = torch.cat([torch.zeros(1, dtype=torch.long), times.diff().clamp(min=0)])
    assert model.clock is not None
    features = model.clock(times[None], queries[None], steps[None])
    query, key = (x.permute(0, 3, 1, 2) for x in (features.query, features.key))
    grouped = values[None].unflatten(-1, (key.shape[1], -1)).transpose(1, 2)
    return quadratic_form(query, key, grouped, features.log_decay.transpose(1, 2)).transpose(1, 2).flatten(2)[0]


# Three forms ---------------------------------------------------------------------------------------------------------

VARIANTS: list[dict[str, object]] = [
    {},
    {"learnable_decay": True, "augment_current": True, "num_heads": 4, "qk_size": 5},
    {"time": "last"},
    {"time": "none"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_1_chunked_is_quadratic_with_gradients(options: dict[str, object]) -> None:
    """37 events are no multiple of 5, 8 or 36."""
    reference, batch = small(chunk_size=None, **options), histories()
    expected = hidden(reference, batch)
    weights = torch.cos(torch.arange(expected.numel())).reshape(expected.shape)
    (expected * weights).sum().backward()
    for chunk_size in (5, 8, 36, 128):
        model = twin(reference, chunk_size=chunk_size)
        found = hidden(model, batch)
        close(found, expected)
        (found * weights).sum().backward()
        for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert parameter.grad is not None and other.grad is not None, name
            close(parameter.grad, other.grad, 5e-5)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_2_events_one_by_one_give_the_states_of_the_quadratic_form(options: dict[str, object]) -> None:
    """Every position of every row, each asked at the time of its next event."""
    model, batch = small(chunk_size=None, **options), histories((12, 9))
    expected, state = hidden(model, batch), model.init_state(2)
    asked = torch.cat([batch["timestamps"][:, 1:], batch["target_timestamps"][:, None]], dim=1)
    asked[1, 8] = batch["target_timestamps"][1]
    for i in range(12):
        state = model.step(state, batch["item_ids"][:, i], batch["timestamps"][:, i])
        found = model.read(state, asked[:, i])
        close(found[0], expected[0, i])
        close(found[1], expected[1, min(i, 8)])  # the second row has ended: item 0 leaves it alone
        asked[1, 9:] = batch["target_timestamps"][1]


def test_2_each_channel_by_recurrence() -> None:
    """Outputs of the block's channels, not of the whole model: one channel at a time passes the gate."""
    model, batch = small(num_layers=1, chunk_size=None), histories((15,))
    block = model.blocks[0]
    assert isinstance(block, FuXiLinearBlock)
    for channel in range(3):
        kept = twin(model)
        merge = kept.blocks[0].feed_forward.merge.weight.data  # type: ignore[union-attr]
        shut = torch.ones(3, 1, dtype=torch.bool).expand(3, 32).clone()
        shut[channel] = False
        merge[:, shut.flatten()] = 0.0
        state = kept.init_state(1)
        expected = hidden(kept, batch)
        for i in range(15):
            state = kept.step(state, batch["item_ids"][:, i], batch["timestamps"][:, i])
        close(kept.read(state, batch["target_timestamps"])[0], expected[0, 14])


# State ---------------------------------------------------------------------------------------------------------------


def numbers(state: FuXiLinearState) -> list[int]:
    parts = [[block.retention, block.temporal, block.positional] for block in state.blocks]
    return [sum(part[0].numel() for part in block if part is not None) for block in parts]


def test_3_the_state_has_one_size_for_every_length() -> None:
    """d = 128 and 4 heads: 4096 + 256 + 4096 numbers a block, as derived for the method."""
    model = small(hidden_size=128, num_heads=4, num_periods=8, period_stride=1)
    assert numbers(model.init_state(1)) == [4096 + 256 + 4096] * 2
    assert numbers(model.prefill(histories((2,)))) == numbers(model.prefill(histories((40,)))) == [8448] * 2
    without = small(hidden_size=128, num_heads=4, time="none")
    assert numbers(without.init_state(1)) == [8192] * 2


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_history_then_event_then_recommendation_reads_nothing_again(options: dict[str, object]) -> None:
    """prefill + step + recommend_from = recommend on the longer history, for rows of different lengths."""
    model, longer = small(chunk_size=8, **options), histories((37, 2, 20, 12, 3))
    last = longer["lengths"] - 1
    before = torch.arange(37) < last[:, None]
    shorter: SequenceBatch = {
        "item_ids": longer["item_ids"] * before, "lengths": last, "timestamps": longer["timestamps"] * before,
    }  # type: ignore[typeddict-item]  # fmt: skip
    item, time = (longer[name].gather(1, last[:, None])[:, 0] for name in ("item_ids", "timestamps"))  # type: ignore[literal-required]
    state = model.step(model.prefill(shorter), item, time)
    found = model.recommend_from(state, 20, longer["target_timestamps"], seen=longer["item_ids"])
    expected = model.recommend({**longer, "seen": longer["item_ids"]}, 20)
    assert torch.equal(found.valid, expected.valid)
    assert (found.item_ids == expected.item_ids).float().mean() > 0.98  # neighbours with equal scores may swap
    scores = model.score(model.read(state, longer["target_timestamps"]))
    same(scores[:, 1:], model.score_items(longer)[:, 1:], atol=1e-5 / model.config.temperature)
    reached = model.prefill(longer)
    for name in ("item_ids", "times", "counts"):
        assert torch.equal(getattr(state, name), getattr(reached, name))
    for one, other in zip(state.blocks, reached.blocks, strict=True):
        close(one.retention, other.retention)
        close(one.positional, other.positional)
        if one.temporal is not None:
            close(one.temporal, other.temporal)  # type: ignore[arg-type]


def test_a_question_changes_no_state_and_depends_on_its_time() -> None:
    model, batch = small(), histories()
    state = model.prefill(batch)
    now = batch["target_timestamps"]
    first = model.read(state, now)
    later = model.read(state, now + 5 * HOUR)
    assert (first - later).abs().max() > 1e-4
    same(model.read(state, now), first)
    same(first, model.user_representation(batch))


def test_rows_without_an_event_keep_their_state() -> None:
    model, batch = small(), histories((5, 5))
    state, now = model.prefill(batch), batch["target_timestamps"]
    after = model.step(state, torch.tensor([7, 0]), now)
    assert after.counts.tolist() == [6, 5] and after.item_ids[1] == state.item_ids[1]
    same(model.read(after, now + HOUR)[1], model.read(state, now + HOUR)[1])
    assert (model.read(after, now + HOUR)[0] - model.read(state, now + HOUR)[0]).abs().max() > 1e-4


def test_streaming_refuses_what_it_cannot_serve() -> None:
    model, batch = small(max_history=6), histories((6, 4))
    state, one, now = model.prefill(batch), torch.tensor([1, 1]), batch["target_timestamps"]
    with pytest.raises(DataError, match=r"outgrown(.|\n)*1 rows with 7 events(.|\n)*max_history = 6(.|\n)*prefill"):
        model.step(state, one, now)
    with pytest.raises(DataError, match="item_ids: an item is outside the catalogue"):
        model.step(state, torch.tensor([0, 21]), now)
    with pytest.raises(DataError, match="timestamps is missing"):
        model.step(state, torch.tensor([0, 1]))
    with pytest.raises(DataError, match="target_timestamps is missing"):
        model.read(state)
    with pytest.raises(DataError, match="a row without events"):
        model.read(model.init_state(2), now)
    with pytest.raises(DataError, match="max_history = 6"):
        model.prefill(histories((7,)))
    with pytest.raises(DataError, match="timestamps is missing"):
        model.prefill({"item_ids": batch["item_ids"], "lengths": batch["lengths"]})


# Channels ------------------------------------------------------------------------------------------------------------


def test_4_products_are_sin_and_cos_of_the_gap() -> None:
    """For times near 1.7e12, the size of milliseconds."""
    model = small(num_periods=8, period_base=2, period_start=10, period_stride=3, learnable_decay=True)
    assert model.clock is not None
    torch.nn.init.constant_(model.clock.decay_logit, 200.0)  # gamma = 1
    gaps = torch.randint(0, 10**9, (1, 50), generator=torch.Generator().manual_seed(1))
    times = torch.full_like(gaps, 1_700_000_000_123)
    found = model.clock(times, times + gaps, torch.zeros_like(gaps))
    products = (found.query * found.key).sum(2)[0]
    angles = 2 * math.pi * gaps[0, :, None].double() / torch.tensor(model.config.periods)
    assert (products - torch.cat([angles.sin(), angles.cos()], dim=1)).abs().max() < 1e-4


def test_5_only_differences_of_times_enter() -> None:
    model, batch = small(learnable_decay=True), histories()
    shifted = dict(batch)
    for name in ("timestamps", "target_timestamps"):
        shifted[name] = batch[name] + 123_456_789 * (batch[name] > 0)  # type: ignore[literal-required]
    close(hidden(model, shifted), hidden(model, batch), 1e-4)  # type: ignore[arg-type]


def test_5_without_decay_a_shift_by_one_period_is_invisible() -> None:
    model = small(num_periods=1, period_base=DAY, period_start=1, learnable_decay=True)
    assert model.clock is not None
    torch.nn.init.constant_(model.clock.decay_logit, 200.0)
    batch = histories((20,))
    shifted = dict(batch)
    shifted["timestamps"] = batch["timestamps"].clone()
    shifted["timestamps"][0, 7] -= DAY
    close(hidden(model, shifted), hidden(model, batch), 1e-4)  # type: ignore[arg-type]
    shifted["timestamps"][0, 7] += 6 * HOUR
    assert (hidden(model, shifted) - hidden(model, batch)).abs().max() > 1e-2  # type: ignore[arg-type]


def test_6_gamma_near_zero_leaves_events_of_the_query_time() -> None:
    model = small(learnable_decay=True, num_periods=2, period_base=60, period_start=1, period_stride=1)
    assert model.clock is not None
    torch.nn.init.constant_(model.clock.decay_logit, -1e6)
    times = torch.tensor([0, 100, 100, 400])
    values = torch.randn(4, 32)
    found = temporal(model, times, torch.tensor([100, 100, 400, 400]), values)
    # cos 0 = 1 and sin 0 = 0: the query at 100 sees both events of 100, the third query (400) none yet.
    expected = torch.stack([values[0] * 0, values[1], values[0] * 0, values[3]]) * (torch.arange(32) >= 16)
    same(found, expected)
    same(temporal(model, times, times, values)[2], (values[1] + values[2]) * (torch.arange(32) >= 16))


def test_6_a_large_lambda_leaves_the_current_event() -> None:
    query, key, value = torch.randn(3, 10, 4).unbind(0)
    found = quadratic_form(query, key, value, torch.tensor([60.0]))
    same(found, (query * key).sum(-1, keepdim=True) * value)


def test_lambda_starts_at_halves_and_falls_with_the_head() -> None:
    block = small(initializer_range=1e-4, num_heads=4).blocks[0]
    same(block.rates(), 0.5 ** torch.arange(1.0, 5.0), atol=1e-3)  # type: ignore[operator,union-attr]


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("time", ["target", "last"])
def test_7_state_t_has_no_gradient_from_later_events(chunk_size: int | None, time: str) -> None:
    model, batch = small(chunk_size=chunk_size, time=time), histories((10,))
    embeds = model.item_embedding(batch["item_ids"]).detach().requires_grad_()
    states = model(**model.inputs(batch), item_embeds=embeds).hidden
    for t in range(10):
        (gradient,) = torch.autograd.grad(states[0, t].pow(3).sum(), embeds, retain_graph=True)
        reach = gradient[0].abs().sum(-1)
        assert not reach[t + 1 :].any() and (reach[: t + 1] > 0).all()


@pytest.mark.parametrize("chunk_size", [None, 4, 16])
def test_7_padding_changes_nothing(chunk_size: int | None) -> None:
    model, batch = small(chunk_size=chunk_size), histories()
    padded = dict(batch)
    for name in ("item_ids", "timestamps"):
        padded[name] = torch.nn.functional.pad(batch[name], (0, 5))  # type: ignore[literal-required]
    close(hidden(model, padded)[:, :37], hidden(model, batch))  # type: ignore[arg-type]
    assert not hidden(model, padded)[:, 37:].any()  # type: ignore[arg-type]


def test_8_augmented_channels_can_become_maps_of_single_events() -> None:
    """alpha = 0, beta = 1: Y_t = V and Y_p = V. With the retention channel shut, states see their own event only."""
    model, batch = small(augment_current=True, num_layers=1), histories((12,))
    block = model.blocks[0]
    assert isinstance(block, FuXiLinearBlock) and block.current is not None
    for name, weights in block.current.items():
        weights.data.copy_(torch.tensor([[0.0], [1.0]]).expand_as(weights))
        output, value = torch.randn(2, 3, 32).unbind(0)
        same(block._with_current(name, output, value), value)
    block.feed_forward.merge.weight.data[:, :32] = 0.0
    embeds = model.item_embedding(batch["item_ids"]).detach().requires_grad_()
    states = model(**model.inputs(batch), item_embeds=embeds).hidden
    (gradient,) = torch.autograd.grad(states[0, 9].pow(3).sum(), embeds)
    reach = gradient[0].abs().sum(-1)
    assert reach[9] > 0 and not reach[torch.arange(12) != 9].any()


def test_9_positions_start_as_a_toeplitz_kernel_with_unit_diagonal() -> None:
    table = small().blocks[1].positions.weight.detach()  # type: ignore[union-attr]
    kernel = table @ table.T / (table.shape[1] / 2)
    same(kernel.diagonal(), torch.ones(48))
    for offset in range(1, 48):
        diagonal = kernel.diagonal(offset)
        same(diagonal, diagonal[:1].expand_as(diagonal))
    assert kernel[0, 20] < 0.9


@pytest.mark.parametrize(("time", "factor"), [("target", 14), ("last", 14), ("none", 11)])
def test_10_a_block_has_14_d_squared_weights(time: str, factor: int) -> None:
    """11 d^2 without the temporal channel; besides, a table of positions and one number a head."""
    block = small(time=time).blocks[0]
    tables = sum(p.numel() for name, p in block.named_parameters() if name.startswith(("positions", "forgetting")))
    assert tables == 48 * 32 + 2
    assert sum(p.numel() for p in block.parameters()) - tables == factor * 32**2
    extra = small(time=time, augment_current=True).blocks[0]
    scalars = sum(p.numel() for p in extra.parameters()) - sum(p.numel() for p in block.parameters())
    assert scalars == (2 if time == "none" else 2 + 2 * 8)


def test_periods_are_shared_by_blocks_and_learned_once() -> None:
    names = [name for name, _ in small(learnable_decay=True, num_layers=3).named_parameters() if "decay" in name]
    assert names == ["clock.decay_logit"]
    assert FuXiLinearConfig(num_items=5).periods[:5] == (1, 16, 256, 4096, 65536)


def daily(rows: int, width: int, seed: int) -> SequenceBatch:
    """Item = which of eight times of the day it is, give or take half an hour; gaps are irregular, 3 h to 3 days."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randint(1, 25, (rows, width + 1), generator=generator).cumsum(1)
    jitter = torch.randint(0, HOUR, (rows, width + 1), generator=generator)
    clock, items = NOW // DAY * DAY + 3 * HOUR * slots + jitter, slots % 8 + 1
    return {
        "item_ids": items[:, :-1], "targets": items[:, 1:], "lengths": torch.full((rows,), width),
        "timestamps": clock[:, :-1], "target_timestamps": clock[:, -1],
    }  # type: ignore[typeddict-item]  # fmt: skip


@pytest.mark.parametrize(("time", "solves"), [("target", True), ("none", False)])
def test_11_a_daily_cycle_needs_the_temporal_channel(time: str, solves: bool) -> None:
    model = small(
        num_items=8, time=time, num_periods=1, period_base=DAY, period_start=1, learnable_decay=True, num_layers=2,
        initializer_range=0.1, dropout=0.0, max_history=12,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-2, weight_decay=0.0)
    for step in range(60):
        optimizer.zero_grad()
        info = StepInfo(step, 60, 0.0, torch.Generator().manual_seed(step))
        NextItem().loss(model, daily(64, 12, step), info).total.backward()
        optimizer.step()
    asked = daily(400, 12, 10_000)
    hits = (model.eval().score_items(asked).argmax(1) == asked["targets"][:, -1]).float().mean()
    assert hits > 0.95 if solves else hits < 0.3


# Options -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_heads", 5), ("qk_size", 0), ("chunk_size", 0), ("num_periods", 3), ("period_base", 1),
        ("period_start", -1), ("period_stride", 0), ("position_width", 7), ("multiplier", 0), ("time", "later"),
        ("period_base", 2**20),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(option: str, value: object) -> None:
    with pytest.raises(RecipeError, match=rf"encoder.{option}: found {value!r}, expected"):
        FuXiLinearConfig(**{**SMALL, option: value})


def test_without_time_the_periods_do_not_matter() -> None:
    assert FuXiLinearConfig(num_items=5, hidden_size=6, num_heads=1, time="none").channels == 2
    model = small(time="none")
    assert model.uses == frozenset() and model.clock is None
    assert small(time="last").uses == frozenset({"timestamps"})


def test_too_long_batches_are_refused() -> None:
    with pytest.raises(DataError, match="max_history = 8"):
        hidden(small(max_history=8), histories((9,)))
