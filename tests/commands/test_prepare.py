from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmrec.cli import main
from llmrec.commands.prepare import parse_columns
from llmrec.data.dataset import InteractionDataset
from llmrec.data.negatives import stored_candidates
from llmrec.errors import RecipeError

FOLDERS = ("online-retail", "ml-latest-small", "amazon-beauty-2014", "amazon-industrial-2018", "ml-100k")


def write_csv(folder: Path, rows=None) -> Path:
    rows = rows or [(f"u{u}", f"i{(u + n) % 9}", 1 + n % 5, 1000 * n + 2000 * u) for u in range(1, 9) for n in range(6)]
    path = folder / "events.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user_id", "item_id", "rating", "timestamp"])
        writer.writerows(rows)
    return path


def run(capsys, *words):
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


class TestPrepare:
    def test_a_csv_becomes_a_data_set(self, tmp_path, capsys):
        status, out, _ = run(capsys, "prepare", write_csv(tmp_path), "--out", tmp_path / "d", "--json")
        assert status == 0
        record = json.loads(out)
        dataset = InteractionDataset.load(tmp_path / "d")
        assert (record["users"], record["items"], record["interactions"]) == (8, 9, 48)
        assert record["fingerprint"] == dataset.fingerprint
        assert record["columns"]["user"] == "user_id"
        assert record["name"] == "events"
        assert any(note.startswith("leave_one_out:") for note in record["notes"])
        assert (tmp_path / "d" / "README.md").read_text().startswith("---\n")

    def test_options_of_a_generated_source(self, tmp_path, capsys):
        words = ["prepare", "synthetic", "--set", "users=12", "--set", "items=9", "--out", tmp_path / "d", "--json"]
        status, out, _ = run(capsys, *words)
        assert status == 0 and (json.loads(out)["users"], json.loads(out)["items"]) == (12, 9)
        status, _, err = run(capsys, "prepare", "synthetic", "--set", "user=12", "--out", tmp_path / "e")
        assert status == 2 and "users" in err
        status, _, err = run(capsys, "prepare", write_csv(tmp_path), "--set", "users=12", "--out", tmp_path / "f")
        assert status == 2 and "has no option 'users'" in err

    def test_the_table_shows_columns_counts_and_the_warning(self, tmp_path, capsys):
        status, out, _ = run(capsys, "prepare", write_csv(tmp_path), "--out", tmp_path / "d")
        assert status == 0
        for text in ("user_id", "columns recognised", "split train", "rows read", "later than the earliest test event"):
            assert text in " ".join(out.split())

    def test_flags_reach_the_data_set(self, tmp_path, capsys):
        words = ["--positive", "rating >= 2", "--repeats", "last", "--min-user", "2", "--min-item", "2"]
        words += ["--split", "user_80_10_10", "--seed", "5", "--name", "mine"]
        status, out, _ = run(capsys, "prepare", write_csv(tmp_path), "--out", tmp_path / "d", "--json", *words)
        assert status == 0
        meta = InteractionDataset.load(tmp_path / "d").meta
        assert (meta.name, meta.positive, meta.repeats, meta.split) == ("mine", "rating >= 2", "last", "user_80_10_10")
        assert meta.filters == {"min_user": 2, "min_item": 2, "core_on": "all", "seed": 5}

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--split", "leave_one"], "did you mean 'leave_one_out'"),
            (["--positive", "rating"], "is not understood"),
            (["--columns", "user"], "expected OURS=THEIRS"),
            (["--min-user", "0"], "min_user is 0"),
            (["--min-user", "99"], "min_user=99"),
        ],
    )
    def test_wrong_use_is_status_2(self, tmp_path, capsys, words, message):
        status, out, err = run(capsys, "prepare", write_csv(tmp_path), "--out", tmp_path / "d", *words)
        assert status == 2 and message in err and out == ""
        assert not (tmp_path / "d").exists()

    def test_bad_rows_stop_or_go_to_a_file(self, tmp_path, capsys):
        rows = [(f"u{u}", f"i{n}", 3, n) for u in range(3) for n in range(4)] + [("u1", "i7", "=1+1", 9)]
        source = write_csv(tmp_path, rows)
        status, _, err = run(capsys, "prepare", source, "--out", tmp_path / "d")
        assert status == 2 and "events.csv:14" in err
        words = ("--on-bad-rows", "quarantine", "--json")
        status, out, _ = run(capsys, "prepare", source, "--out", tmp_path / "d", *words)
        assert status == 0 and json.loads(out)["rejected"] == 1
        line = (tmp_path / "d" / "rejected.csv").read_text().splitlines()[1]
        assert "'=1+1" in line and ",14," in line

    def test_synthetic_data_and_a_second_write(self, tmp_path, capsys):
        for split in ("leave_one_out", "temporal_80_10_10"):
            words = ("--split", split, "--out", tmp_path / "d", "--json")
            status, out, _ = run(capsys, "prepare", "synthetic", *words)
            record = json.loads(out)
            assert status == 0 and (record["name"], record["source"], record["split"]) == (
                "synthetic",
                "synthetic",
                split,
            )
        assert run(capsys, "inspect", tmp_path / "d", "--json")[0] == 0

    def test_columns_mapping(self):
        assert parse_columns(["user=a,item=b", "time=c"]) == {"user": "a", "item": "b", "time": "c"}
        for wrong in ("user", "=a", "user=", "user=a,user=b"):
            with pytest.raises(RecipeError):
                parse_columns([wrong])


