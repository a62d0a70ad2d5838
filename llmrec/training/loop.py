"""The training loop of a stage: transformers' Trainer with our loss, order of examples and checkpoints.

`StageLoop` is a mixin over `transformers.Trainer` (`RecTrainer`) and `trl.SFTTrainer` (`llmrec.training.answers`).
Three things differ from the stock loop: the loss of an accumulated step is the mean over all its supervised places, not
a mean of means; validation is a callable and leaves the random numbers alone; and checkpoints are whole, verified and
free of pickle, so that a resumed run takes the very steps the uninterrupted one would have taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_callback import PrinterCallback

from llmrec.data.grouping import grouped_order
from llmrec.errors import DataError, RecipeError
from llmrec.strategies.base import StepInfo, StepLoss, TrainingStrategy
from llmrec.training.callbacks import LOSS_DRAWS, ORDER_DRAWS, StrategyHooks, means
from llmrec.training.optim import parameter_groups
from llmrec.training.resuming import AtomicCheckpoints, StageRun
from llmrec.training.sharding import choose_sharding
from llmrec.training.speed import SpeedOptions, speed_up
from llmrec.training.states import TrainableState, derived_generator, kept_rng


class StageModule(nn.Module):
    """Model and strategy as one module, so that everything with gradients runs inside the distributed wrapper."""

    def __init__(self, model: nn.Module, strategy: TrainingStrategy) -> None:
        super().__init__()
        self.model = model
        self.strategy = strategy

    def forward(self, batch: Any, step: StepInfo) -> tuple[Tensor, dict[str, Any], int]:
        """(total, parts, count) of the strategy's loss; models with a curriculum are told where training stands first.

        A tuple, since wrappers that divide weights hook into the backward of the tensors they find in the output.
        """
        begin_step = getattr(self.model, "begin_step", None)
        if callable(begin_step):
            begin_step(step.step, step.total_steps)
        found: StepLoss = self.strategy.loss(self.model, batch, step)
        return found.total, dict(found.parts), int(found.count)

    @property
    def _no_split_modules(self) -> list[str]:
        """Layers that a wrapper divides one by one: those the language model names."""
        named = {n for m in self.modules() if isinstance(m, PreTrainedModel) for n in (m._no_split_modules or ())}
        return sorted(named & {type(module).__name__ for module in self.modules()})

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Switch it on in every transformers model inside that has it.

        Raises:
            RecipeError: None has.
        """
        able = [m for m in self.model.modules() if isinstance(m, PreTrainedModel) and m.supports_gradient_checkpointing]
        outer = [m for m in able if not any(m is not other and m in set(other.modules()) for other in able)]
        if not outer:
            raise RecipeError(f"activation_checkpointing: {type(self.model).__name__} does not support it")
        for model in outer:
            model.activation_checkpointing_enable(**options)


class EpochOrder(torch.utils.data.Sampler[int]):
    """Order of examples: the strategy's, or a shuffle derived from seed and epoch; the same after a resume."""

    def __init__(self, loop: StageLoop, length: int) -> None:
        self.loop, self.length = loop, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        epoch = self.loop.state.global_step // self.loop.steps_per_epoch
        order = self.loop.strategy.sampler(epoch)
        name, args = type(self.loop.strategy).__name__, self.loop.args
        grouped = str(args.train_sampling_strategy) == "group_by_length"
        if order is not None and grouped:
            raise RecipeError(f"train_sampling_strategy: {name} has an order of its own; remove group_by_length")
        if order is None:
            generator = np.random.default_rng(np.random.SeedSequence([args.seed, ORDER_DRAWS, epoch]))
            side_by_side = args.per_device_train_batch_size * args.world_size
            order = (
                grouped_order(self._lengths(), side_by_side, generator)
                if grouped
                else generator.permutation(self.length)
            )
        if len(order) != self.length:
            raise DataError(
                f"{name}.sampler returned {len(order)} positions", expected=f"{self.length}, one per example"
            )
        yield from np.asarray(order).tolist()

    def _lengths(self) -> Any:
        lengths = getattr(self.loop.examples, "lengths", None)
        if lengths is None:
            raise RecipeError(
                f"train_sampling_strategy: {type(self.loop.examples).__name__} does not know the lengths of its "
                "examples; remove group_by_length"
            )
        return lengths


