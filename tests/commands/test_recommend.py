"""`llmrec recommend` for a history, a user, and a file of users."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from llmrec.cli import main
from llmrec.recommender import Recommender
from tests.runs import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recommend") / "run"
    train("sasrec", out)
    return out


@pytest.fixture(scope="module")
def recommender(run: Path) -> Recommender:
    return Recommender.from_pretrained(run)


def ask(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main(["recommend", *map(str, words), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_a_history(run: Path, recommender: Recommender, capsys: pytest.CaptureFixture[str]) -> None:
    ids = recommender.dataset.item_keys[1:4]
    record = ask(capsys, run, "--history", " , ".join(ids), "-k", 3)
    rows = record["recommendations"]
    expected = recommender.recommend([ids], 3)[0]
    assert [(row["rank"], row["item"], row["title"]) for row in rows] == [
        (rank, item.item, item.title) for rank, item in enumerate(expected, 1)
    ]
    assert record["system"] == "sasrec" and all("users share both" in row["because"] for row in rows)


def test_a_user_has_the_history_of_the_data(
    run: Path, recommender: Recommender, capsys: pytest.CaptureFixture[str]
) -> None:
    user = recommender.dataset.user_keys[2]
    by_user = ask(capsys, run, "--user", user, "-k", 4)["recommendations"]
    by_history = ask(capsys, run, "--history", ",".join(recommender.history_of(user)), "-k", 4)["recommendations"]
    assert [row["item"] for row in by_user] == [row["item"] for row in by_history]
    assert {row["user"] for row in by_user} == {user}


def test_a_file_of_users_becomes_parquet(
    run: Path, recommender: Recommender, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    users = recommender.dataset.user_keys[1:6]
    (tmp_path / "users.txt").write_text("\n".join(users) + "\n\n", encoding="utf-8")
    target = tmp_path / "made" / "answers.parquet"
    record = ask(capsys, run, "--users", tmp_path / "users.txt", "-k", 2, "--out", target)
    assert record["recommendations"] == [] and record["out"] == str(target)
    table = pq.read_table(target).to_pylist()
    assert [row["user"] for row in table] == [user for user in users for _ in range(2)]
    assert [row["rank"] for row in table] == [1, 2] * 5
    assert [path.name for path in target.parent.iterdir()] == ["answers.parquet"]


def test_somebody_new(run: Path, recommender: Recommender, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ask(capsys, run, "--history", "", "--on-empty", "popular", "-k", 2)["recommendations"]
    assert [row["item"] for row in rows] == [item.item for item in recommender.popular(2)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--history", ""], "is empty"),
        (["--history", "no-such-item"], "no-such-item"),
        (["--user", "nobody"], "nobody"),
        (["--users", "no-such-file.txt"], "no-such-file.txt"),
        (["--history", "1", "-k", "0"], "-k is 0"),
    ],
)
def test_wrong_questions_end_with_2(
    run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recommend", str(run), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_table_for_people(run: Path, recommender: Recommender, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recommend", str(run), "--history", recommender.dataset.item_keys[1], "-k", "2"]) == 0
    assert "recommended by sasrec" in capsys.readouterr().out
