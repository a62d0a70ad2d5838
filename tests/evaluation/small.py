"""A small data set and tiny systems for the tests of evaluation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from llmrec.data.dataset import DatasetMeta, InteractionDataset
from llmrec.data.schema import Ranking


def make_dataset(
    histories: Sequence[Sequence[int]],
    num_items: int,
    *,
    tests: int = 1,
    has_repeats: bool = False,
    titles: Sequence[str] | None = None,
) -> InteractionDataset:
    """Users 1.. with these items in order; the last `tests` events of each are the test split."""
    rows = [
        (user, item, order, "test" if order >= len(items) - tests else "train")
        for user, items in enumerate(histories, start=1)
        for order, item in enumerate(items)
    ]
    names = ("user", "item", "order", "split")
    interactions = pa.table({name: [row[i] for row in rows] for i, name in enumerate(names)})
    columns: dict[str, Any] = {"item": range(1, num_items + 1), "key": [f"i{n}" for n in range(1, num_items + 1)]}
    if titles is not None:
        columns["title"] = list(titles)
    users = {"user": range(1, len(histories) + 1), "key": [f"u{n}" for n in range(1, len(histories) + 1)]}
    meta = DatasetMeta("small", "table", "given", has_repeats=has_repeats)
    return InteractionDataset(
        interactions, *(pa.table({k: list(v) for k, v in c.items()}) for c in (columns, users)), meta
    )


def random_dataset(users: int = 40, num_items: int = 30, seed: int = 0, tests: int = 1) -> InteractionDataset:
    """Users with 4 to 12 distinct items each."""
    rng = np.random.default_rng(seed)
    histories = [rng.permutation(np.arange(1, num_items + 1))[: rng.integers(4, 13)].tolist() for _ in range(users)]
    return make_dataset(histories, num_items, tests=tests)


class TableScorer:
    """Scores every item by a fixed function of (user, last item): a `CatalogueScorer` without parameters."""

    def __init__(self, num_items: int, seed: int = 0, levels: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(1000, num_items + 1, generator=generator)
        if levels:
            self.table = torch.randint(0, levels, self.table.shape, generator=generator).float()
        self.table[:, 0] = float("-inf")
        self.batches: list[dict[str, Tensor]] = []

    def score_items(self, batch: Any) -> Tensor:
        self.batches.append(batch)
        last = batch["item_ids"].gather(1, batch["lengths"][:, None] - 1)[:, 0]
        return self.table[(batch["user_ids"] * 31 + last * 7) % 1000].clone()

    def score_candidates(self, batch: Any) -> Tensor:
        return self.score_items(batch).gather(1, batch["candidates"])

    def recommend(self, batch: Any, k: int) -> Ranking:
        scores = self.score_items(batch)
        if "seen" in batch:
            scores.scatter_(1, batch["seen"], float("-inf"))
        if "candidates" in batch:
            allowed = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, batch["candidates"], True)
            scores.masked_fill_(~allowed, float("-inf"))
        best, items = scores.topk(min(k, scores.shape[1] - 1), dim=1)
        return Ranking(torch.where(best > float("-inf"), items, 0), best, best > float("-inf"))


class ListOnly:
    """The same system seen through `recommend` alone."""

    def __init__(self, scorer: TableScorer) -> None:
        self._scorer = scorer

    def recommend(self, batch: Any, k: int) -> Ranking:
        return self._scorer.recommend(batch, k)


class Writer:
    """Answers with given texts, one per example id; names no item itself."""

    def __init__(self, texts: dict[int, str]) -> None:
        self.texts = texts

    def recommend(self, batch: Any, k: int) -> Ranking:
        rows = len(batch["lengths"])
        nothing = torch.zeros(rows, k, dtype=torch.long)
        texts = [self.texts[int(number)] for number in batch["example_ids"]]
        return Ranking(nothing, torch.full((rows, k), float("-inf")), nothing > 0, texts)


def use_candidates(monkeypatch: pytest.MonkeyPatch, draw: Callable[..., np.ndarray]) -> None:
    """Let the evaluator draw candidates by `draw(dataset, examples, size, kind, seed)`."""
    module = ModuleType("llmrec.data.negatives")
    module.candidate_lists = draw  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llmrec.data.negatives", module)


def every_item(dataset: InteractionDataset, examples: Any, size: int, kind: str, seed: int) -> np.ndarray:
    """Candidate lists that hold the whole catalogue in a random order."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(np.arange(1, dataset.num_items + 1)) for _ in range(len(examples))])
