from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from llmrec.errors import CheckFailed, DataError
from llmrec.evaluation.evaluator import Evaluator
from llmrec.evaluation.predictions import load_predictions, score_predictions
from llmrec.evaluation.protocol import EvalProtocol, parse_protocol
from tests.evaluation.small import TableScorer, every_item, make_dataset, random_dataset, use_candidates

DATA = random_dataset()
PROTOCOL = EvalProtocol(ks=(1, 3, 10))
ACCURACY = [f"{kind}@{k}" for kind in ("hr", "ndcg", "mrr") for k in (1, 3, 10)]


@pytest.fixture(scope="module")
def ours():
    return Evaluator(PROTOCOL, progress=False).run(TableScorer(30), DATA, name="ours")


def by_user(table, column):
    return dict(zip(table.column("user_key").to_pylist(), table.column(column).to_pylist(), strict=True))


def full_lists(data=DATA):
    """What an outsider would hand in: every item by score, seen ones included, in original ids."""
    system, out = TableScorer(30), {}
    examples = data.histories("test", 50)
    from llmrec.data.sequences import SequenceCollator

    scores = system.score_items(SequenceCollator()([examples[i] for i in range(len(examples))]))
    for user, row in zip(examples.users.tolist(), scores, strict=True):
        order = row[1:].argsort(descending=True).tolist()
        out[data.user_keys[user]] = [(f"i{n + 1}", float(row[n + 1])) for n in order]
    return out


def write(path, lists, shape):
    if shape == "long":
        rows = [(user, item, score) for user, entry in lists.items() for item, score in entry]
        np.random.default_rng(0).shuffle(rows)
        table = pa.table({"user_id": [r[0] for r in rows], "item_id": [r[1] for r in rows],
                          "score": [float(r[2]) for r in rows]})  # fmt: skip
    else:
        items = [[item for item, _ in entry] for entry in lists.values()]
        shown = items if shape == "list" else ["|".join(i) if shape == "bars" else json.dumps(i) for i in items]
        table = pa.table({"user": list(lists), "items": shown})
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".csv":
        pa_csv.write_csv(table, path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in table.to_pylist()) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "name, shape",
    [
        ("a.parquet", "list"),
        ("a.parquet", "long"),
        ("a.csv", "bars"),
        ("a.csv", "json"),
        ("a.csv", "long"),
        ("a.jsonl", "list"),
        ("a.jsonl", "long"),
    ],
)
def test_an_outsiders_file_gives_the_evaluators_numbers(tmp_path, ours, name, shape):
    result = score_predictions(write(tmp_path / name, full_lists(), shape), DATA, PROTOCOL)
    assert {m: result.metrics[m] for m in ACCURACY} == {m: ours.metrics[m] for m in ACCURACY}
    assert result.metrics["coverage@10"] == ours.metrics["coverage@10"]
    assert result.fingerprint == ours.fingerprint and result.name == "a" and not result.notes
    assert result.predictions.column("rank").equals(ours.predictions.column("rank"))


def test_a_file_of_ranks(tmp_path, ours):
    ranks = by_user(ours.predictions, "rank")
    path = tmp_path / "ranks.csv"
    path.write_text("user,rank\n" + "".join(f"{u},{r if r <= 10 else ''}\n" for u, r in ranks.items()))
    result = score_predictions(path, DATA, PROTOCOL)
    assert {m: result.metrics[m] for m in ACCURACY} == {m: ours.metrics[m] for m in ACCURACY}
    assert "ranks are taken" in result.notes[0] and "coverage@10" not in result.metrics
    path.write_text("user,rank\nu1,0\n")
    with pytest.raises(DataError, match="count from 1"):
        score_predictions(path, DATA, PROTOCOL)


def test_candidates_are_picked_out_of_a_list(tmp_path, monkeypatch):
    use_candidates(monkeypatch, every_item)
    path = write(tmp_path / "a.parquet", full_lists(), "list")
    protocol = parse_protocol("candidates-30", ks=(1, 3, 10))
    expected = Evaluator(protocol, progress=False).run(TableScorer(30), DATA)
    found = score_predictions(path, DATA, protocol).metrics
    assert found == {name: value for name, value in expected.metrics.items() if "auc" not in name}


def test_our_own_table_is_scored_again(tmp_path, ours):
    ours.save(tmp_path)
    path = tmp_path / "predictions" / "ours.parquet"
    assert score_predictions(path, DATA, PROTOCOL).metrics == ours.metrics
    loaded = load_predictions(path)
    assert loaded.fingerprint == ours.fingerprint and loaded.users == 40 and loaded.measured == "exact ranks"
    assert {m: loaded.metrics[m] for m in ACCURACY} == {m: ours.metrics[m] for m in ACCURACY}
    with pytest.raises(CheckFailed, match="another question"):
        score_predictions(path, DATA, EvalProtocol(remove_seen=False))
    with pytest.raises(CheckFailed, match="another question"):
        score_predictions(path, random_dataset(seed=9), PROTOCOL)


