"""One writer per folder: a lock file that names the process and its machine; and one outcome for all processes."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llmrec.errors import CheckpointError
from llmrec.training.checkpoints import notice


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the kernel lets go of the lock when the process ends, however it ends.

    Raises:
        CheckpointError: Another process holds it, here or on another machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, host = folder / ".lock", socket.gethostname()
    with open(path, "a+", encoding="utf-8") as file:
        file.seek(0)
        holder = file.read().strip()
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(
                f"{folder} is in use by {holder or 'another process'}; wait for it or choose another folder"
            ) from error
        if holder and not holder.endswith(f" on {host}"):
            raise CheckpointError(
                f"{folder} is in use by {holder}, or that process was killed; make sure, then delete {path}"
            )
        if holder:
            notice(f"took over {folder} from {holder}, which has ended")
        _label(file, f"process {os.getpid()} on {host}")
        try:
            yield
        finally:
            _label(file, "")


def _label(file: Any, text: str) -> None:
    file.seek(0)
    file.truncate()
    file.write(text)
    file.flush()


def agree(vote: bool, args: Any) -> bool:
    """Whether any process votes yes; every process takes part.

    Args:
        vote: Of this process.
        args: TrainingArguments, for the number of processes and the device.
    """
    if args.world_size == 1:
        return vote
    votes = torch.tensor([float(vote)], device=args.device)
    torch.distributed.all_reduce(votes)
    return bool(votes.item())


@contextmanager
def together(args: Any, what: str) -> Iterator[None]:
    """Fail in every process when one fails, instead of leaving the others waiting; also a barrier.

    Args:
        args: TrainingArguments.
        what: What is done inside, for the message of the others.

    Raises:
        CheckpointError: It failed in another process. A failure of this one is raised as it is.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    failed = agree(failure is not None, args)
    if failure is not None:
        raise failure
    if failed:
        raise CheckpointError(f"{what} failed in another process, whose message says why")
