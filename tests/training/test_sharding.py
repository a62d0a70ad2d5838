"""Which rows a process takes, what may change between two attempts, and FSDP 2 in one process (DTensor and back)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from llmrec.errors import CheckpointError, RecipeError
from llmrec.strategies.next_item import NextItem
from llmrec.training.lock import together
from llmrec.training.loop import Shares
from llmrec.training.sharding import Fsdp2, Sharding, choose_sharding
from llmrec.training.trainer import _compare
from tests.training.small import TinyStrategy


def batches(length: int, batch: int, processes: int, **options: Any) -> list[list[list[int]]]:
    """[process][micro-batch] rows of an epoch in order."""
    order: Any = range(length)
    return [list(Shares(order, length, batch, rank, processes, **options)) for rank in range(processes)]


@pytest.mark.parametrize("length", [1, 3, 23, 24, 25, 61])
@pytest.mark.parametrize(("batch", "processes"), [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_together_processes_take_the_rows_of_one(length: int, batch: int, processes: int) -> None:
    (alone,) = batches(length, 8, 1)
    order: Any = range(length)
    shares = [Shares(order, length, batch, rank, processes) for rank in range(processes)]
    taken = [list(share) for share in shares]
    assert {len(part) for part in taken} == {len(alone)} == {len(share) for share in shares}
    for number, rows in enumerate(alone):
        own = [part[number] for part, share in zip(taken, shares, strict=True) if not share.is_idle(number)]
        assert [row for part in own for row in part] == rows
        assert all(part[number] for part in taken), "a process without a batch would leave the others waiting"
        assert max(map(len, own)) - min(map(len, own)) <= 1


def test_a_short_last_batch_can_be_left_out() -> None:
    assert batches(10, 2, 2, drop_last=True) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


IDENTITY = {"data": "d", "per_device_train_batch_size": "8", "gradient_accumulation_steps": "2", "processes": "3"}


@pytest.mark.parametrize(("batch", "accumulation", "processes"), [(48, 1, 1), (16, 3, 1), (1, 16, 3), (6, 1, 8)])
def test_the_same_examples_per_step_may_be_divided_otherwise(
    batch: int, accumulation: int, processes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (batch, accumulation, processes)
    now = {**IDENTITY, **dict(zip(list(IDENTITY)[1:], map(str, settings), strict=True))}
    _compare(IDENTITY, now, Path("checkpoint-4"), force=False)
    assert f"3 process(es), now there are {processes}" in capsys.readouterr().err


def test_other_examples_per_step_are_refused() -> None:
    both = r"examples per step: stored 48, now 32\n(.|\n)*processes: stored 3, now 2"
    with pytest.raises(CheckpointError, match=both):
        _compare(IDENTITY, {**IDENTITY, "processes": "2"}, Path("checkpoint-4"), force=False)


def test_another_data_set_is_refused_however_it_is_divided() -> None:
    other = {**IDENTITY, "data": "e", "processes": "1", "gradient_accumulation_steps": "6"}
    with pytest.raises(CheckpointError, match="data: stored d, now e"):
        _compare(IDENTITY, other, Path("checkpoint-4"), force=False)


def test_a_failure_is_raised_as_it_is() -> None:
    alone: Any = SimpleNamespace(world_size=1, device="cpu")
    with pytest.raises(ValueError, match="mine"), together(alone, "work"):
        raise ValueError("mine")


# FSDP 2 in one process ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Scaled(nn.Module):
    """Two layers, tied, and a single number."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.layer = nn.Linear(5, 5, bias=False)
        self.again = nn.Linear(5, 5, bias=False)
        self.again.weight = self.layer.weight
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.layer(self.frozen(x)).tanh()) * self.scale


def loop_of(model: nn.Module, strategy: Any = None, **plugin: Any) -> Any:
    """What a sharding object reads of a StageLoop."""
    defaults = {"fsdp_version": 2, "activation_checkpointing": False, "cpu_ram_efficient_loading": False,
                "reshard_after_forward": True}  # fmt: skip
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(**{**defaults, **plugin}))
    trained = [{"params": [p for p in model.parameters() if p.requires_grad], "name": "all"}]
    return SimpleNamespace(
        model=model, optimizer=torch.optim.AdamW(trained, lr=0.1), accelerator=SimpleNamespace(state=state),
        strategy=strategy or NextItem(), is_deepspeed_enabled=False, is_fsdp_enabled=True,
    )  # fmt: skip


