"""What encoders ask of a data set, and when they are asked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmrec import discovery
from llmrec.blocks.event_times import gap_buckets, query_times
from llmrec.encoders.base import EncoderOutput, SequenceEncoder, TimeAwareConfig
from llmrec.encoders.hstu import HSTUConfig, HSTUEncoder
from llmrec.encoders.sasrec import SASRecConfig, SASRecEncoder
from llmrec.errors import RecipeError
from llmrec.recipe import Recipe, parse_recipe
from llmrec.strategies.base import StepInfo
from llmrec.strategies.next_item import NextItem
from tests.contracts.encoders import stamped

TIMED = ("hstu", "fuxi_alpha", "fuxi_linear")


def recipe(name: str, **options: object) -> Recipe:
    stage = {"train": "encoder"}
    raw = {"name": "x", "dataset": {"source": "synthetic"}, "encoder": {"type": name, **options}, "stages": [stage]}
    return parse_recipe(raw)


def encoder(name: str, **options: object) -> SequenceEncoder:
    kind = discovery.resolve("encoder", name)
    config = kind.config_class(num_items=30, hidden_size=32, max_history=8, **options)  # type: ignore[attr-defined]
    return kind(config).eval()  # type: ignore[operator, no-any-return]


@pytest.mark.parametrize("name", TIMED)
@pytest.mark.parametrize("time", ["target", "last"])
def test_a_data_set_without_times_is_refused_by_encoders_that_read_them(name: str, time: str) -> None:
    with pytest.raises(
        RecipeError, match="reads timestamps, and the data set has titles; .*encoder.time: none"
    ) as caught:
        recipe(name, time=time).check_dataset(frozenset({"titles"}))
    assert name in str(caught.value)
    recipe(name, time=time).check_dataset(frozenset({"timestamps"}))
    recipe(name, time="none").check_dataset(frozenset())


@pytest.mark.parametrize("name", TIMED)
def test_a_batch_without_the_time_of_the_question_is_refused(name: str) -> None:
    batch = stamped(torch.tensor([[3, 4, 5]]), torch.tensor([3]))
    del batch["target_timestamps"]
    with pytest.raises(KeyError, match="target_timestamps"):
        encoder(name).user_representation(batch)
    assert encoder(name, time="last").user_representation(batch).shape == (1, 32)


def test_an_unknown_time_option_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"encoder.time: found 'always'.*target, last or none"):
        TimeAwareConfig(time="always")  # type: ignore[arg-type]


def test_query_times_are_those_of_the_next_events() -> None:
    times, lengths = torch.tensor([[10, 20, 35, 0], [7, 0, 0, 0]]), torch.tensor([3, 1])
    asked = query_times(times, lengths, torch.tensor([50, 9]))
    assert asked.tolist() == [[20, 35, 50, 50], [9, 9, 9, 9]]
    assert query_times(times, lengths).tolist() == [[10, 20, 35, 35], [7, 7, 7, 7]]


def test_buckets_are_the_published_ones() -> None:
    gaps = torch.tensor([[0, 1, 2, 60, 86_400, 31_536_000, 2**60]])
    assert gap_buckets(gaps, torch.zeros_like(gaps))[0, :, 0].tolist() == [0, 0, 2, 13, 37, 57, 128]
    assert torch.equal(gap_buckets(gaps, gaps), gap_buckets(gaps, gaps).mT)  # the sign of a gap does not matter


class Added(SASRecEncoder):
    """SASRec that adds 2 to any loss while training."""

    def forward(self, item_ids: Tensor, lengths: Tensor, **features: Tensor) -> EncoderOutput:  # type: ignore[override]
        output = super().forward(item_ids, lengths, **features)
        output.auxiliary = torch.tensor(2.0) if self.training else None
        output.parts = {"extra": torch.tensor(0.5), "wide": torch.ones(3)}
        return output


def test_an_auxiliary_loss_joins_the_objective_while_training() -> None:
    torch.manual_seed(0)
    config = SASRecConfig(num_items=30, hidden_size=8, max_history=8, dropout=0.0)
    model, plain = Added(config), SASRecEncoder(config)
    plain.load_state_dict(model.state_dict())
    batch = stamped(torch.tensor([[3, 4, 5]]), torch.tensor([3]), targets=torch.tensor([[4, 5, 6]]))
    step = StepInfo(0, 1, 0.0, torch.Generator())
    without = NextItem().loss(plain, batch, step).total
    found = NextItem().loss(model.train(), batch, step)
    torch.testing.assert_close(found.total, without + 2)
    assert found.parts["auxiliary"] == 2 and found.parts["extra"] == 0.5 and "wide" not in found.parts
    torch.testing.assert_close(NextItem().loss(model.eval(), batch, step).total, without)


def test_hstu_without_tables_needs_no_times() -> None:
    assert HSTUEncoder(HSTUConfig(num_items=5, relative_bias=False)).uses == frozenset()
