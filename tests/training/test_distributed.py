"""Several processes train the model one process trains, under every launcher that runs on a processor.

`launched.py` says what is real there and what is not: accelerate is told that gloo processes are accelerators.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.processes import run_cases

Results = tuple[Path, dict[str, list[dict[str, Any]]]]
CLOSE = 1e-5
LAUNCHERS = ["ddp", "fsdp2", *(["zero2", "zero3", "recipe_zero3"] if find_spec("deepspeed") else [])]
TASKS = ["encoder", "item_slots", "item_slots_recomputed", "hybrid", "text"]
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed (extra deepspeed)")
slow = pytest.mark.slow


# A small encoder, in every test run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("pairs") / "cases"
    cases = ("alone:1", "pair:2", "three:3", "full_disk:2", "terminated:2", "resumed:2", "in_use:2")
    return folder, run_cases("tests.training.pairs", folder, *cases)


@pytest.mark.parametrize("case", ["pair", "three"])
def test_processes_train_the_model_of_one(case: str, pairs: Results) -> None:
    """The last batch of an epoch is shorter; of three processes, two have no row of it."""
    folder, results = pairs
    expected = results["alone"][0][case]
    for result in results[case]:
        torch.testing.assert_close(result["losses"], expected["losses"], atol=CLOSE, rtol=0)
    ours, theirs = load_file(folder / case / "end.safetensors"), load_file(folder / "alone" / f"{case}.safetensors")
    for name, tensor in ours.items():
        if name != "forwards":
            torch.testing.assert_close(tensor, theirs[name], atol=CLOSE, rtol=0)


def test_a_full_disk_stops_every_process_and_keeps_the_previous_checkpoint(pairs: Results) -> None:
    first, second = pairs[1]["full_disk"]
    assert "No space left" in first["error"] and "earlier checkpoints are as they were" in first["error"]
    assert "failed in another process" in second["error"]
    assert first["left"] == ["checkpoint-4"]


def test_a_signal_to_one_process_ends_all_at_the_same_step(pairs: Results) -> None:
    assert [result["status"] for result in pairs[1]["terminated"]] == [143, 143]
    assert pairs[1]["terminated"][0]["left"][-1] == "checkpoint-10"
    folder = pairs[0]
    assert [result["resumed_from"] for result in pairs[1]["resumed"]] == [10, 10]
    ours, theirs = load_file(folder / "resumed" / "end.safetensors"), load_file(folder / "pair" / "end.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_second_group_of_processes_is_refused(pairs: Results) -> None:
    errors = [result["error"] for result in pairs[1]["in_use"]]
    assert "is in use by process" in errors[0]
    assert "failed in another process" in errors[1]


# Recipes -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Every task in one process, and under every launcher in two."""
    folder = tmp_path_factory.mktemp("launched") / "cases"
    cases = [f"plain-{task}:1" for task in TASKS] + [f"{name}-{task}:2" for name in LAUNCHERS for task in TASKS]
    return folder, run_cases("tests.training.launched", folder, *cases)


@slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_thirty_steps_are_those_of_one_process(launcher: str, task: str, launched: Results) -> None:
    compare(launched, f"plain-{task}", f"{launcher}-{task}")


