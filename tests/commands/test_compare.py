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
from llmrec.evaluation.tables import metric_values
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


def by_hand(keep):
    """Means of both systems in ndcg@10 over the users `keep` accepts, and how many there are."""
    values = []
    for system in (Oracle(), TableScorer(30)):
        table = Evaluator(PROTOCOL, progress=False).run(system, DATA).predictions
        rows = zip(table.column("user_key").to_pylist(), metric_values(table, "ndcg@10"), strict=True)
        values.append([value for user, value in rows if keep(user)])
    return [pytest.approx(sum(one) / len(one)) for one in values], len(values[0])


def test_a_slice_is_compared_alone(folder, tmp_path, capsys):
    rows = DATA.interactions.column("user").to_pylist()
    means, users = by_hand(lambda key: rows.count(int(key[1:])) - 1 <= 5)
    data = DATA.save(tmp_path / "data")
    words = (f"{folder}:oracle", f"{folder}:random", "--slice", "history <= 5", "--dataset", data)
    call(*words, "--json")
    record = json.loads(capsys.readouterr().out)
    assert [system["mean"] for system in record["systems"]] == means and 0 < users < 60
    assert (record["users"], record["examples"], record["slice"]) == (users, users, "history<=5")
    call(*words, "--slice", "target_events>=1")
    title = " ".join(capsys.readouterr().out.split())
    assert f"history<=5 and target_events>=1: {users} users; fingerprint" in title
    call(*words[:2], "--json")
    record = json.loads(capsys.readouterr().out)
    assert record["slice"] is None and record["users"] == record["examples"] == 60


def test_the_first_run_gives_the_data_set_of_a_slice(folder, tmp_path, capsys):
    run = save(tmp_path / "run", {"random": TableScorer(30, seed=2)})
    words = (f"{run}:random", f"{folder}:oracle", "--slice", "history<=5")
    with pytest.raises(RecipeError, match="--slice needs --dataset.*holds one"):
        call(*words)
    DATA.save(run / "dataset")
    assert call(*words, "--json") == 0
    assert json.loads(capsys.readouterr().out)["users"] < 60
    table = run / "evaluations" / PROTOCOL.slug / "predictions" / "random.parquet"
    with pytest.raises(RecipeError, match="--slice needs --dataset"):
        call(table, *words[1:])
    other = random_dataset(seed=8).save(tmp_path / "other")
    with pytest.raises(CheckFailed, match="give the data set of the run"):
        call(*words, "--dataset", other)
    with pytest.raises(RecipeError, match="'age<5' is no condition"):
        call(*words, "--slice", "age<5")
    with pytest.raises(DataError, match="no example lies in history<=5 and history>5"):
        call(*words, "--slice", "history>5")


def test_somebodys_file_on_a_slice_of_the_runs_own_data_set(folder, tmp_path, capsys):
    run = save(tmp_path / "run", {"random": TableScorer(30)})
    DATA.save(run / "dataset")
    path = tmp_path / "theirs.csv"
    path.write_text("user,items\n" + "".join(f"u{n},i1|i2\n" for n in range(1, 61)))
    assert call(run, "--predictions", path, "--slice", "history<=5", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["systems"][1]["name"] == "theirs" and record["users"] < 60


def test_given_users_are_compared_alone(folder, tmp_path, capsys):
    means, users = by_hand(lambda key: key in {"u3", "u7", "u12", "u30"})
    path = tmp_path / "cold.txt"
    path.write_bytes("\ufeffu3\r\nu7\r\n\r\n u12\nu30\nu3".encode())
    call(f"{folder}:oracle", f"{folder}:random", "--users", path, "--json")
    record = json.loads(capsys.readouterr().out)
    assert [system["mean"] for system in record["systems"]] == means and record["users"] == users == 4
    assert record["slice"] == f"users of {path}"
    data = DATA.save(tmp_path / "data")
    call(f"{folder}:oracle", f"{folder}:random", "--users", path, "--slice", "history>0", "--dataset", data, "--json")
    record = json.loads(capsys.readouterr().out)
    assert (record["slice"], record["users"]) == (f"history>0 and users of {path}", 4)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"u1\n\nu99\n", r"cold\.txt:3: no user of this id was evaluated\n.*u99"),
        (b"u1\nu\xff\n", r"cold\.txt:2: no user"),
        (b"\n \n", r"cold\.txt: names no user"),
    ],
)
def test_users_that_were_not_evaluated(folder, tmp_path, content, message):
    (tmp_path / "cold.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        call(f"{folder}:oracle", f"{folder}:random", "--users", tmp_path / "cold.txt")


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
