"""LRURec: the contract, and the properties of a correct implementation (numbers 1, 2, 6, 10 and 12 of the list of the
sequence encoders)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llmrec.data.schema import SequenceBatch
from llmrec.encoders.lrurec import LRURecConfig, LRURecEncoder, LRUState, diagonal_scan
from llmrec.errors import RecipeError
from llmrec.interfaces import IncrementalEncoder
from llmrec.strategies.base import StepInfo
from llmrec.strategies.next_item import NextItem
from llmrec.training.optim import decays
from tests.contracts.encoders import EncoderContract, same


class TestLRURec(EncoderContract):
    config = LRURecConfig(num_items=30, hidden_size=16, max_history=16, initializer_range=0.1)
    encoder_class = LRURecEncoder


class TestLRURecOneLayerNoBias(TestLRURec):
    config = LRURecConfig(
        num_items=30, hidden_size=32, max_history=16, num_layers=1, state_expansion=1, item_bias=False, dropout=0.0
    )


def small(**options: object) -> LRURecEncoder:
    torch.manual_seed(0)
    chosen = {"num_items": 20, "hidden_size": 8, "max_history": 12, "dropout": 0.0, "initializer_range": 0.3, **options}
    return LRURecEncoder(LRURecConfig(**chosen)).eval()  # type: ignore[arg-type]


def inputs(rows: int = 3, width: int = 6) -> SequenceBatch:
    items = torch.randint(1, 21, (rows, width), generator=torch.Generator().manual_seed(4))
    return {"item_ids": items, "lengths": torch.full((rows,), width)}


def noise(*shape: int, dtype: torch.dtype = torch.complex64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(7))


def ring(states: int, dtype: torch.dtype = torch.complex64) -> Tensor:
    generator = torch.Generator().manual_seed(8)
    real = torch.float64 if dtype == torch.complex128 else torch.float32
    radius = 0.8 + 0.19 * torch.rand(states, dtype=real, generator=generator)
    return torch.polar(radius, 6.28 * torch.rand(states, dtype=real, generator=generator))


def one_by_one(values: Tensor, decay: Tensor) -> Tensor:
    """The recurrence as it is written."""
    state, states = torch.zeros_like(values[:, 0]), []
    for t in range(values.shape[1]):
        state = decay * state + values[:, t]
        states.append(state)
    return torch.stack(states, dim=1)


def test_1_state_t_has_no_gradient_from_later_events() -> None:
    model, batch = small(), inputs(1)
    embeds = model.item_embedding(batch["item_ids"]).detach().requires_grad_()
    hidden = model(**batch, item_embeds=embeds).hidden
    for t in range(6):
        (gradient,) = torch.autograd.grad(hidden[0, t].pow(3).sum(), embeds, retain_graph=True)
        reach = gradient[0].abs().sum(-1)
        assert not reach[t + 1 :].any()
        assert (reach[: t + 1] > 0).all()


@pytest.mark.parametrize("pads", [1, 2, 11])
def test_2_padding_leaves_real_states_alone(pads: int) -> None:
    model, batch = small(), inputs()
    padded = {**batch, "item_ids": F.pad(batch["item_ids"], (0, pads))}
    found, expected = model(**padded), model(**batch)
    assert (found.hidden[:, :6] - expected.hidden).abs().max() < 1e-5
    assert (found.user_repr - expected.user_repr).abs().max() < 1e-5
    assert not found.hidden[:, 6:].any()


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 13, 64, 200])
def test_6_the_scan_is_the_sequential_recurrence(length: int) -> None:
    values, decay = noise(2, length, 5), ring(5)
    found = diagonal_scan(values, decay)
    assert found.dtype == torch.complex64
    torch.testing.assert_close(found, one_by_one(values, decay), rtol=1e-4, atol=1e-4)


def test_6_left_pads_leave_the_state_empty() -> None:
    """Rows with 0, 3 and 9 pads on the left, which hold values of their own, as a bias would put them there."""
    values, decay, pads = noise(3, 11, 5), ring(5), [0, 3, 9]
    valid = torch.arange(11) >= torch.tensor(pads)[:, None]
    found = diagonal_scan(values, decay, valid)
    for row, start in enumerate(pads):
        alone = one_by_one(values[row : row + 1, start:], decay)
        torch.testing.assert_close(found[row : row + 1, start:], alone, rtol=1e-4, atol=1e-4)
    assert (diagonal_scan(values, decay)[1, 3:] - found[1, 3:]).abs().max() > 1e-2


def test_6_derivatives_of_the_scan_are_exact_twice() -> None:
    values = noise(2, 5, 3, dtype=torch.complex128).requires_grad_()
    decay = ring(3, dtype=torch.complex128).requires_grad_()
    assert torch.autograd.gradcheck(diagonal_scan, (values, decay))
    assert torch.autograd.gradgradcheck(diagonal_scan, (values, decay))


def test_6_eigenvalues_start_in_the_ring_and_stay_in_the_disc() -> None:
    model = small(hidden_size=256)
    for block in model.blocks:
        radius = block.unit.decay().abs()
        assert radius.min() >= 0.8 - 1e-6 and radius.max() <= 0.99 + 1e-6
        # Uniform in area: the median lies at half the area, not in the middle of the radii.
        assert abs(radius.median() - ((0.8**2 + 0.99**2) / 2) ** 0.5) < 0.02
        same(torch.exp(2 * block.unit.log_scale), 1 - radius**2, atol=1e-4)
        for far in (-50.0, -17.0, 0.0, 5.0):
            block.unit.log_rate.data.fill_(far)
            assert block.unit.decay().abs().max() < 1


def test_6_one_unit_is_the_written_equation() -> None:
    """Against complex matrices, built here from the stored pairs."""
    unit, x = small().blocks[0].unit, torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(1))
    pairs = unit.input.weight.view(-1, 2, 8)
    into = torch.complex(pairs[:, 0], pairs[:, 1])
    bias = torch.view_as_complex(unit.input.bias.view(-1, 2))
    out = unit.output.weight.view(8, -1, 2)
    out_of = torch.complex(out[..., 0], -out[..., 1])
    rate, phase = torch.exp(unit.log_rate), torch.exp(unit.log_phase)
    driven = torch.exp(unit.log_scale) * (x.to(into.dtype) @ into.T + bias)
    states = one_by_one(driven, torch.exp(torch.complex(-rate, phase)))
    same(unit(x), (states @ out_of.T).real + unit.output.bias, atol=1e-4)


@pytest.mark.parametrize("layers", [1, 2])
def test_6_step_by_step_equals_the_parallel_form(layers: int) -> None:
    model, batch = small(num_layers=layers), inputs(width=40)
    assert isinstance(model, IncrementalEncoder)
    hidden, state = model(**batch).hidden, model.init_state(3)
    assert not model.read(state).any()
    for t in range(40):
        state = model.step(state, batch["item_ids"][:, t])
        same(model.read(state), hidden[:, t], atol=1e-4)
    assert not model.read(state).requires_grad


def test_the_state_does_not_grow_and_rows_without_event_keep_theirs() -> None:
    model, items = small(), inputs(2, 30)["item_ids"]

    def shapes(state: LRUState) -> list[torch.Size]:
        return [state.recurrent.shape, state.hidden.shape]

    start = state = model.init_state(2)
    for t in range(30):
        state = model.step(state, items[:, t])
    assert shapes(state) == shapes(start) == [torch.Size([2, 2, 16]), torch.Size([2, 8])]
    after = model.step(state, torch.tensor([0, 3]))
    torch.testing.assert_close(after.recurrent[:, 0], state.recurrent[:, 0], rtol=0, atol=0)
    torch.testing.assert_close(model.read(after)[0], model.read(state)[0], rtol=0, atol=0)
    assert (model.read(after)[1] - model.read(state)[1]).abs().max() > 1e-3


def test_histories_longer_than_max_history_are_read() -> None:
    assert torch.isfinite(small()(**inputs(width=300)).hidden).all()


def test_10_second_order_sequences_need_two_events() -> None:
    """Next = sum of the last two modulo 7: solved with the whole history, not with a history of one event."""
    pairs = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    walk = list(pairs.unbind(1))
    while len(walk) < 8:
        walk.append((walk[-1] + walk[-2]) % 7)
    ids = torch.stack(walk, dim=1) + 1
    full = torch.full((49,), 7)
    batch: SequenceBatch = {"item_ids": ids[:, :-1], "lengths": full, "targets": ids[:, 1:].clone()}  # type: ignore[typeddict-item]
    batch["targets"][:, 0] = 0  # the second event is free
    model = small(num_items=7, hidden_size=32, initializer_range=0.05).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for step in range(250):
        optimizer.zero_grad()
        loss = NextItem().loss(model, batch, StepInfo(step, 250, 0.0, torch.Generator())).total
        if loss < 0.1:
            break
        loss.backward()
        optimizer.step()
    model.eval()
    assert (model.score_items(batch).argmax(1) == ids[:, -1]).float().mean() > 0.95
    one: SequenceBatch = {"item_ids": ids[:, -2:-1], "lengths": torch.ones(49, dtype=torch.long)}  # type: ignore[typeddict-item]
    assert (model.score_items(one).argmax(1) == ids[:, -1]).float().mean() < 0.5


def test_12_scores_and_inputs_share_one_table_and_the_bias_is_added() -> None:
    model, batch = small(), inputs()
    before = model.score_items(batch)
    torch.testing.assert_close(model.item_vectors()[1:], model.item_embedding.weight[1:], rtol=0, atol=0)
    with torch.no_grad():
        model.item_bias[5] = 2.5
    after = model.score_items(batch)
    same(after[:, 5], before[:, 5] + 2.5)
    same(after[:, 6:], before[:, 6:])
    assert sum("item" in name for name in model.state_dict()) == 2


def test_nothing_complex_is_stored_and_eigenvalues_do_not_decay(tmp_path: Path) -> None:
    model = small()
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    unit = model.blocks[0].unit
    for name in ("log_rate", "log_phase", "log_scale"):
        assert not decays(name, getattr(unit, name), unit)
    model.save_pretrained(tmp_path)
    again = LRURecEncoder.from_pretrained(tmp_path)
    torch.testing.assert_close(again.blocks[1].unit.log_phase, model.blocks[1].unit.log_phase, rtol=0, atol=0)


def test_the_recurrence_stays_complex64_under_autocast_and_in_bfloat16() -> None:
    model, batch = small(), inputs(width=10)
    exact = model(**batch).user_repr
    x = torch.randn(2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.blocks[0].unit.drive(x).dtype == torch.complex64
        rough = model(**batch).user_repr
    assert torch.cosine_similarity(rough.float(), exact, dim=-1).min() > 0.99
    half = small().to(torch.bfloat16)
    unit = half.blocks[0].unit
    assert unit.decay().dtype == unit.drive(x.bfloat16()).dtype == torch.complex64
    state = half.step(half.init_state(3), batch["item_ids"][:, 0])
    assert state.recurrent.dtype == torch.complex64 and half.read(state).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"num_layers": 0}, r"encoder\.num_layers: found 0"),
        ({"state_expansion": 0}, r"encoder\.state_expansion: found 0"),
        ({"max_radius": 1.0}, r"max_radius: found 0\.8 and 1\.0"),
        ({"min_radius": 0.99}, r"found 0\.99 and 0\.99"),
    ],
)
def test_bad_options_are_refused(options: dict[str, float], found: str) -> None:
    with pytest.raises(RecipeError, match=found):
        LRURecConfig(num_items=5, **options)  # type: ignore[arg-type]
