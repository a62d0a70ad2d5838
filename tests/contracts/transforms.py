"""What every data transform must satisfy; a transform's test class inherits `TransformContract`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from llmrec.data.dataset import DatasetMeta, InteractionDataset
from llmrec.transforms.base import DataTransform, TransformContext, TransformResult

HELD_OUT = ("valid", "test", "test_lapse", "calibration")


def repeating_dataset(users: int = 12, num_items: int = 15, seed: int = 0) -> InteractionDataset:
    """Users with repeated items, times and ratings; the last two events of each are validation and test."""
    rng = np.random.default_rng(seed)
    rows: list[tuple[int, int, int, str, int, float]] = []
    for user in range(1, users + 1):
        length = int(rng.integers(6, 12))
        items = rng.integers(1, num_items + 1, length)
        items[1::3] = items[0]  # at least one repeat in the training part
        for order, item in enumerate(items):
            split = {length - 2: "valid", length - 1: "test"}.get(order, "train")
            rows.append((user, int(item), order, split, 1_600_000_000 + 3600 * order, float(rng.integers(1, 6))))
    names = ("user", "item", "order", "split", "timestamp", "rating")
    table = pa.table({name: [row[i] for row in rows] for i, name in enumerate(names)})
    items_table = pa.table({
        "item": list(range(1, num_items + 1)),
        "key": [f"i{n}" for n in range(1, num_items + 1)],
        "title": [f"Title {n}" for n in range(1, num_items + 1)],
    })  # fmt: skip
    users_table = pa.table({"user": list(range(1, users + 1)), "key": [f"u{n}" for n in range(1, users + 1)]})
    meta = DatasetMeta("repeating", "table", "leave_one_out", has_repeats=True, notes=("made for tests",))
    return InteractionDataset(table, items_table, users_table, meta)


def held_out(dataset: InteractionDataset) -> list[tuple[Any, ...]]:
    """Every event of an evaluation split: original user and item, split, time and rating."""
    table = dataset.interactions
    columns = [name for name in ("split", "timestamp", "rating", "label") if name in table.column_names]
    rows = zip(
        (dataset.user_keys[user] for user in table.column("user").to_pylist()),
        (dataset.item_keys[item] for item in table.column("item").to_pylist()),
        *(table.column(name).to_pylist() for name in columns),
        strict=True,
    )
    return sorted((row for row in rows if row[2] in HELD_OUT), key=repr)


class TransformContract:
    """Inherit, set `transform_class` and `options`; override `dataset` or `context` for transforms that need more."""

    transform_class: ClassVar[type[DataTransform]]
    options: ClassVar[dict[str, Any]] = {}

    # Hooks -----------------------------------------------------------------------------------------------------------

    def dataset(self) -> InteractionDataset:
        return repeating_dataset()

    def context(self, folder: Path, seed: int = 0) -> TransformContext:
        return TransformContext(work_dir=folder, seed=seed)

    # Parts -----------------------------------------------------------------------------------------------------------

    def run(self, dataset: InteractionDataset, folder: Path, seed: int = 0) -> TransformResult:
        folder.mkdir(parents=True, exist_ok=True)
        return self.transform_class(**copy.deepcopy(self.options))(dataset, self.context(folder, seed))

    def results(self, folder: Path) -> tuple[InteractionDataset, TransformResult]:
        dataset = self.dataset()
        result = self.run(dataset, folder)
        assert result.datasets, "a transform must make at least one data set"
        return dataset, result

    # Tests -----------------------------------------------------------------------------------------------------------

    def test_evaluation_events_stay_as_they_are(self, tmp_path: Path) -> None:
        dataset, result = self.results(tmp_path)
        expected = held_out(dataset)
        assert expected
        for name, made in result.datasets.items():
            assert held_out(made) == expected, f"{name}: validation or test events changed"

    def test_evaluation_events_stay_the_latest_of_their_user(self, tmp_path: Path) -> None:
        _, result = self.results(tmp_path)
        for made in result.datasets.values():
            last: dict[int, int] = {}
            columns = (made.interactions.column(name).to_pylist() for name in ("user", "order", "split"))
            rows = list(zip(*columns, strict=True))
            for user, order, split in rows:
                if split == "train":
                    last[user] = max(order, last.get(user, order))
            late = [(user, order) for user, order, split in rows if split in HELD_OUT and order <= last.get(user, -1)]
            assert not late, "a training event stands after an evaluation event of its user"

    def test_ids_lie_within_their_tables(self, tmp_path: Path) -> None:
        _, result = self.results(tmp_path)
        for made in result.datasets.values():
            items, users = made.column("item"), made.column("user")
            assert len(items) and items.min() >= 1 and items.max() <= made.num_items
            assert users.min() >= 1 and users.max() <= made.num_users

    def test_catalogue_and_users_keep_their_ids(self, tmp_path: Path) -> None:
        dataset, result = self.results(tmp_path)
        for made in result.datasets.values():
            assert made.item_keys[: len(dataset.item_keys)] == dataset.item_keys
            assert made.user_keys[: len(dataset.user_keys)] == dataset.user_keys

    def test_note_and_parent_are_written(self, tmp_path: Path) -> None:
        dataset, result = self.results(tmp_path)
        before = dataset.meta.notes
        for name, made in result.datasets.items():
            assert made.meta.parent == dataset.fingerprint, f"{name}: the parent's fingerprint is missing"
            assert made.meta.notes[: len(before)] == before and len(made.meta.notes) > len(before), f"{name}: no note"
            assert all(note.strip() and "\n" not in note for note in made.meta.notes)

    def test_result_depends_on_the_seed_alone(self, tmp_path: Path) -> None:
        import torch

        found = []
        for attempt in range(2):
            torch.manual_seed(attempt)
            np.random.seed(attempt)
            result = self.run(self.dataset(), tmp_path / str(attempt), seed=3)
            found.append(({n: d.fingerprint for n, d in result.datasets.items()}, dict(result.report)))
        assert found[0] == found[1]

    def test_the_input_is_not_changed(self, tmp_path: Path) -> None:
        dataset = self.dataset()
        twin = self.dataset()
        self.run(dataset, tmp_path)
        for name in ("interactions", "items", "users"):
            assert getattr(dataset, name).equals(getattr(twin, name)), f"{name} of the input changed"
        assert dataset.meta == twin.meta

    def test_report_holds_named_numbers(self, tmp_path: Path) -> None:
        _, result = self.results(tmp_path)
        assert result.report and all(isinstance(name, str) for name in result.report)
        assert all(isinstance(value, int | float) and np.isfinite(value) for value in result.report.values())

    def test_result_can_be_saved_and_loaded(self, tmp_path: Path) -> None:
        _, result = self.results(tmp_path / "work")
        for name, made in result.datasets.items():
            made.save(tmp_path / name)
            assert InteractionDataset.load(tmp_path / name).fingerprint == made.fingerprint
