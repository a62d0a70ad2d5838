"""Cases of test_distributed.py: stages of small recipes, under every launcher that runs on a processor.

    LAUNCHER-TASK              thirty steps, validated every six
    LAUNCHER-TASK-resume       twelve steps, and the same from the checkpoint of step 5
    LAUNCHER-TASK-after-CASE   from that checkpoint of another case, which another number of processes wrote

One process and several see the same rows in the same global batches, without dropout, so their losses must agree.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from llmrec import discovery
from llmrec.errors import CheckpointError
from llmrec.recipe import Recipe, StageSpec, parse_recipe
from llmrec.run_dir import RunDir
from llmrec.strategies.base import StepInfo
from llmrec.training import stages
from llmrec.training.loop import StageModule
from llmrec.training.sharding import Divided
from llmrec.training.states import derived_generator
from llmrec.training.trainer import train_stage
from tests.runs import ROOT, prompted_recipe, small_recipe

STEPS = 30
BATCH = {"encoder": 32, "item_slots": 32, "hybrid": 16, "text": 16}
PREPARED: dict[str, tuple[Recipe, RunDir, Any]] = {}
# Asked for by the recipe and not by a profile; every weight is divided, where the default spares small ones.
ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
         **dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")}  # fmt: skip


def prepare(folder: Path) -> None:
    """Data sets of all tasks; 61 and 41 users, so that the last batch of an epoch cannot be halved."""
    for task in BATCH:
        recipe = _recipe(task)
        run_dir = RunDir(folder / f"data-{task}")
        PREPARED[task] = recipe, run_dir, stages.prepare_dataset(recipe, run_dir, lambda line: None)


def _recipe(task: str) -> Recipe:
    if task in ("encoder", "item_slots"):
        users = "dataset.options={users: 61, items: 30, events_per_user: 8}"
        return small_recipe("ilora", users, "encoder.dropout=0.0", "tuner.lora_dropout=0.0", "prompt.slot_content=both")
    prompt: dict[str, Any] = {"curriculum": True} if task == "hybrid" else {}
    raw = prompted_recipe(task, **prompt).model_dump(mode="json")
    raw["tuner"]["lora_dropout"] = 0.0
    raw["dataset"]["options"]["users"] = 41
    return parse_recipe(raw)


def run(case: str, folder: Path) -> dict[str, Any]:
    """What one process reports of a case."""
    launcher, task, *what = case.split("-")
    options: dict[str, Any] = {}
    if launcher.startswith("loop"):
        return bare_loop(folder, int(launcher.removeprefix("loop_zero") or 0) if "zero" in launcher else None)
    if launcher == "ddp":
        dist.init_process_group("gloo")
    elif launcher != "plain":
        launched(launcher)
    if launcher == "recipe_zero3":
        options["deepspeed"] = ZERO3
    if task.endswith("_recomputed"):
        task, options["activation_checkpointing"] = task.removesuffix("_recomputed"), True
    if task.endswith("_half"):  # half the examples per step
        task, options["batch"] = task.removesuffix("_half"), BATCH["item_slots"] // 2
    if not what:
        return train(folder, task, **options)
    options |= {"max_steps": 12, "save_strategy": "steps", "save_steps": 5, "save_total_limit": None}
    if what[0] == "resume":
        whole = train(folder / "whole", task, **options)
        return {**_go_on(folder, folder / "whole", task, **options), "whole": whole}
    return _go_on(folder, folder.parent / "-".join(what[1:]) / "whole", task, **options)


def _go_on(folder: Path, before: Path, task: str, **options: Any) -> dict[str, Any]:
    """Train from the checkpoint of step 5 of a finished stage."""
    if _rank() == 0:
        shutil.copytree(before / "stage", folder / "cut" / "stage")
        for name in ("checkpoint-10", "checkpoint-12", "final"):
            shutil.rmtree(folder / "cut" / "stage" / "checkpoints" / name)
        (folder / "cut" / "stage" / "done.json").unlink()
    if _world() > 1:
        dist.barrier()
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            again = train(folder / "cut", task, **options)
        except CheckpointError as error:
            return {"refused": str(error)}
    return {"again": again, "said": said.getvalue()}


def train(folder: Path, task: str, **options: Any) -> dict[str, Any]:
    """Train a stage; its losses, and from the first process its weights in FOLDER/weights.safetensors."""
    run, part = _parts(task)
    prompted = task in ("hybrid", "text")
    data = stages._prompted_data(run, run.recipe.stages[-1]) if prompted else stages._dense_data(run, part)
    examples, collator = data
    settings: dict[str, Any] = {
        "train": "encoder" if task == "encoder" else "tuner", "max_steps": STEPS, "learning_rate": 3e-3,
        "per_device_train_batch_size": int(options.pop("batch", BATCH[task])) // _world(), "warmup_steps": 2,
        "logging_steps": 1, "save_strategy": "no", "eval_strategy": "steps", "eval_steps": 6, "weight_decay": 0.01,
    }  # fmt: skip
    result = train_stage(
        part,
        discovery.build("strategy", "next_item", {}),
        examples,
        collator,
        stage=StageSpec(**{**settings, **options}),
        output_dir=folder / "stage",
        seed=7,
        context=run.dataset.context(),
        evaluate=lambda: _measure(part, examples, collator, task),
        identity={"data": "d"},
    )
    return {"resumed_from": result.resumed_from, "steps": result.steps, **_report(folder, part)}


def _parts(task: str) -> tuple[stages.Run, Any]:
    """A run, and its part that trains, fresh and the same in every process."""
    recipe, run_dir, dataset = PREPARED[task]
    run = stages.Run(recipe, run_dir, dataset, print)
    stages._make_encoder(run)
    if task == "encoder":
        return run, run.encoder
    stages._make_model(run)
    return run, run.model


@torch.no_grad()
def _measure(part: Any, examples: Any, collator: Any, task: str) -> dict[str, float]:
    """A number that depends on the weights. Processes run the model a different number of times."""
    batch = collator([examples[row] for row in range(4)])
    for _ in range(1 + _rank()):
        if task in ("hybrid", "text"):
            value = part.answer_loss(batch)
        else:
            value = part.score_items(batch)[:, 1:].logsumexp(-1).mean()
    return {"ndcg@10": float(value)}


def _report(folder: Path, part: Any) -> dict[str, Any]:
    if _rank() == 0:
        kept = {name: p.detach().contiguous().clone() for name, p in part.named_parameters() if p.requires_grad}
        save_file(kept, folder / "weights.safetensors")
        part.save_pretrained(folder / "model")
    lines = [json.loads(line) for line in (folder / "stage" / "log.jsonl").read_text().splitlines()]
    return {
        "losses": [line["loss"] for line in lines if "loss" in line],
        "norms": [line["grad_norm"] for line in lines if "grad_norm" in line],
        "metrics": [line["eval_ndcg@10"] for line in lines if "eval_ndcg@10" in line],
        "whole_and_plain": all(type(p) is nn.Parameter and p.numel() for p in part.parameters()),
        "wrapped_classes": sorted({type(m).__name__ for m in part.modules() if type(m).__name__.startswith("FSDP")}),
        "norm_of_the_base": sum(float(p.detach().double().norm()) for p in part.parameters() if not p.requires_grad),
    }


def bare_loop(folder: Path, zero: int | None) -> dict[str, Any]:
    """The item_slots stage without the trainer: `deepspeed.initialize`, or plain AdamW in one process."""
    run, part = _parts("item_slots")
    examples, collator = stages._dense_data(run, part)
    module = StageModule(part, discovery.build("strategy", "next_item", {})).train()
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.01)
    step: Any = module
    if zero is not None:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
        Divided.before_wrapping(SimpleNamespace(loop=SimpleNamespace(model=module), _single=[]))  # type: ignore[arg-type]
        config = {
            "train_micro_batch_size_per_gpu": BATCH["item_slots"] // _world(),
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # DeepSpeed's default is 1
            "zero_optimization": {"stage": zero, "stage3_param_persistence_threshold": 0},
        }
        step, optimizer, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    losses = []
    for number in range(STEPS):
        rows = [(number * BATCH["item_slots"] + row) % len(examples) for row in range(BATCH["item_slots"])]
        batch = collator([examples[row] for row in rows[_rank() :: _world()]])
        total, _, count = step(batch, StepInfo(number, STEPS, 0.0, derived_generator(number)))
        counts = torch.tensor([float(count), float(total.detach()) * count], dtype=torch.float64)
        if _world() > 1:
            dist.all_reduce(counts)
        losses.append(float(counts[1] / counts[0]))
        total = total * (count * _world() / float(counts[0]))
        if zero is None:
            total.backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            step.backward(total)
            step.step()
    return {"losses": losses}


def _world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def launched(profile: str) -> None:
    """Set the environment `accelerate launch` sets for a profile, in float32 unless "_bf16" follows its name.

    Accelerate divides weights over accelerators only, so it is told that the gloo processes are such; everything behind
    that question is the real thing.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    if profile != "recipe_zero3":
        os.environ.update(_environment(profile))
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    answer = ("gloo", DistributedType.MULTI_XPU)
    PartialState._prepare_backend = lambda *args, **kwargs: answer  # type: ignore[method-assign, assignment]
    if "zero" in profile:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    else:
        dist.init_process_group("gloo")


def _environment(profile: str) -> dict[str, str]:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    profile, _, precision = profile.partition("_")
    precision = precision or "no"
    config = ROOT / "accelerate_configs" / f"{profile}.yaml"
    words = ["--config_file", str(config), "--num_processes", str(_world()), "--mixed_precision", precision]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args([*words, "script.py"]))
    fields = ",".join(defaults.deepspeed_config)
    args = Namespace(**{**vars(args), "main_process_port": 0, "deepspeed_fields_from_accelerate_config": fields})
    made = prepare_deepspeed_cmd_env(args)[1] if profile.startswith("zero") else prepare_multi_gpu_env(args)
    return {name: value for name, value in made.items() if name.startswith(("ACCELERATE_", "FSDP_"))}
