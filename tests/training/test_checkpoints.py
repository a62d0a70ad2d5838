"""Folders that are whole or not there: the protocol of writing, reading, rotating and locking."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from llmrec.errors import CheckpointError
from llmrec.training import checkpoints
from llmrec.training.lock import lock

CONTENTS = dict.fromkeys(checkpoints.RESUMABLE, b"some bytes")
IDENTITY = {"recipe": "r1", "data": "d1"}


def write(folder: Path, step: int, **changed: bytes) -> Path:
    path = folder / f"checkpoint-{step}"
    checkpoints.write_folder(path, {**CONTENTS, **changed}, step=step, identity=IDENTITY)
    return path


def test_the_manifest_names_what_it_belongs_to(tmp_path: Path) -> None:
    path = write(tmp_path, 4)
    record = json.loads((path / checkpoints.MANIFEST).read_text())
    assert record["format_version"] == checkpoints.FORMAT_VERSION
    assert record["step"] == 4
    assert record["identity"] == IDENTITY
    assert set(record["files"]) == set(CONTENTS) == {p.name for p in path.iterdir()} - {checkpoints.MANIFEST}
    assert all(file["size"] == 10 and len(file["sha256"]) == 64 for file in record["files"].values())
    assert {"torch", "transformers", "peft", "trl", "accelerate", "safetensors"} <= set(record["libraries"])
    assert checkpoints.verify(path).identity == IDENTITY


def test_an_existing_folder_is_replaced(tmp_path: Path) -> None:
    write(tmp_path, 4)
    path = write(tmp_path, 4, **{checkpoints.TRAINABLE: b"newer"})
    assert (path / checkpoints.TRAINABLE).read_bytes() == b"newer"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-4"]


def test_find_latest_orders_by_number_and_says_why_it_passes_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (4, 12, 100):
        write(tmp_path, step)
    (tmp_path / "checkpoint-200").mkdir()
    (tmp_path / "checkpoint-100" / checkpoints.OPTIMIZER).unlink()
    (tmp_path / "checkpoint-abc").mkdir()
    (tmp_path / "tmp-checkpoint-300.1").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert checkpoints.find_latest(tmp_path) == tmp_path / "checkpoint-12"
    said = capsys.readouterr().err.splitlines()
    assert "checkpoint-200" in said[0] and "never finished" in said[0]
    assert "checkpoint-100" in said[1] and f"{checkpoints.OPTIMIZER} is missing" in said[1]
    assert sorted(tmp_path.rglob("*")) == before
    assert checkpoints.find_latest(tmp_path / "nowhere") is None


def test_a_checkpoint_without_a_required_file_is_not_resumable(tmp_path: Path) -> None:
    contents = {name: data for name, data in CONTENTS.items() if name != checkpoints.OPTIMIZER}
    checkpoints.write_folder(tmp_path / "checkpoint-4", contents, step=4, identity={})
    assert checkpoints.verify(tmp_path / "checkpoint-4").step == 4
    assert checkpoints.find_latest(tmp_path) is None


def test_sizes_alone_do_not_see_a_flipped_byte(tmp_path: Path) -> None:
    path = write(tmp_path, 4)
    (path / checkpoints.TRAINABLE).write_bytes(b"some bytez")
    checkpoints.verify(path, hashes=False)
    with pytest.raises(CheckpointError, match="SHA-256"):
        checkpoints.verify(path)


def test_an_extra_file_is_ignored(tmp_path: Path) -> None:
    path = write(tmp_path, 4)
    (path / "optimizer.pt").write_bytes(b"\x80\x04something pickled")
    assert checkpoints.verify(path).step == 4


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_reported(tmp_path: Path) -> None:
    path = write(tmp_path, 4)
    (path / checkpoints.TRAINABLE).chmod(0)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoints.verify(path)


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    for step in (4, 8, 12, 100):
        write(tmp_path, step)
    checkpoints.rotate(tmp_path, None, 100)
    assert len(checkpoints.list_checkpoints(tmp_path)) == 4
    checkpoints.rotate(tmp_path, 2, 100)
    assert [step for step, _ in checkpoints.list_checkpoints(tmp_path)] == [100, 12]


def test_rotation_is_not_stopped_by_a_later_damaged_checkpoint(tmp_path: Path) -> None:
    for step in (4, 8, 12, 16):
        write(tmp_path, step)
    (tmp_path / "checkpoint-16" / checkpoints.MANIFEST).unlink()  # passed over by the run that has now written 12
    checkpoints.rotate(tmp_path, 2, 12)
    assert [step for step, _ in checkpoints.list_checkpoints(tmp_path)] == [16, 12, 8]


def test_rotation_deletes_nothing_while_the_newest_is_damaged(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        write(tmp_path, step)
    (tmp_path / "checkpoint-12" / checkpoints.RANDOM).write_bytes(b"")
    with pytest.raises(CheckpointError, match="found 0 bytes, expected 10"):
        checkpoints.rotate(tmp_path, 1, 12)
    assert len(checkpoints.list_checkpoints(tmp_path)) == 3


def test_leftovers_of_killed_processes_are_cleared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 4)
    half = tmp_path / "tmp-checkpoint-8.123"
    half.mkdir()
    (half / checkpoints.TRAINABLE).write_bytes(b"half")
    os.replace(write(tmp_path, 12), tmp_path / "tmp-replaced-checkpoint-12.123")  # killed between the two renames
    checkpoints.clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-12", "checkpoint-4"]
    assert "tmp-checkpoint-8.123" in capsys.readouterr().err


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    with lock(tmp_path):
        with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()} on {socket.gethostname()}"):
            with lock(tmp_path):
                pass
    with lock(tmp_path):
        pass


def test_another_process_is_refused(tmp_path: Path) -> None:
    with lock(tmp_path):
        child = os.fork()
        if not child:
            status = 1
            try:
                with lock(tmp_path):
                    status = 2
            except CheckpointError:
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_stale_lock_is_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / ".lock").write_text(f"process 1 on {socket.gethostname()}")
    with lock(tmp_path):
        assert "which has ended" in capsys.readouterr().err
    assert (tmp_path / ".lock").read_text() == ""


def test_a_lock_of_another_machine_is_respected(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("process 1 on elsewhere")
    with pytest.raises(CheckpointError, match="process 1 on elsewhere.*delete"):
        with lock(tmp_path):
            pass
    assert (tmp_path / ".lock").read_text() == "process 1 on elsewhere"


def test_identity_differences_are_listed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        checkpoints.compare_identity({"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}, tmp_path, force=False)
    assert "b: stored 2, now 3" in str(caught.value) and "c: stored nothing, now 4" in str(caught.value)
    checkpoints.compare_identity({"a": "1"}, {"a": "1"}, tmp_path, force=False)
