"""Kills training processes at given moments and resumes them; run as a program by test_resume.py.

torch is imported once; every attempt is a fork of this process, which itself never trains. Prints one JSON object:
moment -> {"status", "resumed_from", "same", ...}.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llmrec.training import checkpoints, trainer
from tests.training.small import TinyStrategy, make_stage, run_stage, same, weights


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Signalling(TinyStrategy):
    """Sends a signal to its own process in the loss of a step."""

    def __init__(self, step: int, number: int) -> None:
        super().__init__()
        self.step, self.number = step, number

    def loss(self, model: Any, batch: Any, step: Any) -> Any:
        if step.step == self.step:
            os.kill(os.getpid(), self.number)
        return super().loss(model, batch, step)


def at_step(step: int, number: int = signal.SIGKILL) -> Callable[[], TinyStrategy]:
    return lambda: Signalling(step, number)


def while_writing(folder: str, file: str, share: float) -> Callable[[], TinyStrategy]:
    """Write a share of one file of a folder, then die."""

    def plan() -> TinyStrategy:
        write = checkpoints._write_bytes

        def partly(path: Path, data: bytes) -> None:
            if path.name == file and path.parent.name.startswith(f"tmp-{folder}."):
                path.write_bytes(data[: int(share * len(data))])
                kill()
            write(path, data)

        checkpoints._write_bytes = partly
        return TinyStrategy()

    return plan


def around(module: Any, name: str, call: int, *, after: bool) -> Callable[[], TinyStrategy]:
    """Die before or after the n-th call of a function."""

    def plan() -> TinyStrategy:
        function, count = getattr(module, name), [0]

        def deadly(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == call and not after:
                kill()
            result = function(*args, **kwargs)
            if count[0] == call:
                kill()
            return result

        setattr(module, name, deadly)
        return TinyStrategy()

    return plan


MOMENTS: dict[str, Callable[[], TinyStrategy]] = {
    "inside an epoch": at_step(9),
    "half way through the first file": while_writing("checkpoint-8", checkpoints.TRAINABLE, 0.5),
    "just before the manifest": while_writing("checkpoint-16", checkpoints.MANIFEST, 0.0),
    "before the rotation": around(checkpoints, "rotate", 3, after=False),
    "before the stage is marked as done": around(trainer, "write_json", 1, after=False),
    "SIGTERM inside an epoch": at_step(9, signal.SIGTERM),
}
MORE_MOMENTS: dict[str, Callable[[], TinyStrategy]] = {
    "before the first checkpoint": at_step(2),
    "at the start of an epoch": at_step(12),
    "with an empty optimizer": while_writing("checkpoint-12", checkpoints.OPTIMIZER, 0.0),
    "half way through the manifest": while_writing("checkpoint-4", checkpoints.MANIFEST, 0.5),
    "before the rename": around(checkpoints, "_take_place", 3, after=False),
    "after the rotation": around(checkpoints, "rotate", 3, after=True),
    "while the final weights are written": while_writing("final", checkpoints.TRAINABLE, 0.5),
}


def fork(work: Callable[[], None], log: Path) -> int:
    """Run in a child; its exit status (negative: the signal that killed it)."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        with open(log, "a", encoding="utf-8") as file:
            os.dup2(file.fileno(), 2)
        work()
        status = 0
    except SystemExit as error:
        status = int(error.code or 0)
    finally:
        os._exit(status)


def train(folder: Path, plan: Callable[[], TinyStrategy] = TinyStrategy) -> None:
    """Train, and store what it ended with."""
    result, model, strategy = run_stage(folder, strategy=plan(), stage=make_stage())
    save_file(weights(model, strategy), folder / "end.safetensors")
    (folder / "end.json").write_text(json.dumps({"resumed_from": result.resumed_from, "steps": result.steps}))


def main(root: Path, moments: dict[str, Callable[[], TinyStrategy]]) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # the imported libraries need no collecting in every child
    reference = root / "reference"
    assert fork(lambda: train(reference), root / "reference.txt") == 0, (root / "reference.txt").read_text()
    expected = load_file(reference / "end.safetensors")
    log_text = (reference / "log.jsonl").read_text()
    found = {}
    for number, (moment, plan) in enumerate(moments.items()):
        folder, log = root / str(number), root / f"{number}.txt"
        status = fork(lambda folder=folder, plan=plan: train(folder, plan), log)
        again = fork(lambda folder=folder: train(folder), log)
        assert again == 0, log.read_text()
        found[moment] = {
            "status": status,
            **json.loads((folder / "end.json").read_text()),
            "same": same(expected, load_file(folder / "end.safetensors")),
            "same_log": (folder / "log.jsonl").read_text() == log_text,
            "leftovers": [path.name for path in (folder / "checkpoints").glob("tmp-*")],
        }
        shutil.rmtree(folder)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), MORE_MOMENTS if "more" in sys.argv else MOMENTS)
