"""The contracts tested on toys: small honest parts pass every test, and for every test a planted fault is caught."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from llmrec.blocks.readout import top_items
from llmrec.data.dataset import InteractionDataset
from llmrec.data.schema import DataContext, ItemFeatures, Ranking, SequenceBatch
from llmrec.heads.base import GenerativeHead, GenerativeHeadConfig, HeadOutput, register
from llmrec.item_tokenizers.base import FitReport, ItemTokenizer
from llmrec.transforms.base import DataTransform, TransformContext, TransformResult
from tests.contracts.heads import ITEMS, GenerativeHeadContract, SpelledTokenizer
from tests.contracts.item_tokenizers import ItemTokenizerContract
from tests.contracts.transforms import TransformContract


def methods_of(contract: type) -> set[str]:
    return {name for name in dir(contract) if name.startswith("test_")}


def expect_caught(contract: type, attribute: str, faulty: type, method: str, folder: Path) -> None:
    """Run one test of a contract on a faulty part; it must fail by an assertion or by a missing refusal."""
    case = type("Case", (contract,), {attribute: faulty})()
    test = getattr(case, method)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test(folder) if "tmp_path" in inspect.signature(test).parameters else test()


# An item tokenizer ---------------------------------------------------------------------------------------------------


@dataclass
class HashTokenizer(ItemTokenizer):
    """Signs of random projections, three bits a level; a last level numbers the items of one bucket."""

    levels: int = 2
    room: int = 64

    def fit(self, items: ItemFeatures, *, seed: int) -> FitReport:
        """Draw the planes, then code every item."""
        width = sum(values.shape[1] for values, _ in items.values())
        self.planes = torch.randn(width, 3 * self.levels, generator=torch.Generator().manual_seed(seed))
        self.level_sizes, self.unique = (*[8] * self.levels, self.room), True
        self.codes = torch.full((1, self.levels + 1), -1)
        self.add(items)
        buckets = [tuple(row) for row in self.codes[1:, :-1].tolist()]
        collisions = sum(buckets.count(bucket) > 1 for bucket in buckets)
        used = [len(torch.unique(column)) for column in self.codes[1:].T]
        usage = tuple(count / size for count, size in zip(used, self.level_sizes, strict=True))
        return FitReport(collisions, usage, float("nan"), {})

    def add(self, items: ItemFeatures) -> None:
        """Code the items that have no code yet."""
        first = len(self.codes)
        parts = [np.where(mask[:, None], values, 0.0) for values, mask in items.values()]
        bits = (torch.from_numpy(np.concatenate(parts, axis=1)).float() @ self.planes > 0).long()[first:]
        buckets = (bits.reshape(len(bits), self.levels, 3) * torch.tensor([4, 2, 1])).sum(-1)
        for bucket in buckets:
            taken = int((self.codes[:, :-1] == bucket).all(1).sum())
            assert taken < self.room
            row = torch.cat([bucket, torch.tensor([taken])])
            self.codes = torch.cat([self.codes, row[None]])

    def _arrays(self) -> dict[str, Tensor]:
        return {"planes": self.planes}


class TestHashTokenizer(ItemTokenizerContract):
    tokenizer_class = HashTokenizer


class TestRoomyHashTokenizer(ItemTokenizerContract):
    tokenizer_class = HashTokenizer
    options: ClassVar[dict[str, Any]] = {"levels": 3, "room": 40}


class TestSpelledTokenizer(ItemTokenizerContract):
    """The stand-in that heads are tested with; it never looks at a feature."""

    tokenizer_class = SpelledTokenizer
    options: ClassVar[dict[str, Any]] = {"base": 10}

    def test_report_counts_what_is_there(self) -> None:
        pytest.skip("its report is a constant")


class PaddingHasACode(HashTokenizer):
    def fit(self, items: ItemFeatures, *, seed: int) -> FitReport:
        report = super().fit(items, seed=seed)
        self.codes[0] = 0
        return report


class OutsideItsLevel(HashTokenizer):
    def fit(self, items: ItemFeatures, *, seed: int) -> FitReport:
        report = super().fit(items, seed=seed)
        self.codes[3, 0] = self.level_sizes[0]
        return report


class Twins(HashTokenizer):
    def fit(self, items: ItemFeatures, *, seed: int) -> FitReport:
        report = super().fit(items, seed=seed)
        self.codes[2] = self.codes[1]
        return report


class Boaster(HashTokenizer):
    def fit(self, items: ItemFeatures, *, seed: int) -> FitReport:
        return dataclasses.replace(super().fit(items, seed=seed), usage=(1.0,) * (self.levels + 1))


class HidesCollisions(HashTokenizer):
    def fit(self, items: ItemFeatures, *, seed: int) -> FitReport:
        report = super().fit(items, seed=seed)
        self.codes[1:, -1], self.unique = 0, False
        used = (*report.usage[:-1], 1 / self.room)
        return dataclasses.replace(report, collisions=0, usage=used)


class EncodesPaddingAsLastItem(HashTokenizer):
    def encode(self, item_ids: Tensor) -> Tensor:
        return self.codes[item_ids - 1]


class DecodesToTheNext(HashTokenizer):
    def decode(self, codes: Tensor) -> Tensor:
        return super().decode(codes) % (len(self.codes) - 1) + 1


class AlwaysFindsSomething(HashTokenizer):
    def decode(self, codes: Tensor) -> Tensor:
        return super().decode(codes).clamp(min=1)


class LosesAnItem(HashTokenizer):
    def items_of(self, codes: Tensor) -> list[Tensor]:
        return [group[group != 4] for group in super().items_of(codes)]


class DrawsFromTheGlobalGenerator(HashTokenizer):
    def fit(self, items: ItemFeatures, *, seed: int) -> FitReport:
        return super().fit(items, seed=int(torch.randint(1000, ())))


class CentresInPlace(HashTokenizer):
    def fit(self, items: ItemFeatures, *, seed: int) -> FitReport:
        for values, _ in items.values():
            values -= values.mean(axis=0)
        return super().fit(items, seed=seed)


class IgnoresMasks(HashTokenizer):
    def add(self, items: ItemFeatures) -> None:
        super().add({name: (values, np.ones_like(mask)) for name, (values, mask) in items.items()})


class ForgetsItsPlanes(HashTokenizer):
    def _arrays(self) -> dict[str, Tensor]:
        return {"planes": self.planes.flip(0)}


class LoadsAnything(HashTokenizer):
    @property
    def fingerprint(self) -> str:
        return f"{len(self.codes):016d}"


class CodesAnew(HashTokenizer):
    def add(self, items: ItemFeatures) -> None:
        if len(self.codes) > 1:
            self.planes, self.codes = self.planes.flip(0), self.codes[:1]
        super().add(items)


TOKENIZER_FAULTS: list[tuple[type, str]] = [
    (PaddingHasACode, "test_codes_have_shape_and_range"),
    (OutsideItsLevel, "test_codes_have_shape_and_range"),
    (Twins, "test_codes_have_shape_and_range"),
    (Boaster, "test_report_counts_what_is_there"),
    (HidesCollisions, "test_report_counts_what_is_there"),
    (EncodesPaddingAsLastItem, "test_encode"),
    (DecodesToTheNext, "test_decode_gives_back_the_item_or_its_first_twin"),
    (Twins, "test_decode_gives_back_the_item_or_its_first_twin"),
    (AlwaysFindsSomething, "test_decode_knows_no_items_behind_other_codes"),
    (LosesAnItem, "test_items_of_splits_the_catalogue"),
    (DrawsFromTheGlobalGenerator, "test_fit_depends_on_its_seed_alone"),
    (CentresInPlace, "test_features_are_not_changed"),
    (IgnoresMasks, "test_items_may_lack_levels"),
    (ForgetsItsPlanes, "test_save_and_load"),
    (LoadsAnything, "test_loading_refuses_other_codes"),
    (CodesAnew, "test_add_keeps_old_codes"),
]


@pytest.mark.parametrize(("faulty", "method"), TOKENIZER_FAULTS)
def test_faulty_tokenizers_are_caught(faulty: type, method: str, tmp_path: Path) -> None:
    expect_caught(ItemTokenizerContract, "tokenizer_class", faulty, method, tmp_path)


# A head --------------------------------------------------------------------------------------------------------------


class ToyHeadConfig(GenerativeHeadConfig):
    model_type = "llmrec_toy_head"

    hidden_size: int = 16


class ToyHead(GenerativeHead):
    """A GRU over item vectors whose last state is scored against them."""

    config_class = ToyHeadConfig

    def __init__(self, config: ToyHeadConfig) -> None:
        super().__init__(config)
        self.items = nn.Embedding(config.num_items + 1, config.hidden_size, padding_idx=0)
        self.gru = nn.GRU(config.hidden_size, config.hidden_size, batch_first=True)
        self.post_init()

    @classmethod
    def from_context(
        cls, config: GenerativeHeadConfig, context: DataContext, tokenizer: ItemTokenizer | None = None
    ) -> ToyHead:
        return cls(config)  # type: ignore[arg-type]

    @property
    def gate_dim(self) -> int:
        return int(self.config.hidden_size)

    def user_representation(self, batch: SequenceBatch) -> Tensor:
        hidden, _ = self.gru(self.items(batch["item_ids"]))
        return hidden[torch.arange(len(hidden)), batch["lengths"] - 1]

    def scores(self, batch: SequenceBatch) -> Tensor:
        """[B, I+1], padding at -inf."""
        scores = self.user_representation(batch) @ self.items.weight.T
        return scores.index_fill(1, torch.zeros(1, dtype=torch.long), float("-inf"))

    def forward(self, batch: SequenceBatch) -> HeadOutput:
        target = batch["targets"].gather(1, batch["lengths"][:, None] - 1)[:, 0]
        loss = nn.functional.cross_entropy(self.scores(batch), target)
        return HeadOutput(loss=loss, parts={"likelihood": loss.detach()})

    def recommend(
        self,
        batch: SequenceBatch,
        k: int,
        *,
        beams: int | None = None,
        steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Ranking:
        scores, candidates = self.scores(batch), batch.get("candidates")
        if candidates is not None:
            scores = scores.gather(1, candidates)
        return Ranking(*top_items(scores, k, seen=batch.get("seen"), candidates=candidates))


register(ToyHeadConfig, ToyHead)


class TestToyHead(GenerativeHeadContract):
    head_class = ToyHead
    overfit_steps = 80


class IdleWeight(ToyHead):
    def __init__(self, config: ToyHeadConfig) -> None:
        super().__init__(config)
        self.idle = nn.Parameter(torch.zeros(3))


class NotANumber(ToyHead):
    def forward(self, batch: SequenceBatch) -> HeadOutput:
        return HeadOutput(loss=super().forward(batch).loss, parts={"entropy": torch.tensor(float("nan"))})


class LearnsOtherTargets(ToyHead):
    def forward(self, batch: SequenceBatch) -> HeadOutput:
        return super().forward({**batch, "targets": batch["targets"] % ITEMS + (batch["targets"] > 0)})  # type: ignore[typeddict-item]


class RecommendsPadding(ToyHead):
    def recommend(self, batch: SequenceBatch, k: int, **options: Any) -> Ranking:
        found = super().recommend(batch, k)
        return Ranking(found.item_ids * (found.item_ids != found.item_ids.max()), found.scores, found.valid)


class Repeats(ToyHead):
    def recommend(self, batch: SequenceBatch, k: int, **options: Any) -> Ranking:
        found = super().recommend(batch, k)
        return Ranking(found.item_ids[:, :1].expand(-1, k), found.scores, found.valid)


class ForgetsSeen(ToyHead):
    def recommend(self, batch: SequenceBatch, k: int, **options: Any) -> Ranking:
        return super().recommend({n: v for n, v in batch.items() if n != "seen"}, k)  # type: ignore[misc,arg-type]


class ForgetsCandidates(ToyHead):
    def recommend(self, batch: SequenceBatch, k: int, **options: Any) -> Ranking:
        return super().recommend({n: v for n, v in batch.items() if n != "candidates"}, k)  # type: ignore[misc,arg-type]


class ReadsTheTarget(ToyHead):
    def scores(self, batch: SequenceBatch) -> Tensor:
        scores = super().scores(batch)
        return scores.scatter_add(1, batch["trajectory"], torch.ones(scores.shape)) if "trajectory" in batch else scores


class RollsDice(ToyHead):
    def scores(self, batch: SequenceBatch) -> Tensor:
        scores = super().scores(batch)
        return scores + torch.rand(scores.shape)


class KnowsItsRow(ToyHead):
    def user_representation(self, batch: SequenceBatch) -> Tensor:
        state = super().user_representation(batch)
        return state * torch.linspace(1, -1, len(state))[:, None]


class LooksAtItsNeighbours(ToyHead):
    def user_representation(self, batch: SequenceBatch) -> Tensor:
        state = super().user_representation(batch)
        return state - state.mean(0)


class CountsPadding(ToyHead):
    def user_representation(self, batch: SequenceBatch) -> Tensor:
        return self.gru(self.items(batch["item_ids"]))[0].mean(1)


class PaddedLossOnly(ToyHead):
    def forward(self, batch: SequenceBatch) -> HeadOutput:
        loss = super().forward(batch).loss
        return HeadOutput(loss=loss * batch["targets"].shape[1])


class ShortensTheBatch(ToyHead):
    def user_representation(self, batch: SequenceBatch) -> Tensor:
        batch["item_ids"][:, 0] = 1
        return super().user_representation(batch)


class WrongWidth(ToyHead):
    @property
    def gate_dim(self) -> int:
        return 7


class LosesABuffer(ToyHead):
    def __init__(self, config: ToyHeadConfig) -> None:
        super().__init__(config)
        self.register_buffer("tilt", torch.randn(config.num_items + 1), persistent=False)

    def scores(self, batch: SequenceBatch) -> Tensor:
        return super().scores(batch) + self.tilt


HEAD_FAULTS: list[tuple[type, str]] = [
    (IdleWeight, "test_loss_is_finite_and_reaches_every_parameter"),
    (NotANumber, "test_parts_are_finite"),
    (LearnsOtherTargets, "test_overfits_the_circle"),
    (RecommendsPadding, "test_recommend_gives_catalogue_items"),
    (Repeats, "test_recommend_gives_catalogue_items"),
    (ForgetsSeen, "test_recommend_honours_seen"),
    (ForgetsCandidates, "test_recommend_honours_candidates"),
    (ForgetsSeen, "test_recommend_honours_candidates"),
    (ReadsTheTarget, "test_recommend_does_not_read_what_comes_next"),
    (RollsDice, "test_recommend_depends_on_its_generator_alone"),
    (KnowsItsRow, "test_order_of_the_batch_does_not_matter"),
    (LooksAtItsNeighbours, "test_a_row_does_not_depend_on_the_others"),
    (CountsPadding, "test_padding_does_not_matter"),
    (PaddedLossOnly, "test_padding_does_not_matter"),
    (ShortensTheBatch, "test_the_batch_is_not_changed"),
    (WrongWidth, "test_user_representation_where_there_is_one"),
    (LosesABuffer, "test_save_and_load_give_equal_outputs"),
]


@pytest.mark.parametrize(("faulty", "method"), HEAD_FAULTS)
def test_faulty_heads_are_caught(faulty: type, method: str, tmp_path: Path) -> None:
    contract = type("Short", (GenerativeHeadContract,), {"overfit_steps": 60})
    expect_caught(contract, "head_class", faulty, method, tmp_path)


# A transform ---------------------------------------------------------------------------------------------------------


@dataclass
class DropRepeats(DataTransform):
    """Training events that repeat the (user, item) pair of an earlier training event go."""

    def __call__(self, dataset: InteractionDataset, context: TransformContext) -> TransformResult:
        table = dataset.interactions
        pairs = zip(*(table.column(name).to_pylist() for name in ("user", "item", "split")), strict=True)
        seen: set[tuple[int, int]] = set()
        keep = []
        for user, item, split in pairs:
            keep.append(split != "train" or (user, item) not in seen)
            seen.add((user, item))
        made = table.filter(pa.array(keep))
        removed = table.num_rows - made.num_rows
        note = f"{removed} repeated training events dropped"
        return TransformResult({"dataset": dataset.with_interactions(made, note)}, {"removed": removed})


class TestDropRepeats(TransformContract):
    transform_class = DropRepeats

    def test_it_drops_repeats(self, tmp_path: Path) -> None:
        _, result = self.results(tmp_path)
        table = result.datasets["dataset"].interactions
        rows = zip(*(table.column(name).to_pylist() for name in ("user", "item", "split")), strict=True)
        train = [(user, item) for user, item, split in rows if split == "train"]
        assert result.report["removed"] > 0 and len(train) == len(set(train))


@dataclass
class Edited(DropRepeats):
    """Runs the honest transform and changes its result by `edit`."""

    def __call__(self, dataset: InteractionDataset, context: TransformContext) -> TransformResult:
        result = super().__call__(dataset, context)
        return TransformResult({"dataset": self.edit(result.datasets["dataset"], context)}, result.report)

    def edit(self, dataset: InteractionDataset, context: TransformContext) -> Any:
        raise NotImplementedError


def with_column(dataset: InteractionDataset, name: str, values: Any) -> InteractionDataset:
    table = dataset.interactions
    changed = table.set_column(table.column_names.index(name), name, pa.array(values))
    return dataclasses.replace(dataset, interactions=changed)


class MovesATestEvent(Edited):
    def edit(self, dataset: InteractionDataset, context: TransformContext) -> Any:
        items = dataset.column("item").copy()
        place = dataset.interactions.column("split").to_pylist().index("test")
        items[place] = items[place] % dataset.num_items + 1
        return with_column(dataset, "item", items)


class DropsAValidationEvent(Edited):
    def edit(self, dataset: InteractionDataset, context: TransformContext) -> Any:
        splits = dataset.interactions.column("split").to_pylist()
        splits[splits.index("valid")] = "train"
        return with_column(dataset, "split", splits)


class TrainsAfterTheTest(Edited):
    def edit(self, dataset: InteractionDataset, context: TransformContext) -> Any:
        last = dataset.interactions.slice(dataset.interactions.num_rows - 1, 1)
        later = last.set_column(2, "order", pa.array([last["order"][0].as_py() + 1]))
        later = later.set_column(3, "split", pa.array(["train"]))
        return dataclasses.replace(dataset, interactions=pa.concat_tables([dataset.interactions, later]))


class OutsideTheTables:
    """A data set whose own check was gone round: an item id beyond its table."""

    def __init__(self, dataset: InteractionDataset) -> None:
        self._dataset = dataset

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)

    def column(self, name: str) -> np.ndarray:
        return self._dataset.column(name) + (100 if name == "item" else 0)


class InventsItems(Edited):
    def edit(self, dataset: InteractionDataset, context: TransformContext) -> Any:
        return OutsideTheTables(dataset)


class Renumbers(Edited):
    def edit(self, dataset: InteractionDataset, context: TransformContext) -> Any:
        items = dataset.items.set_column(1, "key", pa.array(dataset.items.column("key").to_pylist()[::-1]))
        return dataclasses.replace(dataset, items=items)


class SaysNothing(Edited):
    def edit(self, dataset: InteractionDataset, context: TransformContext) -> Any:
        return dataclasses.replace(dataset, meta=dataclasses.replace(dataset.meta, notes=("made for tests",)))


class HasNoParent(Edited):
    def edit(self, dataset: InteractionDataset, context: TransformContext) -> Any:
        return dataclasses.replace(dataset, meta=dataclasses.replace(dataset.meta, parent=None))


class ShufflesGlobally(Edited):
    def edit(self, dataset: InteractionDataset, context: TransformContext) -> Any:
        items = dataset.column("item").copy()
        train = np.flatnonzero(np.array(dataset.interactions.column("split").to_pylist()) == "train")
        items[train] = np.random.permutation(items[train])
        return with_column(dataset, "item", items)


class ChangesItsInput(DropRepeats):
    def __call__(self, dataset: InteractionDataset, context: TransformContext) -> TransformResult:
        result = super().__call__(dataset, context)
        object.__setattr__(dataset, "interactions", result.datasets["dataset"].interactions)
        return result


class ReportsNothing(DropRepeats):
    def __call__(self, dataset: InteractionDataset, context: TransformContext) -> TransformResult:
        return TransformResult(super().__call__(dataset, context).datasets, {"removed": float("nan")})


class SavesLess(Edited):
    """Its data set writes one event fewer than it holds."""

    def edit(self, dataset: InteractionDataset, context: TransformContext) -> Any:
        shorter = dataclasses.replace(dataset, interactions=dataset.interactions.slice(1))
        object.__setattr__(dataset, "save", shorter.save)
        return dataset


TRANSFORM_FAULTS: list[tuple[type, str]] = [
    (MovesATestEvent, "test_evaluation_events_stay_as_they_are"),
    (DropsAValidationEvent, "test_evaluation_events_stay_as_they_are"),
    (TrainsAfterTheTest, "test_evaluation_events_stay_the_latest_of_their_user"),
    (InventsItems, "test_ids_lie_within_their_tables"),
    (Renumbers, "test_catalogue_and_users_keep_their_ids"),
    (SaysNothing, "test_note_and_parent_are_written"),
    (HasNoParent, "test_note_and_parent_are_written"),
    (ShufflesGlobally, "test_result_depends_on_the_seed_alone"),
    (ChangesItsInput, "test_the_input_is_not_changed"),
    (ReportsNothing, "test_report_holds_named_numbers"),
    (SavesLess, "test_result_can_be_saved_and_loaded"),
]


@pytest.mark.parametrize(("faulty", "method"), TRANSFORM_FAULTS)
def test_faulty_transforms_are_caught(faulty: type, method: str, tmp_path: Path) -> None:
    expect_caught(TransformContract, "transform_class", faulty, method, tmp_path)


@pytest.mark.parametrize(
    ("contract", "faults"),
    [
        (ItemTokenizerContract, TOKENIZER_FAULTS),
        (GenerativeHeadContract, HEAD_FAULTS),
        (TransformContract, TRANSFORM_FAULTS),
    ],
)
def test_every_test_of_a_contract_has_a_fault_that_it_catches(contract: type, faults: list[tuple[type, str]]) -> None:
    assert {method for _, method in faults} == methods_of(contract)
