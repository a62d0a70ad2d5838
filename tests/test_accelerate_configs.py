"""Every launcher profile: read by accelerate, resolved by its launcher, and run as far as a processor allows.

tests/test_wheel.py checks that each file is in the wheel; tests/commands/test_launch.py holds the refusals.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llmrec.assets import asset_names, find_asset
from llmrec.commands.launch import launch_command, machine_problems, read_profile
from tests.runs import ROOT, words

NAMES = asset_names("accelerate_configs")
EXPECTED: dict[str, dict[str, Any]] = {
    "cpu": {"processes": 2, "sharding": "none", "use_cpu": True, "mixed_precision": "no"},
    "single_gpu": {"processes": 1, "sharding": "none"},
    "multi_gpu": {"processes": 8, "sharding": "none"},
    "multi_node": {"processes": 16, "machines": 2, "sharding": "none", "address": "ADDRESS_OF_THE_FIRST_MACHINE"},
    "zero2": {"processes": 8, "sharding": "zero2"},
    "zero3": {"processes": 8, "sharding": "zero3"},
    "fsdp2": {"processes": 8, "sharding": "fsdp"},
}
VARIABLES: dict[str, dict[str, str]] = {
    "single_gpu": {"ACCELERATE_USE_CPU": "False", "CUDA_VISIBLE_DEVICES": "0"},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}
"""What processes of a profile find in their environment; llmrec and transformers read them there."""


def environment(home: Path) -> dict[str, str]:
    more = {"PYTHONPATH": str(ROOT), "HF_HOME": str(home), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return {**os.environ, **more}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def on_processors(folder: Path, name: str, processes: int, **changes: Any) -> str:
    """A copy of a profile for processors."""
    content = yaml.safe_load(find_asset("accelerate_configs", name).read_text(encoding="utf-8"))
    content |= {"use_cpu": True, "mixed_precision": "no", "num_processes": processes, **changes}
    path = folder / f"{name}-{len(list(folder.iterdir()))}.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


def arguments(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What accelerate's launcher makes of the command llmrec builds."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    command = launch_command(["train", "r.yaml", "--launcher", name], name)
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    args = launch_command_parser().parse_args(command[3:])
    assert args.module and args.training_script == "llmrec" and args.training_script_args == ["train", "r.yaml"]
    return _validate_launch_command(args)[0]


def trained_by(run: Path, processes: int) -> None:
    """The run is complete, was written once, and every stage was trained by that many processes together."""
    record = json.loads((run / "metrics.json").read_text())
    assert 0.0 <= record["models"]["ilora"]["ndcg@10"]["mean"] <= 1.0
    manifests = sorted(run.glob("stages/*/checkpoints/final/manifest.json"))
    assert len(manifests) == 2
    assert {json.loads(path.read_text())["identity"]["processes"] for path in manifests} == {str(processes)}
    steps = [json.loads(line).get("step") for line in (run / "stages/2-tuner/log.jsonl").read_text().splitlines()]
    assert len(steps) == len(set(map(str, steps))) or steps == sorted(steps)


def test_every_profile_is_described() -> None:
    assert sorted(EXPECTED) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_and_llmrec_read_the_same(name: str) -> None:
    from accelerate.commands.config.config_args import ClusterConfig

    profile, config = read_profile(name), ClusterConfig.from_yaml_file(str(find_asset("accelerate_configs", name)))
    defaults = {"machines": 1, "use_cpu": False, "mixed_precision": "bf16"}
    for field, value in {**defaults, **EXPECTED[name]}.items():
        assert getattr(profile, field) == value, field
    found = (config.distributed_type.value, config.num_processes, config.num_machines, config.use_cpu)
    assert found == (profile.kind, profile.processes, profile.machines, profile.use_cpu)
    found = (config.mixed_precision, config.main_process_ip, config.machine_rank)
    assert found == (profile.mixed_precision, profile.address, profile.rank)


@pytest.mark.parametrize("name", NAMES)
def test_the_launcher_resolves_the_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kind, processes and precision arrive in the environment of the processes; nothing is started."""
    from accelerate.utils import launch

    args = arguments(name, monkeypatch)
    assert args.num_processes == EXPECTED[name]["processes"] and args.use_cpu == (name == "cpu")
    args.main_process_port, args.machine_rank = free_port(), 0
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = "zero_stage"
        variables = launch.prepare_deepspeed_cmd_env(args)[1]
    elif args.multi_gpu or args.use_fsdp:
        variables = launch.prepare_multi_gpu_env(args)
        assert int(args.nproc_per_node) * args.num_machines == args.num_processes
    else:
        variables = launch.prepare_simple_launcher_cmd_env(args)[1]
    precision = "no" if name == "cpu" else "bf16"
    for variable, value in {"ACCELERATE_MIXED_PRECISION": precision, **VARIABLES.get(name, {})}.items():
        assert variables[variable] == value, variable


