"""Processes that work together over gloo, forked from one that has imported everything; run as a program by tests.

    python -m tests.training.processes MODULE FOLDER CASE:COUNT ...

`MODULE.run(CASE, FOLDER/CASE)` runs in COUNT processes at once; what each returns stands in FOLDER/CASE/RANK.json, what
it says in FOLDER/CASE/RANK.txt. `MODULE.prepare(FOLDER)` runs first, before the fork.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE = 1800.0


def run_cases(module: str, folder: Path, *cases: str) -> dict[str, list[Any]]:
    """Results of cases ("name:count") by name, one per process; fails with the last words of a process that failed."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.training.processes", module, str(folder), *cases],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=PATIENCE * len(cases),
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    found = {}
    for name, _, count in (case.partition(":") for case in cases):
        found[name] = [json.loads((folder / name / f"{rank}.json").read_text()) for rank in range(int(count))]
    return found


def fork_group(works: Sequence[Callable[[], None]], logs: Sequence[Path], together: bool = True) -> list[int]:
    """Exit statuses of processes that run at once (negative: the signal that killed one).

    Args:
        works: What each does.
        logs: Where each writes its output.
        together: They form a group; when one is killed the rest are killed too, as a launcher would.
    """
    environment = {}
    if together:
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(len(works)),
                       "LOCAL_WORLD_SIZE": str(len(works))}  # fmt: skip
    children = []
    for rank, (work, log) in enumerate(zip(works, logs, strict=True)):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if together else {}
        children.append(_fork(work, log, {**environment, **place}))
    return _wait(children)


def _fork(work: Callable[[], None], log: Path, environment: dict[str, str]) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with open(log, "a", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.update(environment)
        work()
        status = 0
    except SystemExit as error:
        status = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(children: list[int]) -> list[int]:
    statuses: dict[int, int] = {}
    end = time.monotonic() + PATIENCE
    while len(statuses) < len(children):
        for child in set(children) - set(statuses):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                statuses[child] = os.waitstatus_to_exitcode(status)
        killed = any(status == -signal.SIGKILL for status in statuses.values())
        if killed or time.monotonic() > end:
            for child in set(children) - set(statuses):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return [statuses[child] for child in children]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run_case(module: Any, name: str, folder: Path, rank: int) -> None:
    result = module.run(name, folder / name)
    (folder / name / f"{rank}.json").write_text(json.dumps(result))


def main(module_name: str, folder: Path, cases: list[str]) -> int:
    """Run cases one after the other; 1 when a process failed, with its output."""
    torch.set_num_threads(1)
    module = importlib.import_module(module_name)
    module.prepare(folder)
    gc.freeze()
    for name, _, count in (case.partition(":") for case in cases):
        (folder / name).mkdir(parents=True)
        logs = [folder / name / f"{rank}.txt" for rank in range(int(count))]

        statuses = fork_group([partial(_run_case, module, name, folder, rank) for rank in range(int(count))], logs)
        if any(statuses):
            print(f"{name}: exit statuses {statuses}")
            for log in logs:
                print(f"--- {log.name}\n{log.read_text()[-3000:]}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]))
