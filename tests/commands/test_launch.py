"""What `--launcher` refuses before anything is started, and what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from llmrec.assets import find_asset
from llmrec.cli import main
from llmrec.commands import launch
from llmrec.errors import DependencyError, RecipeError
from llmrec.recipe import Recipe, load_recipe

SMOKE = find_asset("recipes", "smoke/ilora")


def profile(folder: Path, source: str, **changes: Any) -> str:
    """A copy of a profile that comes with llmrec, with some keys changed."""
    content = yaml.safe_load(find_asset("accelerate_configs", source).read_text(encoding="utf-8"))
    path = folder / f"own-{source}.yaml"
    path.write_text(yaml.safe_dump({**content, **changes}), encoding="utf-8")
    return str(path)


def quantised() -> Recipe:
    return load_recipe(SMOKE, ["llm.quantize=4bit"])


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that would have replaced this process."""
    commands: list[list[str]] = []
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(launch.os, "execv", lambda program, words: commands.append(words))
    return commands


@pytest.mark.parametrize(("name", "message"), [("zero3", "ZeRO-3"), ("fsdp2", "FSDP")])
def test_quantised_weights_are_not_divided(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = launch.read_profile(name)
    with pytest.raises(RecipeError, match=f"4bit with .*{message}.*multi_gpu.*zero2.*{name} without llm.quantize"):
        launch.check_pair(pair, quantised())
    launch.check_pair(pair, load_recipe(SMOKE))


@pytest.mark.parametrize("name", ["cpu", "single_gpu", "multi_gpu", "multi_node", "zero2"])
def test_quantised_weights_may_be_repeated(name: str) -> None:
    launch.check_pair(launch.read_profile(name), quantised())


def test_half_precision_is_not_for_processors(tmp_path: Path, started: list[list[str]]) -> None:
    own = profile(tmp_path, "cpu", mixed_precision="bf16")
    with pytest.raises(RecipeError, match="use_cpu: true with mixed_precision: bf16.*llm.dtype"):
        launch.relaunch(["train"], own)
    assert not started


def test_deepspeed_has_to_be_there(
    monkeypatch: pytest.MonkeyPatch, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"'zero2'.*llmrec\[deepspeed\]"):
        launch.relaunch(["train"], "zero2")
    assert main(["check", "smoke/sasrec", "--launcher", "zero3"]) == 2
    assert "llmrec[deepspeed]" in capsys.readouterr().err and not started


@pytest.mark.parametrize(
    ("name", "found", "message"),
    [
        ("single_gpu", 0, "found 0, expected 1; use --launcher cpu"),
        ("multi_gpu", 2, "found 2, expected 8; copy the profile and set num_processes to 2"),
    ],
)
def test_accelerators_are_counted(
    name: str, found: int, message: str, monkeypatch: pytest.MonkeyPatch, started: list[list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(launch, "count_accelerators", lambda: found)
    assert main(["train", str(SMOKE), "--launcher", name]) == 2
    assert message in capsys.readouterr().err and not started
    assert main(["check", "smoke/sasrec", "--launcher", name]) == 0
    assert f"warning: not on this machine: {launch.read_profile(name).path}" in capsys.readouterr().err


def test_a_node_needs_its_own_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "count_accelerators", lambda: 8)
    address, rank = launch.machine_problems(launch.read_profile("multi_node"))
    assert "main_process_ip: found ADDRESS_OF" in address and "machine_rank: found RANK_OF" in rank
    monkeypatch.setattr(launch, "count_accelerators", lambda: 7)
    assert "found 7, expected 8" in launch.machine_problems(launch.read_profile("multi_node"))[2]


def test_a_filled_in_profile_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[list[str]]) -> None:
    monkeypatch.setattr(launch, "count_accelerators", lambda: 8)
    with pytest.raises(RecipeError, match="machine_rank: found 2, expected a number from 0 to 1"):
        wrong = profile(tmp_path, "multi_node", main_process_ip="node0", machine_rank=2)
        launch.relaunch(["train"], wrong)
    own = profile(tmp_path, "multi_node", main_process_ip="node0", machine_rank=1)
    launch.relaunch(["train", str(SMOKE), "--launcher", own], own, quantised())
    assert started[0][-4:] == ["-m", "llmrec", "train", str(SMOKE)] and own in started[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("num_processes: 2", "distributed_type"),
        ("- 1", "distributed_type"),
        ("distributed_type: [", "not a YAML text"),
        ("{distributed_type: MULTI_GPU, num_processes: two}", "num_processes: found 'two'"),
        ("{distributed_type: DEEPSPEED, deepspeed_config: {zero_stage: 4}}", "ZeRO stage 4"),
        ("{distributed_type: DEEPSPEED, deepspeed_config: {deepspeed_config_file: no.json}}", "no.json cannot be read"),
    ],
)
def test_what_is_no_profile(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(RecipeError, match=message):
        launch.read_profile(str(path))


def test_a_stage_of_its_own_file(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}}')
    own = profile(tmp_path, "zero2", deepspeed_config={"deepspeed_config_file": str(tmp_path / "ds.json")})
    assert launch.read_profile(own).sharding == "zero3"
