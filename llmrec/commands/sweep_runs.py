"""Runs the points of a sweep as processes of `llmrec train`, several at a time, and reads what they found.

```
OUT/data/<rules>/dataset/   the data set, prepared once for all runs that share its rules
OUT/recipes/<point>.yaml    one ordinary recipe per run
OUT/runs/<point>/           one ordinary run folder each
OUT/logs/<point>.log        what its process printed
```
The same command on the same folder goes on: finished runs are skipped, a half-trained one resumes from its checkpoint.
A run that fails does not stop the others; they are named at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from llmrec.errors import CheckFailed, DataError, RecipeError

if TYPE_CHECKING:
    from llmrec.data.dataset import InteractionDataset
    from llmrec.recipe import Recipe
    from llmrec.sweeps import Sweep, SweepPoint

Say = Callable[[str], None]
SECONDS_BETWEEN_LOOKS, SECONDS_BETWEEN_LINES, SECONDS_TO_STOP = 0.2, 30.0, 60.0


@dataclass(frozen=True)
class SweepRun:
    """A point with its place on disk.

    Args:
        point: Of the sweep.
        recipe: Its recipe, with the prepared data set as source.
        dataset: The data set.
        file, folder, log: Recipe file, run folder, and what its process prints.
    """

    point: SweepPoint
    recipe: Recipe
    dataset: InteractionDataset
    file: Path
    folder: Path
    log: Path

    @property
    def finished(self) -> bool:
        """Whether the folder holds this recipe's finished run."""
        from llmrec.recipe import load_recipe
        from llmrec.run_dir import RunDir

        run = RunDir(self.folder)
        return run.metrics.is_file() and run.recipe.is_file() and load_recipe(run.recipe) == self.recipe

    @property
    def command(self) -> list[str]:
        """The words that train it."""
        return [sys.executable, "-m", "llmrec", "train", str(self.file), "--out", str(self.folder)]


