"""`train_stage`: one stage of a recipe, from fresh or half-trained to done.

```
STAGE/
  checkpoints/checkpoint-N/   whole state of the run after step N (see llmrec.training.checkpoints)
  checkpoints/final/          the weights of the best validation, or the last ones where nothing is validated
  log.jsonl                   loss, learning rate, gradient norm, parts and metrics by step
  done.json                   steps, seconds, best metric; written last
```
Killed at any moment, the same call goes on from the newest whole checkpoint and ends with the same weights (bit for bit
on a processor). SIGTERM writes a checkpoint first; the process then exits with status 143.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from llmrec.errors import CheckpointError, DataError
from llmrec.run_dir import write_json
from llmrec.strategies.base import TrainContext, TrainingStrategy
from llmrec.training import checkpoints
from llmrec.training.arguments import build_arguments
from llmrec.training.callbacks import PREPARE_DRAWS, JsonLog, Progress, StopOnSignal, duration, truncate_log
from llmrec.training.checkpoints import notice
from llmrec.training.lock import agree, lock, together
from llmrec.training.loop import RecTrainer, StageLoop, StageModule
from llmrec.training.resuming import StageRecord, StageRun
from llmrec.training.states import TrainableState, derived_generator, pack, pack_json, unpack, unpack_json

if TYPE_CHECKING:
    from llmrec.data.schema import DataContext
    from llmrec.recipe import StageSpec

DIVISION = ("per_device_train_batch_size", "gradient_accumulation_steps", "processes")
"""Settings that may change between two attempts as long as their product, the examples of a step, stays."""
EXAMPLES_PER_STEP = "examples per step"
TERMINATED = 143
"""Exit status after SIGTERM: 128 + 15, what a shell reports for a process that signal ended."""


@dataclass(frozen=True)
class StageResult:
    """How a stage ended.

    Args:
        steps: Optimizer steps.
        epochs: Epochs, fractional.
        best_metric: The best validation, None where nothing was validated.
        stopped_early: Patience ended it.
        seconds: Training time, all attempts together.
        resumed_from: Step of the checkpoint it went on from, None for a fresh start.
    """

    steps: int
    epochs: float
    best_metric: float | None
    stopped_early: bool
    seconds: float
    resumed_from: int | None


def train_stage(
    model: nn.Module,
    strategy: TrainingStrategy,
    examples: Any,
    collator: Callable[[list[Any]], Any],
    *,
    stage: StageSpec,
    output_dir: Path,
    seed: int,
    context: DataContext,
    evaluate: Callable[[], dict[str, float]] | None,
    identity: dict[str, str],
    resume: Literal["auto", "never"] = "auto",
    force: bool = False,
) -> StageResult:
    """Train `model`, or go on training it, and leave it with its best weights.

    Args:
        model: A SequenceEncoder, GenerativeHead or LLM recommender; what requires gradients is trained, in place.
        strategy: The objective.
        examples: Map-style data set.
        collator: Rows -> batch.
        stage: The stage of the recipe.
        output_dir: Folder of the stage.
        seed: Of the stage.
        context: Training part of the data, for the strategy.
        evaluate: Validation metrics of the model as it stands; called in evaluation mode, without gradients.
        identity: What the checkpoints belong to, such as hashes of recipe, data and encoder.
        resume: "auto" goes on from the newest whole checkpoint, and returns at once when the stage is done; "never"
            moves what is there aside and starts anew.
        force: Go on although the identity differs.

    Raises:
        RecipeError: The stage asks for something that cannot be.
        CheckpointError: Another process is at it, checkpoints belong to something else, or the disk is full.
        SystemExit: With status 143 after SIGTERM.
    """
    if not len(examples):
        raise DataError("nothing to train on", found="0 examples", expected="at least one history with a next item")
    folder = Path(output_dir) / "checkpoints"
    text = _style(model) == "text" or bool(getattr(getattr(model, "options", None), "tasks", ()))
    args = _arguments(stage, folder, seed, evaluates=evaluate is not None, text=text)
    with ExitStack() as held, StopOnSignal() as signal:
        held.callback(unset_hf_deepspeed_config)  # or ZeRO would divide a model that is loaded after this stage
        with together(args, f"taking {output_dir}"):
            if args.should_save:
                held.enter_context(lock(Path(output_dir)))
                _tidy(Path(output_dir), resume)
        module = StageModule(model, strategy)
        ours = {**identity, **_settings(module, stage, args, len(examples))}
        run = StageRun(stage, strategy, evaluate, ours, signal)
        done = _finished(Path(output_dir), module, ours, force)
        if done is not None:
            return done
        loop = _build_loop(module, run, args, examples, collator, text=text)
        loop.add_callback(JsonLog(Path(output_dir) / "log.jsonl"))  # type: ignore[attr-defined]
        resumed = _train(loop, run, Path(output_dir), len(examples), context, force)
        if agree(signal.received, args):
            raise SystemExit(TERMINATED)
        return _finish(loop, run, Path(output_dir), resumed)


def _style(model: Any) -> str | None:
    """Style of an LLM recommender: its own attribute, or that of its options."""
    return getattr(model, "style", None) or getattr(getattr(model, "options", None), "style", None)


def _arguments(stage: StageSpec, folder: Path, seed: int, *, evaluates: bool, text: bool) -> Any:
    if not text:
        return build_arguments(stage, folder, seed, evaluates=evaluates)
    from llmrec.training import answers  # trl is loaded only for the text style

    return build_arguments(stage, folder, seed, evaluates=evaluates, kind=answers.SFTConfig, extra=answers.ARGUMENTS)


def _build_loop(
    module: StageModule, run: StageRun, args: Any, examples: Any, collator: Callable[..., Any], *, text: bool
) -> StageLoop:
    kind: Any = RecTrainer
    if text:
        from llmrec.training.answers import AnswerTrainer

        kind = AnswerTrainer
    loop = kind(module, args=args, train_dataset=examples, data_collator=collator, eval_dataset={})
    loop.begin(run)
    loop.add_callback(Progress(f"stage {run.stage.train}"))
    return loop


def _settings(module: StageModule, stage: StageSpec, args: Any, num_examples: int) -> dict[str, str]:
    """What a resumed run must share with the first beyond the caller's hashes."""
    return {
        "seed": str(args.seed),
        "examples": str(num_examples),
        "per_device_train_batch_size": str(args.per_device_train_batch_size),
        "gradient_accumulation_steps": str(args.gradient_accumulation_steps),
        "processes": str(args.world_size),
        "stage": stage.train,
        "strategy": json.dumps(stage.strategy.model_dump(mode="json"), sort_keys=True),
        "model": TrainableState(module).signature(),
    }


