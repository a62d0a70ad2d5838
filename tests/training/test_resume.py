"""A stage that is killed, cut off or damaged goes on and ends with the very weights of an uninterrupted run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrec.errors import CheckpointError, RecipeError
from llmrec.training import checkpoints
from tests.conftest import ROOT
from tests.training.small import (
    IDENTITY,
    TinyEncoder,
    TinyStrategy,
    make_examples,
    make_stage,
    run_stage,
    same,
    weights,
)

KEEP_ALL = {"save_total_limit": None}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A finished stage with all its checkpoints (4, 8, 12, 16, 18), and what it ended with."""
    folder = tmp_path_factory.mktemp("finished") / "stage"
    _, model, strategy = run_stage(folder, stage=make_stage(**KEEP_ALL))
    return folder, weights(model, strategy)


@pytest.fixture
def cut_off(finished: tuple[Path, Any], tmp_path: Path) -> Path:
    """The stage as if it had been killed right after step 12."""
    folder = tmp_path / "stage"
    shutil.copytree(finished[0], folder)
    for name in ("checkpoint-16", "checkpoint-18", "final"):
        shutil.rmtree(folder / "checkpoints" / name)
    (folder / "done.json").unlink()
    return folder


def go_on(folder: Path, **options: Any) -> tuple[int | None, dict[str, torch.Tensor]]:
    result, model, strategy = run_stage(folder, stage=make_stage(**KEEP_ALL), **options)
    return result.resumed_from, weights(model, strategy)


def run_driver(folder: Path, *words: str, patience: float = 300) -> subprocess.CompletedProcess[str]:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.training.kill_driver", str(folder), *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=patience,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran


def kill_and_resume(folder: Path, *which: str) -> dict[str, int | None]:
    """Moment -> step of the checkpoint the second attempt went on from, once everything else was checked."""
    found = json.loads(run_driver(folder, *which).stdout.splitlines()[-1])
    for moment, result in found.items():
        expected = 143 if "SIGTERM" in moment else -signal.SIGKILL
        assert result["status"] == expected, moment
        assert result["same"], f"other weights after being killed {moment}"
        assert result["same_log"], f"another log after being killed {moment}"
        assert result["steps"] == 18 and result["leftovers"] == []
    return {moment: result["resumed_from"] for moment, result in found.items()}


def test_killed_at_six_moments(tmp_path: Path) -> None:
    assert kill_and_resume(tmp_path) == {
        "inside an epoch": 8,
        "half way through the first file": 4,
        "just before the manifest": 12,
        "before the rotation": 12,
        "before the stage is marked as done": 18,
        "SIGTERM inside an epoch": 10,
    }


@pytest.mark.slow
def test_killed_at_more_moments(tmp_path: Path) -> None:
    assert kill_and_resume(tmp_path, "more") == {
        "before the first checkpoint": None,
        "at the start of an epoch": 12,
        "with an empty optimizer": 8,
        "half way through the manifest": None,
        "before the rename": 8,
        "after the rotation": 12,
        "while the final weights are written": 18,
    }


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_twenty_random_moments(processes: int, tmp_path: Path) -> None:
    ran = run_driver(tmp_path, "random", str(processes), patience=900)
    found = json.loads(ran.stdout.splitlines()[-1])
    assert len(found["moments"]) == 20
    assert (found["other_weights"], found["lost"], found["damaged"]) == (0, 0, 0), found


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


