"""A disk that fills up, at whatever file: the run stops and says so, and the previous checkpoint is good."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrec.errors import CheckpointError
from llmrec.training import callbacks, checkpoints, trainer
from tests.training.small import make_stage, run_stage, same, weights

STAGE = {"num_train_epochs": 1, "save_steps": 2, "save_total_limit": None}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What an undisturbed stage of six steps ends with."""
    _, model, strategy = run_stage(tmp_path_factory.mktemp("whole"), stage=make_stage(**STAGE))
    return weights(model, strategy)


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def write_until(folder: str, name: str) -> Callable[[Path, bytes], None]:
    """A writer that runs out of space in the middle of one file of one folder."""
    write = checkpoints._write_bytes

    def partly(path: Path, data: bytes) -> None:
        if path.parent.name.startswith(f"tmp-{folder}.") and path.name == name:
            path.write_bytes(data[: len(data) // 2])
            no_space()
        write(path, data)

    return partly


def stop_and_go_on(folder: Path, left: list[str], expected: dict[str, torch.Tensor], undo: Callable[[], None]) -> None:
    """The stage stops with an explanation and good checkpoints; with space again it ends as if nothing had happened."""
    with pytest.raises(CheckpointError, match="No space left.*earlier checkpoints are as they were.*goes on"):
        run_stage(folder, stage=make_stage(**STAGE))
    assert sorted(path.name for path in (folder / "checkpoints").glob("*")) == left
    for name in left:
        checkpoints.verify(folder / "checkpoints" / name)
    undo()
    result, model, strategy = run_stage(folder, stage=make_stage(**STAGE))
    numbers = [int(name.removeprefix("checkpoint-")) for name in left if name != "final"]
    assert result.resumed_from == (max(numbers) if numbers else None)
    assert same(weights(model, strategy), expected)


@pytest.mark.parametrize("name", [*checkpoints.RESUMABLE, checkpoints.MANIFEST])
def test_at_a_file_of_a_checkpoint(
    name: str, tmp_path: Path, expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_write_bytes", write_until("checkpoint-4", name))
    stop_and_go_on(tmp_path, ["checkpoint-2"], expected, monkeypatch.undo)


def test_at_the_first_checkpoint(
    tmp_path: Path, expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_write_bytes", write_until("checkpoint-2", checkpoints.TRAINABLE))
    stop_and_go_on(tmp_path, [], expected, monkeypatch.undo)


def test_at_the_rename(tmp_path: Path, expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    take = checkpoints._take_place
    full = lambda part, place: no_space() if place.name == "checkpoint-4" else take(part, place)  # noqa: E731
    monkeypatch.setattr(checkpoints, "_take_place", full)
    stop_and_go_on(tmp_path, ["checkpoint-2"], expected, monkeypatch.undo)


def test_at_the_final_weights(
    tmp_path: Path, expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_write_bytes", write_until("final", checkpoints.TRAINABLE))
    stop_and_go_on(tmp_path, ["checkpoint-2", "checkpoint-4", "checkpoint-6"], expected, monkeypatch.undo)
    assert (tmp_path / "done.json").is_file()


def test_at_the_mark_that_the_stage_is_done(
    tmp_path: Path, expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "write_json", no_space)
    left = ["checkpoint-2", "checkpoint-4", "checkpoint-6", "final"]
    stop_and_go_on(tmp_path, left, expected, monkeypatch.undo)


def test_at_the_log(tmp_path: Path, expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    append = callbacks.JsonLog.on_log

    def full(self: Any, args: Any, state: Any, control: Any, **shared: Any) -> None:
        self.path = Path("/dev/full") if state.global_step == 5 else tmp_path / "log.jsonl"
        append(self, args, state, control, **shared)

    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    monkeypatch.setattr(callbacks.JsonLog, "on_log", full)
    stop_and_go_on(tmp_path, ["checkpoint-2", "checkpoint-4"], expected, monkeypatch.undo)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match="could not be written"):
        checkpoints.write_folder(tmp_path / "checkpoints" / "checkpoint-1", {}, step=1, identity={})
