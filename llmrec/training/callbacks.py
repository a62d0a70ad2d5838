"""What happens around the steps of a stage: progress for people, a log for programs, the strategy's hooks, SIGTERM."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmrec.strategies.base import StepInfo
from llmrec.training.checkpoints import writing
from llmrec.training.states import derived_generator

if TYPE_CHECKING:
    from llmrec.training.loop import StageLoop

LOSS_DRAWS, EPOCH_DRAWS, STEP_DRAWS, ORDER_DRAWS, PREPARE_DRAWS, RANDOM_STATES = range(6)
"""Streams of random numbers of a stage; each is derived from the seed and the place in training."""

SECONDS_BETWEEN_LINES = 15.0


class StrategyHooks(TrainerCallback):
    """Calls the strategy before epochs and after steps."""

    def __init__(self, loop: StageLoop) -> None:
        self.loop = loop

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Call `on_epoch_start`, unless a resumed run stands in the middle of the epoch and has done so before."""
        self.loop.begin_epoch()
        if state.global_step % self.loop.steps_per_epoch == 0:
            self.loop.strategy.on_epoch_start(self.loop.inner_model, self._info(state, EPOCH_DRAWS))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Call `on_step_end`."""
        self.loop.strategy.on_step_end(self.loop.inner_model, self._info(state, STEP_DRAWS))

    def _info(self, state: TrainerState, stream: int) -> StepInfo:
        return StepInfo(
            step=state.global_step,
            total_steps=state.max_steps,
            epoch=state.global_step / self.loop.steps_per_epoch,
            generator=derived_generator(self.loop.args.seed, stream, state.global_step),
        )


class JsonLog(TrainerCallback):
    """Appends one JSON object per log to a file: loss, learning rate, gradient norm, parts, validation metrics."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **shared: Any) -> None:
        """Append what the trainer logs, but its closing summary: run times stand in done.json."""
        if state.is_world_process_zero and "train_runtime" not in shared["logs"]:
            line = json.dumps({"step": state.global_step, **shared["logs"]})
            with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(line + "\n")


def truncate_log(path: Path, step: int) -> None:
    """Forget lines of later steps, and a last line that was cut off; for a resumed run that writes them again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            break  # cut off while being written: nothing after it counts
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)


class Progress(TrainerCallback):
    """A bar on a terminal, a line now and then elsewhere; always on standard error.

    Args:
        label: Name of the stage.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.bar: Any = None
        self._latest: dict[str, float] = {}
        self._began = self._spoke = 0.0
        self._first_step = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open the bar."""
        self._began = self._spoke = time.monotonic()
        self._first_step = state.global_step
        if state.is_world_process_zero and sys.stderr.isatty():
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc=self.label, unit="step", file=sys.stderr
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move the bar, or say where training stands after a while of silence."""
        if self.bar is not None:
            self.bar.update(1)
        elif time.monotonic() - self._spoke > SECONDS_BETWEEN_LINES:
            self._speak(state)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **shared: Any) -> None:
        """Keep the latest numbers for the next line."""
        logs: dict[str, Any] = shared["logs"]
        named = {name.removeprefix("eval_"): value for name, value in logs.items() if isinstance(value, float)}
        self._latest.update({n: v for n, v in named.items() if n == "loss" or "@" in n})
        if self.bar is not None:
            self.bar.set_postfix_str(", ".join(f"{name} {value:.4g}" for name, value in self._latest.items()))

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A line per validation."""
        if self.bar is None:
            self._speak(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _speak(self, state: TrainerState) -> None:
        if not state.is_world_process_zero:
            return
        self._spoke = time.monotonic()
        done = state.global_step - self._first_step
        left = (self._spoke - self._began) / max(done, 1) * (state.max_steps - state.global_step)
        numbers = "".join(f", {name} {value:.4g}" for name, value in self._latest.items())
        print(
            f"{self.label}: step {state.global_step} of {state.max_steps}{numbers}, {duration(left)} left",
            file=sys.stderr,
            flush=True,
        )


class StopOnSignal(TrainerCallback):
    """SIGTERM writes a checkpoint after the running step and ends training; the caller then exits with status 143.

    A second SIGTERM does what it did before. Signals reach processes at different moments, so `received` is what this
    one knows, and `agreed`, which the loop sets once a step, what all have heard of: only that may change what they do.
    """

    def __init__(self) -> None:
        self.received = self.agreed = False
        self._before: Any = None

    def __enter__(self) -> StopOnSignal:
        try:
            self._before = signal.signal(signal.SIGTERM, self._receive)
        except ValueError:  # only the main thread may set handlers; elsewhere the default stays
            self._before = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _receive(self, number: int, frame: Any) -> None:
        self.received = True
        self.__exit__()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for a checkpoint and the end."""
        if self.agreed:
            control.should_save = control.should_training_stop = True


def duration(seconds: float) -> str:
    """ "4.5 s", "45 s", "12 min", "3 h 20 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def means(sums: Mapping[str, tuple[Any, int]]) -> dict[str, float]:
    """(weighted sum, weight) by name -> means; the only place where parts of the loss leave the device."""
    return {name: float(total) / weight for name, (total, weight) in sums.items() if weight}