def steps(loop: Any, count: int) -> None:
    torch.manual_seed(1)
    for _ in range(count):
        loop.model(torch.randn(3, 5)).pow(2).mean().backward()
        loop.sharding.scale_gradients(2.0)
        loop.optimizer.step()
        loop.optimizer.zero_grad()


def divided() -> Any:
    """A divided model, its optimizer and its sharding object."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = Scaled()
    loop = loop_of(model)
    loop.sharding = Fsdp2(loop)
    loop.sharding.configure()
    loop.sharding.before_wrapping()
    fully_shard(model.frozen)
    fully_shard(model)
    loop.optimizer = loop_of(model).optimizer
    loop.sharding.wrapped(lambda: None)
    return loop


def plain() -> Any:
    torch.manual_seed(0)
    loop = loop_of(Scaled())
    loop.sharding = Sharding(loop)
    return loop


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert type(found[name]) is torch.Tensor and found[name].shape == tensor.shape, name
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0)


def gathered(loop: Any) -> dict[str, torch.Tensor]:
    return {name: loop.sharding.gather(parameter) for name, parameter in loop.model.named_parameters()}


def test_gathered_values_have_the_names_and_shapes_of_undivided_ones(group: None) -> None:
    ours, theirs = divided(), plain()
    for loop in (ours, theirs):
        steps(loop, 3)
    assert_equal(gathered(ours), gathered(theirs))
    (tensors, rest), (expected, same) = ours.sharding.optimizer_state(), theirs.sharding.optimizer_state()
    assert_equal(tensors, expected)
    assert rest["groups"][0]["params"] == same["groups"][0]["params"]


@pytest.mark.parametrize("before", [divided, plain])
@pytest.mark.parametrize("after", [divided, plain])
def test_the_state_of_one_kind_goes_on_as_another(before: Any, after: Any, group: None) -> None:
    first, second, expected = before(), after(), plain()
    steps(first, 3)
    steps(expected, 3)
    steps(expected, 2)
    second = _fresh_with(gathered(first), after)
    second.sharding.load_optimizer(*first.sharding.optimizer_state())
    steps(second, 2)
    assert_equal(gathered(second), gathered(expected))


def _fresh_with(values: dict[str, torch.Tensor], kind: Any) -> Any:
    """A loop whose weights are put in place before they are divided, as after a resume."""
    original = Scaled.__init__

    def loaded(self: Scaled) -> None:
        original(self)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(values[name])

    Scaled.__init__ = loaded  # type: ignore[method-assign]
    try:
        return kind()
    finally:
        Scaled.__init__ = original  # type: ignore[method-assign]


def test_whole_weights_are_for_calls_of_parts_and_divided_again(group: None) -> None:
    loop, expected = divided(), plain()
    x = torch.randn(2, 5)
    with loop.sharding.whole(), torch.no_grad():
        for _ in range(2):
            found, wanted = (one.model.layer(one.model.frozen(x)) for one in (loop, expected))
            torch.testing.assert_close(found, wanted)
    for one in (loop, expected):
        steps(one, 2)
    assert_equal(gathered(loop), gathered(expected))


def test_released_models_are_plain_again(group: None) -> None:
    loop, expected = divided(), plain()
    for one in (loop, expected):
        steps(one, 2)
    loop.sharding.release()
    model = loop.model
    assert type(model) is Scaled and type(model.frozen) is nn.Linear
    assert model.again.weight is model.layer.weight and not model.frozen.weight.requires_grad
    assert not model._forward_hooks and not model._forward_pre_hooks and not model.frozen._forward_hooks
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    assert_equal(dict(model.state_dict()), dict(expected.model.state_dict()))
    assert model.scale.shape == ()


@pytest.mark.parametrize(
    ("plugin", "named"),
    [
        ({"fsdp_version": 1}, "expected fsdp_version: 2"),
        ({"activation_checkpointing": True}, "use activation_checkpointing: true in the stage"),
        ({"cpu_ram_efficient_loading": True}, "without weights"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused(plugin: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        choose_sharding(loop_of(Scaled(), **plugin)).configure()


def test_hooks_that_would_read_divided_weights_are_refused() -> None:
    with pytest.raises(RecipeError, match="TinyStrategy reads the model in on_step_end"):
        choose_sharding(loop_of(Scaled(), TinyStrategy())).configure()


def test_quantised_weights_are_not_divided() -> None:
    model = Scaled()
    model.frozen.weight = nn.Parameter(torch.zeros(13, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(RecipeError, match="quantised weights"):
        choose_sharding(loop_of(model)).configure()
