"""`--launcher NAME`: start the same command again under `accelerate launch`."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from llmrec.assets import find_asset
from llmrec.errors import DependencyError, RecipeError


def relaunch(args_list: Sequence[str], launcher: str) -> NoReturn:
    """Replace this process by `accelerate launch --config_file PROFILE -m llmrec VERB ...`.

    Args:
        args_list: The words llmrec was called with (`args.argv`); `--launcher` is taken out.
        launcher: A name of `accelerate_configs/`, or the path of a profile of your own.

    Raises:
        RecipeError: There is no such profile, or this process was itself started by a launcher.
        DependencyError: The profile wants DeepSpeed and it is not installed.
    """
    if "LOCAL_RANK" in os.environ:
        raise RecipeError(
            f"found --launcher {launcher} in a process that a launcher has already started; "
            "use either `accelerate launch ... -m llmrec` or `--launcher`, not both"
        )
    command = launch_command(args_list, launcher)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], command)


def launch_command(args_list: Sequence[str], launcher: str) -> list[str]:
    """The command line `relaunch` runs, as words."""
    profile = find_asset("accelerate_configs", launcher)
    _require_libraries(profile)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(profile)]
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


def _require_libraries(profile: Path) -> None:
    import yaml

    content = yaml.safe_load(profile.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or "distributed_type" not in content:
        raise RecipeError(f"{profile}: found no key 'distributed_type'; expected a configuration of accelerate")
    if content["distributed_type"] == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        raise DependencyError("deepspeed", extra="deepspeed", purpose=f"the launcher profile {profile.stem!r}")