def _tidy(output_dir: Path, resume: str) -> None:
    checkpoints.clear_leftovers(output_dir / "checkpoints")
    present = [output_dir / name for name in ("checkpoints", "log.jsonl", "done.json") if (output_dir / name).exists()]
    if resume != "never" or not present:
        return
    number = 1 + sum(path.name.startswith("superseded-") for path in output_dir.iterdir())
    aside = output_dir / f"superseded-{number}"
    aside.mkdir()
    for path in present:
        os.replace(path, aside / path.name)
    notice(f"starting anew; what was in {output_dir} is now in {aside.name}")


def _train(
    loop: Any, run: StageRun, output_dir: Path, num_examples: int, context: DataContext, force: bool
) -> int | None:
    """Prepare the strategy and train to the end; the step it went on from, if any."""
    args = loop.args
    plan = TrainContext(data=context, num_examples=num_examples, total_steps=loop.total_steps, seed=args.seed)
    run.strategy.prepare(plan, loop.inner_model, derived_generator(args.seed, PREPARE_DRAWS))
    loop.adopt_weights()
    latest = checkpoints.find_latest(Path(args.output_dir))
    step = None
    if latest is not None:
        manifest = checkpoints.verify(latest, required=checkpoints.RESUMABLE, hashes=False)
        _compare(manifest.identity, run.identity, latest, force)
        step = manifest.step
    _expect_one_step(step, args, output_dir)
    with together(args, f"writing to {output_dir}"):
        if args.should_save:
            truncate_log(output_dir / "log.jsonl", step or 0)
            _announce(loop, run, num_examples, step)
    run.began = time.monotonic()
    if latest is not None and _complete(latest, loop.total_steps):
        loop._load_from_checkpoint(str(latest))
        loop.state.global_step = step
        run.began = time.monotonic()
    else:
        loop.train(resume_from_checkpoint=str(latest) if latest is not None else None)
    return step


def _compare(stored: dict[str, str], ours: dict[str, str], where: Path, force: bool) -> None:
    """Refuse a folder of something else. Another division of the same examples per step is no other run."""

    def examples_per_step(identity: dict[str, str]) -> str:
        return str(math.prod(int(identity.get(name, 0)) for name in DIVISION))

    before, now = examples_per_step(stored), examples_per_step(ours)
    if before != now:
        stored, ours = {**stored, EXAMPLES_PER_STEP: before}, {**ours, EXAMPLES_PER_STEP: now}
    elif any(stored[name] != ours[name] for name in DIVISION):
        notice(
            f"{where.name} was written by {stored['processes']} process(es), now there are {ours['processes']}; every "
            f"step takes the same {now} examples, but sums in another order: the result is close, not bit for bit"
        )
        stored = {**stored, **{name: ours[name] for name in DIVISION}}
    checkpoints.compare_identity(stored, ours, where, force=force)


