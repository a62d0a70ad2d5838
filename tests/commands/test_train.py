"""`llmrec train` as a command: one record, reruns, refusals, launchers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmrec.cli import main
from tests.runs import ROOT, words


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("train") / "run"
    assert main(words("sasrec", out)) == 0
    return out


def test_the_record_on_standard_output(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rerun skips training and prints the same record."""
    done = run / "stages" / "1-encoder" / "done.json"
    before = done.stat().st_mtime_ns
    assert main([*words("sasrec", run), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    stored = json.loads((run / "metrics.json").read_text())
    assert record == {**stored, "run": str(run)} and done.stat().st_mtime_ns == before
    for system in ("popularity", "itemknn", "sasrec"):
        value = record["models"][system]["ndcg@10"]
        assert 0.0 <= value["low"] <= value["mean"] <= value["high"] <= 1.0


def test_another_recipe_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = "encoder.dropout=0.2"
    assert main(words("sasrec", run, other)) == 2
    assert "encoder differ" in capsys.readouterr().err


def test_training_anew_keeps_what_was_there(run: Path) -> None:
    assert main([*words("sasrec", run), "--resume", "never"]) == 0
    assert (run / "stages" / "1-encoder" / "superseded-1" / "done.json").is_file()


def test_a_missing_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "recipes/smoke/nothing.yaml"]) == 2
    assert "nothing" in capsys.readouterr().err


@pytest.mark.slow
def test_accelerate_launch_gives_the_same_metrics(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "launched"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu", "-m", "llmrec"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([*launch, *words("sasrec", out)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    plain, launched = (json.loads((folder / "metrics.json").read_text()) for folder in (run, out))
    assert launched["models"] == plain["models"] and launched["fingerprint"] == plain["fingerprint"]
