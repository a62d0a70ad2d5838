"""Decayed linear attention: every form against a loop over events, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmrec.blocks.linear_attention import (
    channel_scan,
    chunked_form,
    final_state,
    pairwise_decay,
    quadratic_form,
    read_state,
    step_state,
)

ROWS, HEADS, QK, VALUES = 2, 3, 4, 5


def operands(width: int, *, leaves: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(width)
    shapes = {"query": (QK,), "key": (QK,), "value": (VALUES,), "log_decay": ()}
    made = {name: torch.randn(ROWS, HEADS, width, *end, generator=generator) for name, end in shapes.items()}
    made["log_decay"] = made["log_decay"].exp()
    return {name: x.requires_grad_(leaves) for name, x in made.items()}


def loop(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None) -> Tensor:
    """The definition, one event after the other, in float64."""
    query, key, value = query.double(), key.double(), value.double()
    state = torch.zeros(ROWS, HEADS, QK, VALUES, dtype=torch.float64)
    outputs = []
    for i in range(query.shape[-2]):
        if log_decay is not None:
            place = min(i, log_decay.shape[-1] - 1)
            state = state * (-log_decay.double()[..., place]).exp()[..., None, None]
        state = state + key[..., i, :, None] * value[..., i, None, :]
        outputs.append((query[..., i, :, None] * state).sum(-2))
    return torch.stack(outputs, dim=-2)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert (found - expected).abs().max() <= tolerance * max(1.0, float(expected.detach().abs().max()))


@pytest.mark.parametrize("kind", ["per step", "uniform", "none"])
@pytest.mark.parametrize("chunk_size", [None, 1, 4, 7, 13, 64])
def test_parallel_forms_are_the_definition(kind: str, chunk_size: int | None) -> None:
    """23 events: not a multiple of any chunk but 1."""
    parts = operands(23)
    decay = {"per step": parts["log_decay"], "uniform": torch.rand(1, HEADS, 1), "none": None}[kind]
    given = parts["query"], parts["key"], parts["value"], decay
    found = quadratic_form(*given) if chunk_size is None else chunked_form(*given, chunk_size=chunk_size)
    close(found, loop(*given).float())


@pytest.mark.parametrize("chunk_size", [4, 12, 23])
@pytest.mark.parametrize("uniform", [False, True])
def test_gradients_of_the_chunked_form_are_those_of_the_quadratic_form(chunk_size: int, uniform: bool) -> None:
    gradients = []
    for form in (quadratic_form, lambda *x: chunked_form(*x, chunk_size=chunk_size)):
        leaves = operands(24, leaves=True)
        if uniform:
            leaves["log_decay"] = torch.tensor([0.7, 0.2, 1e-3])[:, None].requires_grad_()
        output = form(*leaves.values())
        output.backward(torch.cos(torch.arange(output.numel())).reshape(output.shape))
        gradients.append({name: leaf.grad for name, leaf in leaves.items()})
    for name, expected in gradients[0].items():
        assert expected.abs().max() > 1e-3
        close(gradients[1][name], expected)


def test_tables_shared_by_all_rows_broadcast() -> None:
    table, value = torch.randn(20, 6), torch.randn(4, 20, 3)
    expected = (table @ table.T).tril() @ value
    close(quadratic_form(table, table, value), expected)
    close(chunked_form(table, table, value, chunk_size=6), expected)


def per_channel(parts: dict[str, Tensor], chunk_size: int) -> Tensor:
    """`channel_scan` of heads: each head's features and decay repeated for its value channels."""
    query, key = (parts[n].permute(0, 2, 3, 1).repeat_interleave(VALUES, -1) for n in ("query", "key"))
    kept = parts["log_decay"].neg().exp().transpose(1, 2).repeat_interleave(VALUES, -1)
    scanned = channel_scan(query, key, parts["value"].transpose(1, 2).flatten(2), kept, chunk_size)
    return scanned.unflatten(-1, (HEADS, VALUES)).transpose(1, 2)


