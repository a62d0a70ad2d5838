"""Many users: shards survive a stop, belong to one question, and become one file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from llmrec.cli import main
from llmrec.commands import ray_actors, user_shards
from llmrec.commands.questions import Question
from llmrec.commands.user_shards import ShardFolder
from llmrec.data.dataset import InteractionDataset
from llmrec.errors import CheckpointError
from tests.runs import train

USERS = 10


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "run"
    train("sasrec", out)
    return out


@pytest.fixture
def users(run: Path, tmp_path: Path) -> Path:
    path = tmp_path / "users.txt"
    path.write_text("\n".join(InteractionDataset.load(run / "dataset").user_keys[1 : USERS + 1]), encoding="utf-8")
    return path


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(user_shards, "SHARD", 4)
    yield


def words(run: Path, users: Path, out: Path, *more: str) -> list[str]:
    return ["recommend", str(run), "--users", str(users), "-k", "3", "--out", str(out), "--json", *more]


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int) -> list[list[str]]:
    """Interrupt the shard after the first `count`; the users of those that were answered."""
    answered: list[list[str]] = []
    real = user_shards.answer_shard

    def answer(question: Any, recommender: Any, names: list[str]) -> Any:
        if len(answered) == count:
            raise KeyboardInterrupt
        answered.append(list(names))
        return real(question, recommender, names)

    monkeypatch.setattr(user_shards, "answer_shard", answer)
    return answered


@pytest.mark.usefixtures("small_shards")
def test_a_stopped_job_goes_on(
    run: Path, users: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole.parquet", tmp_path / "out.parquet"
    assert main(words(run, users, whole)) == 0
    with monkeypatch.context() as patched:
        answered = stop_after(patched, 2)
        assert main(words(run, users, out)) == 130
    shards = tmp_path / "out.parquet.shards"
    assert not out.exists() and sorted(path.name for path in shards.glob("0*")) == ["000000.parquet", "000001.parquet"]
    (shards / ".000002.1.partial").write_bytes(b"half a shard")
    capsys.readouterr()
    with monkeypatch.context() as patched:
        again = stop_after(patched, 99)
        assert main(words(run, users, out)) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["resumed"], record["shards"], record["users"]) == (2, 3, USERS)
    assert answered + again == [users.read_text().split("\n")[n : n + 4] for n in (0, 4, 8)]
    assert out.read_bytes() == whole.read_bytes() and not shards.exists()
    assert len(pq.read_table(out)) == 3 * USERS


@pytest.mark.usefixtures("small_shards")
def test_shards_of_another_question_are_refused(
    run: Path, users: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.parquet"
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        assert main(words(run, users, out)) == 130
    capsys.readouterr()
    assert main(words(run, users, out, "--reasons", "0")) == 2
    said = capsys.readouterr().err
    assert "(reasons differ)" in said and "out.parquet.shards" in said
    users.write_text(users.read_text().split("\n")[0])
    assert main(words(run, users, out)) == 2
    assert "(users differ)" in capsys.readouterr().err


def test_shards_of_other_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run" / "encoder").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text("name: a")
    weights = tmp_path / "run" / "encoder" / "model.safetensors"
    weights.write_bytes(b"one")
    question = Question(run=str(tmp_path / "run"))
    job = ShardFolder(tmp_path / "out.parquet", ["1"])
    job.claim(question, "data")
    job.claim(question, "data")
    weights.write_bytes(b"two")
    with pytest.raises(CheckpointError, match=r"\(weights differ\)"):
        job.claim(question, "data")


def test_merging_refuses_missing_shards(tmp_path: Path) -> None:
    job = ShardFolder(tmp_path / "out.parquet", ["1"])
    job.folder.mkdir()
    with pytest.raises(CheckpointError, match=r"lacks the shards \[0\]"):
        job.merge()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--engine", "ray", "--actors", "0"], "--actors is 0"),
        (["--engine", "ray"], "llmrec[ray]"),
    ],
)
def test_ray_is_refused(
    run: Path,
    users: Path,
    tmp_path: Path,
    more: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = ray_actors.importlib.util.find_spec
    monkeypatch.setattr(
        ray_actors.importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else found(name, *rest)
    )
    assert main(words(run, users, tmp_path / "out.parquet", *more)) == 2
    assert message in capsys.readouterr().err


def test_ray_needs_users_and_a_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recommend", str(run), "--history", "1", "--engine", "ray"]) == 2
    assert "--users FILE and --out" in capsys.readouterr().err


def test_ray_reports_nothing_to_anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")  # so that monkeypatch puts back what was there
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED")
    seen: list[str | None] = []

    def initialised() -> bool:
        seen.append(os.environ.get("RAY_USAGE_STATS_ENABLED"))
        return True

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=initialised))
    with ray_actors._cluster(1):
        assert seen == ["0"]


@pytest.mark.slow
def test_actors_of_ray_give_the_same_file(run: Path, users: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra ray")
    local, ray = tmp_path / "local.parquet", tmp_path / "ray.parquet"
    program = (
        "import sys; from llmrec.commands import user_shards; user_shards.SHARD = 4; from llmrec.cli import main; "
    )
    for out, more in ((local, []), (ray, ["--engine", "ray", "--actors", "2"])):
        done = subprocess.run(
            [sys.executable, "-c", program + "sys.exit(main(sys.argv[1:]))", *words(run, users, out, *more)],
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(done.stdout)["shards"] == 3
    assert local.read_bytes() == ray.read_bytes()
