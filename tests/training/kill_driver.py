"""Kills training processes at given or random moments and resumes them; run as a program by test_resume.py.

    python -m tests.training.kill_driver FOLDER [more]
    python -m tests.training.kill_driver FOLDER random PROCESSES

torch is imported once; every attempt is a fork of this process, which itself never trains. Prints one JSON object:
moment -> {"status", "resumed_from", "same", ...}, or what `at_random` returns.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from llmrec.training import checkpoints, trainer
from tests.training.processes import fork_group
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
    return fork_group([work], [log], together=False)[0]


def train(folder: Path, plan: Callable[[], TinyStrategy] = TinyStrategy) -> None:
    """Train, and store what it ended with."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        torch.distributed.init_process_group("gloo")
    stage = make_stage(per_device_train_batch_size=4 // processes)
    result, model, strategy = run_stage(folder, strategy=plan(), stage=stage)
    if os.environ.get("RANK", "0") == "0":
        save_file(weights(model, strategy), folder / "end.safetensors")
        (folder / "end.json").write_text(json.dumps({"resumed_from": result.resumed_from, "steps": result.steps}))


# Random moments ------------------------------------------------------------------------------------------------------


class Ticks:
    """Counts moments of a run, and dies at one of them: before a loss, a file, a rename, a rotation, the last mark.

    Args:
        folder: Of the run; each checkpoint that got its name is noted in it.
        last: Number of the moment to die at; None to live.
        share: How much of a file is written when it is the moment.
    """

    def __init__(self, folder: Path, last: int | None = None, share: float = 0.0) -> None:
        self.folder, self.last, self.share, self.count = folder, last, share, 0

    def __call__(self, before_death: Callable[[], object] = lambda: None) -> None:
        self.count += 1
        if self.count == self.last:
            before_death()
            kill()

    def plan(self) -> TinyStrategy:
        """Watch the functions of a run; returns the strategy to train with."""
        write, take = checkpoints._write_bytes, checkpoints._take_place

        def watched_write(path: Path, data: bytes) -> None:
            self(lambda: path.write_bytes(data[: int(self.share * len(data))]))
            write(path, data)

        def watched_take(partial: Path, folder: Path) -> None:
            self()
            take(partial, folder)
            with open(self.folder / "named.txt", "a", encoding="utf-8") as file:
                file.write(f"{folder.name}\n")
            self()

        checkpoints._write_bytes, checkpoints._take_place = watched_write, watched_take
        for module, name in ((checkpoints, "rotate"), (trainer, "write_json")):
            setattr(module, name, self._watched(getattr(module, name)))
        return _TickingStrategy(self)

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self()
            return function(*args, **kwargs)

        return watched


class _TickingStrategy(TinyStrategy):
    def __init__(self, ticks: Ticks) -> None:
        super().__init__()
        self.ticks = ticks

    def loss(self, model: Any, batch: Any, step: Any) -> Any:
        self.ticks()
        return super().loss(model, batch, step)


def counted(folder: Path) -> None:
    """An undisturbed run that stores how many moments each of its processes has."""
    ticks = Ticks(folder)
    folder.mkdir(exist_ok=True)
    train(folder, ticks.plan)
    (folder / f"ticks-{os.environ.get('RANK', '0')}.json").write_text(str(ticks.count))


def at_random(root: Path, processes: int, times: int = 20, seed: int = 2024) -> dict[str, Any]:
    """Kill runs at random moments and resume them.

    Returns:
        "moments": process and number of each; "other_weights", "lost", "damaged": how many of the runs ended with other
        weights, resumed from less than the last checkpoint that had got its name, or left a damaged one.
    """
    names = range(processes)
    reference = root / "reference"
    statuses = fork_group([partial(counted, reference)] * processes, [root / f"reference-{n}.txt" for n in names])
    assert not any(statuses), (root / "reference-0.txt").read_text()
    totals = [int((reference / f"ticks-{rank}.json").read_text()) for rank in names]
    expected = load_file(reference / "end.safetensors")
    draws = np.random.default_rng([seed, processes])
    found: dict[str, Any] = {"moments": [], "other_weights": 0, "lost": 0, "damaged": 0}
    for number in range(times):
        victim, folder = int(draws.integers(processes)), root / str(number)
        moment, share = int(draws.integers(1, totals[victim] + 1)), float(draws.random())
        folder.mkdir()
        logs = [root / f"{number}-{rank}.txt" for rank in names]
        ticks = [Ticks(folder, moment if rank == victim else None, share) for rank in names]
        statuses = fork_group([partial(train, folder, one.plan) for one in ticks], logs)
        assert statuses[victim] == -signal.SIGKILL, (statuses, logs[victim].read_text())
        named = (folder / "named.txt").read_text().split() if (folder / "named.txt").exists() else []
        steps = [int(name.removeprefix("checkpoint-")) for name in named if name.startswith("checkpoint-")]
        statuses = fork_group([partial(train, folder)] * processes, logs)
        assert not any(statuses), logs[0].read_text()
        resumed = json.loads((folder / "end.json").read_text())["resumed_from"]
        found["moments"].append([victim, moment, resumed])
        found["other_weights"] += not same(expected, load_file(folder / "end.safetensors"))
        found["lost"] += (resumed or 0) < max(steps, default=0)
        found["damaged"] += "passed over" in logs[0].read_text()
        shutil.rmtree(folder)
    return found


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
        status = fork(partial(train, folder, plan), log)
        again = fork(partial(train, folder), log)
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
    if "random" in sys.argv:
        torch.set_num_threads(1)
        gc.freeze()
        print(json.dumps(at_random(Path(sys.argv[1]), int(sys.argv[3]))))
    else:
        main(Path(sys.argv[1]), MORE_MOMENTS if "more" in sys.argv else MOMENTS)
