"""`llmrec evaluate` measures again without touching what the recipe measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from llmrec.cli import main
from llmrec.data.dataset import InteractionDataset
from tests.runs import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluate") / "run"
    train("sasrec", out, 'evaluate.slices=["history <= 4", "history>900"]')
    return out


def measure(capsys: pytest.CaptureFixture[str], run: Path, *words: str) -> dict[str, Any]:
    assert main(["evaluate", str(run), *words, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_candidates_go_to_a_folder_of_their_own(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "metrics.json").read_bytes()
    full = run / "evaluations" / json.loads(before)["evaluation"] / "metrics.json"
    stored = full.read_bytes()
    record = measure(capsys, run, "--protocol", "candidates-20")
    assert (run / "metrics.json").read_bytes() == before and full.read_bytes() == stored
    folder = run / "evaluations" / record["evaluation"]
    assert folder != full.parent
    assert json.loads((folder / "metrics.json").read_text())["models"] == record["models"]
    assert {path.stem for path in folder.glob("predictions/*.parquet")} == set(record["models"])
    assert record["fingerprint"] != json.loads(before)["fingerprint"]


def test_the_command_says_how_candidates_are_drawn(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("popularity", "uniform"):
        record = measure(capsys, run, "--protocol", f"candidates-20-{kind}")
        assert record["protocol_fields"]["kind"] == kind and record["evaluation"] == f"test-candidates-20-{kind}"


def test_the_same_protocol_gives_the_same_numbers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = json.loads((run / "metrics.json").read_text())
    record = measure(capsys, run)
    assert record["models"] == stored["models"] and record["fingerprint"] == stored["fingerprint"]


def test_another_split_seeds_and_baselines(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = measure(
        capsys, run, "--split", "valid", "--protocol", "candidates-10", "--seeds", "1,2", "--baselines", "popularity"
    )
    assert record["protocol_fields"]["split"] == "valid" and record["protocol_fields"]["seeds"] == [1, 2]
    assert set(record["models"]) == {"popularity", "sasrec"}


def test_fewer_users_have_another_fingerprint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = measure(capsys, run, "--max-users", "7", "--split", "valid")
    assert record["users"] <= 7
    assert record["fingerprint"] != measure(capsys, run, "--split", "valid")["fingerprint"]


def test_slices_of_the_recipe_or_of_the_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = json.loads((run / "metrics.json").read_text())
    early, none = (stored["slices"][text] for text in ("history<=4", "history>900"))
    assert none == {"examples": 0, "users": 0, "models": {}}
    assert 0 < early["users"] < stored["users"] and set(early["models"]) == set(stored["models"])
    assert "low" in early["models"]["sasrec"]["ndcg@10"] and "coverage@10" not in early["models"]["sasrec"]
    assert measure(capsys, run)["slices"] == stored["slices"]
    record = measure(capsys, run, "--slice", "history>4", "--slice", "target_events <= 3 and history>0")
    assert list(record["slices"]) == ["history>4", "target_events<=3 and history>0"]
    assert record["slices"]["history>4"]["users"] == stored["users"] - early["users"]
    assert json.loads((run / "evaluations" / record["evaluation"] / "metrics.json").read_text()) == {
        name: value for name, value in record.items() if name != "run"
    }


def test_slices_are_printed_below(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--baselines", "popularity"]) == 0
    out = capsys.readouterr().out
    whole, _, rest = out.partition("slice history<=4: ")
    assert whole.count("popularity") == rest.count("popularity") == 1
    assert "slice history>900: no example of split test lies in it" in rest


def test_training_events_are_those_of_all_users(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = InteractionDataset.load(run / "dataset")
    counts = data.context().train_counts
    rare = int(np.quantile(counts[data.histories("test", 1).targets], 0.5))
    record = measure(capsys, run, "--max-users", "20", "--slice", f"target_events<={rare}")
    table = pq.read_table(run / "evaluations" / record["evaluation"] / "predictions" / "sasrec.parquet")
    inside = counts[data.item_ids_of(table.column("target_key").to_pylist())] <= rare
    assert 0 < record["slices"][f"target_events<={rare}"]["examples"] == inside.sum() < len(table)


@pytest.mark.parametrize(
    ("words", "message"), [(["--protocol", "sampled"], "sampled"), (["--baselines", "sasrec"], "has to be trained"),
                           (["--baselines", "encoder"], "beside an LLM"), (["--max-users", "0"], "greater than or"),
                           (["--slice", "age<5"], "evaluate.slices: Value error, slice 'age<5'")]
)  # fmt: skip
def test_what_cannot_be_measured(run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "is not a run" in capsys.readouterr().err