@dataclass(frozen=True)
class RunResult:
    """What a finished run found.

    Args:
        name, series, values: Of its point.
        parameters: All that was trained.
        inner: Without embedding tables.
        metric: Name of the validation metric.
        best: Its best value.
        loss: Mean training loss of the last epoch; None where the log has none.
        seconds: Training time.
        test: Mean of each test metric the recipe shows, with the ends of its interval.
        gates: For an instance-wise tuner: mean entropy of the expert weights over users as a share of the largest
            possible, and the share of users led by the busiest expert; empty for other runs.
    """

    name: str
    series: str
    values: dict[str, Any]
    parameters: int
    inner: int
    metric: str
    best: float
    loss: float | None
    seconds: float
    test: dict[str, dict[str, float]]
    gates: dict[str, float]

    def record(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def lay_out(sweep: Sweep, out: Path, say: Say) -> list[SweepRun]:
    """Prepare data and write the recipe of every point.

    Raises:
        RecipeError: A recipe never validates, or the data lack what it needs.
        DataError: The data cannot be prepared.
    """
    from llmrec.run_dir import RunDir, write_text
    from llmrec.training.stages import prepare_dataset

    rules: dict[str, tuple[Path, InteractionDataset]] = {}
    runs = []
    for point in sweep.points:
        _check_validates(point.recipe)
        # Seeds and windows differ from run to run; the data do not.
        base = point.recipe.model_copy(update={"seed": sweep.points[0].recipe.seed})
        text = json.dumps([base.seed, base.dataset.model_dump(mode="json", exclude={"max_history", "label"})])
        key = hashlib.sha256(text.encode()).hexdigest()[:8]
        if key not in rules:
            home = RunDir(out / "data" / key)
            dataset = prepare_dataset(base, home, say)
            rules[key] = (home.dataset, dataset)
        folder, dataset = rules[key]
        point.recipe.check_dataset(dataset.fields)
        spec = point.recipe.dataset.model_copy(update={"source": str(folder), "options": {}})
        recipe = point.recipe.model_copy(update={"dataset": spec})
        places = (out / "recipes" / f"{point.name}.yaml", out / "runs" / point.name, out / "logs" / f"{point.name}.log")
        write_text(places[0], recipe.dump())
        runs.append(SweepRun(point, recipe, dataset, *places))
    return runs


def _check_validates(recipe: Recipe) -> None:
    if not recipe.stages:
        raise RecipeError("a sweep compares trained runs; found a recipe without `stages`")
    if recipe.stages[-1].training_arguments.get("eval_strategy", "epoch") in ("no", False):
        raise RecipeError(
            "a sweep compares the best validation of each run; found eval_strategy: 'no', expected epoch or steps"
        )


def run_all(runs: Sequence[SweepRun], say: Say, *, jobs: int = 1, devices: Sequence[str] = ()) -> None:
    """Train what is not finished, `jobs` processes at a time, or one for each device.

    Args:
        runs: Of `lay_out`.
        say: Told what begins and ends, with the time left.
        jobs: Processes at a time where there are no devices; each gets its share of the cores.
        devices: Entries for CUDA_VISIBLE_DEVICES, one process each.

    Raises:
        CheckFailed: A run failed; the message names its log.
    """
    waiting = [run for run in runs if not run.finished]
    if len(waiting) < len(runs):
        say(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished already")
    slots = list(devices) or [""] * max(1, jobs)
    failed = _Pool(len(waiting), slots, bool(devices), say).run(waiting)
    if failed:
        shown = "\n".join(f"  {run.point.name}: {run.log}: {_last_line(run.log)}" for run in failed)
        raise CheckFailed(f"{len(failed)} of {len(runs)} runs failed; the same command tries them again\n{shown}")


@dataclass
class _Working:
    run: SweepRun
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    began: float


class _Pool:
    """Processes at work, one a slot."""

    def __init__(self, total: int, slots: list[str], on_devices: bool, say: Say) -> None:
        self.total, self.slots, self.on_devices, self.say = total, slots, on_devices, say
        self.busy: dict[int, _Working] = {}
        self.took: list[float] = []
        self.done = 0

    def run(self, waiting: list[SweepRun]) -> list[SweepRun]:
        queue, failed, spoke = list(waiting), [], time.monotonic()
        with _terminated_as_interrupt():
            try:
                while queue or self.busy:
                    for slot in range(len(self.slots)):
                        if queue and slot not in self.busy:
                            self._start(slot, queue.pop(0))
                    failed += self._reap()
                    if time.monotonic() - spoke > SECONDS_BETWEEN_LINES:
                        spoke = time.monotonic()
                        self._report()
                    time.sleep(SECONDS_BETWEEN_LOOKS if self.busy else 0)
            finally:
                self._stop()
        return failed

    def _start(self, slot: int, run: SweepRun) -> None:
        environment = dict(os.environ)
        if self.on_devices:
            environment["CUDA_VISIBLE_DEVICES"] = self.slots[slot]
        elif len(self.slots) > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(self.slots))))
        run.log.parent.mkdir(parents=True, exist_ok=True)
        log = open(run.log, "ab")  # noqa: SIM115  # closed when the process has ended
        process = subprocess.Popen(run.command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        self.busy[slot] = _Working(run, process, log, time.monotonic())
        where = f" on device {self.slots[slot]}" if self.on_devices else ""
        self.say(f"run {self.done + len(self.busy)} of {self.total}: {run.point.name}{where}")

    def _reap(self) -> list[SweepRun]:
        from llmrec.training.callbacks import duration

        failed = []
        for slot, work in list(self.busy.items()):
            status = work.process.poll()
            if status is None:
                continue
            work.log.close()
            del self.busy[slot]
            self.done += 1
            self.took.append(time.monotonic() - work.began)
            if status != 0:
                failed.append(work.run)
                self.say(f"  {work.run.point.name} failed with status {status}; see {work.run.log}")
            else:
                self.say(f"  {work.run.point.name} done in {duration(self.took[-1])}; {self._left()}")
        return failed

    def _left(self) -> str:
        from llmrec.training.callbacks import duration

        rest = (self.total - self.done) * sum(self.took) / len(self.took) / len(self.slots)
        return f"{self.done} of {self.total}, about {duration(rest)} left"

    def _report(self) -> None:
        for work in self.busy.values():
            self.say(f"  {work.run.point.name}: {_last_line(work.run.log)}")

    def _stop(self) -> None:
        """Ask what still runs to write a checkpoint and end; a sweep that is stopped leaves nothing behind."""
        for work in self.busy.values():
            work.process.send_signal(signal.SIGTERM)
        for work in self.busy.values():
            try:
                work.process.wait(SECONDS_TO_STOP)
            except subprocess.TimeoutExpired:
                work.process.kill()
                work.process.wait()
            work.log.close()


@contextmanager
def _terminated_as_interrupt() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, so that running processes are stopped, and ends with status 143."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: signals are the caller's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def read_result(run: SweepRun) -> RunResult:
    """What a finished run found.

    Raises:
        DataError: It was never validated, or its files are damaged.
    """
    from llmrec.commands.model_cost import encoder_size
    from llmrec.recommender import system_name
    from llmrec.run_dir import RunDir

    folder = RunDir(run.folder)
    stages = [folder.stage(number, stage.train) for number, stage in enumerate(run.recipe.stages, start=1)]
    done = [json.loads((stage / "done.json").read_text(encoding="utf-8")) for stage in stages]
    if done[-1]["best_metric"] is None:
        raise DataError(
            "the run was never validated", file=stages[-1] / "done.json", expected="a best metric",
            remedy="use a split with validation users and eval_strategy: epoch",
        )  # fmt: skip
    if run.recipe.llm is None:
        size = encoder_size(run.recipe, run.dataset)
        total, inner = size.total, size.inner
    else:
        total = inner = stored_parameters(folder.model)
    record = json.loads(folder.metrics.read_text(encoding="utf-8"))
    measured = record["models"][system_name(run.recipe)]
    return RunResult(
        name=run.point.name,
        series=run.point.series,
        values=run.point.values,
        parameters=total,
        inner=inner,
        metric=run.recipe.stages[-1].metric,
        best=float(done[-1]["best_metric"]),
        loss=last_epoch_loss(stages[-1] / "log.jsonl"),
        seconds=sum(float(record["seconds"]) for record in done),
        test={
            name: {part: float(measured[name][part]) for part in ("mean", "low", "high")}
            for name in run.recipe.evaluate.metrics
            if name in measured
        },
        gates=gate_figures(run.folder),
    )


def gate_figures(folder: Path) -> dict[str, float]:
    """How decided and how even the expert weights of a run are; see `RunResult.gates`."""
    from llmrec.reporting.sections import read_gates

    tables = sorted((folder / "evaluations").glob("*/gates.parquet"))
    if not tables:
        return {}
    found = read_gates(tables[0])
    most = found["uniform_entropy"]
    return {
        "gate entropy": found["entropy"] / most if most else 0.0,
        "busiest expert": max(found["leads"]),
    }


def last_epoch_loss(log: Path) -> float | None:
    """Mean training loss of the last whole epoch in a log.jsonl; None where it holds no loss."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    losses = [(line["epoch"], line["loss"]) for line in lines if "loss" in line and "epoch" in line]
    if not losses:
        return None
    last = losses[-1][0]
    latest = [loss for epoch, loss in losses if epoch > last - 1]
    return sum(latest) / len(latest)


def stored_parameters(folder: Path) -> int:
    """Number of values in the safetensors files below a folder, read from their headers."""
    from safetensors import safe_open

    count = 0
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118  # not a dictionary
                size = 1
                for length in file.get_slice(name).get_shape():
                    size *= length
                count += size
    return count


def _last_line(log: Path) -> str:
    """The last words a process printed."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    said = [line.strip() for line in lines if line.strip() and not line.startswith("(LLMREC_DEBUG")]
    return said[-1][-160:] if said else "started"
