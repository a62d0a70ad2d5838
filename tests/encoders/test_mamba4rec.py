"""Mamba4Rec: the contract, and the properties of a correct implementation (numbers 1, 2, 7, 10 and 12 of the list of
the sequence encoders)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llmrec.data.schema import SequenceBatch
from llmrec.encoders.mamba4rec import CHUNK, Mamba4RecConfig, Mamba4RecEncoder, MambaState, selective_scan
from llmrec.errors import RecipeError
from llmrec.interfaces import IncrementalEncoder
from llmrec.strategies.base import StepInfo
from llmrec.strategies.next_item import NextItem
from llmrec.training.optim import decays
from tests.contracts.encoders import EncoderContract, same


class TestMamba4Rec(EncoderContract):
    config = Mamba4RecConfig(num_items=30, hidden_size=16, max_history=16, state_size=8, initializer_range=0.1)
    encoder_class = Mamba4RecEncoder


class TestMamba4RecTwoLayers(TestMamba4Rec):
    config = Mamba4RecConfig(
        num_items=30, hidden_size=16, max_history=16, num_layers=2, state_size=4, conv_width=1, initializer_range=0.1
    )


def small(**options: object) -> Mamba4RecEncoder:
    torch.manual_seed(0)
    chosen = {"num_items": 20, "hidden_size": 8, "max_history": 12, "dropout": 0.0, "initializer_range": 0.3, **options}
    return Mamba4RecEncoder(Mamba4RecConfig(**{"state_size": 6, **chosen})).eval()  # type: ignore[arg-type]


def inputs(rows: int = 3, width: int = 6) -> SequenceBatch:
    items = torch.randint(1, 21, (rows, width), generator=torch.Generator().manual_seed(4))
    return {"item_ids": items, "lengths": torch.full((rows,), width)}


def scan_inputs(length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """drive [2, L, 3], delta, rates [4, 3], write [2, L, 4], read."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator)

    drive, delta, rates = draw(2, length, 3), F.softplus(draw(2, length, 3)), -draw(4, 3).exp()
    return drive, delta, rates, draw(2, length, 4), draw(2, length, 4)


def one_by_one(drive: Tensor, delta: Tensor, rates: Tensor, write: Tensor, read: Tensor) -> Tensor:
    """The recurrence as it is written."""
    state, outputs = drive.new_zeros(drive.shape[0], *rates.shape), []
    for t in range(drive.shape[1]):
        decay = torch.exp(delta[:, t, None, :] * rates)
        state = decay * state + write[:, t, :, None] * drive[:, t, None, :]
        outputs.append((read[:, t, :, None] * state).sum(1))
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("layers", [1, 2])
def test_1_state_t_has_no_gradient_from_later_events(layers: int) -> None:
    model, batch = small(num_layers=layers), inputs(1)
    embeds = model.item_embedding(batch["item_ids"]).detach().requires_grad_()
    hidden = model(**batch, item_embeds=embeds).hidden
    for t in range(6):
        (gradient,) = torch.autograd.grad(hidden[0, t].pow(3).sum(), embeds, retain_graph=True)
        reach = gradient[0].abs().sum(-1)
        assert not reach[t + 1 :].any()
        assert (reach[: t + 1] > 0).all()


@pytest.mark.parametrize("pads", [1, 20])
def test_2_padding_leaves_real_states_alone(pads: int) -> None:
    model, batch = small(), inputs()
    padded = {**batch, "item_ids": F.pad(batch["item_ids"], (0, pads))}
    found, expected = model(**padded), model(**batch)
    assert (found.hidden[:, :6] - expected.hidden).abs().max() < 1e-5
    assert (found.user_repr - expected.user_repr).abs().max() < 1e-5
    assert not found.hidden[:, 6:].any()


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 200])
def test_7_the_scan_and_its_gradients_are_those_of_the_recurrence(length: int) -> None:
    tensors = [tensor.double().requires_grad_() for tensor in scan_inputs(length)]
    found, expected = selective_scan(*tensors), one_by_one(*tensors)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    weights = torch.randn(found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(3))
    for got, wanted in zip(
        torch.autograd.grad((found * weights).sum(), tensors),
        torch.autograd.grad((expected * weights).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


def test_7_gradients_of_the_scan_agree_with_differences() -> None:
    tensors = [tensor.requires_grad_() for tensor in scan_inputs(CHUNK + 2, torch.float64)]
    assert torch.autograd.gradcheck(selective_scan, tensors)


def test_second_derivatives_are_refused_not_wrong() -> None:
    tensors = [tensor.requires_grad_() for tensor in scan_inputs(3)]
    (first,) = torch.autograd.grad(selective_scan(*tensors).pow(2).sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"conv_width": 1}])