DAMAGES = {
    "truncated weights": lambda c: os.truncate(c / checkpoints.TRAINABLE, 200),
    "flipped byte": lambda c: flip_byte(c / checkpoints.OPTIMIZER),
    "no optimizer": lambda c: (c / checkpoints.OPTIMIZER).unlink(),
    "empty random numbers": lambda c: os.truncate(c / checkpoints.RANDOM, 0),
    "empty folder": lambda c: [path.unlink() for path in c.iterdir()],
    "cut manifest": lambda c: os.truncate(c / checkpoints.MANIFEST, 50),
    "edited manifest": lambda c: (c / checkpoints.MANIFEST).write_text(
        (c / checkpoints.MANIFEST).read_text().replace('"step": 12', '"step": 13')
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back(
    damage: str, cut_off: Path, finished: tuple[Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGES[damage](cut_off / "checkpoints" / "checkpoint-12")
    resumed, ended = go_on(cut_off)
    assert resumed == 8
    assert "checkpoint-12 is passed over" in capsys.readouterr().err
    assert same(ended, finished[1])


def test_an_undamaged_checkpoint_is_used(cut_off: Path, finished: tuple[Path, Any]) -> None:
    resumed, ended = go_on(cut_off)
    assert resumed == 12
    assert same(ended, finished[1])


def test_all_damaged_starts_again(cut_off: Path, finished: tuple[Path, Any]) -> None:
    for step in (4, 8, 12):
        flip_byte(cut_off / "checkpoints" / f"checkpoint-{step}" / checkpoints.TRAINABLE)
    resumed, ended = go_on(cut_off)
    assert resumed is None
    assert same(ended, finished[1])


def test_a_finished_stage_returns_at_once(finished: tuple[Path, Any], tmp_path: Path) -> None:
    folder = tmp_path / "stage"
    shutil.copytree(finished[0], folder)
    strategy = TinyStrategy()
    result, model, _ = run_stage(folder, strategy=strategy)
    assert (result.steps, strategy.drawn) == (18, [])
    expected = {n: t for n, t in finished[1].items() if n != "strategy"}
    assert same(dict(model.state_dict()), expected)


def test_damaged_final_weights_are_made_again(finished: tuple[Path, Any], tmp_path: Path) -> None:
    folder = tmp_path / "stage"
    shutil.copytree(finished[0], folder)
    flip_byte(folder / "checkpoints" / "final" / checkpoints.TRAINABLE)
    resumed, ended = go_on(folder)
    assert resumed == 18
    assert same(ended, finished[1])
    assert checkpoints.verify(folder / "checkpoints" / "final").step == 18


def test_resume_never_starts_anew_and_keeps_the_old(cut_off: Path, finished: tuple[Path, Any]) -> None:
    resumed, ended = go_on(cut_off, resume="never")
    assert resumed is None
    assert same(ended, finished[1])
    assert (cut_off / "superseded-1" / "checkpoints" / "checkpoint-12").is_dir()


def test_another_identity_is_refused_unless_forced(cut_off: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = {**IDENTITY, "data": "d2"}
    with pytest.raises(CheckpointError, match=r"data: stored d1, now d2"):
        go_on(cut_off, identity=other)
    assert go_on(cut_off, identity=other, force=True)[0] == 12
    assert "as forced" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"stage": make_stage(per_device_train_batch_size=8)}, "per_device_train_batch_size: stored 4, now 8"),
        ({"seed": 8}, "seed: stored 7, now 8"),
        ({"examples": make_examples(30)}, "examples: stored 24, now 30"),
    ],
)
def test_changed_settings_are_refused(cut_off: Path, changed: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        run_stage(cut_off, **changed)


class Measured:
    """A validation that names values in turn and draws from the global generators as a sampler would."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)
        self.seen: list[torch.Tensor] = []

    def __call__(self, model: TinyEncoder) -> dict[str, float]:
        assert not model.training and not torch.is_grad_enabled()
        torch.rand(3)
        self.seen.append(model.item_embedding.weight.detach().clone())
        return {"ndcg@10": self.values[len(self.seen) - 1]}


def test_early_stopping_restores_the_best_state(tmp_path: Path) -> None:
    measured = Measured(0.1, 0.3, 0.2, 0.3, 0.9)
    stage = make_stage(num_train_epochs=9, early_stopping_patience=2)
    result, model, _ = run_stage(tmp_path, stage=stage, evaluate=measured)
    assert (result.stopped_early, result.best_metric, result.steps) == (True, 0.3, 24)
    assert torch.equal(model.item_embedding.weight, measured.seen[1])
    again, loaded, _ = run_stage(tmp_path, stage=stage, evaluate=measured)
    assert again == result
    assert torch.equal(loaded.item_embedding.weight, measured.seen[1])


def test_patience_survives_a_resume(tmp_path: Path) -> None:
    stage = make_stage(num_train_epochs=9, early_stopping_patience=2, save_strategy="epoch", save_total_limit=None)
    whole, _, _ = run_stage(tmp_path / "whole", stage=stage, evaluate=Measured(0.1, 0.3, 0.2, 0.3))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("checkpoint-24", "final"):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / name)
    (tmp_path / "cut" / "done.json").unlink()
    resumed, model, _ = run_stage(tmp_path / "cut", stage=stage, evaluate=Measured(0.3))
    assert (resumed.resumed_from, resumed.steps, resumed.best_metric) == (18, whole.steps, whole.best_metric)
    best = checkpoints.verify(tmp_path / "whole" / "checkpoints" / "final").files[checkpoints.TRAINABLE]
    assert checkpoints.verify(tmp_path / "cut" / "checkpoints" / "final").files[checkpoints.TRAINABLE] == best


def test_a_stage_that_stopped_early_does_not_go_on(tmp_path: Path) -> None:
    stage = make_stage(num_train_epochs=9, early_stopping_patience=1, save_strategy="epoch")
    first, _, _ = run_stage(tmp_path, stage=stage, evaluate=Measured(0.3, 0.2))
    (tmp_path / "done.json").unlink()  # killed between the last checkpoint and the mark
    strategy = TinyStrategy()
    again, _, _ = run_stage(tmp_path, stage=stage, strategy=strategy, evaluate=Measured())
    assert (again.steps, again.stopped_early, strategy.drawn) == (first.steps, True, [])


def test_validation_does_not_change_training(tmp_path: Path, finished: tuple[Path, Any]) -> None:
    run_stage(tmp_path, evaluate=Measured(0.1, 0.2, 0.3))
    losses = [json.loads(line).get("loss") for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    plain = [json.loads(line).get("loss") for line in (finished[0] / "log.jsonl").read_text().splitlines()]
    assert [loss for loss in losses if loss] == [loss for loss in plain if loss]


def test_an_unknown_metric_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="metric 'ndcg@10' is not measured; there is hr@10"):
        run_stage(tmp_path, evaluate=lambda model: {"hr@10": 0.5})
