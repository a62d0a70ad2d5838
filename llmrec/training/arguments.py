"""From a stage of a recipe to transformers' TrainingArguments.

A stage takes TrainingArguments' own names. What is ours to decide (folders, seed, which columns stay, the best state)
is refused there; everything else is handed on, after these defaults of ours:

    evaluation and checkpoint once an epoch, a hundred log lines a stage, the two newest checkpoints kept
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import TrainingArguments

from llmrec.discovery import nearest
from llmrec.errors import RecipeError
from llmrec.llm.loading import name_processor_to_deepspeed
from llmrec.training.speed import SpeedOptions

if TYPE_CHECKING:
    from llmrec.recipe import StageSpec

OURS = {
    "output_dir": "the run folder decides it",
    "seed": "the recipe's `seed` decides it",
    "data_seed": "the recipe's `seed` decides it",
    "resume_from_checkpoint": "resuming is automatic; see --resume",
    "remove_unused_columns": "collators hand over what models need",
    "load_best_model_at_end": "the best state is always restored; see the stage's `metric`",
    "metric_for_best_model": "use the stage's `metric`",
    "label_smoothing_factor": "it is an option of the strategy",
    "auto_find_batch_size": "a run must not depend on the memory that happened to be free",
    "disable_tqdm": "progress goes to standard error, as a bar or as lines",
    "enable_jit_checkpoint": "SIGTERM always writes a checkpoint",
    "save_only_model": "a checkpoint must be resumable",
    "ignore_data_skip": "a resumed run sees the examples the first one would have seen",
    "push_to_hub": "a run is published whole, when it is evaluated; see report.push_to and `llmrec push`",
    "torch_compile_backend": "decoder layers are compiled by torch's default backend; set torch_compile: true",
    "torch_compile_mode": "decoder layers are compiled in torch's default mode; set torch_compile: true",
    "liger_kernel_config": "the loss is ours and the other kernels are all used; set use_liger_kernel: true",
    "dataloader_persistent_workers": "examples change from epoch to epoch, which lasting workers would not notice",
    "length_column_name": "lengths come from the examples themselves",
}
"""Argument names a stage may not set, and who decides instead."""

ORDERS = ("random", "group_by_length")
"""Values of train_sampling_strategy; a strategy with an order of its own goes before "random"."""

_SPEED = tuple(field.name for field in dataclasses.fields(SpeedOptions))

_DEFAULTS: dict[str, Any] = {
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 0.01,
    "dataloader_num_workers": 0,
    "report_to": "none",
}

Arguments = TypeVar("Arguments", bound=TrainingArguments)


def build_arguments(
    stage: StageSpec,
    folder: Path,
    seed: int,
    *,
    evaluates: bool,
    kind: type[Arguments] = TrainingArguments,  # type: ignore[assignment]
    extra: dict[str, Any] | None = None,
) -> Arguments:
    """Training arguments of a stage.

    Args:
        stage: The stage of the recipe.
        folder: Where checkpoints go.
        seed: Of the stage.
        evaluates: Whether there is something to validate with.
        kind: TrainingArguments or a subclass.
        extra: Arguments the subclass needs.

    Raises:
        RecipeError: An unknown name (the nearest is given), one that is ours, or a value transformers refuses.
    """
    SpeedOptions.of(stage)
    given = {name: value for name, value in stage.training_arguments.items() if name not in _SPEED}
    known = [*(field.name for field in dataclasses.fields(TrainingArguments) if field.init), *_SPEED]
    for name in given:
        if name in OURS or name.startswith(("hub_", "fsdp_transformer", "jit_")):
            raise RecipeError(f"stage {stage.train}: {name} cannot be set: {OURS.get(name, 'it is not used here')}")
        if name not in known:
            raise RecipeError(
                f"stage {stage.train}: unknown key {name!r}{nearest(name, known)}; a stage takes its own keys and the "
                "names of transformers.TrainingArguments"
            )
    values = {**_DEFAULTS, **({"eval_strategy": "epoch"} if evaluates else {}), **given, **(extra or {})}
    order = values.get("train_sampling_strategy", "random")
    if order not in ORDERS:
        raise RecipeError(
            f"stage {stage.train}: train_sampling_strategy: found {order!r}, expected {' or '.join(ORDERS)}"
        )
    _check_evaluation(stage, values, evaluates)
    name_processor_to_deepspeed()
    accelerator = torch.accelerator.is_available() and not values.get("use_cpu")
    if not accelerator:
        # Weights carry their dtype on a processor; autocast would only slow it down.
        values.update(use_cpu=True, bf16=False, dataloader_pin_memory=False)
    if values.get("activation_checkpointing"):
        values["activation_checkpointing_kwargs"] = {
            "use_reentrant": False, **(values.get("activation_checkpointing_kwargs") or {}),
        }  # fmt: skip
    try:
        arguments = kind(
            output_dir=str(folder), seed=seed, data_seed=seed, remove_unused_columns=False, disable_tqdm=True,
            logging_nan_inf_filter=False, metric_for_best_model=stage.metric, load_best_model_at_end=False, **values,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise RecipeError(f"stage {stage.train}: transformers refuses its arguments: {error}") from error
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process, one device: nn.DataParallel would lose the gates of a tuner
    return arguments


def _check_evaluation(stage: StageSpec, values: dict[str, Any], evaluates: bool) -> None:
    wanted = str(getattr(values.get("eval_strategy", "no"), "value", values.get("eval_strategy", "no"))) != "no"
    if wanted and not evaluates:
        raise RecipeError(f"stage {stage.train}: eval_strategy asks for validation, and there is no validation split")
    if stage.early_stopping_patience is not None and not wanted:
        raise RecipeError(
            f"stage {stage.train}: early_stopping_patience needs validation; "
            + ("remove eval_strategy: 'no'" if evaluates else "the data set has no validation split")
        )
