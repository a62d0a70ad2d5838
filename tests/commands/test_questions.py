"""What can be asked of a run: given candidates, and a moment in time."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmrec.cli import main
from llmrec.commands.questions import Placed, Question, parse_time
from llmrec.data.schema import Ranking
from llmrec.errors import RecipeError
from llmrec.recommender import Recommender, _History
from llmrec.training.stages import run_recipe
from tests.runs import prompted_recipe, train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("questions") / "run"
    train("sasrec", out)
    return out


@pytest.fixture(scope="module")
def worded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("questions") / "words"
    run_recipe(prompted_recipe("text", encoder=False), out, say=lambda line: None)
    return out


class Seasonal:
    """Recommends item 1 at even seconds and item 2 at odd ones."""

    uses: frozenset[str] = frozenset()
    optional = frozenset({"target_timestamps"})

    def recommend(self, batch: Any, k: int) -> Ranking:
        items = 1 + batch["target_timestamps"][:, None] % 2
        return Ranking(items, torch.zeros_like(items, dtype=torch.float32), items > 0)


def seasonal(monkeypatch: pytest.MonkeyPatch, run: Path, **changes: Any) -> None:
    """Let every run hold a `Seasonal`."""
    data, system = Recommender.from_pretrained(run).dataset, Seasonal()
    for name, value in changes.items():
        setattr(system, name, value)

    def load(cls: type[Recommender], folder: str, **options: Any) -> Recommender:
        return cls(system, data, max_history=12, name="seasonal")

    monkeypatch.setattr(Recommender, "from_pretrained", classmethod(load))


def test_candidates_are_ranked_by_their_scores(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recommender = Recommender.from_pretrained(run)
    ids = recommender.dataset.item_keys[5:11]
    assert main(["recommend", str(run), "--history", "i1,i2", "--candidates", " , ".join(ids), "-k", "4"]) == 0
    expected = recommender.rank([["i1", "i2"]], [ids])[0]
    assert {item.item for item in expected} == set(ids)
    printed = capsys.readouterr().out
    assert [key for key in ids if key not in {item.item for item in expected[:4]}]
    places = [printed.index(item.title) for item in expected[:4]]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--candidates", "i1,nothing"], "nothing"),
        (["--candidates", "i1,i1"], "different item ids"),
        (["--candidates", ""], "different item ids"),
        (["--candidates", "i1,i2", "--on-empty", "popular"], "asks for another one"),
        (["--at", "2024-05-01"], "SASRecEncoder does not read the time"),
        (["--at", "soon"], "ISO date"),
    ],
)
def test_what_cannot_be_asked(run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recommend", str(run), "--history", "i1,i2", *words]) == 2
    assert message in capsys.readouterr().err


def test_prompts_with_candidates_need_them(worded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recommender = Recommender.from_pretrained(worded)
    history, ids = recommender.dataset.item_keys[1:4], recommender.dataset.item_keys[4:14]
    asked = ["recommend", str(worded), "--history", ",".join(history)]
    assert main(asked) == 2
    assert "--candidates" in capsys.readouterr().err
    assert main([*asked, "--candidates", ",".join(ids), "--json"]) == 0
    row = {**recommender._row(_History([1, 2, 3]), None), "candidates": recommender.dataset.item_ids_of(ids)}
    with torch.no_grad():
        scores = recommender.system.score_candidates(recommender.system.collate([row]))[0]
    best = [ids[n] for n in scores.argsort(descending=True)]
    assert [item.item for item in recommender.rank([history], [ids])[0]] == best


def test_the_time_reaches_the_system(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seasonal(monkeypatch, run)
    found = []
    for at in (10, 11):
        question = Question(run=str(run), k=1, at=at)
        found.append(question.answer(question.open(), ["a", "b"], [["i3"], ["i4", "i5"]]))
    keys = Recommender.from_pretrained(run).dataset.item_keys
    assert [[row["item"] for row in rows] for rows in found] == [[keys[1]] * 2, [keys[2]] * 2]
    assert [row["user"] for row in found[0]] == ["a", "b"]


@pytest.mark.parametrize(
    ("uses", "message"),
    [(frozenset({"target_timestamps"}), "give it with --at"), (frozenset({"ratings"}), "needs ratings")],
)
def test_what_a_system_cannot_do_without(
    run: Path, uses: frozenset[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seasonal(monkeypatch, run, uses=uses)
    with pytest.raises(RecipeError, match=message):
        Question(run=str(run)).open()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1714521600", 1714521600),
        ("2024-05-01", 1714521600),
        ("2024-05-01T02:00:00+02:00", 1714521600),
        ("-5", -5),
    ],
)
def test_times(text: str, seconds: int) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "tomorrow", "2024-13-01", "1714521600000"])
def test_wrong_times(text: str) -> None:
    with pytest.raises(RecipeError, match="--at"):
        parse_time(text)


def test_a_placed_system_shows_only_what_it_has() -> None:
    placed = Placed(SimpleNamespace(recommend=lambda batch, k: (sorted(batch), k), name="x"), "cpu")
    assert placed.name == "x" and not hasattr(placed, "collate") and not hasattr(placed, "score_candidates")
    assert placed.recommend({"lengths": torch.ones(1)}, 3) == (["lengths"], 3)