def compare(found: Results, plain: str, case: str) -> None:
    """Losses, validation and weights of every process are those of one process, and nothing stays divided."""
    folder, results = found
    (expected,) = results[plain]
    for result in results[case]:
        assert len(result["losses"]) == len(expected["losses"])
        for measured in ("losses", "metrics"):
            torch.testing.assert_close(result[measured], expected[measured], atol=CLOSE, rtol=0)
        torch.testing.assert_close(result["norms"], expected["norms"], atol=1e-4, rtol=1e-4)
        assert result["whole_and_plain"] and result["wrapped_classes"] == []
        assert result["norm_of_the_base"] == expected["norm_of_the_base"]
    ours, theirs = load_file(folder / case / "weights.safetensors"), load_file(folder / plain / "weights.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():  # Adam turns the last bit of a tiny gradient into a step of visible size
        torch.testing.assert_close(tensor, theirs[name], atol=1e-3, rtol=0, msg=f"{name} differs")
    router = [name for name in ours if "ilora_router" in name]
    assert router or plain.endswith("encoder"), "no router was trained"
    assert _files(folder / case / "model") == _files(folder / plain / "model")


def _files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


@slow
@needs_deepspeed
def test_a_bare_deepspeed_loop_takes_the_steps_of_adamw(tmp_path: Path) -> None:
    results = run_cases("tests.training.launched", tmp_path / "cases", "loop-x:1", "loop_zero2-x:2", "loop_zero3-x:2")
    for case in ("loop_zero2-x", "loop_zero3-x"):
        for result in results[case]:
            torch.testing.assert_close(result["losses"], results["loop-x"][0]["losses"], atol=CLOSE, rtol=0)


@slow
@needs_deepspeed
def test_half_precision_profiles_leave_frozen_weights_alone(tmp_path: Path) -> None:
    """As printed, the profiles say bf16: compute in it, and keep what is frozen and what trains as it is."""
    cases = ("plain-item_slots:1", "zero2_bf16-item_slots:1", "zero3_bf16-item_slots:1", "fsdp2_bf16-item_slots:2")
    results = run_cases("tests.training.launched", tmp_path / "cases", *cases)
    expected = results["plain-item_slots"][0]
    for name in ("zero2_bf16-item_slots", "zero3_bf16-item_slots", "fsdp2_bf16-item_slots"):
        (result, *_) = results[name]
        assert result["norm_of_the_base"] == expected["norm_of_the_base"], name
        torch.testing.assert_close(result["losses"], expected["losses"], atol=0.1, rtol=0)
        assert result["losses"] != expected["losses"], f"{name} did not compute in bfloat16"


# Resuming ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("resumed") / "cases"
    own = [f"{name}-item_slots-resume:2" for name in LAUNCHERS]
    alone = [f"{name}-item_slots-resume:1" for name in ("zero2", "zero3") if name in LAUNCHERS]
    plain = "plain-item_slots-resume"
    other = [f"{name}-item_slots-after-{plain}:2" for name in LAUNCHERS]
    back = [f"plain-item_slots-after-{name}-item_slots-resume:1" for name in LAUNCHERS]
    half = f"ddp-item_slots_half-after-{plain}:2"
    results = run_cases("tests.training.launched", folder, f"{plain}:1", *own, *other, *back, half)
    lone = run_cases("tests.training.launched", folder.parent / "lone", *alone) if alone else {}
    return folder, {**results, **{f"lone-{name}": found for name, found in lone.items()}}


@slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_resumed_run_ends_with_the_same_weights(launcher: str, resumed: Results) -> None:
    folder, results = resumed
    case = f"{launcher}-item_slots-resume"
    for result in results[case]:
        assert (result["again"]["resumed_from"], result["again"]["losses"]) == (5, result["whole"]["losses"])
    ours = load_file(folder / case / "cut" / "weights.safetensors")
    theirs = load_file(folder / case / "whole" / "weights.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_and_resumes_in_one_process(stage: int, resumed: Results) -> None:
    (result,) = resumed[1][f"lone-zero{stage}-item_slots-resume"]
    (plain,) = resumed[1]["plain-item_slots-resume"]
    assert result["again"]["losses"] == result["whole"]["losses"]
    torch.testing.assert_close(result["whole"]["losses"], plain["whole"]["losses"], atol=CLOSE, rtol=0)


@slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_another_number_of_processes_and_another_launcher_go_on(launcher: str, resumed: Results) -> None:
    results = resumed[1]
    expected = results["plain-item_slots-resume"][0]["whole"]["losses"]
    more = results[f"{launcher}-item_slots-after-plain-item_slots-resume"]
    fewer = results[f"plain-item_slots-after-{launcher}-item_slots-resume"]
    for result in (*more, *fewer):
        assert result["again"]["resumed_from"] == 5
        torch.testing.assert_close(result["again"]["losses"], expected, atol=CLOSE, rtol=0)
    assert "written by 1 process(es), now there are 2" in more[0]["said"] and "not bit for bit" in more[0]["said"]
    assert "written by 2 process(es), now there are 1" in fewer[0]["said"]


@slow
def test_other_examples_per_step_are_refused_with_both_numbers(resumed: Results) -> None:
    for result in resumed[1]["ddp-item_slots_half-after-plain-item_slots-resume"]:
        assert "examples per step: stored 32, now 16" in result["refused"]
        assert "processes: stored 1, now 2" in result["refused"]