class Shares(torch.utils.data.Sampler[list[int]]):
    """Batches of one process. Together, processes take the rows one process would take with the same global batch.

    Each micro-batch is a run of the epoch's order, B rows for each of W processes. A last, shorter one is divided
    evenly; a process for which no row is left takes one all the same (`is_idle`), since all must take part.

    Args:
        order: The epoch's order, the same in every process.
        length: Rows of an epoch.
        batch: B.
        rank: This process, from 0.
        processes: W.
        drop_last: Leave out a last, shorter micro-batch.
    """

    def __init__(
        self, order: EpochOrder, length: int, batch: int, rank: int, processes: int, drop_last: bool = False
    ) -> None:
        self.order, self.length, self.batch = order, length, batch
        self.rank, self.processes, self.drop_last = rank, processes, drop_last

    def __len__(self) -> int:
        width = self.batch * self.processes
        return self.length // width if self.drop_last else -(-self.length // width)

    def __iter__(self) -> Iterator[list[int]]:
        rows = list(self.order)
        for number in range(len(self)):
            start, end = self._bounds(number)
            yield rows[start:end] or rows[-1:]

    def is_idle(self, number: int) -> bool:
        """Whether micro-batch `number` of the epoch holds no row of this process's own."""
        start, end = self._bounds(number)
        return start == end

    def _bounds(self, number: int) -> tuple[int, int]:
        first = number * self.batch * self.processes
        rows = min(self.batch * self.processes, self.length - first)
        return first + rows * self.rank // self.processes, first + rows * (self.rank + 1) // self.processes