def test_7_step_by_step_equals_the_parallel_form(options: dict[str, int]) -> None:
    model, batch = small(**options), inputs(width=40)
    assert isinstance(model, IncrementalEncoder)
    hidden, state = model(**batch).hidden, model.init_state(3)
    assert not model.read(state).any()
    for t in range(40):
        state = model.step(state, batch["item_ids"][:, t])
        same(model.read(state), hidden[:, t])
    assert not model.read(state).requires_grad


def test_7_the_state_does_not_grow_and_rows_without_event_keep_theirs() -> None:
    model, items = small(), inputs(2, 30)["item_ids"]

    def shapes(state: MambaState) -> list[tuple[int, ...]]:
        return [tuple(part.shape) for part in (state.recent, state.recurrent, state.hidden)]

    start = state = model.init_state(2)
    for t in range(30):
        state = model.step(state, items[:, t])
    assert shapes(state) == shapes(start) == [(1, 2, 3, 16), (1, 2, 6, 16), (2, 8)]
    after = model.step(state, torch.tensor([0, 3]))
    torch.testing.assert_close(after.recurrent[:, 0], state.recurrent[:, 0], rtol=0, atol=0)
    torch.testing.assert_close(after.recent[:, 0], state.recent[:, 0], rtol=0, atol=0)
    torch.testing.assert_close(model.read(after)[0], model.read(state)[0], rtol=0, atol=0)
    assert (model.read(after)[1] - model.read(state)[1]).abs().max() > 1e-3


def test_the_convolution_is_a_causal_depthwise_one() -> None:
    mixer, signal = small().layers[0].mixer, torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(5))
    found = mixer._convolve(F.pad(signal, (0, 0, 3, 0)))
    kernel = mixer.conv_weight.T[:, None]  # [c, 1, w]
    wanted = F.conv1d(F.pad(signal.transpose(1, 2), (3, 0)), kernel, mixer.conv_bias, groups=16)
    same(found, F.silu(wanted).transpose(1, 2))


def test_initial_values_are_those_of_mamba() -> None:
    mixer = small(hidden_size=64, state_size=32).layers[0].mixer
    assert mixer.rank == 4
    same(mixer.rates(), -torch.arange(1.0, 33.0)[:, None].expand(32, 128), atol=1e-4)
    steps = F.softplus(mixer.step_size.bias)
    assert steps.min() >= 1e-3 - 1e-6 and steps.max() <= 0.1 + 1e-6
    assert 0.5e-2 < steps.log().mean().exp() < 2e-2  # log-uniform: the geometric mean is the middle
    assert (mixer.skip == 1).all()
    assert not decays("log_rates", mixer.log_rates, mixer)


def test_only_a_single_layer_leaves_the_residual_out() -> None:
    """Without Mamba's output, one layer forgets its input altogether, and two layers do not."""
    for layers, forgets in ((1, True), (2, False)):
        model, batch = small(num_layers=layers), inputs()
        for layer in model.layers:
            torch.nn.init.zeros_(layer.mixer.output.weight)
        hidden = model(**batch).hidden
        assert ((hidden - hidden[:1, :1]).abs().max() < 1e-6) == forgets


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
    model = small(num_items=7, hidden_size=32, state_size=8, initializer_range=0.05).train()
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


def test_12_scores_and_inputs_share_one_table() -> None:
    model, batch = small(), inputs()
    before = model.score_items(batch)
    torch.testing.assert_close(model.item_vectors()[1:], model.item_embedding.weight[1:], rtol=0, atol=0)
    unused = ({*range(1, 21)} - set(batch["item_ids"].flatten().tolist())).pop()
    with torch.no_grad():
        model.item_embedding.weight[unused].neg_()
    same(model.score_items(batch)[:, unused], -before[:, unused])
    assert sum("item" in name for name in model.state_dict()) == 1


def test_the_recurrence_stays_float32_under_autocast_and_in_bfloat16() -> None:
    model, batch = small(), inputs(width=10)
    exact = model(**batch).user_repr
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(**batch).user_repr
        rough.sum().backward()
    assert torch.cosine_similarity(rough.float(), exact, dim=-1).min() > 0.99
    assert torch.isfinite(model.layers[0].mixer.log_rates.grad).all()
    half = small().to(torch.bfloat16)
    assert half.layers[0].mixer.rates().dtype == torch.float32
    state = half.step(half.init_state(3), batch["item_ids"][:, 0])
    assert state.recurrent.dtype == torch.float32 and half.read(state).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["num_layers", "state_size", "conv_width", "expand"])
def test_bad_options_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=rf"encoder\.{name}: found 0, expected at least 1"):
        Mamba4RecConfig(num_items=5, **{name: 0})  # type: ignore[arg-type]
