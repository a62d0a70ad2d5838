"""Where the files of a run lie, and that they are written whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llmrec.errors import DataError
from llmrec.run_dir import RunDir, write_json, write_text


def test_paths(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    found = [run.recipe, run.environment, run.encoder, run.model, run.metrics, run.report, run.dataset]
    found += [run.stage(2, "tuner"), run.evaluation("test-full")]
    assert [path.relative_to(tmp_path).as_posix() for path in found] == [
        "recipe.yaml", "environment.json", "encoder", "model", "metrics.json", "report.html", "dataset",
        "stages/2-tuner", "evaluations/test-full",
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == []  # asking creates nothing


def test_a_shared_data_set_survives_moving_both(tmp_path: Path) -> None:
    (tmp_path / "here/data").mkdir(parents=True)
    run = RunDir(tmp_path / "here/runs/a")
    run.point_to_dataset(tmp_path / "here/data")
    assert run.dataset == (tmp_path / "here/data").resolve()
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert RunDir(tmp_path / "there/runs/a").dataset == (tmp_path / "there/data").resolve()


def test_an_absolute_pointer(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_json(tmp_path / "run/dataset.json", {"path": str(tmp_path / "data")})
    assert RunDir(tmp_path / "run").dataset == tmp_path / "data"


@pytest.mark.parametrize(
    ("text", "expected"), [('{"path": "../gone"}', "is gone"), ("{", "does not point"), ("{}", "path"), ("[]", "point")]
)
def test_pointers_to_nothing(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "dataset.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=expected) as caught:
        _ = RunDir(tmp_path).dataset
    assert "dataset.json" in str(caught.value)


def test_environment_holds_versions_and_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("sys.argv", ["/somewhere/llmrec", "train", "--token", "hf_secret"])
    run = RunDir(tmp_path)
    run.write_environment({"device": "cpu"})
    record = json.loads(run.environment.read_text(encoding="utf-8"))
    assert record["command"] == ["llmrec", "train"] and record["device"] == "cpu"
    assert record["versions"]["torch"] and record["versions"]["numpy"] and record["cores"] >= 1
    assert "hf_secret" not in run.environment.read_text(encoding="utf-8")


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "a.json"
    write_json(path, {"title": "é"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"title": "é"}
    with pytest.raises(TypeError):
        write_json(path, {"title": object()})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_text(path, "half")
    assert json.loads(path.read_text(encoding="utf-8")) == {"title": "é"}


def test_write_text_replaces(tmp_path: Path) -> None:
    for text in ("one\n", "two\n"):
        write_text(tmp_path / "a.txt", text)
        assert (tmp_path / "a.txt").read_text(encoding="utf-8") == text
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
