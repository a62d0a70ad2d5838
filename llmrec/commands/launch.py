"""`--launcher NAME`: start the same command again under `accelerate launch`, after checks that need no model.

Three kinds of refusal: a recipe and a profile that can never work together (`check_pair`), a library the profile needs
(`launch_command`), and a machine that is not the one the profile describes (`machine_problems`: too few accelerators, a
placeholder that was not filled in). `llmrec check --launcher` only warns of the last, since it may run elsewhere.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from llmrec.assets import find_asset
from llmrec.errors import DependencyError, RecipeError

if TYPE_CHECKING:
    from llmrec.recipe import Recipe

PLACEHOLDERS = ("ADDRESS_OF_THE_FIRST_MACHINE", "RANK_OF_THIS_MACHINE")
"""What `accelerate_configs/multi_node.yaml` says where only its user knows the value."""


@dataclass(frozen=True)
class Profile:
    """What a launcher profile says, as far as llmrec reads it.

    Args:
        path: The file.
        kind: accelerate's `distributed_type`.
        processes: Of all machines together.
        machines: How many.
        use_cpu: Processes compute on the processor.
        mixed_precision: "no", "bf16" or "fp16".
        sharding: What processes divide: "none", "zero0" to "zero3", or "fsdp".
        address: Of the first machine.
        rank: Of this machine; a text where it was not filled in.
    """

    path: Path
    kind: str
    processes: int
    machines: int
    use_cpu: bool
    mixed_precision: str
    sharding: str
    address: str | None
    rank: int | str


def relaunch(args_list: Sequence[str], launcher: str, recipe: Recipe | None = None) -> NoReturn:
    """Replace this process by `accelerate launch --config_file PROFILE -m llmrec VERB ...`.

    Args:
        args_list: The words llmrec was called with (`args.argv`); `--launcher` is taken out.
        launcher: A name of `accelerate_configs/`, or the path of a profile of your own.
        recipe: What is going to run, where it is known: refused here when the profile cannot run it.

    Raises:
        RecipeError: There is no such profile, it fits neither recipe nor machine, or this process was itself started
            by a launcher.
        DependencyError: The profile wants DeepSpeed and it is not installed.
    """
    if "LOCAL_RANK" in os.environ:
        raise RecipeError(
            f"found --launcher {launcher} in a process that a launcher has already started; "
            "use either `accelerate launch ... -m llmrec` or `--launcher`, not both"
        )
    profile = read_profile(launcher)
    check_pair(profile, recipe)
    command = launch_command(args_list, launcher)
    problems = machine_problems(profile)
    if problems:
        raise RecipeError("\n".join(problems))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], command)


def launch_command(args_list: Sequence[str], launcher: str) -> list[str]:
    """The command line `relaunch` runs, as words.

    Raises:
        RecipeError: There is no such profile.
        DependencyError: The profile wants DeepSpeed and it is not installed.
    """
    profile = read_profile(launcher)
    require_libraries(profile)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(profile.path)]
    return [*launch, "-m", "llmrec", *without_launcher(args_list)]


def without_launcher(args_list: Sequence[str]) -> list[str]:
    """The words without `--launcher NAME` and `--launcher=NAME`."""
    kept: list[str] = []
    words = iter(args_list)
    for word in words:
        if word == "--launcher":
            next(words, None)
        elif not word.startswith("--launcher="):
            kept.append(word)
    return kept


def read_profile(launcher: str) -> Profile:
    """Read a profile by its name or path.

    Raises:
        RecipeError: There is no such file, or it is no configuration of accelerate.
    """
    import yaml

    path = find_asset("accelerate_configs", launcher)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not a YAML text: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict) or "distributed_type" not in content:
        raise RecipeError(f"{path}: found no key 'distributed_type'; expected a configuration of accelerate")
    kind = str(content["distributed_type"])
    counts = {name: content.get(name, 1) for name in ("num_processes", "num_machines")}
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise RecipeError(f"{path}: {name}: found {value!r}, expected a whole number from 1")
    return Profile(
        path=path,
        kind=kind,
        processes=counts["num_processes"],
        machines=counts["num_machines"],
        use_cpu=bool(content.get("use_cpu", False)),
        mixed_precision=str(content.get("mixed_precision") or "no"),
        sharding=_sharding(kind, content.get("deepspeed_config") or {}, path),
        address=content.get("main_process_ip"),
        rank=content.get("machine_rank", 0),
    )


def _sharding(kind: str, deepspeed: dict[str, Any], path: Path) -> str:
    if kind == "FSDP":
        return "fsdp"
    if kind != "DEEPSPEED":
        return "none"
    stage = deepspeed.get("zero_stage", 2)
    if "deepspeed_config_file" in deepspeed:
        own = Path(deepspeed["deepspeed_config_file"])
        try:
            stage = json.loads(own.read_text(encoding="utf-8")).get("zero_optimization", {}).get("stage", 0)
        except (OSError, ValueError) as error:
            raise RecipeError(f"{path}: deepspeed_config_file: {own} cannot be read as JSON: {error}") from error
    if stage not in (0, 1, 2, 3):
        raise RecipeError(f"{path}: found the ZeRO stage {stage!r}, expected 0, 1, 2 or 3")
    return f"zero{stage}"


def require_libraries(profile: Profile) -> None:
    """Refuse a profile whose library is missing.

    Raises:
        DependencyError: It wants DeepSpeed.
    """
    if profile.kind == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        raise DependencyError("deepspeed", extra="deepspeed", purpose=f"the launcher profile {profile.path.stem!r}")


def check_pair(profile: Profile, recipe: Recipe | None) -> None:
    """Refuse what can work on no machine.

    Raises:
        RecipeError: Half precision on a processor, or quantised weights that would have to be divided.
    """
    if profile.use_cpu and profile.mixed_precision != "no":
        raise RecipeError(
            f"{profile.path}: found use_cpu: true with mixed_precision: {profile.mixed_precision}; expected 'no': on a "
            "processor the weights carry the dtype, which llm.dtype: bfloat16 chooses"
        )
    if recipe is not None and recipe.llm is not None and recipe.llm.quantize is not None:
        if profile.sharding in ("zero3", "fsdp"):
            from llmrec.llm.quantized import refuse_divided

            refuse_divided(recipe.llm.quantize, profile.sharding)


def machine_problems(profile: Profile) -> list[str]:
    """Why this machine cannot run a profile; empty when it can."""
    problems = []
    if profile.machines > 1:
        remedy = "copy the profile, fill it in, and give each machine its copy with --launcher"
        if profile.address in (None, *PLACEHOLDERS):
            expected = "the address of the first machine"
            problems.append(f"{profile.path}: main_process_ip: found {profile.address}, expected {expected}; {remedy}")
        if not isinstance(profile.rank, int) or not 0 <= profile.rank < profile.machines:
            expected = f"a number from 0 to {profile.machines - 1}, another one on each machine"
            problems.append(f"{profile.path}: machine_rank: found {profile.rank}, expected {expected}; {remedy}")
    if not profile.use_cpu:
        needed, found = -(-profile.processes // profile.machines), count_accelerators()
        if found < needed:
            remedy = (
                f"copy the profile and set num_processes to {found * profile.machines}, or use single_gpu"
                if found
                else "use --launcher cpu, or no launcher"
            )
            problems.append(f"{profile.path}: accelerators on this machine: found {found}, expected {needed}; {remedy}")
    return problems


def count_accelerators() -> int:
    """Accelerators this process may use (`CUDA_VISIBLE_DEVICES` counts)."""
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0