class TestInspect:
    @pytest.fixture
    def folder(self, tmp_path, capsys):
        words = ("--repeats", "first", "--out", tmp_path / "d", "--json")
        assert run(capsys, "prepare", write_csv(tmp_path), *words)[0] == 0
        return tmp_path / "d"

    def test_a_clean_data_set(self, folder, capsys):
        status, out, _ = run(capsys, "inspect", folder, "--json")
        record = json.loads(out)
        assert status == 0 and record["passed"] is True
        severities = {finding["name"]: finding["severity"] for finding in record["findings"]}
        assert severities.pop("future_training_events") == "warning"
        assert set(severities.values()) == {"ok"} and len(severities) == 9

    def test_a_leak_is_status_1_and_still_reported(self, folder, capsys):
        dataset = InteractionDataset.load(folder)
        doubled = dataset.column("item").copy()
        doubled[dataset.user_offsets[2] - 1] = doubled[dataset.user_offsets[1]]
        place = dataset.interactions.column_names.index("item")
        table = dataset.interactions.set_column(place, "item", pa.array(doubled))
        dataset.with_interactions(table, "planted").save(folder)
        status, out, err = run(capsys, "inspect", folder, "--json")
        assert status == 1 and json.loads(out)["passed"] is False
        assert "target_in_history" in err

    def test_prompts_and_stored_candidates_are_looked_at(self, folder, tmp_path, capsys):
        dataset = InteractionDataset.load(folder)
        stored_candidates(folder, dataset, "test", 3)
        assert run(capsys, "inspect", folder, "--json")[0] == 0
        row = {"prompt": "the answer is item-x", "completion": "item-x", "target": 1, "history": [2], "user": 1}
        other = {"prompt": "something else", "completion": "item-y", "target": 2, "history": [3], "user": 1}
        file = tmp_path / "rows.jsonl"
        file.write_text("\n".join(json.dumps(r) for r in (row, other, other)) + "\n")
        status, out, _ = run(capsys, "inspect", folder, "--prompts", file)
        assert status == 1 and "answer_in_prompt" in out and "item-x" in out

    def test_damaged_prompts_name_the_line(self, folder, tmp_path, capsys):
        file = tmp_path / "rows.jsonl"
        for text, message in (
            ('{"prompt": "a"}\n{"promp', "rows.jsonl:2: not JSON"),
            ("[1]", "rows.jsonl:1: not a prompt row"),
        ):
            file.write_text(text)
            status, _, err = run(capsys, "inspect", folder, "--prompts", file)
            assert status == 2 and message in err

    def test_a_folder_that_is_no_data_set(self, tmp_path, capsys):
        status, _, err = run(capsys, "inspect", tmp_path)
        assert status == 2 and "not a prepared data set" in err


@pytest.mark.parametrize("name", FOLDERS)
def test_real_folders_need_no_flags(name, test_data, tmp_path, capsys):
    status, out, err = run(capsys, "prepare", test_data / name, "--out", tmp_path / "d", "--json")
    assert status == 0, err
    record = json.loads(out)
    rows = pq.read_metadata(test_data / name / "interactions.parquet").num_rows
    assert record["interactions"] == rows
    assert "titles" in record["fields"]
    status, out, err = run(capsys, "inspect", tmp_path / "d", "--json")
    assert status == 0, err
    assert json.loads(out)["dataset"]["fingerprint"] == record["fingerprint"]
