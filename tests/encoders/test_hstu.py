"""HSTU: the contract, and the properties of a correct implementation (test_1 to test_11, numbered as in our list)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from llmrec.blocks.relative_bias import causal_tiles
from llmrec.data.schema import SequenceBatch
from llmrec.encoders.hstu import HSTUBlock, HSTUConfig, HSTUEncoder
from llmrec.errors import DataError, RecipeError
from llmrec.interfaces import IncrementalEncoder
from llmrec.strategies.base import StepInfo
from llmrec.strategies.next_item import NextItem
from tests.contracts.encoders import EncoderContract, same

HOUR, START = 3600, 1_600_000_000


class TestHSTU(EncoderContract):
    config = HSTUConfig(num_items=30, hidden_size=16, max_history=16, num_heads=2)
    encoder_class = HSTUEncoder


class TestHSTUAskedAtTheLastEvent(EncoderContract):
    config = HSTUConfig(num_items=30, hidden_size=16, max_history=16, time="last", concat_gate=True)
    encoder_class = HSTUEncoder


class TestHSTUWithoutTime(EncoderContract):
    config = HSTUConfig(num_items=30, hidden_size=16, max_history=16, time="none", num_layers=1)
    encoder_class = HSTUEncoder


def small(**options: object) -> HSTUEncoder:
    """Two layers with wide weights, so that every part shows in the outputs."""
    torch.manual_seed(0)
    chosen = {"num_items": 20, "hidden_size": 8, "max_history": 12, "dropout": 0.0, "num_heads": 2, **options}
    return HSTUEncoder(HSTUConfig(**{"initializer_range": 0.5, **chosen})).eval()  # type: ignore[arg-type]


def batch_of(rows: int = 3, width: int = 8) -> SequenceBatch:
    make = torch.Generator().manual_seed(4)
    times = START + torch.randint(1, 40 * HOUR, (rows, width + 1), generator=make).cumsum(1)
    return {
        "item_ids": torch.randint(1, 21, (rows, width), generator=make), "lengths": torch.full((rows,), width),
        "timestamps": times[:, :-1], "target_timestamps": times[:, -1],
    }  # type: ignore[typeddict-item]  # fmt: skip


def hidden(model: HSTUEncoder, batch: SequenceBatch) -> Tensor:
    with torch.no_grad():
        return model.encode(batch).hidden


def train(model: HSTUEncoder, batch: SequenceBatch, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(steps):
        optimizer.zero_grad()
        NextItem().loss(model, batch, StepInfo(step, steps, 0.0, torch.Generator())).total.backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize("concat", [False, True])
def test_0_a_block_is_the_written_out_formula(concat: bool) -> None:
    """Mask after SiLU, division by N, order of the split, tables, norms: from the equations, without tiles."""
    config = HSTUConfig(
        hidden_size=8, max_history=12, num_heads=2, attention_size=3, value_size=5, concat_gate=concat, dropout=0.0
    )
    torch.manual_seed(1)
    block, width = HSTUBlock(config), 6
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x, batch = torch.randn(3, width, 8), batch_of(3, width)
    queries = torch.cat([batch["timestamps"][:, 1:], batch["target_timestamps"][:, None]], 1)
    mapped = F.silu(F.layer_norm(x, (8,), eps=1e-6) @ block.projection.weight.T)
    gate, value, query, key = mapped.split([10, 10, 6, 6], -1)
    q, k, v = (part.view(3, width, 2, -1) for part in (query, key, value))
    place = torch.arange(width)
    gaps = (queries[:, :, None] - batch["timestamps"][:, None, :]).abs().clamp(min=1).double()
    assert block.position is not None and block.time is not None
    bias = block.position.weight[place[None] - place[:, None] + 11] + block.time.weight[(gaps.log() / 0.301).long()]
    weights = F.silu(torch.einsum("bihd,bjhd->bhij", q, k) + bias[:, None]) / 12 * torch.ones(width, width).tril()
    normed = F.layer_norm(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2), (10,), eps=1e-6)
    gated = torch.cat([gate, normed, gate * normed], -1) if concat else gate * normed
    expected = x + gated @ block.output.weight.T + block.output.bias
    for rows in (2, 64):
        tiles = causal_tiles(width, x.device, queries=queries, timestamps=batch["timestamps"], rows=rows)
        same(block(x, tiles), expected, atol=1e-4)


def test_1_causality_and_the_next_time() -> None:
    model, batch = small(), batch_of()
    before = hidden(model, batch)
    for i in range(7):
        later = {**batch, "item_ids": batch["item_ids"].clone(), "timestamps": batch["timestamps"].clone()}
        later["item_ids"][:, i + 1] = later["item_ids"][:, i + 1] % 20 + 1
        same(hidden(model, later)[:, : i + 1], before[:, : i + 1], atol=1e-6)  # type: ignore[arg-type]
        later["timestamps"][:, i + 2 :] += 1000 * HOUR
        later["target_timestamps"] = batch["target_timestamps"] + 1000 * HOUR
        same(hidden(model, later)[:, : i + 1], before[:, : i + 1], atol=1e-6)  # type: ignore[arg-type]
        # The next event's time reaches state i, through the time table alone.
        next_time = {**batch, "timestamps": batch["timestamps"].clone()}
        next_time["timestamps"][:, i + 1] += 1000 * HOUR
        after = hidden(model, next_time)  # type: ignore[arg-type]
        same(after[:, :i], before[:, :i], atol=1e-6)
        assert (after[:, i] - before[:, i]).abs().max() > 1e-4
    for block in model.stack.blocks:
        block.time.weight.data.zero_()
    same(hidden(model, next_time), hidden(model, batch), atol=1e-6)  # type: ignore[arg-type]


def test_1_with_time_last_a_state_knows_no_later_time() -> None:
    model, batch = small(time="last"), batch_of()
    later = {**batch, "timestamps": batch["timestamps"].clone()}
    later["timestamps"][:, 5:] += 1000 * HOUR
    del later["target_timestamps"]
    same(hidden(model, later)[:, :5], hidden(model, batch)[:, :5], atol=1e-6)  # type: ignore[arg-type]


def test_2_what_stands_in_padding_does_not_matter() -> None:
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


def test_3_without_scores_only_the_residual_remains() -> None:
    block = small().stack.blocks[0]
    with torch.no_grad():
        block.projection.weight[16:].zero_()  # u and v keep their maps, q and k are zero
        for table in (block.position, block.time):
            table.weight.zero_()
        block.output.bias.fill_(0.7)
        x, batch = torch.randn(3, 8, 8), batch_of()
        out = block(x, causal_tiles(8, x.device, queries=batch["timestamps"], timestamps=batch["timestamps"]))
    same(out, x + 0.7)


def test_5_without_bias_times_do_not_matter() -> None:
    batch = batch_of()
    shuffled = {**batch, "timestamps": batch["timestamps"].flip(1)}
    shifted = {**batch, "timestamps": batch["timestamps"] + 12345}
    shifted["target_timestamps"] = batch["target_timestamps"] + 12345
    plain, biased = small(relative_bias=False), small()
    assert plain.uses == frozenset()
    same(plain(**batch | {"timestamps": shuffled["timestamps"]}).hidden, plain(**batch).hidden, atol=0)
    assert (hidden(biased, shuffled) - hidden(biased, batch)).abs().max() > 1e-3  # type: ignore[arg-type]
    same(hidden(biased, shifted), hidden(biased, batch), atol=0)  # type: ignore[arg-type]


def test_6_rows_have_unit_length_and_logits_are_bounded() -> None:
    model, batch = small(), batch_of()
    same(hidden(model, batch).norm(dim=-1), torch.ones(3, 8))
    assert model.score_items(batch)[:, 1:].abs().max() <= 20 + 1e-4
    same(model.user_representation(batch).norm(dim=-1), torch.ones(3))
    raw = small(similarity="dot", temperature=1.0)
    assert (hidden(raw, batch).norm(dim=-1) - 1).abs().max() > 0.1


def test_7_sampled_loss_at_its_limits() -> None:
    batch = batch_of()
    batch["targets"] = torch.full((3, 8), 7)
    info = StepInfo(0, 1, 0.0, torch.Generator())
    only_hits = {**batch, "negatives": torch.full((5,), 7)}
    strategy = NextItem(loss="sampled_softmax", negatives=5)
    assert strategy.loss(small(), only_hits, info).total.abs() < 1e-6  # type: ignore[arg-type]
    others = {**batch, "negatives": torch.tensor([1, 2, 3, 4, 5])}
    flat = strategy.loss(small(temperature=1e6), others, info).total  # type: ignore[arg-type]
    same(flat, torch.tensor(6.0).log())


@pytest.mark.parametrize("max_history", [12, 30])
def test_8_parameters_of_a_block(max_history: int) -> None:
    block = small(max_history=max_history).stack.blocks[0]
    assert sum(p.numel() for p in block.parameters()) == 5 * 8**2 + 8 + (2 * max_history - 1) + 129


def test_9_next_item_is_the_previous_one_plus_one() -> None:
    model = small(num_items=50, hidden_size=32, max_history=20, num_heads=1, num_layers=1, time="none")
    walk = (torch.arange(50)[:, None] + torch.arange(21)) % 50 + 1
    batch: SequenceBatch = {"item_ids": walk[:, :-1], "targets": walk[:, 1:], "lengths": torch.full((50,), 20)}  # type: ignore[typeddict-item]
    train(model, batch, 60)
    assert (model.score_items(batch).argmax(1) == walk[:, -1]).float().mean() > 0.99


def gap_task(rows: int, seed: int) -> SequenceBatch:
    """Items 1 and 2: the next one is 1 after a gap of minutes, 2 after a gap of days. Nothing else tells."""
    make = torch.Generator().manual_seed(seed)
    long = torch.randint(0, 2, (rows, 9), generator=make)
    noise = torch.rand(rows, 9, generator=make) + 0.5
    times = START + (torch.where(long > 0, 48 * HOUR, 300) * noise).long().cumsum(1)
    items = long + 1
    return {
        "item_ids": items[:, :-1], "targets": items[:, 1:], "lengths": torch.full((rows,), 8),
        "timestamps": times[:, :-1], "target_timestamps": times[:, -1],
    }  # type: ignore[typeddict-item]  # fmt: skip


def test_9_the_gap_decides_and_only_the_time_table_knows() -> None:
    found = {}
    for bias in (True, False):
        model = small(num_items=2, hidden_size=16, num_heads=1, relative_bias=bias, initializer_range=0.02)
        train(model, gap_task(64, 1), 100)
        asked = gap_task(200, 2)
        found[bias] = (hidden_argmax(model, asked) == asked["targets"]).float().mean()
    assert found[True] > 0.98 and found[False] < 0.6


def hidden_argmax(model: HSTUEncoder, batch: SequenceBatch) -> Tensor:
    """[B, L] best item at every position."""
    return model.score(hidden(model, batch))[..., 1:].argmax(-1) + 1


@pytest.mark.parametrize("time", ["target", "last", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_10_event_by_event_equals_the_whole_history(time: str, bias: bool) -> None:
    model, batch = small(time=time, relative_bias=bias), batch_of()
    assert isinstance(model, IncrementalEncoder)
    times = torch.cat([batch["timestamps"], batch["target_timestamps"][:, None]], 1)
    whole, state = hidden(model, batch), model.init_state(3)
    with torch.no_grad():
        for t in range(8):
            state = model.step(state, batch["item_ids"][:, t], times[:, t])
            same(model.read(state, times[:, t + 1]), whole[:, t])
    kept = state.past[0]
    assert kept is not None and kept[0].shape == (3, 2, 7, 4)  # grows with the history


def test_10_an_old_state_stays_valid() -> None:
    model, batch = small(), batch_of()
    with torch.no_grad():
        first = model.step(model.init_state(3), batch["item_ids"][:, 0], batch["timestamps"][:, 0])
        before = model.read(first, batch["timestamps"][:, 1])
        model.step(first, batch["item_ids"][:, 1], batch["timestamps"][:, 1])
        same(model.read(first, batch["timestamps"][:, 1]), before, atol=0)


def test_10_states_refuse_what_they_cannot_hold() -> None:
    model, items, times = small(max_history=2), torch.tensor([1, 2]), torch.tensor([START, START])
    state = model.init_state(2)
    with pytest.raises(ValueError, match="no event yet"):
        model.read(state, times)
    with pytest.raises(ValueError, match="timestamp of every event"):
        model.step(state, items)
    with pytest.raises(ValueError, match="belongs to 2 rows, found 1"):
        model.step(state, items[:1], times[:1])
    state = model.step(model.step(state, items, times), items, times + 1)
    with pytest.raises(ValueError, match="time of the event to predict"):
        model.read(state)
    with pytest.raises(ValueError, match="larger max_history"):
        model.step(state, items, times + 2)


def test_11_attention_grows_with_the_square_and_projections_do_not() -> None:
    """Counted operations; clocks of shared machines are no test."""

    def counted(width: int) -> tuple[int, int]:
        model = small(max_history=2048, hidden_size=8, num_layers=1, num_heads=1, time="none")
        ids = torch.ones(1, width, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(item_ids=ids, lengths=torch.tensor([width]))
        totals = {str(name): n for name, n in counter.get_flop_counts()["Global"].items()}
        square = totals["aten.baddbmm"] + totals["aten.bmm"]
        return square, sum(totals.values()) - square

    (short_square, short_rest), (long_square, long_rest) = counted(1024), counted(2048)
    assert 3.7 < long_square / short_square < 4.1
    assert long_rest == 2 * short_rest


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = HSTUEncoder(HSTUConfig(num_items=500, hidden_size=64, max_history=100))
    block = model.stack.blocks[0]
    for weight in (block.projection.weight, block.position.weight, block.time.weight, model.item_embedding.weight[1:]):
        assert 0.017 < weight.std() < 0.023
    assert abs(model.stack.position_embedding.weight.std() - (2 / 164) ** 0.5) < 0.005  # Xavier normal
    assert 0.2 < block.output.weight.abs().max() <= (6 / 128) ** 0.5 and not block.output.bias.any()  # Xavier uniform


def test_too_long_batches_and_bad_options_are_refused() -> None:
    with pytest.raises(DataError, match="max_history = 12"):
        small()(**batch_of(width=13))
    with pytest.raises(RecipeError, match="num_heads: found 3, expected a divisor of hidden_size 8"):
        HSTUConfig(hidden_size=8, num_heads=3)
    with pytest.raises(RecipeError, match="value_size: found 0"):
        HSTUConfig(value_size=0)
    with pytest.raises(RecipeError, match="num_layers: found 0"):
        HSTUConfig(num_layers=0)
    with pytest.raises(RecipeError, match="expected target, last or none"):
        HSTUConfig(time="never")  # type: ignore[arg-type]
