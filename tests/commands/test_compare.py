from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace

import pytest

from llmrec.commands import compare
from llmrec.errors import CheckFailed, DataError, RecipeError
from llmrec.evaluation.evaluator import Evaluator
from llmrec.evaluation.protocol import EvalProtocol
from tests.evaluation.small import ListOnly, TableScorer, random_dataset
from tests.runs import train

DATA = random_dataset(users=60)
PROTOCOL = EvalProtocol(ks=(1, 3, 10))


class Oracle:
    """Puts the target first for two users of three; knows the data set, as no system may."""

    def __init__(self) -> None:
        examples = DATA.histories("test", 50)
        self.targets = dict(zip(examples.users.tolist(), examples.targets.tolist(), strict=True))

    def score_items(self, batch):
        import torch

        scores = torch.zeros(len(batch["lengths"]), 31)
        for row, user in enumerate(batch["user_ids"].tolist()):
            scores[row, self.targets[user]] = 1.0 if user % 3 else -1.0
        return scores


def save(folder, systems, protocol=PROTOCOL, data=DATA, main=True):
    for name, system in systems.items():
        result = Evaluator(protocol, progress=False).run(system, data, name=name)
        result.save(folder / "evaluations" / protocol.slug)
    if main:
        (folder / "metrics.json").write_text(json.dumps({"evaluation": protocol.slug}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("run"), {"oracle": Oracle(), "random": TableScorer(30)})


def call(*words):
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", dest="as_json", action="store_true")
    compare.add_arguments(parser)
    return compare.run(parser.parse_args([str(word) for word in words]))


def test_a_planted_difference(folder, capsys):
    assert call(f"{folder}:oracle", f"{folder}:random", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    first, second = record["systems"]
    assert (first["name"], second["name"], record["metric"]) == ("oracle", "random", "ndcg@10")
    assert record["difference"]["mean"] == pytest.approx(first["mean"] - second["mean"]) and record["users"] == 60
    assert record["difference"]["low"] > 0 and record["p_value"] < 0.01 and record["p_value_mcnemar"] is None
    assert record["fingerprint"] == PROTOCOL.fingerprint(DATA)


def test_zero_one_metrics_add_mcnemar(folder, capsys):
    call(f"{folder}:oracle", f"{folder}:random", "--metric", "hr@1", "--json")
    assert json.loads(capsys.readouterr().out)["p_value_mcnemar"] < 0.01


def test_the_table_names_protocol_and_p_value(folder, capsys):
    assert call(f"{folder}:oracle", f"{folder}:random") == 0
    out = capsys.readouterr().out
    for part in ("oracle", "random", "difference", "full ranking, test, seen removed", "p = ", "fingerprint"):
        assert part in out


def test_a_system_against_itself(folder, capsys):
    call(f"{folder}:random", f"{folder}:random", "--json")
    record = json.loads(capsys.readouterr().out)
    assert record["p_value"] == 1.0 and record["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_two_runs_of_one_system_are_told_apart_by_their_folders(folder, tmp_path, capsys):
    other = save(tmp_path / "other", {"random": TableScorer(30)})
    assert call(f"{folder}:random", f"{other}:random", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in record["systems"]] == [f"random ({folder}:random)", f"random ({other}:random)"]


def test_different_questions_are_refused(folder, tmp_path):
    other = save(tmp_path, {"random": TableScorer(30)}, EvalProtocol(ks=(1, 3, 10), remove_seen=False))
    with pytest.raises(CheckFailed) as caught:
        call(f"{folder}:random", other)
    for part in (PROTOCOL.fingerprint(DATA), "seen removed", "seen kept"):
        assert part in str(caught.value)
    assert caught.value.exit_status == 1


def test_somebodys_file(folder, tmp_path, capsys):
    table = Evaluator(PROTOCOL, progress=False).run(TableScorer(30, seed=5), DATA).predictions
    path = tmp_path / "theirs.csv"
    rows = zip(table.column("user_key").to_pylist(), table.column("items").to_pylist(), strict=True)
    path.write_text("user,items\n" + "".join(f"{u},{'|'.join(f'i{n}' for n in items)}\n" for u, items in rows))
    data = DATA.save(tmp_path / "data")
    assert call(f"{folder}:random", "--predictions", path, "--dataset", data, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert [system["name"] for system in record["systems"]] == ["random", "theirs"]
    other = random_dataset(seed=8).save(tmp_path / "other")
    with pytest.raises(CheckFailed, match="give the data set of the run"):
        call(f"{folder}:random", "--predictions", path, "--dataset", other)
    with pytest.raises(RecipeError, match="needs --dataset"):
        call(f"{folder}:random", "--predictions", path)


def test_cuts_beyond_a_list_are_refused(folder, tmp_path):
    listed = save(tmp_path, {"listed": ListOnly(TableScorer(30))})
    call(f"{folder}:random", listed, "--metric", "recall@10")
    with pytest.raises(RecipeError, match="top-10 lists"):
        call(f"{folder}:random", listed, "--metric", "hr@20")
    for metric in ("accuracy", "ndcg", "ndcg@0", "valid_ratio"):
        with pytest.raises(RecipeError):
            call(f"{folder}:random", listed, "--metric", metric)


def test_a_run_stands_for_the_system_it_trained(tmp_path):
    train("sasrec", tmp_path / "run")
    found = compare.find_predictions(str(tmp_path / "run"))
    assert found.name == "sasrec.parquet" and len(list(found.parent.glob("*.parquet"))) > 1


def test_runs_are_found_or_the_reason_is_said(folder, tmp_path):
    with pytest.raises(RecipeError, match="oracle, random"):
        call(folder, folder)
    with pytest.raises(DataError, match="no system 'sasrec'"):
        call(f"{folder}:sasrec", f"{folder}:random")
    with pytest.raises(DataError, match="no such run"):
        call(tmp_path / "none", f"{folder}:random")
    with pytest.raises(DataError, match="no evaluation"):
        call(tmp_path, f"{folder}:random")
    with pytest.raises(RecipeError, match="two runs"):
        call(folder)
    several = save(tmp_path / "several", {"random": TableScorer(30)}, main=False)
    save(several, {"random": TableScorer(30)}, EvalProtocol(ks=(10,), remove_seen=False), main=False)
    with pytest.raises(RecipeError, match="several evaluations"):
        call(several, f"{folder}:random")
    assert call(several, f"{folder}:random", "--evaluation", PROTOCOL.slug) == 0
    path = folder / "evaluations" / PROTOCOL.slug / "predictions" / "random.parquet"
    assert call(path, f"{folder}:oracle") == 0


@pytest.mark.parametrize("tests, rows", [(1, 50), (2, 119)])
def test_tables_of_different_users_or_targets_are_refused(tests, rows):
    data = random_dataset(users=60, tests=tests)
    whole = Evaluator(PROTOCOL, progress=False).run(TableScorer(30), data)
    part = replace(whole, predictions=whole.predictions.slice(0, rows))
    with pytest.raises(CheckFailed, match="different users or targets"):
        compare.compare(whole, part)


def test_the_module_is_light():
    # Reading two tables needs no torch, so the verb answers at once.
    code = "import sys, llmrec.commands.compare, llmrec.evaluation.predictions; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
