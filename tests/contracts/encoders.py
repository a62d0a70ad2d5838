"""What every sequence encoder must satisfy; an encoder's test class inherits `EncoderContract`.

`causal`, `supervises` and `trainable` of the encoder class choose which tests apply.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from llmrec.data.schema import DataContext, SequenceBatch
from llmrec.encoders.base import SequenceEncoder, SequenceEncoderConfig
from llmrec.interfaces import CatalogueScorer, GateProvider
from llmrec.strategies.base import StepInfo, TrainingStrategy
from llmrec.strategies.next_item import NextItem
from llmrec.tuners.base import attach
from llmrec.tuners.ilora import ILoraConfig
from tests.contracts.tuners import randomise_adapter, tiny_llama, tokens

USERS, EVENTS, WINDOW, HOUR = 20, 10, 8, 3600


def cyclic_histories(num_items: int) -> np.ndarray:
    """[USERS, EVENTS + 1]: each user walks through the catalogue, one item further per event."""
    starts = np.arange(USERS) * num_items // USERS
    return (starts[:, None] + np.arange(EVENTS + 1)) % num_items + 1


def cyclic_context(num_items: int) -> DataContext:
    """The training part of the cyclic histories: all events but the last of each user."""
    items = cyclic_histories(num_items)[:, :-1]
    edges = np.stack([np.repeat(np.arange(1, USERS + 1), EVENTS), items.ravel()])
    counts = np.bincount(items.ravel(), minlength=num_items + 1)
    return DataContext(num_items, USERS, counts, edges, fields=frozenset({"timestamps"}))


def stamped(item_ids: Tensor, lengths: Tensor, **more: Tensor) -> SequenceBatch:
    """A batch with user ids and hourly timestamps; padding positions have time 0."""
    clock = 1_600_000_000 + HOUR * torch.arange(item_ids.shape[1]).expand(item_ids.shape)
    batch = {
        "item_ids": item_ids,
        "lengths": lengths,
        "timestamps": clock * (item_ids > 0),
        "target_timestamps": 1_600_000_000 + HOUR * lengths,
        "user_ids": torch.arange(len(item_ids)) % USERS + 1,
        "example_ids": torch.arange(len(item_ids)),
        **more,
    }
    return batch  # type: ignore[return-value]


def take_rows(batch: SequenceBatch, index: Tensor) -> SequenceBatch:
    return {name: value[index] for name, value in batch.items()}  # type: ignore[index,return-value]


def same(found: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=atol)


class EncoderContract:
    """Inherit, set `config` and `encoder_class`; override the hooks for encoders that need more."""

    config: ClassVar[SequenceEncoderConfig]
    encoder_class: ClassVar[type[SequenceEncoder]]
    overfit_steps: ClassVar[int] = 400
    overfit_learning_rate: ClassVar[float] = 5e-3
    takes_item_embeds: ClassVar[bool] = True

    # Hooks -----------------------------------------------------------------------------------------------------------

    def context(self) -> DataContext:
        return cyclic_context(self.config.num_items)

    def strategy(self) -> TrainingStrategy:
        return NextItem()

    def extend(self, batch: SequenceBatch) -> SequenceBatch:
        """Add the fields an encoder needs besides ids and times; padding must be allowed for."""
        return batch

    # Parts -----------------------------------------------------------------------------------------------------------

    def model(self, seed: int = 0) -> SequenceEncoder:
        torch.manual_seed(seed)
        return self.encoder_class.from_context(copy.deepcopy(self.config), self.context()).eval()

    def batch(self, seed: int = 1, width: int = WINDOW) -> SequenceBatch:
        """Six rows of different lengths, the first one full."""
        generator = torch.Generator().manual_seed(seed)
        item_ids = torch.randint(1, self.config.num_items + 1, (6, width), generator=generator)
        lengths = torch.tensor([width, 1, 3, width - 1, 5, 2])
        return self.extend(stamped(item_ids * (torch.arange(width) < lengths[:, None]), lengths))

    def states(self, model: SequenceEncoder, batch: SequenceBatch) -> Tensor:
        with torch.no_grad():
            return model(**model.inputs(batch)).hidden

    def scores(self, model: SequenceEncoder, batch: SequenceBatch) -> Tensor:
        with torch.no_grad():
            return model.score_items(batch)

    @pytest.fixture()
    def only_trainable(self) -> None:
        if not self.encoder_class.trainable:
            pytest.skip("counts only, nothing is trained")

    @pytest.fixture()
    def only_causal(self) -> None:
        if not self.encoder_class.causal:
            pytest.skip("not causal by design")

    # Shapes and interfaces -------------------------------------------------------------------------------------------

    def test_shapes(self) -> None:
        model, batch, items = self.model(), self.batch(), self.config.num_items
        out = model(**model.inputs(batch))
        assert out.user_repr.shape == (6, model.gate_dim)
        assert out.hidden.shape == (6, WINDOW, model.gate_dim)
        vectors = model.item_vectors()
        assert len(vectors) == items + 1 and not vectors[0].any()
        scores = model.score_items(batch)
        assert scores.shape == (6, items + 1) and scores.dtype == torch.float32
        assert torch.isneginf(scores[:, 0]).all() and torch.isfinite(scores[:, 1:]).all()
        assert model.score(out.hidden).shape == (6, WINDOW, items + 1)

    def test_is_gate_provider_and_catalogue_scorer(self) -> None:
        model = self.model()
        assert isinstance(model, GateProvider) and isinstance(model, CatalogueScorer)

    def test_missing_field_is_named(self) -> None:
        model, batch = self.model(), self.batch()
        for name in model.uses:
            with pytest.raises(KeyError, match=name):
                model.inputs({key: value for key, value in batch.items() if key != name})  # type: ignore[arg-type]

    def test_scores_of_chosen_items_are_those_of_the_catalogue(self) -> None:
        model, batch = self.model(), self.batch()
        chosen = torch.randint(1, self.config.num_items + 1, (6, 5), generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            user_repr = model.user_representation(batch)
            everything = model.score(user_repr)
            same(model.score(user_repr, chosen), everything.gather(1, chosen))
            same(model.score(user_repr, chosen[0]), everything[:, chosen[0]])
            padded = torch.cat([chosen, torch.zeros(6, 1, dtype=torch.long)], dim=1)
            among = model.score_candidates({**batch, "candidates": padded})
        same(among[:, :-1], self.scores(model, batch).gather(1, chosen))
        assert torch.isneginf(among[:, -1]).all()

    def test_recommend_honours_seen_and_candidates(self) -> None:
        model, batch, items = self.model(), self.batch(), self.config.num_items
        seen = torch.arange(1, items - 2).expand(6, -1)
        left = model.recommend({**batch, "seen": seen}, 5)
        assert [set(row[:3].tolist()) for row in left.item_ids] == [{items - 2, items - 1, items}] * 6
        assert left.valid.tolist() == [[True] * 3 + [False] * 2] * 6 and not left.item_ids[:, 3:].any()
        candidates = torch.tensor([[3, 5, items - 1, items, 0]]).expand(6, -1)
        ranked = model.recommend({**batch, "seen": seen, "candidates": candidates}, 4)
        assert [set(row[:2].tolist()) for row in ranked.item_ids] == [{items - 1, items}] * 6
        assert not ranked.valid[:, 2:].any()
        free = model.recommend(batch, 5)
        assert free.item_ids.min() >= 1 and (free.scores.diff(dim=1) <= 0).all()

    def test_item_embeds_replace_the_item_table(self, only_trainable: None) -> None:
        if not self.takes_item_embeds:
            pytest.skip("does not take item_embeds")
        model, batch = self.model(), self.batch()
        with torch.no_grad():
            embeds = model.item_embedding(batch["item_ids"])
            same(model(**model.inputs(batch), item_embeds=embeds).user_repr, model.user_representation(batch))
            other = model(**model.inputs(batch), item_embeds=embeds.flip(0)).user_repr
        assert (other - model.user_representation(batch)).abs().max() > 1e-6

    # What a state may depend on --------------------------------------------------------------------------------------

    def test_later_events_never_change_earlier_states(self, only_causal: None) -> None:
        model, batch = self.model(), take_rows(self.batch(), torch.tensor([0]))
        before, shift = self.states(model, batch), torch.randint(1, self.config.num_items, (1, WINDOW))
        asked = "target_timestamps" in model.uses  # state t then knows when event t + 1 happens, and nothing else of it
        for t in range(WINDOW - 1):
            changed = dict(batch)
            later = torch.arange(WINDOW) > t
            other = (batch["item_ids"] - 1 + shift) % self.config.num_items + 1
            changed["item_ids"] = torch.where(later, other, batch["item_ids"])
            moved = torch.arange(WINDOW) > t + asked
            changed["timestamps"] = batch["timestamps"] + moved * 50 * HOUR
            changed["target_timestamps"] = batch["target_timestamps"] + 100 * HOUR
            after = self.states(model, self.extend(changed))  # type: ignore[arg-type]
            same(after[:, : t + 1], before[:, : t + 1])
            if model.trainable:
                assert (after[:, t + 1 :] - before[:, t + 1 :]).abs().max() > 1e-6

    def test_position_representations_are_refused_or_causal(self) -> None:
        model, batch = self.model(), self.batch()
        if model.causal:
            with torch.no_grad():
                same(model.position_representations(batch), self.states(model, batch))
        else:
            with pytest.raises(TypeError, match="not causal"):
                model.position_representations(batch)

    def test_padding_changes_nothing(self) -> None:
        model, batch = self.model(), self.batch()
        wider = dict(batch)
        for name in ("item_ids", "timestamps"):
            wider[name] = torch.nn.functional.pad(batch[name], (0, 3))
        wide = self.extend(wider)  # type: ignore[arg-type]
        real = torch.arange(WINDOW)[None, :] < batch["lengths"][:, None]
        same(self.states(model, wide)[:, :WINDOW][real], self.states(model, batch)[real])
        same(self.scores(model, wide), self.scores(model, batch))

    def test_rows_do_not_depend_on_each_other(self) -> None:
        model, batch = self.model(), self.batch()
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        expected = self.scores(model, batch)
        same(self.scores(model, take_rows(batch, order)), expected[order])
        for row in range(6):
            same(self.scores(model, take_rows(batch, torch.tensor([row]))), expected[row : row + 1])

    # Training --------------------------------------------------------------------------------------------------------

    def training_batch(self) -> SequenceBatch:
        """Cyclic histories; every prefix is a row of its own for encoders with one state per history."""
        items = torch.from_numpy(cyclic_histories(self.config.num_items)[:, :-1])
        inputs, targets = items[:, :-1], items[:, 1:]
        if self.encoder_class.supervises == "all":
            return self.extend(stamped(inputs, torch.full((USERS,), EVENTS - 1), targets=targets))
        ends = torch.arange(1, EVENTS).repeat(USERS)
        places = torch.arange(EVENTS - 1)
        rows, wanted = inputs.repeat_interleave(EVENTS - 1, 0), targets.repeat_interleave(EVENTS - 1, 0)
        kept, last = places < ends[:, None], places == ends[:, None] - 1
        return self.extend(stamped(rows * kept, ends, targets=wanted * last))

    def step_loss(self, model: SequenceEncoder, step: int = 0) -> Tensor:
        info = StepInfo(step, self.overfit_steps, 0.0, torch.Generator().manual_seed(step))
        return self.strategy().loss(model, self.training_batch(), info).total

    def test_every_parameter_gets_a_finite_gradient(self, only_trainable: None) -> None:
        model = self.model().train()
        self.step_loss(model).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, f"{name} is not reached"
            assert torch.isfinite(parameter.grad).all(), f"{name} has a gradient that is not finite"

    def test_overfits_cyclic_histories(self, only_trainable: None) -> None:
        """The held-out last event follows from what other users show: HR@1 > 0.95."""
        model = self.model().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.overfit_learning_rate, weight_decay=0.0)
        histories = torch.from_numpy(cyclic_histories(self.config.num_items))
        asked = self.extend(stamped(histories[:, 1:-1], torch.full((USERS,), EVENTS - 1)))
        hit_rate = 0.0
        for step in range(self.overfit_steps):
            optimizer.zero_grad()
            self.step_loss(model, step).backward()
            optimizer.step()
            if step % 25 == 24:
                hit_rate = (self.scores(model.eval(), asked).argmax(1) == histories[:, -1]).float().mean().item()
                if hit_rate > 0.95:
                    break
                model.train()
        assert hit_rate > 0.95

    def test_the_seed_decides(self, only_trainable: None) -> None:
        first, second, batch = self.model(5).train(), self.model(5).train(), self.batch()
        torch.manual_seed(9)
        expected = first(**first.inputs(batch)).user_repr
        torch.manual_seed(9)
        torch.testing.assert_close(second(**second.inputs(batch)).user_repr, expected, rtol=0, atol=0)
        other = self.model(6)
        assert (self.scores(other, batch)[:, 1:] - self.scores(first.eval(), batch)[:, 1:]).abs().max() > 1e-6

    def test_bfloat16_forward(self) -> None:
        batch, model = self.batch(), self.model().to(torch.bfloat16)
        exact = self.model().user_representation(batch)
        rough = model.user_representation(batch)
        assert torch.isfinite(rough).all()
        assert torch.cosine_similarity(rough.float(), exact, dim=-1).min() > 0.98
        scores = self.scores(model, batch)
        assert scores.dtype == torch.float32 and torch.isfinite(scores[:, 1:]).all()

    # Files -----------------------------------------------------------------------------------------------------------

    def test_outputs_survive_saving_and_loading(self, tmp_path: Path) -> None:
        """Loading builds the model on the meta device; only outputs show whether everything came back."""
        model, batch = self.model(), self.batch()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
        model.save_pretrained(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
        again = AutoModel.from_pretrained(tmp_path).eval()
        assert type(again) is self.encoder_class and type(AutoConfig.from_pretrained(tmp_path)) is type(self.config)
        torch.testing.assert_close(self.states(again, batch), self.states(model, batch), rtol=0, atol=0)
        torch.testing.assert_close(self.scores(again, batch), self.scores(model, batch), rtol=0, atol=0)

    def test_every_buffer_is_saved(self) -> None:
        model = self.model()
        missing = {name for name, _ in model.named_buffers()} - set(model.state_dict())
        assert not missing, "buffers that are not persistent hold garbage after from_pretrained"

    # Gates of an LLM -------------------------------------------------------------------------------------------------

    def gated_llm(self, gate_dim: int) -> Any:
        base = tiny_llama()
        torch.manual_seed(3)
        options = {"r": 8, "lora_alpha": 16, "num_experts": 4, "target_modules": "all-linear"}
        llm = attach(base, ILoraConfig(task_type="CAUSAL_LM", gate_dim=gate_dim, **options))
        randomise_adapter(llm)
        return llm.eval()

    def test_drives_the_gates_of_a_tiny_llm(self) -> None:
        model, batch = self.model(), self.batch()
        llm, ids = self.gated_llm(model.gate_dim), tokens(6)
        with torch.no_grad():
            user_repr = model.user_representation(batch)
        out = llm(input_ids=ids, labels=ids, user_repr=user_repr)
        out.loss.backward()
        assert torch.isfinite(out.logits).all()
        gates = llm.base_model.last_gates
        assert gates.shape == (6, 4)
        same(gates.sum(-1), torch.ones(6))
        if model.trainable:
            assert (gates[0] - gates[1]).abs().max() > 1e-6
            router = [p for name, p in llm.named_parameters() if "ilora_router" in name]
            assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in router)
            assert any(p.grad.abs().sum() > 0 for p in router)

    def test_gates_per_position_do_not_leak(self, only_causal: None) -> None:
        model, batch = self.model(), take_rows(self.batch(), torch.tensor([0]))
        llm, ids = self.gated_llm(model.gate_dim), tokens(1, WINDOW)
        changed = dict(batch)
        last = batch["item_ids"][:, -1:]
        changed["item_ids"] = torch.cat([batch["item_ids"][:, :-1], last % self.config.num_items + 1], dim=1)
        with torch.no_grad():
            before = llm(input_ids=ids, user_repr=model.position_representations(batch)).logits
            extended = self.extend(changed)  # type: ignore[arg-type]
            after = llm(input_ids=ids, user_repr=model.position_representations(extended)).logits
        same(after[:, :-1], before[:, :-1])
        if model.trainable:
            assert (after[:, -1] - before[:, -1]).abs().max() > 1e-6
