"""What every training strategy must satisfy; a strategy's test class inherits `StrategyContract`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmrec.data.schema import SequenceBatch
from llmrec.encoders.sasrec import SASRecConfig, SASRecEncoder
from llmrec.strategies.base import StepInfo, StepLoss, TrainContext, TrainingStrategy
from tests.contracts.encoders import cyclic_context, stamped, take_rows

ITEMS, WIDTH = 30, 8


class StrategyContract:
    """Inherit and define `strategy`; override the hooks where the strategy trains something else."""

    def strategy(self) -> TrainingStrategy:
        raise NotImplementedError

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        config = SASRecConfig(num_items=ITEMS, hidden_size=16, max_history=16, dropout=0.0, initializer_range=0.2)
        return SASRecEncoder(config).eval()

    def batch(self) -> SequenceBatch:
        """Five rows of different lengths with dense targets."""
        generator = torch.Generator().manual_seed(1)
        lengths = torch.tensor([WIDTH, 1, 4, 6, WIDTH - 1])
        real = torch.arange(WIDTH) < lengths[:, None]
        item_ids = torch.randint(1, ITEMS + 1, (5, WIDTH), generator=generator) * real
        targets = torch.randint(1, ITEMS + 1, (5, WIDTH), generator=generator) * real
        return stamped(item_ids, lengths, targets=targets)

    def expected_count(self, batch: SequenceBatch) -> int:
        return int((batch["targets"] > 0).sum())

    def prepared(self, model: nn.Module) -> TrainingStrategy:
        strategy = self.strategy()
        context = TrainContext(cyclic_context(ITEMS), num_examples=5, total_steps=10, seed=0)
        strategy.prepare(context, model, torch.Generator().manual_seed(0))
        return strategy

    def step(self, seed: int = 7, number: int = 0) -> StepInfo:
        return StepInfo(number, 10, 0.0, torch.Generator().manual_seed(seed))

    def run(self, model: Any, batch: SequenceBatch, seed: int = 7) -> StepLoss:
        return self.prepared(model).loss(model, batch, self.step(seed))

    def same(self, found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    def test_loss_is_a_finite_scalar_with_parts(self) -> None:
        out = self.run(self.model(), self.batch())
        assert out.total.shape == () and torch.isfinite(out.total) and out.total.requires_grad
        assert all(value.shape == () and torch.isfinite(value) for value in out.parts.values())
        assert not any(value.requires_grad for value in out.parts.values())

    def test_count_is_the_number_of_supervised_places(self) -> None:
        batch = self.batch()
        assert self.run(self.model(), batch).count == self.expected_count(batch)

    def test_gradient_reaches_the_model(self) -> None:
        model = self.model()
        self.run(model, self.batch()).total.backward()
        reached = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
        assert reached and all(torch.isfinite(g).all() for g in reached)
        assert sum(float(g.abs().sum()) for g in reached) > 0

    def test_the_generator_decides(self) -> None:
        model, batch = self.model(), self.batch()
        torch.manual_seed(11)
        first = self.run(model, batch).total
        torch.manual_seed(12)
        torch.testing.assert_close(self.run(model, batch).total, first, rtol=0, atol=0)

    def test_batch_is_left_as_it_was(self) -> None:
        batch = self.batch()
        before = {name: value.clone() for name, value in batch.items()}  # type: ignore[attr-defined]
        self.run(self.model(), batch)
        assert batch.keys() == before.keys()
        assert all(torch.equal(batch[name], value) for name, value in before.items())  # type: ignore[literal-required]

    def test_order_of_rows_does_not_matter(self) -> None:
        model, batch = self.model(), self.batch()
        moved = take_rows(batch, torch.tensor([4, 2, 0, 1, 3]))
        self.same(self.run(model, moved).total, self.run(model, batch).total)

    def test_padding_does_not_matter(self) -> None:
        model, batch = self.model(), self.batch()
        wider = dict(batch)
        for name in ("item_ids", "timestamps", "targets"):
            wider[name] = torch.nn.functional.pad(batch[name], (0, 3))  # type: ignore[literal-required]
        self.same(self.run(model, wider).total, self.run(model, batch).total)  # type: ignore[arg-type]

    def test_state_survives_a_resume(self) -> None:
        model, batch = self.model(), self.batch()
        strategy = self.prepared(model)
        strategy.loss(model, batch, self.step(1))
        strategy.on_step_end(model, self.step(1, 1))
        state = {name: value.clone() for name, value in strategy.state_dict().items()}
        again = self.prepared(model)
        again.load_state_dict(state)
        self.same(again.loss(model, batch, self.step(2, 1)).total, strategy.loss(model, batch, self.step(2, 1)).total)

    def test_foreign_state_is_refused(self) -> None:
        with pytest.raises((ValueError, KeyError)):
            self.strategy().load_state_dict({"no_such_entry": torch.zeros(1)})