def test_machines_meet_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.utils.launch import prepare_multi_gpu_env

    args = arguments("multi_node", monkeypatch)
    args.main_process_ip, args.main_process_port, args.machine_rank = "node0", free_port(), 1
    prepare_multi_gpu_env(args)
    assert (args.rdzv_endpoint, args.node_rank) == (f"node0:{args.main_process_port}", 1)
    assert args.rdzv_backend == "static"  # whatever a profile says: the launcher reads it from its command line only


@pytest.mark.slow
def test_the_printed_cpu_command(tmp_path: Path) -> None:
    """The command of README, with two processes."""
    config = "accelerate_configs/cpu.yaml"
    command = ["-m", "accelerate.commands.launch", "--config_file", config, "-m", "llmrec", "train"]
    line = [sys.executable, *command, "recipes/smoke/ilora.yaml", "--out", str(tmp_path / "run")]
    done = subprocess.run(line, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    trained_by(tmp_path / "run", 2)


@pytest.mark.slow
def test_the_cpu_launcher_of_llmrec(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "llmrec", *words("ilora", tmp_path / "run"), "--launcher", "cpu", "--json"]
    done = subprocess.run(line, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["run"] == str(tmp_path / "run")  # one object, from one process
    trained_by(tmp_path / "run", 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_deepspeed_profiles_with_one_process(name: str, tmp_path: Path) -> None:
    """More than one DeepSpeed process on processors does not work through the Trainer (accelerate 1.15)."""
    pytest.importorskip("deepspeed")
    own = on_processors(tmp_path, name, 1, main_process_port=free_port())
    line = [sys.executable, "-m", "llmrec", *words("ilora", tmp_path / "run"), "--launcher", own]
    done = subprocess.run(line, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    trained_by(tmp_path / "run", 1)


@pytest.mark.slow
def test_two_machines_on_one(tmp_path: Path) -> None:
    """The profile of several machines, filled in and started twice, with one process each."""
    settings = {"main_process_ip": "127.0.0.1", "main_process_port": free_port(), "num_machines": 2}
    running = []
    for machine in (0, 1):
        own = on_processors(tmp_path, "multi_node", 2, machine_rank=machine, **settings)
        line = [sys.executable, "-m", "llmrec", *words("ilora", tmp_path / "run"), "--launcher", own]
        log = (tmp_path / f"{machine}.log").open("w")
        running.append(subprocess.Popen(line, cwd=ROOT, env=environment(tmp_path), stdout=log, stderr=log))
    statuses = [process.wait() for process in running]
    assert statuses == [0, 0], (tmp_path / "0.log").read_text()[-2000:] + (tmp_path / "1.log").read_text()[-2000:]
    trained_by(tmp_path / "run", 2)


@pytest.mark.slow
def test_quantised_weights_in_two_processes(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    recipe = words("ilora", tmp_path / "run", "llm.quantize=4bit")
    line = [sys.executable, "-m", "llmrec", *recipe, "--launcher", "cpu"]
    done = subprocess.run(line, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    trained_by(tmp_path / "run", 2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("cpu", "multi_node")])
def test_profiles_on_accelerators(name: str, tmp_path: Path) -> None:
    """As shipped, but with as many processes as there are accelerators."""
    if not torch.cuda.is_available():
        pytest.skip("no accelerator here")
    processes = 1 if name == "single_gpu" else torch.cuda.device_count()
    content = yaml.safe_load(find_asset("accelerate_configs", name).read_text(encoding="utf-8"))
    if content["distributed_type"] == "MULTI_GPU" and processes < 2:
        pytest.skip("data parallel needs two accelerators")
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({**content, "num_processes": processes}), encoding="utf-8")
    assert machine_problems(read_profile(str(own))) == []
    line = [sys.executable, "-m", "llmrec", *words("ilora", tmp_path / "run"), "--launcher", str(own)]
    env = {name: value for name, value in environment(tmp_path).items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    trained_by(tmp_path / "run", processes)
