"""What every item tokenizer must satisfy; a tokenizer's test class inherits `ItemTokenizerContract`.

A feature level is (values [I+1, d], mask [I+1]); values of items whose mask is False mean nothing and must not matter.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmrec.data.schema import ItemFeatures
from llmrec.errors import CheckpointError
from llmrec.item_tokenizers.base import FitReport, ItemTokenizer

WIDTHS = {"category": 6, "title": 12, "description": 10, "collaborative": 8}


def item_features(num_items: int, seed: int = 0, missing: float = 0.0) -> ItemFeatures:
    """Clustered vectors per level; the first rows are the same for every `num_items`.

    Args:
        num_items: I.
        seed: Seed of the vectors.
        missing: Share of items that lack a level (not the first level), with garbage in its place.
    """
    levels: ItemFeatures = {}
    for number, (name, width) in enumerate(WIDTHS.items()):
        rng = np.random.default_rng([seed, number])
        centres = rng.normal(size=(5, width)) * 3
        rows = [centres[item % 5] + rng.normal(size=width) for item in range(num_items + 1)]
        values = np.stack(rows).astype(np.float32)
        draws = np.random.default_rng([seed, number, 1]).random(num_items + 1)
        mask = draws >= (missing if number else 0.0)
        mask[0] = False
        values[0] = 0.0
        levels[name] = (values, mask)
    return levels


def with_garbage(items: ItemFeatures, value: float) -> ItemFeatures:
    """The same features with `value` wherever an item lacks a level."""
    return {name: (np.where(mask[:, None], values, np.float32(value)), mask) for name, (values, mask) in items.items()}


class ItemTokenizerContract:
    """Inherit, set `tokenizer_class` and `options`; override `features` for tokenizers that want other levels."""

    tokenizer_class: ClassVar[type[ItemTokenizer]]
    options: ClassVar[dict[str, Any]] = {}
    num_items: ClassVar[int] = 40
    takes_missing_levels: ClassVar[bool] = True

    # Hooks -----------------------------------------------------------------------------------------------------------

    def features(self, num_items: int, missing: float = 0.0) -> ItemFeatures:
        return item_features(num_items, missing=missing)

    # Parts -----------------------------------------------------------------------------------------------------------

    def fitted(self, items: ItemFeatures | None = None, seed: int = 0) -> ItemTokenizer:
        tokenizer = self.tokenizer_class(**copy.deepcopy(self.options))
        tokenizer.fit(self.features(self.num_items) if items is None else items, seed=seed)
        return tokenizer

    def check_codes(self, tokenizer: ItemTokenizer, num_items: int) -> None:
        codes, sizes = tokenizer.codes, tokenizer.level_sizes
        assert isinstance(sizes, tuple) and sizes and all(isinstance(size, int) and size > 0 for size in sizes)
        assert codes.dtype == torch.int64 and codes.shape == (num_items + 1, len(sizes))
        assert (codes[0] == -1).all(), "row 0 is padding and holds -1"
        assert (codes[1:] >= 0).all() and (codes[1:] < torch.tensor(sizes)).all(), "a code lies outside its level"
        if tokenizer.unique:
            assert len(torch.unique(codes[1:], dim=0)) == num_items, "unique is True, and two items share a code"

    def ids(self, tokenizer: ItemTokenizer) -> Tensor:
        return torch.arange(1, len(tokenizer.codes))

    # Codes -----------------------------------------------------------------------------------------------------------

    def test_codes_have_shape_and_range(self) -> None:
        self.check_codes(self.fitted(), self.num_items)

    def test_report_counts_what_is_there(self) -> None:
        tokenizer = self.tokenizer_class(**copy.deepcopy(self.options))
        report = tokenizer.fit(self.features(self.num_items), seed=0)
        assert isinstance(report, FitReport) and len(report.usage) == len(tokenizer.level_sizes)
        used = [len(torch.unique(column)) for column in tokenizer.codes[1:].T]
        expected = [count / size for count, size in zip(used, tokenizer.level_sizes, strict=True)]
        assert report.usage == pytest.approx(expected), "usage is the share of codes in use, per level"
        shared = sum(len(items) > 1 for items in tokenizer.items_of(tokenizer.codes[1:]))
        assert self.num_items >= report.collisions >= shared, "a policy can only lessen collisions"

    def test_encode(self) -> None:
        tokenizer = self.fitted()
        ids = torch.tensor([[1, 0, 3], [self.num_items, 2, 0]])
        codes = tokenizer.encode(ids)
        assert codes.shape == (2, 3, len(tokenizer.level_sizes)) and codes.dtype == torch.int64
        assert (codes[ids == 0] == -1).all() and torch.equal(codes[0, 2], tokenizer.codes[3])

    def test_decode_gives_back_the_item_or_its_first_twin(self) -> None:
        tokenizer = self.fitted()
        ids = self.ids(tokenizer)
        found = tokenizer.decode(tokenizer.encode(ids).reshape(2, -1, len(tokenizer.level_sizes)))
        assert found.shape == (2, self.num_items // 2)
        found = found.reshape(-1)
        if tokenizer.unique:
            assert torch.equal(found, ids)
        assert (found <= ids).all() and (found >= 1).all()
        assert torch.equal(tokenizer.encode(found), tokenizer.encode(ids))

    def test_decode_knows_no_items_behind_other_codes(self) -> None:
        tokenizer = self.fitted()
        outside = torch.tensor([list(tokenizer.level_sizes), [-1] * len(tokenizer.level_sizes)])
        assert tokenizer.decode(outside).tolist() == [0, 0]

    def test_items_of_splits_the_catalogue(self) -> None:
        tokenizer = self.fitted()
        codes = torch.unique(tokenizer.codes[1:], dim=0)
        groups = tokenizer.items_of(codes)
        assert len(groups) == len(codes)
        assert sorted(item for group in groups for item in group.tolist()) == list(range(1, self.num_items + 1))
        for code, group in zip(codes, groups, strict=True):
            assert group.tolist() == sorted(group.tolist()) and (tokenizer.codes[group] == code).all()

    # Fitting ---------------------------------------------------------------------------------------------------------

    def test_fit_depends_on_its_seed_alone(self) -> None:
        torch.manual_seed(1)
        np.random.seed(1)
        first = self.fitted(seed=5)
        torch.manual_seed(2)
        np.random.seed(2)
        state = torch.get_rng_state()
        again = self.fitted(seed=5)
        assert torch.equal(first.codes, again.codes) and first.fingerprint == again.fingerprint
        assert torch.equal(state, torch.get_rng_state()), "fitting must not draw from the global generator"

    def test_features_are_not_changed(self) -> None:
        items = self.features(self.num_items, missing=0.3 if self.takes_missing_levels else 0.0)
        before = copy.deepcopy(items)
        self.fitted(items)
        for name, (values, mask) in before.items():
            assert np.array_equal(items[name][0], values) and np.array_equal(items[name][1], mask)

    def test_items_may_lack_levels(self) -> None:
        if not self.takes_missing_levels:
            pytest.skip("needs every level of every item")
        items = self.features(self.num_items, missing=0.3)
        plain, wild = self.fitted(with_garbage(items, 0.0)), self.fitted(with_garbage(items, 1e4))
        self.check_codes(plain, self.num_items)
        assert torch.equal(plain.codes, wild.codes), "values of a level that an item lacks must not matter"

    # Saving and growing ----------------------------------------------------------------------------------------------

    def test_save_and_load(self, tmp_path: Path) -> None:
        tokenizer = self.fitted()
        tokenizer.save_pretrained(tmp_path)
        again = self.tokenizer_class.from_pretrained(tmp_path)
        assert torch.equal(again.codes, tokenizer.codes) and again.fingerprint == tokenizer.fingerprint
        assert (again.level_sizes, again.unique, again) == (tokenizer.level_sizes, tokenizer.unique, tokenizer)
        grown = self.features(self.num_items + 6)
        for one in (tokenizer, again):
            one.add(grown)
        assert torch.equal(again.codes, tokenizer.codes), "a loaded tokenizer codes new items as the saved one does"

    def test_loading_refuses_other_codes(self, tmp_path: Path) -> None:
        self.fitted().save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "codes.safetensors")
        tensors["codes"] = tensors["codes"].flip(0)
        save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "codes.safetensors")
        with pytest.raises(CheckpointError):
            self.tokenizer_class.from_pretrained(tmp_path)

    def test_add_keeps_old_codes(self) -> None:
        tokenizer = self.fitted()
        old, fingerprint = tokenizer.codes.clone(), tokenizer.fingerprint
        tokenizer.add(self.features(self.num_items + 6))
        self.check_codes(tokenizer, self.num_items + 6)
        assert torch.equal(tokenizer.codes[: self.num_items + 1], old), "adding items changed older codes"
        assert tokenizer.fingerprint != fingerprint
        assert torch.equal(tokenizer.codes[tokenizer.decode(tokenizer.codes[1:])], tokenizer.codes[1:])