def _expect_one_step(step: int | None, args: Any, output_dir: Path) -> None:
    """Every process must have found the same checkpoint, or they would train different models.

    Raises:
        CheckpointError: They did not; the folder is not the same one for all machines.
    """
    found = torch.tensor([-1.0 if step is None else float(step)], device=args.device)
    steps = [found]
    if args.world_size > 1:
        steps = [torch.zeros_like(found) for _ in range(args.world_size)]
        torch.distributed.all_gather(steps, found)
    if len({float(one) for one in steps}) > 1:
        raise CheckpointError(
            f"{output_dir}: processes found checkpoints of different steps ({[int(one) for one in steps]}); expected "
            "a folder that all machines share"
        )


def _complete(checkpoint: Path, total_steps: int) -> bool:
    """Whether training ended at this checkpoint, and only the final weights are missing."""
    record = StageRecord(**unpack_json(checkpoint / checkpoints.STAGE_STATE))
    return record.stopped_early or unpack_json(checkpoint / checkpoints.TRAINER_STATE)["global_step"] >= total_steps


def _announce(loop: Any, run: StageRun, num_examples: int, step: int | None) -> None:
    parameters = list(loop.model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    args = loop.args
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    notice(
        f"stage {run.stage.train}: {trainable:,} of {sum(p.numel() for p in parameters):,} parameters train; "
        f"{num_examples:,} examples, {loop.total_steps:,} steps of {batch} "
        f"({loop.total_steps / loop.steps_per_epoch:.3g} epochs) on {args.device.type}"
        + (f"; going on from step {step:,}" if step is not None else "")
    )


def _finish(loop: Any, run: StageRun, output_dir: Path, resumed: int | None) -> StageResult:
    """Restore the best state, store it as `final`, and mark the stage as done."""
    record = run.record
    record.seconds += time.monotonic() - run.began
    loop.sharding.release()
    if run.best is not None:
        loop.trainable.load(run.best, "the best state")
    steps = int(loop.state.global_step)
    result = StageResult(
        steps, steps / loop.steps_per_epoch, record.best_metric, record.stopped_early, record.seconds, resumed
    )
    with together(loop.args, f"finishing {output_dir}"):
        if loop.args.should_save:
            _write_final(loop, run, output_dir, result)
    return result


def _write_final(loop: Any, run: StageRun, output_dir: Path, result: StageResult) -> None:
    record = run.record
    contents = {
        checkpoints.TRAINABLE: pack(loop.trainable.tensors()),
        checkpoints.STRATEGY: pack(run.strategy.state_dict()),
        checkpoints.STAGE_STATE: pack_json(asdict(record)),
    }
    final = output_dir / "checkpoints" / "final"
    checkpoints.write_folder(final, contents, step=result.steps, identity=run.identity)
    with checkpoints.writing(output_dir / "done.json"):
        write_json(output_dir / "done.json", asdict(result))
    best = "" if record.best_metric is None else f", {run.stage.metric} {record.best_metric:.4f}"
    early = f" (the best was step {record.best_step})" if record.best_step not in (None, result.steps) else ""
    notice(f"stage {run.stage.train}: done after {result.steps:,} steps in {duration(record.seconds)}{best}{early}")


def _finished(output_dir: Path, module: StageModule, identity: dict[str, str], force: bool) -> StageResult | None:
    """Load the final weights of a stage that is done; None when it is not, or when they are damaged."""
    marker, final = output_dir / "done.json", output_dir / "checkpoints" / "final"
    if not marker.is_file():
        return None
    try:
        result = StageResult(**json.loads(marker.read_text(encoding="utf-8")))
        manifest = checkpoints.verify(final)
    except (CheckpointError, ValueError, TypeError) as error:
        notice(f"{marker} says done, but the final weights cannot be used: {error}")
        return None
    _compare(manifest.identity, identity, final, force)
    tensors = unpack(final / checkpoints.TRAINABLE)
    # What belongs to the strategy alone is not needed once training is over.
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    TrainableState(module.model).load({n.removeprefix("model."): t for n, t in kept.items()}, str(final))
    return result
