"""Cases of test_distributed.py with the small encoder of small.py: seconds for several processes."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file

from llmrec.errors import CheckpointError
from llmrec.training import checkpoints
from llmrec.training.lock import lock
from tests.training.kill_driver import at_step
from tests.training.small import TinyEncoder, TinyStrategy, make_examples, make_stage, run_stage, weights

BATCH = {"pair": 4, "three": 6}
USERS = {"pair": 23, "three": 19}  # 19 = 3 * 6 + 1: of the last batch, two of three processes have no row


def prepare(folder: Path) -> None:
    """Nothing is shared."""


def run(case: str, folder: Path) -> dict[str, Any]:
    """What one process reports of a case."""
    if "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")
    if case == "alone":
        return {name: train(folder / name, name, 1, folder / f"{name}.safetensors") for name in ("pair", "three")}
    if case in BATCH:
        return train(folder, case, dist.get_world_size(), folder / "end.safetensors")
    if case == "resumed":
        folder = folder.parent / "terminated"
        return train(folder, "pair", 2, folder.parent / "resumed" / "end.safetensors")
    if case == "terminated":
        strategy = at_step(9, signal.SIGTERM)() if dist.get_rank() == 1 else TinyStrategy()
        try:
            train(folder, "pair", 2, folder / "end.safetensors", strategy)
        except SystemExit as error:
            return {"status": error.code, "left": _left(folder)}
    if case == "in_use":
        dist.barrier()
        if dist.get_rank() == 1:
            return _refused(folder)
        with lock(folder / "stage"):
            return _refused(folder)
    assert case == "full_disk"
    checkpoints._write_bytes = _full
    return _refused(folder)


def _refused(folder: Path) -> dict[str, Any]:
    try:
        train(folder, "pair", 2, folder / "end.safetensors")
    except CheckpointError as error:
        return {"error": str(error), "left": _left(folder)}
    return {"error": "", "left": _left(folder)}


def _left(folder: Path) -> list[str]:
    names = [path.name for path in (folder / "stage" / "checkpoints").glob("*")]
    return sorted(names, key=lambda name: (len(name), name))


WRITE = checkpoints._write_bytes


def _full(path: Path, data: bytes) -> None:
    if "checkpoint-8" in path.parent.name and path.name == checkpoints.OPTIMIZER:
        path.write_bytes(data[:100])
        raise OSError(errno.ENOSPC, "No space left on device")
    WRITE(path, data)


def train(folder: Path, case: str, processes: int, end: Path, strategy: Any = None) -> dict[str, Any]:
    """Train without dropout; the losses, and from the first process the weights."""
    import torch

    torch.manual_seed(1)
    stage = make_stage(per_device_train_batch_size=BATCH[case] // processes)
    model = TinyEncoder(dropout=0.0)
    result, model, strategy = run_stage(
        folder / "stage", model=model, strategy=strategy, stage=stage, examples=make_examples(USERS[case])
    )
    if os.environ.get("RANK", "0") == "0":
        save_file(weights(model, strategy), end)
    lines = [json.loads(line) for line in (folder / "stage" / "log.jsonl").read_text().splitlines()]
    return {"losses": [line["loss"] for line in lines if "loss" in line], "resumed_from": result.resumed_from}