def test_a_table_of_ours_with_exchanged_targets_is_refused(tmp_path, ours):
    ours.save(tmp_path)
    path = tmp_path / "predictions" / "ours.parquet"
    table = pq.read_table(path)
    easy = table.set_column(3, "target", pa.array([1] * table.num_rows, pa.int64()))
    pq.write_table(easy.replace_schema_metadata(table.schema.metadata), path)
    with pytest.raises(DataError, match="targets are not those"):
        score_predictions(path, DATA, PROTOCOL)


def test_bad_rows_stop_with_counts(tmp_path):
    lists = full_lists()
    lists["u2"] = [("nowhere", 1.0), *lists["u2"]]
    lists["u3"] = [lists["u3"][0], *lists["u3"]]
    lists["stranger"] = lists.pop("u4")
    path = write(tmp_path / "a.parquet", lists, "list")
    with pytest.raises(DataError) as caught:
        score_predictions(path, DATA, PROTOCOL)
    for part in ("1 unknown items", "'nowhere'", "1 repeated items", "1 rows of unknown users", "'stranger'",
                 "1 targets without an answer", "'u4'", "quarantine"):  # fmt: skip
        assert part in str(caught.value)


def test_quarantined_rows_waste_their_place(tmp_path, ours):
    lists = full_lists()
    target = by_user(ours.predictions, "target_key")
    best, other = (target["u2"], 1.0), next(entry for entry in lists["u2"] if entry[0] != target["u2"])
    lists["u2"] = [("nowhere", 9.0), ("nowhere else", 8.0), best, other, best]
    del lists["u4"]
    result = score_predictions(write(tmp_path / "a.parquet", lists, "list"), DATA, PROTOCOL, on_bad_rows="quarantine")
    ranks = by_user(result.predictions, "rank")
    assert ranks["u2"] == 3.0 and ranks["u4"] is None and len(result.notes) == 3


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", "user,thing\nu1,i1\n", "neither lists nor ranks"),
        ("a.csv", "who,items\nu1,i1\n", "name no user"),
        ("a.csv", "user,items\n", "no rows"),
        ("a.csv", "user,items\nu1,i1\nu1,i2\n", "more than one row"),
        ("a.csv", "user,item,score\nu1,i1,high\n", "not a number"),
        ("a.csv", "user,items\nu1\nu2,i1,i2\n", "cannot be read"),
        ("a.jsonl", '{"user": "u1"\n', "a.jsonl:1: not a JSON object"),
        ("a.jsonl", '{"user": "u1", "items": ["i1"]}\n[1]\n', "a.jsonl:2: not a JSON object"),
        ("a.csv", 'user,items\nu1,"[i1"\n', "not valid JSON"),
        ("a.txt", "u1 i1\n", "unknown kind of file"),
        ("a.parquet", "not parquet", "cannot be read"),
    ],
)
def test_unreadable_files_say_why(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        score_predictions(path, DATA, PROTOCOL)


def test_missing_files_and_wrong_modes(tmp_path):
    with pytest.raises(DataError, match="no such predictions"):
        score_predictions(tmp_path / "none.csv", DATA, PROTOCOL)
    with pytest.raises(DataError, match="no predictions here"):
        load_predictions(tmp_path / "none.parquet")
    with pytest.raises(DataError, match="mode 'score'"):
        score_predictions(tmp_path / "none.csv", DATA, parse_protocol("candidates-5", mode="generate"))
    pq.write_table(pa.table({"user": ["u1"]}), tmp_path / "theirs.parquet")
    with pytest.raises(DataError, match="not a per-user table"):
        load_predictions(tmp_path / "theirs.parquet")


def test_ids_keep_their_leading_zeros(tmp_path):
    from llmrec.data.dataset import DatasetMeta, InteractionDataset

    data = InteractionDataset(
        pa.table({"user": [1, 1], "item": [1, 2], "order": [0, 1], "split": ["train", "test"]}),
        pa.table({"item": [1, 2, 3], "key": ["7", "007", "1.0"]}),
        pa.table({"user": [1], "key": ["01"]}),
        DatasetMeta("zeros", "table", "given"),
    )
    (tmp_path / "a.csv").write_text("user,item,score\n01,1.0,3\n01,007,2\n")
    assert score_predictions(tmp_path / "a.csv", data, EvalProtocol(ks=(1, 2))).predictions["rank"].to_pylist() == [2.0]


def test_one_list_answers_each_target_of_a_user(tmp_path):
    data = random_dataset(users=5, tests=2)
    targets = data.histories("test", 50)
    lists = {f"u{u}": [(f"i{t}", 0.0) for t in targets.targets[targets.users == u]] for u in range(1, 6)}
    result = score_predictions(write(tmp_path / "a.csv", lists, "bars"), data, PROTOCOL)
    # the second target of a user finds the first one seen, so the list closes up to rank 1
    assert result.predictions.column("rank").to_pylist() == [1.0] * 10


def test_a_repeated_target_stays_in_a_list_whose_seen_items_go(tmp_path):
    data = make_dataset([[2, 1, 2]], 4, has_repeats=True)
    (tmp_path / "a.csv").write_text("user,items\nu1,i1|i3|i2|i4\n")
    protocol = EvalProtocol(ks=(1, 2, 3), remove_seen=True)
    table = score_predictions(tmp_path / "a.csv", data, protocol).predictions
    assert table["rank"].to_pylist() == [2.0] and table["items"].to_pylist() == [[3, 2, 4]]