@pytest.mark.parametrize("width", [1, 2, 23, 24])
@pytest.mark.parametrize("chunk_size", [1, 4, 5, 12, 64])
def test_the_scan_is_the_quadratic_form_with_its_gradients(width: int, chunk_size: int) -> None:
    scanned, reference = operands(width, leaves=True), operands(width, leaves=True)
    found, expected = per_channel(scanned, chunk_size), quadratic_form(*reference.values())
    close(found, expected)
    weights = torch.cos(torch.arange(found.numel())).reshape(found.shape)
    found.backward(weights)
    expected.backward(weights)
    for name in scanned:
        assert scanned[name].grad is not None
        close(scanned[name].grad, reference[name].grad)  # type: ignore[arg-type]


def test_gradients_of_the_scan_by_finite_differences() -> None:
    torch.manual_seed(0)
    shapes = [(1, 7, 2, 3), (1, 7, 2, 3), (1, 7, 3)]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    kept = torch.rand(1, 7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: channel_scan(*x, 3), (*leaves, kept))


def test_one_event_after_the_other_is_the_quadratic_form() -> None:
    parts = operands(12)
    expected, state = quadratic_form(*parts.values()), torch.zeros(ROWS, HEADS, QK, VALUES)
    for i in range(12):
        state = step_state(state, parts["key"][:, :, i], parts["value"][:, :, i], parts["log_decay"][:, :, i])
        close(read_state(state, parts["query"][:, :, i]), expected[:, :, i])
    after = parts["log_decay"].flip(-1).cumsum(-1).flip(-1) - parts["log_decay"]
    close(final_state(parts["key"], parts["value"], after.neg().exp()), state)


def test_events_with_weight_zero_are_not_in_the_final_state() -> None:
    parts, weights = operands(6), torch.ones(6)
    weights[4:] = 0
    expected = parts["key"][:, :, :4].transpose(-1, -2) @ parts["value"][:, :, :4]
    close(final_state(parts["key"], parts["value"], weights), expected)


@pytest.mark.parametrize("form", ["quadratic", "chunked", "scan"])
def test_long_pauses_leave_close_neighbours_exact(form: str) -> None:
    """A pause of 1e8 before gaps of 0.1: differences of running totals in float32 would lose the gaps altogether."""
    parts = operands(16)
    decay = torch.full((ROWS, HEADS, 16), 0.1)
    decay[..., 3] = 1e8
    parts["log_decay"] = decay
    expected = loop(*parts.values()).float()
    if form == "scan":
        found = per_channel(parts, 8)
    else:
        given = tuple(parts.values())
        found = quadratic_form(*given) if form == "quadratic" else chunked_form(*given, chunk_size=8)
    assert torch.isfinite(found).all()
    close(found, expected)


def test_pairwise_decay_sums_the_steps_between_two_events() -> None:
    weights = pairwise_decay(torch.tensor([5.0, 1.0, 2.0])).log()
    expected = torch.tensor([[0.0, -torch.inf, -torch.inf], [-1.0, 0.0, -torch.inf], [-3.0, -2.0, 0.0]])
    close(weights[weights.isfinite()], expected[expected.isfinite()])
    assert torch.equal(weights.isfinite(), expected.isfinite())


@pytest.mark.parametrize("form", ["quadratic", "chunked", "scan"])
def test_later_events_reach_no_earlier_output(form: str) -> None:
    parts, other = operands(16), operands(16)
    for name in ("key", "value", "log_decay"):
        other[name] = torch.cat([other[name][:, :, :9], other[name][:, :, 9:] * 3], dim=2)

    def run(x: dict[str, Tensor]) -> Tensor:
        if form == "scan":
            return per_channel(x, 4)
        return quadratic_form(*x.values()) if form == "quadratic" else chunked_form(*x.values(), chunk_size=6)

    close(run(other)[:, :, :9], run(parts)[:, :, :9], 1e-6)
    assert (run(other)[:, :, 9:] - run(parts)[:, :, 9:]).abs().max() > 0.1


@pytest.mark.parametrize("form", ["quadratic", "chunked"])
def test_bfloat16_keeps_decays_in_float32(form: str) -> None:
    """500 steps of 0.001: summed in bfloat16 they would stop growing at 0.25."""
    ones, decay = torch.ones(1, 500, 1), torch.full((1, 500), 1e-3)
    low = ones.bfloat16()
    found = (
        quadratic_form(low, low, low, decay)
        if form == "quadratic"
        else chunked_form(low, low, low, decay, chunk_size=50)
    )
    assert found.dtype == torch.bfloat16
    close(found.float(), quadratic_form(ones, ones, ones, decay), 0.02)
