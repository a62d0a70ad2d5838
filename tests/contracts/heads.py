"""What every generative head must satisfy; a head's test class inherits `GenerativeHeadContract`.

The data are walks through a small catalogue in a circle, so that the next item is always the one after the last.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel

from llmrec.data.schema import DataContext, ItemFeatures, Ranking, SequenceBatch
from llmrec.heads.base import GenerativeHead, GenerativeHeadConfig
from llmrec.item_tokenizers.base import FitReport, ItemTokenizer

ITEMS, WINDOW, TRAJECTORY, HOUR = 12, 6, 3, 3600


@dataclass
class SpelledTokenizer(ItemTokenizer):
    """Item numbers in base 4: unique codes of two levels for up to 15 items."""

    base: int = 4

    def fit(self, items: ItemFeatures, *, seed: int) -> FitReport:
        """Nothing is learned."""
        self.spell(len(next(iter(items.values()))[0]) - 1)
        return FitReport(0, (1.0, 1.0), float("nan"), {})

    def add(self, items: ItemFeatures) -> None:
        """Spell the longer catalogue."""
        self.spell(len(next(iter(items.values()))[0]) - 1)

    def spell(self, num_items: int) -> SpelledTokenizer:
        """Set the codes of items 1..num_items."""
        numbers = torch.arange(num_items + 1)
        self.level_sizes, self.unique = (self.base, self.base), True
        self.codes = torch.stack([numbers // self.base, numbers % self.base], dim=1)
        self.codes[0] = -1
        return self


def cyclic_batch(starts: list[int], lengths: list[int], num_items: int = ITEMS) -> SequenceBatch:
    """Walks in a circle with one supervised target each, the next items, times and the whole history as `seen`."""
    rows, width = len(starts), max(lengths)
    steps = torch.arange(width)
    walk = (torch.tensor(starts)[:, None] + steps) % num_items + 1
    length = torch.tensor(lengths)
    item_ids = walk * (steps < length[:, None])
    following = (torch.tensor(starts)[:, None] + length[:, None] + torch.arange(TRAJECTORY)) % num_items + 1
    targets = torch.zeros_like(item_ids)
    targets[torch.arange(rows), length - 1] = following[:, 0]
    return {  # type: ignore[return-value]
        "item_ids": item_ids,
        "lengths": length,
        "user_ids": torch.arange(rows) % 20 + 1,
        "example_ids": torch.arange(rows),
        "timestamps": (1_600_000_000 + HOUR * steps) * (item_ids > 0),
        "target_timestamps": 1_600_000_000 + HOUR * length,
        "targets": targets,
        "trajectory": following,
    }


def cyclic_context(num_items: int = ITEMS) -> DataContext:
    """Training counts and edges of twenty walks."""
    items = (np.arange(20)[:, None] + np.arange(WINDOW)) % num_items + 1
    edges = np.stack([np.repeat(np.arange(1, 21), WINDOW), items.ravel()])
    counts = np.bincount(items.ravel(), minlength=num_items + 1)
    return DataContext(num_items, 20, counts, edges, fields=frozenset({"timestamps"}))


def longer(batch: SequenceBatch, more: int = 3) -> SequenceBatch:
    """The same batch with `more` columns of padding."""
    wide = {"item_ids", "timestamps", "targets", "seen", "candidates"}
    return {  # type: ignore[return-value]
        name: torch.nn.functional.pad(value, (0, more)) if name in wide else value for name, value in batch.items()
    }


class GenerativeHeadContract:
    """Inherit, set `head_class` and `options`; override the hooks for heads that need more."""

    head_class: ClassVar[type[GenerativeHead]]
    options: ClassVar[dict[str, Any]] = {}
    overfit_steps: ClassVar[int] = 150
    overfit_learning_rate: ClassVar[float] = 1e-2
    tolerance: ClassVar[float] = 1e-4

    # Hooks -----------------------------------------------------------------------------------------------------------

    def tokenizer(self) -> ItemTokenizer | None:
        return SpelledTokenizer().spell(ITEMS) if self.head_class.needs_tokenizer else None

    def context(self) -> DataContext:
        return cyclic_context()

    def extend(self, batch: SequenceBatch) -> SequenceBatch:
        """Add the fields a head needs besides ids, times and targets."""
        return batch

    def recommend(self, head: GenerativeHead, batch: SequenceBatch, k: int = 5) -> Ranking:
        """The ranking to compare; a sampler whose noise depends on the row's place fixes its noise here."""
        with torch.no_grad():
            return head.recommend(batch, k, generator=torch.Generator().manual_seed(7))

    # Parts -----------------------------------------------------------------------------------------------------------

    def head(self, seed: int = 0) -> GenerativeHead:
        torch.manual_seed(seed)
        config_class = self.head_class.config_class
        assert issubclass(config_class, GenerativeHeadConfig)
        # Wider than the longest history, so that padding columns can be added to a full batch.
        config = config_class(num_items=ITEMS, max_history=WINDOW + 3, **copy.deepcopy(self.options))
        return self.head_class.from_context(config, self.context(), self.tokenizer()).eval()

    def batch(self) -> SequenceBatch:
        """Five rows of different lengths, the first one full."""
        return self.extend(cyclic_batch([0, 3, 7, 9, 5], [WINDOW, 1, 4, 2, 3]))

    def loss(self, head: GenerativeHead, batch: SequenceBatch) -> Tensor:
        torch.manual_seed(11)
        loss = head(batch).loss
        assert loss is not None, "forward must return a loss"
        return loss

    def same(self, found: Ranking, expected: Ranking) -> None:
        assert torch.equal(found.item_ids, expected.item_ids), "another ranking"
        assert torch.equal(found.valid, expected.valid)
        close = torch.isclose(found.scores, expected.scores, rtol=self.tolerance, atol=self.tolerance)
        assert (close | ~expected.valid).all(), "other scores"

    def check_ranking(self, ranking: Ranking, rows: int, k: int) -> None:
        ids, scores, valid = ranking.item_ids, ranking.scores, ranking.valid
        assert ids.shape == scores.shape == valid.shape == (rows, k)
        assert ids.dtype == torch.int64 and scores.dtype == torch.float32 and valid.dtype == torch.bool
        assert ((ids >= 1) & (ids <= ITEMS))[valid].all(), "an item outside the catalogue"
        assert (ids[~valid] == 0).all() and torch.isneginf(scores[~valid]).all()
        assert not torch.isnan(scores).any() and (scores[:, :-1] >= scores[:, 1:]).all(), "scores must not rise"
        for row, real in zip(ids, valid, strict=True):
            assert len(set(row[real].tolist())) == int(real.sum()), "an item twice in one list"

    # Training --------------------------------------------------------------------------------------------------------

    def test_loss_is_finite_and_reaches_every_parameter(self) -> None:
        head = self.head().train()
        loss = self.loss(head, self.batch())
        assert loss.dim() == 0 and torch.isfinite(loss)
        loss.backward()
        trainable = {name: p for name, p in head.named_parameters() if p.requires_grad}
        assert trainable
        without = [name for name, p in trainable.items() if p.grad is None or not torch.isfinite(p.grad).all()]
        assert not without, f"no finite gradient: {without}"
        still = [name for name, p in trainable.items() if not p.grad.any()]
        assert not still, f"gradient is zero everywhere: {still}"

    def test_parts_are_finite(self) -> None:
        parts = self.head()(self.batch()).parts or {}
        assert all(torch.isfinite(value).all() for value in parts.values())

    def test_overfits_the_circle(self) -> None:
        head = self.head().train()
        starts = list(range(ITEMS))
        batch = self.extend(cyclic_batch(starts, [3 + start % 3 for start in starts]))
        optimiser = torch.optim.Adam([p for p in head.parameters() if p.requires_grad], self.overfit_learning_rate)
        first = None
        for _ in range(self.overfit_steps):
            optimiser.zero_grad()
            loss = head(batch).loss
            first = float(loss.detach()) if first is None else first
            loss.backward()
            optimiser.step()
        assert float(loss.detach()) < first, "the loss did not fall"
        found = self.recommend(head.eval(), batch, 1).item_ids[:, 0]
        right = float((found == batch["trajectory"][:, 0]).float().mean())
        assert right >= 0.9, f"only {right:.0%} of twelve walks learned"

    # Recommending ----------------------------------------------------------------------------------------------------

    def test_recommend_gives_catalogue_items(self) -> None:
        head, batch = self.head(), self.batch()
        for k in (1, 5):
            self.check_ranking(self.recommend(head, batch, k), 5, k)

    def test_recommend_honours_seen(self) -> None:
        head, batch = self.head(), self.batch()
        seen = torch.arange(1, ITEMS - 2).expand(5, -1)
        found = self.recommend(head, {**batch, "seen": seen}, 5)
        self.check_ranking(found, 5, 5)
        assert (found.item_ids[found.valid] >= ITEMS - 2).all(), "recommended a seen item"

    def test_recommend_honours_candidates(self) -> None:
        head, batch = self.head(), self.batch()
        candidates = torch.tensor([[2, 5, 9, 11, 0]]).expand(5, -1)
        found = self.recommend(head, {**batch, "candidates": candidates}, 4)
        self.check_ranking(found, 5, 4)
        assert set(found.item_ids[found.valid].tolist()) <= {2, 5, 9, 11}, "recommended an item that is no candidate"
        assert found.valid.any()
        seen = torch.tensor([[5, 9]]).expand(5, -1)
        both = self.recommend(head, {**batch, "candidates": candidates, "seen": seen}, 4)
        assert set(both.item_ids[both.valid].tolist()) <= {2, 11}

    def test_recommend_does_not_read_what_comes_next(self) -> None:
        head, batch = self.head(), self.batch()
        other = {**batch, "targets": batch["targets"].flip(0), "trajectory": batch["trajectory"].flip(0)}
        blank = {name: value for name, value in batch.items() if name not in ("targets", "trajectory")}
        expected = self.recommend(head, batch)
        self.same(self.recommend(head, other), expected)  # type: ignore[arg-type]
        self.same(self.recommend(head, blank), expected)  # type: ignore[arg-type]

    def test_recommend_depends_on_its_generator_alone(self) -> None:
        head, batch = self.head(), self.batch()
        torch.manual_seed(1)
        expected = self.recommend(head, batch)
        torch.manual_seed(2)
        self.same(self.recommend(head, batch), expected)

    # What a row may depend on ----------------------------------------------------------------------------------------

    def test_order_of_the_batch_does_not_matter(self) -> None:
        head, batch = self.head(), self.batch()
        order = torch.tensor([3, 0, 4, 2, 1])
        expected = self.recommend(head, batch)
        found = self.recommend(head, {name: value[order] for name, value in batch.items()})  # type: ignore[misc,index]
        self.same(found, Ranking(expected.item_ids[order], expected.scores[order], expected.valid[order]))

    def test_a_row_does_not_depend_on_the_others(self) -> None:
        head, batch = self.head(), self.batch()
        expected = self.recommend(head, batch)
        found = self.recommend(head, {name: value[:1] for name, value in batch.items()})  # type: ignore[misc,index]
        self.same(found, Ranking(expected.item_ids[:1], expected.scores[:1], expected.valid[:1]))

    def test_padding_does_not_matter(self) -> None:
        head, batch = self.head(), self.batch()
        self.same(self.recommend(head, self.extend(longer(batch))), self.recommend(head, batch))
        with torch.no_grad():
            found, expected = self.loss(head, self.extend(longer(batch))), self.loss(head, batch)
        assert abs(float(found - expected)) < self.tolerance, "padding changed the loss"

    def test_the_batch_is_not_changed(self) -> None:
        head, batch = self.head(), self.batch()
        batch["seen"] = batch["item_ids"].clone()  # type: ignore[typeddict-item]
        before = copy.deepcopy(batch)
        self.recommend(head, batch)
        self.loss(head, batch)
        assert batch.keys() == before.keys()
        assert all(torch.equal(batch[name], before[name]) for name in before)  # type: ignore[literal-required]

    def test_user_representation_where_there_is_one(self) -> None:
        head, batch = self.head(), self.batch()
        if hasattr(head, "gate_dim"):
            with torch.no_grad():
                vectors = head.user_representation(batch)
            assert vectors.shape == (5, head.gate_dim) and torch.isfinite(vectors).all()

    # Saving ----------------------------------------------------------------------------------------------------------

    def test_save_and_load_give_equal_outputs(self, tmp_path: Path) -> None:
        head, batch = self.head(), self.batch()
        head.save_pretrained(tmp_path)
        expected = self.recommend(head, batch)
        with torch.no_grad():
            loss = self.loss(head, batch)
            for again in (self.head_class.from_pretrained(tmp_path).eval(), AutoModel.from_pretrained(tmp_path).eval()):
                assert type(again) is self.head_class
                self.same(self.recommend(again, batch), expected)
                assert abs(float(self.loss(again, batch) - loss)) < self.tolerance, "another loss after loading"
