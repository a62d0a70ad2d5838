"""`train_sampling_strategy: group_by_length` in a stage: resumable, alike in every process, refused where it cannot be;
and examples that change between epochs do so in every style."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from llmrec.errors import RecipeError
from llmrec.training import checkpoints
from llmrec.training.arguments import build_arguments
from llmrec.training.loop import EpochOrder
from tests.training.small import TinyStrategy, make_examples, make_stage, run_stage, same, weights
from tests.training.test_answers import Answers, Collator, Examples, TinyAnswers

GROUPED = {"train_sampling_strategy": "group_by_length"}


def order(lengths: np.ndarray, epoch: int = 0, batch: int = 4, processes: int = 1) -> EpochOrder:
    args = SimpleNamespace(
        train_sampling_strategy="group_by_length", seed=7, per_device_train_batch_size=batch, world_size=processes
    )
    loop: Any = SimpleNamespace(
        args=args, state=SimpleNamespace(global_step=10 * epoch), steps_per_epoch=10,
        strategy=TinyStrategy(), examples=SimpleNamespace(lengths=lengths),
    )  # fmt: skip
    return EpochOrder(loop, len(lengths))


def test_the_order_is_one_of_seed_and_epoch() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 203)
    first, again, next_epoch = (list(order(lengths, epoch)) for epoch in (0, 0, 1))
    assert first == again != next_epoch
    assert sorted(first) == sorted(next_epoch) == list(range(203))


def test_processes_share_a_step_of_similar_lengths() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 800)
    shards = [
        list(BatchSamplerShard(BatchSampler(order(lengths, processes=2), 4, False), 2, process)) for process in (0, 1)
    ]
    assert sorted(i for shard in shards for batch in shard for i in batch) == list(range(800))
    together = [np.ptp(lengths[[*one, *other]]) for one, other in zip(*shards, strict=True)]
    assert np.mean(together) < 3 and len(together) == 100


def test_a_grouped_stage_resumes_bit_for_bit(tmp_path: Path) -> None:
    stage = make_stage(**GROUPED, save_total_limit=None)
    _, model, strategy = run_stage(tmp_path / "whole", stage=stage, examples=make_examples(25))
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    (tmp_path / "half" / "done.json").unlink()
    for step, path in checkpoints.list_checkpoints(tmp_path / "half" / "checkpoints"):
        if step > 12:
            shutil.rmtree(path)
    result, resumed, other = run_stage(tmp_path / "half", stage=stage, examples=make_examples(25))
    assert result.resumed_from == 12
    assert same(weights(model, strategy), weights(resumed, other))
    _, plain, third = run_stage(tmp_path / "plain", stage=make_stage(), examples=make_examples(25))
    assert not same(weights(model, strategy), weights(plain, third))


def test_a_strategy_with_an_order_of_its_own_and_examples_without_lengths_are_refused(tmp_path: Path) -> None:
    strategy = TinyStrategy()
    strategy.sampler = lambda epoch: np.arange(24)  # type: ignore[method-assign]
    with pytest.raises(RecipeError, match="TinyStrategy has an order of its own"):
        run_stage(tmp_path / "own", strategy=strategy, stage=make_stage(**GROUPED))
    with pytest.raises(RecipeError, match="Examples does not know the lengths"):
        run_stage(tmp_path / "bare", examples=Examples(), stage=make_stage(**GROUPED))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train_sampling_strategy", "sequential", "found 'sequential', expected random or group_by_length"),
        ("torch_compile_mode", "max-autotune", "set torch_compile: true"),
        ("dataloader_persistent_workers", True, "lasting workers"),
        ("pack", True, "did you mean .?packing"),
        ("use_liger_kernel", 1, "expected true or false"),
    ],
)
def test_keys_that_cannot_be_are_refused(key: str, value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        build_arguments(make_stage(**{key: value}), tmp_path, 0, evaluates=False)


def test_switches_of_ours_do_not_reach_transformers(tmp_path: Path) -> None:
    stage = make_stage(packing=True, torch_compile=True, use_liger_kernel=True, **GROUPED)
    args = build_arguments(stage, tmp_path, 0, evaluates=False)
    assert not args.torch_compile and not args.use_liger_kernel
    assert args.train_sampling_strategy == "group_by_length"


class Noted(Examples):
    """Examples that note which epochs they were asked to draw for, in rows and so in every worker."""

    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**super().__getitem__(index), "epoch": self.epoch}


class Noting(Collator):
    """Gives the epoch of the rows to the batch."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {**super().__call__(rows), "epochs": torch.tensor([row["epoch"] for row in rows])}


class Listening(Answers):
    """Remembers the epochs of its batches."""

    heard: list[int]

    def loss(self, model: Any, batch: Any, step: Any) -> Any:
        self.heard.append(int(batch["epochs"].unique()))
        return super().loss(model, batch, step)


@pytest.mark.parametrize(("style", "workers"), [("text", 0), ("hybrid", 0), ("text", 1)])
def test_examples_are_told_of_each_epoch_before_they_are_drawn(style: str, workers: int, tmp_path: Path) -> None:
    from llmrec.training.trainer import train_stage
    from tests.training.small import IDENTITY, make_context

    model, strategy = TinyAnswers(style), Listening()
    strategy.heard = []
    stage = make_stage(
        train="tuner", per_device_train_batch_size=6, num_train_epochs=3, save_strategy="no",
        dataloader_num_workers=workers,
    )  # fmt: skip
    train_stage(
        model, strategy, Noted(), Noting(model.tokenizer), stage=stage, output_dir=tmp_path, seed=3,
        context=make_context(), evaluate=None, identity=IDENTITY,
    )  # fmt: skip
    assert strategy.heard == [0, 0, 1, 1, 2, 2]
