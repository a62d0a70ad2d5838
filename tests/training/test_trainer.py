"""`train_stage`: what it trains, writes, says and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llmrec.encoders.sasrec import SASRecConfig, SASRecEncoder
from llmrec.errors import CheckpointError, DataError, RecipeError
from llmrec.strategies.base import StepInfo, StepLoss
from llmrec.training import checkpoints
from llmrec.training.arguments import build_arguments
from llmrec.training.callbacks import JsonLog, duration, truncate_log
from llmrec.training.lock import lock
from tests.training.small import ITEMS, TinyStrategy, make_examples, make_stage, run_stage


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_an_encoder_learns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = SASRecEncoder(SASRecConfig(num_items=ITEMS, hidden_size=16, num_layers=1, num_heads=1, max_history=8))
    stage = make_stage(num_train_epochs=25, save_strategy="no", logging_strategy="epoch")
    result, _, _ = run_stage(tmp_path, model=encoder, strategy=TinyStrategy(noise=0.0), stage=stage)
    losses = [line["loss"] for line in log_of(tmp_path)]
    assert losses[-1] < 0.6 * losses[0]
    assert (result.steps, result.epochs, result.resumed_from, result.best_metric) == (150, 25.0, None, None)
    assert json.loads((tmp_path / "done.json").read_text())["steps"] == 150


def test_frozen_weights_are_not_written(tmp_path: Path) -> None:
    _, model, _ = run_stage(tmp_path)
    for name in ("checkpoint-16", "final"):
        stored = load_file(tmp_path / "checkpoints" / name / checkpoints.TRAINABLE)
        expected = {f"model.{n}" for n, p in model.named_parameters() if p.requires_grad}
        assert set(stored) == expected | {"model.forwards"}  # a buffer that training changed
        assert "model.frozen" not in stored and "model.constant" not in stored


def test_nothing_in_the_folder_is_pickled(tmp_path: Path) -> None:
    run_stage(tmp_path, evaluate=lambda model: {"ndcg@10": 0.1})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert {path.suffix for path in files if path.name != ".lock"} == {".safetensors", ".json", ".jsonl"}
    for path in files:
        assert not path.read_bytes().startswith((b"\x80", b"PK"))  # pickle protocols and zip archives of torch


def test_the_manifest_says_what_the_run_was(tmp_path: Path) -> None:
    run_stage(tmp_path)
    manifest = checkpoints.verify(tmp_path / "checkpoints" / "checkpoint-18", required=checkpoints.RESUMABLE)
    assert {"recipe": "r1", "data": "d1", "encoder": "none", "base_model": "none"}.items() <= manifest.identity.items()
    assert {"seed", "examples", "per_device_train_batch_size", "strategy", "model"} <= set(manifest.identity)


def test_the_two_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run_stage(tmp_path)
    assert [step for step, _ in checkpoints.list_checkpoints(tmp_path / "checkpoints")] == [18, 16]


def test_what_is_said_goes_to_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_stage(tmp_path, evaluate=lambda model: {"ndcg@10": 0.1})
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert lines[0] == ("stage encoder: 552 of 1,552 parameters train; 24 examples, 18 steps of 4 (3 epochs) on cpu")
    assert "step 6 of 18" in lines[1] and "ndcg@10 0.1" in lines[1] and lines[1].endswith("left")
    assert lines[-1].startswith("stage encoder: done after 18 steps")


def test_the_log_has_what_is_worth_plotting(tmp_path: Path) -> None:
    strategy = TinyStrategy()
    run_stage(tmp_path, strategy=strategy, stage=make_stage(logging_steps=2), evaluate=lambda model: {"ndcg@10": 0.25})
    lines = log_of(tmp_path)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(2, 19, 2))
    assert {"loss", "learning_rate", "grad_norm", "draw", "epoch"} <= set(steps[0])
    assert [line["eval_ndcg@10"] for line in lines if "eval_ndcg@10" in line] == [0.25] * 3
    places = make_examples().lengths  # parts are means over supervised places, not over batches
    assert min(strategy.drawn[:2]) <= steps[0]["draw"] <= max(strategy.drawn[:2]) and places.std() > 0


def test_a_cut_log_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    truncate_log(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    truncate_log(tmp_path / "nothing.jsonl", 2)
    assert JsonLog(path).path == path


class Recording(TinyStrategy):
    """Notes which examples it sees."""

    def loss(self, model: Any, batch: Any, step: StepInfo) -> StepLoss:
        self.__dict__.setdefault("seen", []).extend(batch["example_ids"].tolist())
        return super().loss(model, batch, step)


def test_every_epoch_shuffles_and_the_seed_decides(tmp_path: Path) -> None:
    orders = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        strategy = Recording()
        run_stage(tmp_path / name, strategy=strategy, seed=seed)
        seen = np.array(strategy.seen).reshape(3, 24)
        assert all(sorted(epoch) == list(range(24)) for epoch in seen.tolist())
        assert (seen[0] != seen[1]).any() and (seen[1] != seen[2]).any()
        orders.append(seen)
    assert (orders[0] == orders[1]).all() and (orders[0] != orders[2]).any()


def test_a_strategy_may_order_the_examples(tmp_path: Path) -> None:
    class Backwards(Recording):
        def sampler(self, epoch: int) -> np.ndarray:
            return np.arange(24)[::-1]

    class TooFew(Recording):
        def sampler(self, epoch: int) -> np.ndarray:
            return np.arange(5)

    strategy = Backwards()
    run_stage(tmp_path / "a", strategy=strategy)
    assert strategy.seen == list(range(23, -1, -1)) * 3
    with pytest.raises(DataError, match="TooFew.sampler returned 5 positions"):
        run_stage(tmp_path / "b", strategy=TooFew())


def test_a_resumed_run_draws_the_same_numbers(tmp_path: Path) -> None:
    whole = TinyStrategy()
    run_stage(tmp_path, strategy=whole, stage=make_stage(save_total_limit=None))
    for step in (16, 18):
        (tmp_path / "checkpoints" / f"checkpoint-{step}" / checkpoints.MANIFEST).unlink()
    (tmp_path / "done.json").unlink()
    rest = TinyStrategy()
    result, _, _ = run_stage(tmp_path, strategy=rest)
    assert result.resumed_from == 12
    assert rest.drawn == whole.drawn[12:]
    assert len(set(whole.drawn)) == 18
    assert (whole.epochs, rest.epochs) == ([0, 6, 12], [12])


def test_a_loss_that_is_no_number_stops_the_stage(tmp_path: Path) -> None:
    class Broken(TinyStrategy):
        def loss(self, model: Any, batch: Any, step: StepInfo) -> StepLoss:
            found = super().loss(model, batch, step)
            return StepLoss(found.total * float("nan"), {}, 1) if step.step == 5 else found

    with pytest.raises(RecipeError, match="the loss became nan at step 6"):
        run_stage(tmp_path, strategy=Broken())
    assert checkpoints.find_latest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "checkpoint-4"


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    with lock(tmp_path), pytest.raises(CheckpointError, match="in use"):
        run_stage(tmp_path)


def test_no_examples_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to train on"):
        run_stage(tmp_path, examples=make_examples().subset(np.zeros(0, dtype=int)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rat": 1e-3}, "unknown key 'learning_rat'; did you mean 'learning_rate'"),
        ({"output_dir": "x"}, "output_dir cannot be set: the run folder decides it"),
        ({"hub_token": "x"}, "hub_token cannot be set"),
        ({"early_stopping_patience": 2}, "early_stopping_patience needs validation"),
        ({"eval_strategy": "steps"}, "there is no validation split"),
        ({"lr_scheduler_type": "cosinus"}, "transformers refuses its arguments"),
        ({"learning_rates": {"router": 0.3}}, "found router, but nothing trains there"),
        ({"optim": "lomo"}, "optim: .*lomo is not available"),
    ],
)
def test_wrong_arguments_are_explained(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        run_stage(tmp_path, stage=make_stage(**options))


def test_arguments_fit_the_machine(tmp_path: Path) -> None:
    stage = make_stage(bf16=True, warmup_ratio=0.1, activation_checkpointing=True)
    arguments = build_arguments(stage.model_copy(), tmp_path, 3, evaluates=True)
    assert arguments.seed == arguments.data_seed == 3
    assert arguments.eval_strategy == "epoch"
    assert arguments.remove_unused_columns is False
    assert arguments.activation_checkpointing_kwargs == {"use_reentrant": False}
    if not torch.accelerator.is_available():
        assert arguments.use_cpu and not arguments.bf16 and not arguments.dataloader_pin_memory


def test_durations_are_readable() -> None:
    assert [duration(s) for s in (1.26, 45, 600, 12000)] == ["1.3 s", "45 s", "10 min", "3 h 20 min"]
