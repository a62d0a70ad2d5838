"""Work divided over processes: nothing is lost or done twice, and the files are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from llmrec.evaluation.shards import Ranks, joined, ranks
from tests.evaluation.rank_cases import CASES
from tests.training.processes import run_cases


@pytest.mark.parametrize("parts", [0, 1, 3, 4, 7, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_part_has_one_owner(parts: int, count: int) -> None:
    everyone = [Ranks(index, count) for index in range(count)]
    owned = [part for one in everyone for part in one.own(range(parts))]
    assert sorted(owned) == list(range(parts))


@pytest.mark.parametrize("parts", [1, 3, 4, 7])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_all_take_the_same_number_of_turns(parts: int, count: int) -> None:
    everyone = [Ranks(index, count) for index in range(count)]
    turns = [one.turns(range(parts)) for one in everyone]
    assert len({len(one) for one in turns}) == 1
    assert all(set(one.own(range(parts))) <= set(turn) for one, turn in zip(everyone, turns, strict=True))
    assert sum(map(len, turns)) < parts + count


def test_no_parts_are_no_turns() -> None:
    assert Ranks(0, 3).turns([]) == []


def test_outside_a_launcher_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined() as here:
        assert here == ranks() == Ranks(0, 1) and here.is_first


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    counts = dict(zip(CASES, (1, 2, 5), strict=True))
    return folder, run_cases("tests.evaluation.rank_cases", folder, *(f"{name}:{n}" for name, n in counts.items()))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["two", "five"])
def test_files_are_those_of_one_process(done: tuple[Path, dict[str, Any]], case: str) -> None:
    folder, results = done
    assert [result["statuses"] for result in results[case]] == [[0, 0, 0]] * len(results[case])
    assert {result["count"] for result in results[case]} == {len(results[case])}
    for name in ("many", "one"):
        assert (folder / case / name).read_bytes() == (folder / "alone" / name).read_bytes()
        assert not (folder / case / f"{name}.shards").exists()
    measured = contents(folder / "runs" / case / "evaluations")
    assert measured == contents(folder / "runs" / "alone" / "evaluations")
    assert sum(path.endswith(".parquet") for path in measured) >= 4


@pytest.mark.slow
def test_every_user_is_answered_once(done: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = done
    users = (folder / "many.txt").read_text().split("\n")
    table = pq.read_table(folder / "five" / "many").to_pylist()
    assert [row["user"] for row in table] == [user for user in users for _ in range(3)]
    assert [row["user"] for row in pq.read_table(folder / "five" / "one").to_pylist()] == users[:1] * 3


@pytest.mark.slow
def test_texts_reach_every_process(done: tuple[Path, dict[str, Any]]) -> None:
    for case in CASES:
        assert all(result["texts"] == ["ä" * n for n in range(6)] for result in done[1][case])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
