"""What a stage writes into its checkpoints and reads back: `AtomicCheckpoints`, a mixin over transformers' Trainer.

It replaces the stock files (pickles, written in place) by those of `llmrec.training.checkpoints`, and restores weights,
optimizer, schedule, strategy, patience, best state and random numbers of every process.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import set_seed

from llmrec.strategies.base import TrainingStrategy
from llmrec.training import checkpoints
from llmrec.training.callbacks import RANDOM_STATES, StopOnSignal
from llmrec.training.lock import together
from llmrec.training.sharding import Sharding
from llmrec.training.states import (
    TrainableState,
    derived_generator,
    pack,
    pack_json,
    rng_tensors,
    set_rng,
    unpack,
    unpack_json,
)

if TYPE_CHECKING:
    from llmrec.recipe import StageSpec


@dataclass
class StageRecord:
    """What a stage knows about itself beyond weights; stored in every checkpoint."""

    seconds: float = 0.0
    best_metric: float | None = None
    best_step: int | None = None
    waited: int = 0
    stopped_early: bool = False


@dataclass
class StageRun:
    """One run of a stage, shared by the loop and its callbacks.

    Args:
        stage: The stage of the recipe.
        strategy: Its objective.
        evaluate: Validation metrics of the model as it stands, or None.
        identity: What checkpoints belong to.
        signal: The SIGTERM watcher.
        best: The tensors of the best validation so far.
    """

    stage: StageSpec
    strategy: TrainingStrategy
    evaluate: Callable[[], dict[str, float]] | None
    identity: dict[str, str]
    signal: StopOnSignal
    record: StageRecord = field(default_factory=StageRecord)
    best: dict[str, Tensor] | None = None
    began: float = field(default_factory=time.monotonic)


class AtomicCheckpoints:
    """Mixin over a Trainer; `StageLoop.begin` sets what it needs."""

    args: Any
    state: Any
    control: Any
    accelerator: Any
    optimizer: Any
    lr_scheduler: Any
    sharding: Sharding
    run: StageRun
    strategy: TrainingStrategy
    trainable: TrainableState
    steps_per_epoch: int
    _saved_step: int
    _settle: Callable[[], None]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.state.global_step == self._saved_step:
            return
        self._saved_step = step = self.state.global_step
        contents = self._contents()
        with together(self.args, "writing a checkpoint"):
            if self.args.should_save:
                folder = Path(self.args.output_dir)
                checkpoints.write_folder(
                    folder / f"checkpoint-{step}", contents(), step=step, identity=self.run.identity
                )
                checkpoints.rotate(folder, self.args.save_total_limit, step)

    def _contents(self) -> Callable[[], dict[str, bytes]]:
        """Gather a checkpoint, in which every process takes part; the process that writes then makes the files."""
        random = rng_tensors(self.args.device)
        if self.args.world_size > 1:
            gathered = {k: self.accelerator.gather(v.to(self.args.device)[None]).cpu() for k, v in random.items()}
            random = {f"{r}.{name}": rows[r] for name, rows in gathered.items() for r in range(self.args.world_size)}
        else:
            random = {f"0.{name}": tensor for name, tensor in random.items()}
        run, now = self.run, time.monotonic()
        run.record.seconds, run.began = run.record.seconds + now - run.began, now
        trainable, (optimizer, rest) = self.trainable.tensors(), self.sharding.optimizer_state()
        scaler = getattr(self.accelerator, "scaler", None)

        def files() -> dict[str, bytes]:
            made = {
                checkpoints.TRAINABLE: pack(trainable),
                checkpoints.STRATEGY: pack(self.strategy.state_dict()),
                checkpoints.OPTIMIZER: pack(optimizer),
                checkpoints.OPTIMIZER_SCALARS: pack_json({**rest, "scaler": scaler.state_dict() if scaler else None}),
                checkpoints.SCHEDULER: pack_json(self.lr_scheduler.state_dict()),
                checkpoints.RANDOM: pack(random),
                checkpoints.TRAINER_STATE: json.dumps({**asdict(self.state), "log_history": []}, indent=1).encode(),
                checkpoints.STAGE_STATE: pack_json(asdict(run.record)),
            }
            return made if run.best is None else {**made, checkpoints.BEST: pack(run.best)}

        return files

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Load weights while they are whole, let the launcher divide them, then load the optimizer."""
        if self.sharding.divides and resume_from_checkpoint is not None:
            self._load_from_checkpoint(resume_from_checkpoint)
        self.sharding.before_wrapping()
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)  # type: ignore[misc]
        self.sharding.wrapped(self._settle)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        self.trainable.load(unpack(folder / checkpoints.TRAINABLE), str(folder))
        self.strategy.load_state_dict(unpack(folder / checkpoints.STRATEGY))
        self.run.record = StageRecord(**unpack_json(folder / checkpoints.STAGE_STATE))
        best = folder / checkpoints.BEST
        self.run.best = unpack(best) if best.is_file() else None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        rest = unpack_json(Path(checkpoint) / checkpoints.OPTIMIZER_SCALARS)
        self.sharding.load_optimizer(unpack(Path(checkpoint) / checkpoints.OPTIMIZER), rest)
        self.lr_scheduler.load_state_dict(unpack_json(Path(checkpoint) / checkpoints.SCHEDULER))
        if rest["scaler"] is not None and getattr(self.accelerator, "scaler", None) is not None:
            self.accelerator.scaler.load_state_dict(rest["scaler"])
        self._saved_step = self.state.global_step
        if self.state.global_step % self.steps_per_epoch == 0:
            self._restore_rng(checkpoint)  # before the hooks of the epoch, which may draw numbers

    def _load_scaler(self, checkpoint: str | None) -> None:
        return  # done together with the optimizer

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # Trainer calls this once the data loader stands where it stood; at the start of an epoch it already does.
        if checkpoint is not None and self.state.global_step % self.steps_per_epoch:
            self._restore_rng(checkpoint)

    def _restore_rng(self, checkpoint: str) -> None:
        prefix = f"{self.args.process_index}."
        stored = unpack(Path(checkpoint) / checkpoints.RANDOM)
        mine = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
        if mine:
            set_rng(mine, self.args.device)
            return
        # There were fewer processes when it was written.
        place = (self.args.seed, RANDOM_STATES, self.state.global_step, self.args.process_index)
        set_seed(derived_generator(*place).initial_seed() % 2**32)
