"""Prompts, recipes and launcher profiles are found by name; profiles are what accelerate accepts."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmrec.assets import asset_names, asset_root, find_asset
from llmrec.errors import LlmrecError, RecipeError

PROFILES = ["cpu", "fsdp2", "multi_gpu", "multi_node", "single_gpu", "zero2", "zero3"]


def test_profiles_are_listed() -> None:
    assert asset_names("accelerate_configs") == PROFILES


@pytest.mark.parametrize("name", ["zero2", "zero2.yaml", "accelerate_configs/zero2.yaml", "./accelerate_configs/zero2"])
def test_all_spellings_find_the_file(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_asset("accelerate_configs", name) == asset_root("accelerate_configs") / "zero2.yaml"


def test_a_file_of_the_user_wins(tmp_path: Path) -> None:
    own = tmp_path / "zero2.yaml"
    own.write_text("distributed_type: 'NO'\n")
    assert find_asset("accelerate_configs", str(own)) == own


@pytest.mark.parametrize("name", ["zero1", "../pyproject", "/etc/zero2", ""])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="zero2"):
        find_asset("accelerate_configs", name)


def test_unknown_kind() -> None:
    with pytest.raises(LlmrecError, match="prompts"):
        asset_root("weights")


@pytest.mark.parametrize("name", PROFILES)
def test_accelerate_accepts_the_profile(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(find_asset("accelerate_configs", name)))
    assert config.num_processes >= 1
    kinds = {"single_gpu": "NO", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "fsdp2": "FSDP"}
    assert config.distributed_type.value == kinds.get(name, "MULTI_GPU")
    assert config.use_cpu == (name == "cpu")


@pytest.mark.parametrize("name", ["zero2", "zero3", "fsdp2"])
def test_plugin_keys_are_flags_of_the_launcher(name: str) -> None:
    """accelerate copies these keys onto its own flags and would ignore a misspelled one."""
    import yaml
    from accelerate.commands.launch import launch_command_parser

    flags = {action.dest for action in launch_command_parser()._actions}
    content = yaml.safe_load(find_asset("accelerate_configs", name).read_text(encoding="utf-8"))
    keys = {*content.get("deepspeed_config", {}), *content.get("fsdp_config", {})}
    assert keys and not keys - flags
