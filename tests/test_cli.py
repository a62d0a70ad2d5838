"""The command line as a contract: verbs, exit statuses, one JSON object, launchers."""

from __future__ import annotations

import argparse
import json
import logging
import math
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from llmrec import cli
from llmrec.commands import launch
from llmrec.commands.output import emit, note, tabulate, to_json
from llmrec.errors import CheckFailed, DataError, DependencyError, RecipeError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[argparse.Namespace], int | None]], str]]:
    """Installs a verb called `probe` whose `run` the test gives."""
    level = logging.getLogger("llmrec").level

    def install(run: Callable[[argparse.Namespace], int | None]) -> str:
        module = ModuleType("llmrec.commands.probe", "Probe the command line.")
        module.EXAMPLE = "llmrec probe --number 3"  # type: ignore[attr-defined]
        module.add_arguments = lambda parser: parser.add_argument("--number", type=int)  # type: ignore[attr-defined]
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "llmrec.commands.probe", module)
        monkeypatch.setattr(cli, "VERBS", (*cli.VERBS, ("probe", "a probe")))
        return "probe"

    yield install
    logging.getLogger("llmrec").setLevel(level)


def test_help_lists_every_verb_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out.split("verbs:")[1]
    positions = [text.index(f"  {verb} ") for verb, _ in cli.VERBS]
    assert positions == sorted(positions)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0 and "llmrec 0." in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["trian"], ["nonsense"]])
def test_wrong_verbs_exit_with_2_and_say_what_there_is(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "train" in shown.err


def test_flag_before_the_verb_is_wrong_usage() -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--json", "list"])
    assert end.value.code == 2


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RecipeError("encoder.type: found 'sasrek'"), 2),
        (DataError("bad row", file="a.csv", line=3), 2),
        (CheckFailed("3 leaks"), 1),
        (FileNotFoundError(2, "No such file or directory", "missing.yaml"), 2),
        (ZeroDivisionError("x"), 70),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_become_exit_statuses(verb, error, status, capsys, monkeypatch) -> None:
    monkeypatch.delenv("LLMREC_DEBUG", raising=False)

    def run(args: argparse.Namespace) -> None:
        raise error

    assert cli.main([verb(run)]) == status
    shown = capsys.readouterr()
    assert shown.out == ""
    assert ("Traceback" in shown.err) == (status == 70)


def test_debug_shows_the_traceback(verb, capsys, monkeypatch) -> None:
    monkeypatch.setenv("LLMREC_DEBUG", "1")

    def run(args: argparse.Namespace) -> None:
        raise RecipeError("no")

    assert cli.main([verb(run)]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_status_and_words_reach_and_leave_the_verb(verb) -> None:
    seen = {}

    def run(args: argparse.Namespace) -> int:
        seen.update(vars(args))
        return 1

    assert cli.main([verb(run), "--number", "3"]) == 1
    assert seen == {"number": 3, "as_json": False, "argv": ["probe", "--number", "3"]}


def test_wrong_flag_of_a_verb_exits_with_2(verb) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([verb(lambda args: None), "--numb", "3"])
    assert end.value.code == 2


def test_json_is_one_object_and_alone_on_standard_output(verb, capsys) -> None:
    def run(args: argparse.Namespace) -> None:
        print("chatter of some library")
        note("step 1")
        emit({"hr": float("nan"), "n": 2}, lambda: pytest.fail("no table with --json"), args.as_json)

    assert cli.main([verb(run), "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"hr": None, "n": 2}
    assert "chatter" in shown.err and "step 1" in shown.err


def test_table_shows_brackets_and_aligns_numbers(verb, capsys) -> None:
    rows = [["[B, L]", 1234567, 0.123456], ["long " * 10, 2, None]]
    run = lambda args: emit({}, lambda: tabulate(["shape", "n", "hr@10"], rows, title="t"), args.as_json)  # noqa: E731
    assert cli.main([verb(run)]) == 0
    out = capsys.readouterr().out
    assert "[B, L]" in out and "1,234,567" in out and "0.1235" in out and "-" in out


def test_only_the_first_process_speaks(verb, capsys, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert cli.main([verb(lambda args: emit({"a": 1}, lambda: "a", args.as_json)), "--json"]) == 0
    assert capsys.readouterr().out == ""


def test_to_json_converts_numbers_paths_and_refuses_the_rest() -> None:
    import numpy as np

    value = {"a": np.float32(0.5), "b": np.array([1.0, math.inf]), 3: Path("x/y"), "s": {2, 1}, "t": np.bool_(True)}
    assert to_json(value) == {"a": 0.5, "b": [1.0, None], "3": "x/y", "s": [1, 2], "t": True}
    with pytest.raises(TypeError, match="no JSON form"):
        to_json(object())


@pytest.mark.parametrize("name", [verb for verb, _ in cli.VERBS])
def test_the_example_of_a_verb_parses(name: str) -> None:
    command = cli.import_verb(name)
    parser = cli.build_verb_parser(name, command)
    assert command.EXAMPLE.strip() in parser.format_help()
    for line in command.EXAMPLE.strip().splitlines():
        words = shlex.split(line)
        assert words[:2] == ["llmrec", name]
        parser.parse_args(words[2:])


def test_python_m_llmrec_runs() -> None:
    done = subprocess.run([sys.executable, "-m", "llmrec", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "quickstart" in done.stdout


def test_launcher_words() -> None:
    words = ["train", "r.yaml", "--launcher", "cpu", "--set", "seed=1"]
    command = launch.launch_command(words, "cpu")
    assert command[:5] == [sys.executable, "-m", "accelerate.commands.launch", "--config_file", command[4]]
    assert Path(command[4]).name == "cpu.yaml"
    assert command[5:] == ["-m", "llmrec", "train", "r.yaml", "--set", "seed=1"]
    assert launch.without_launcher(["train", "--launcher=cpu", "r.yaml"]) == ["train", "r.yaml"]


def test_launcher_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="zero2"):
        launch.launch_command(["train"], "zero1")
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"llmrec\[deepspeed\]"):
        launch.launch_command(["train"], "zero3")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(RecipeError, match="already"):
        launch.relaunch(["train"], "cpu")


def test_relaunch_replaces_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(launch.os, "execv", lambda *words: calls.append(words))
    launch.relaunch(["train", "r.yaml", "--launcher", "cpu"], "cpu")
    assert calls and calls[0][0] == sys.executable and "--launcher" not in calls[0][1]