class StageLoop(AtomicCheckpoints):
    """Mixin over a Trainer; call `begin` before `train`."""

    loss_is_scaled_for_ga = True  # by `training_step`, over all places of the step

    args: Any
    train_dataset: Any
    state: Any
    model: Any
    accelerator: Any
    control: Any

    def begin(self, run: StageRun) -> None:
        """Connect the loop to a run; called once after construction."""
        self.run, self.strategy = run, run.strategy
        self.inner_model: nn.Module = self.model.model
        self.parameter_plan: list[list[nn.Parameter]] = []
        self.sharding = choose_sharding(self)
        self.sharding.configure()
        self._micro = 0
        self._settled = torch.zeros(())
        self._saved_step = -1
        self._loss_sum: Tensor | float = 0.0
        self._count = 0
        self._parts: dict[str, tuple[Any, int]] = {}
        self.remove_callback(PrinterCallback)  # type: ignore[attr-defined]
        checkpointing = bool(self.args.activation_checkpointing)
        speed_up(self.inner_model, SpeedOptions.of(run.stage), checkpointing=checkpointing)
        for callback in (StrategyHooks(self), run.signal):
            self.add_callback(callback)  # type: ignore[attr-defined]
        loader = self.get_train_dataloader()  # type: ignore[attr-defined]
        planned = self.set_initial_training_values(self.args, loader)  # type: ignore[attr-defined]
        self.steps_per_epoch, self.total_steps = int(planned[1]), int(planned[6])

    @property
    def examples(self) -> Any:
        """The map-style data set the examples come from."""
        return self.train_dataset

    def begin_epoch(self) -> None:
        """Let the examples draw anew what changes between epochs; before workers copy them."""
        if hasattr(self.examples, "set_epoch"):
            self.examples.set_epoch(self.state.global_step // self.steps_per_epoch)

    def adopt_weights(self) -> None:
        """Note which tensors train; called after the strategy's `prepare`, which may freeze or add some."""
        self.trainable = TrainableState(self.model, self.sharding.gather)

    # Steps -----------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> torch.utils.data.DataLoader[Any]:
        """Batches of this process. Accelerate would fill the last step with rows that were seen already."""
        args, length = self.args, len(self.train_dataset)
        self._shares = Shares(
            EpochOrder(self, length), length, args.per_device_train_batch_size, args.process_index, args.world_size,
            args.dataloader_drop_last,
        )  # fmt: skip
        return torch.utils.data.DataLoader(
            self.train_dataset, batch_sampler=self._shares, collate_fn=self.data_collator,  # type: ignore[attr-defined]
            num_workers=args.dataloader_num_workers, pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers, prefetch_factor=args.dataloader_prefetch_factor,
        )  # fmt: skip

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer the arguments name, over our parameter groups."""
        if getattr(self, "optimizer", None) is None:
            try:
                kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)  # type: ignore[attr-defined]
            except (ImportError, ValueError) as error:
                raise RecipeError(f"optim: {self.args.optim.value} is not available: {error}") from error
            if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)) or "params" in options:
                raise RecipeError(
                    f"optim: {self.args.optim.value} builds its own parameter groups; choose another optimizer"
                )
            groups = parameter_groups(
                self.model if model is None else model, self.inner_model, learning_rate=self.args.learning_rate,
                weight_decay=self.args.weight_decay, factors=dict(self.run.stage.learning_rates),
            )  # fmt: skip
            self.parameter_plan = [list(group["params"]) for group in groups]
            self.optimizer: Any = kind(groups, **options)
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The strategy's loss of one micro-batch, weighted by its supervised places."""
        place = (self.state.global_step, self._micro)  # the same in every process: all draw the same negatives
        info = StepInfo(
            step=self.state.global_step,
            total_steps=self.state.max_steps,
            epoch=self.state.global_step / self.steps_per_epoch,
            generator=derived_generator(self.args.seed, LOSS_DRAWS, *place),
        )
        with self._precision():
            total, parts, count = model(inputs, info)
        before = self.state.global_step % self.steps_per_epoch * self.args.gradient_accumulation_steps
        if self._shares.is_idle(before + self._micro):
            count = 0
        self._micro += 1
        self._count += count
        self._loss_sum = self._loss_sum + total.detach().float() * count
        for name, part in parts.items():
            known, weight = self._parts.get(name, (0.0, 0))
            value = part.detach().float() if torch.is_tensor(part) else float(part)
            self._parts[name] = (known + value * count, weight + count)
        return total * count if self._weighs else total

    def _precision(self) -> AbstractContextManager[Any]:
        dtype = self.sharding.autocast_dtype()
        return nullcontext() if dtype is None else torch.autocast(self.args.device.type, dtype)

    @property
    def _weighs(self) -> bool:
        """Whether gradients are sums that `_settle` divides; a single batch is its own mean."""
        return bool(self.args.gradient_accumulation_steps > 1 or self.args.world_size > 1)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch; the last of a step turns the summed gradients into the gradient of the mean."""
        super().training_step(*args, **kwargs)  # type: ignore[misc]
        if not self.accelerator.gradient_state.sync_gradients:
            return torch.zeros((), device=self.args.device)
        if not self.sharding.steps_in_backward:
            self._settle()
        return self._settled

    def _settle(self) -> None:
        """What processes tell each other once a step, between the last gradient and the optimizer."""
        told = [float(self._loss_sum), float(self._count), float(self.run.signal.received)]
        totals = torch.tensor(told, dtype=torch.float64)
        if self.args.world_size > 1:
            totals = totals.to(self.args.device)
            torch.distributed.all_reduce(totals)
        loss, count = float(totals[0]), max(float(totals[1]), 1.0)
        self.run.signal.agreed = bool(totals[2])
        if self._weighs:
            self.sharding.scale_gradients(self.args.world_size / count)
        self._micro, self._count, self._loss_sum = 0, 0, 0.0
        if not np.isfinite(loss):
            raise RecipeError(
                f"the loss became {loss / count} at step {self.state.global_step + 1}; lower the learning rate, "
                "set max_grad_norm, or use float32 weights"
            )
        self._settled = torch.tensor(loss / count, device=self.args.device, dtype=torch.float32)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the means of the loss's parts since the last log."""
        if "loss" in logs:
            logs = {**logs, **means(self._parts)}
            self._parts = {}
        super().log(logs, start_time)  # type: ignore[misc]

    # Validation ------------------------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validate, keep the best state, and stop when patience is at its end."""
        if self.run.signal.agreed or self.run.evaluate is None:
            return {}
        training = self.model.training
        self.model.eval()
        with kept_rng(self.args.device), torch.no_grad(), self.sharding.whole():
            measured = self._shared(self.run.evaluate())
        self.model.train(training)
        metrics = {f"eval_{name}": float(value) for name, value in measured.items()}
        self._judge(measured)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(  # type: ignore[attr-defined]
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _shared(self, measured: dict[str, float]) -> dict[str, float]:
        """The first process's metrics: a difference in the last bit must not make one process stop and others go on."""
        if self.args.world_size == 1:
            return measured
        values = torch.tensor([float(v) for v in measured.values()], device=self.args.device, dtype=torch.float64)
        torch.distributed.broadcast(values, 0)
        return dict(zip(measured, values.tolist(), strict=True))

    def _judge(self, measured: dict[str, float]) -> None:
        stage, record = self.run.stage, self.run.record
        if stage.metric not in measured:
            raise RecipeError(
                f"stage {stage.train}: metric {stage.metric!r} is not measured; there is {', '.join(sorted(measured))}"
            )
        value = float(measured[stage.metric])
        sign = -1.0 if stage.metric.endswith("loss") else 1.0
        self._improved = record.best_metric is None or sign * value > sign * record.best_metric
        if self._improved:
            record.best_metric, record.best_step, record.waited = value, self.state.global_step, 0
            self.run.best = self.trainable.copy()
            return
        record.waited += 1
        if stage.early_stopping_patience is not None and record.waited >= stage.early_stopping_patience:
            record.stopped_early = self.control.should_training_stop = True

    def _determine_best_metric(self, metrics: Any, trial: Any) -> bool:
        return bool(metrics) and self._improved


class RecTrainer(StageLoop, Trainer):  # type: ignore[misc]
    """The loop for encoders, heads and LLM recommenders."""
