"""One writer per folder: a lock file that names the process and its machine."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
