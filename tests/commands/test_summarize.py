"""`llmrec summarize`: tables and figures, refusals, and kill -9 at three moments with the same bytes in the end."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from llmrec.cli import main
from llmrec.data.dataset import InteractionDataset
from llmrec.data.prepare import PrepareOptions, prepare_source
from llmrec.data.summaries import ITEMS, RECORD, USERS, read_summaries
from tests.conftest import ROOT

SLOW = '''
"""A slow generator behind both summarizers; every answer is noted, tables are written slowly when a file says so."""
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pyarrow.parquet as pq

from llmrec.llm.generating import Reply
from llmrec.summarizers.attributes import Attributes
from llmrec.summarizers.base import ItemContent, Written
from llmrec.summarizers.recurrent import Recurrent

PAUSE = float(Path("pause").read_text()) if Path("pause").exists() else 0.0
if PAUSE:
    write = pq.write_table

    def slowly(*args, **options):
        write(*args, **options)
        time.sleep(1)

    pq.write_table = slowly


def note(what):
    with open("asked.log", "a") as file:
        file.write(what + "\\n")


class Slow:
    identity, max_prompt_tokens = "slow", None

    def count_tokens(self, text):
        return len(text.split())

    def generate(self, requests):
        time.sleep(PAUSE)
        for request in requests:
            note(" ".join(request.text.split()))
        return [Reply(f"{request.opening} {len(request.text)} things.", 3, 2, "stop") for request in requests]


@dataclass
class SlowItems(Attributes):
    def write_items(self, items, generator):
        time.sleep(PAUSE)
        for item in items:
            note("item " + item.words)
        return [Written("seen: " + item.words) for item in items]


@dataclass
class SlowUsers(Recurrent):
    needs_generator: ClassVar[bool] = False

    def write_users(self, steps, generator):
        return super().write_users(steps, Slow())
'''
ATTRIBUTES = ("--items", "attributes", "--users", "attributes")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "synthetic"
    options = PrepareOptions(source_options={"users": 24, "items": 30, "events_per_user": 9})
    prepare_source("synthetic", options).dataset.save(folder)
    return folder


def said(capsys: pytest.CaptureFixture[str], *words: Any, status: int = 0) -> tuple[dict[str, Any], str]:
    found = main(["summarize", *map(str, words), "--json"])
    shown = capsys.readouterr()
    assert found == status, shown.err
    return json.loads(shown.out), shown.err


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    status = main(["summarize", *map(str, words)])
    shown = capsys.readouterr()
    assert status == 2 and shown.out == "", shown
    return shown.err


def digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (ITEMS, USERS, RECORD)}


def test_tables_figures_and_a_second_run(data: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "new" / "out"
    words = [data, *ATTRIBUTES, "--split", "train", "test", "--out", out]
    record, told = said(capsys, *words)
    assert told.splitlines()[0] == f"data set synthetic: 24 users, 30 items -> {out}"
    assert record["items"]["statuses"] == {"ok": 30} and record["users"]["statuses"] == {"ok": 48}
    assert record["this_run"]["from_cache"] == 0 and record["seconds"] > 0 and record["untitled_items"] == 0
    dataset = InteractionDataset.load(data)
    found = read_summaries(out, dataset)
    assert set(found.items) == set(range(1, 31)) and {split: len(rows) for split, rows in found.users.items()} == {
        "train": 24, "test": 24,
    }  # fmt: skip
    table = pq.read_table(out / USERS)
    assert table.column("key").to_pylist()[::2] == dataset.user_keys[1:]
    for train, test in zip(found.rows[::2], found.rows[1::2], strict=True):
        assert (train.split, test.split, test.events) == ("train", "test", train.events + 2)
        assert train.blocks == -(-train.events // 3)
    before = digests(out)
    again, told = said(capsys, *words)
    written = record["this_run"]["written"]
    assert again["this_run"] == {**record["this_run"], "written": 0, "from_cache": written} and digests(out) == before
    assert f"{written} finished texts" in told and again["users"] == record["users"]


def test_the_table_for_people(data: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["summarize", str(data), *ATTRIBUTES, "--limit", "5", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "summaries of synthetic" in shown and "texts written and 0 from the cache" in shown


def test_batches_and_shared_caches_change_nothing(data: Path, tmp_path: Path, capsys: Any) -> None:
    results = []
    for number, more in enumerate((["--batch", "1"], ["--batch", "7"], ["--cache", tmp_path / "0" / "cache"])):
        out = tmp_path / str(number)
        record, _ = said(capsys, data, *ATTRIBUTES, *more, "--out", out)
        results.append(digests(out))
    assert results[0] == results[1] == results[2]
    assert record["this_run"]["written"] == 0, "the third read the cache of the first"


def test_limit_grows_and_items_are_chosen(data: Path, tmp_path: Path, capsys: Any) -> None:
    words = [data, *ATTRIBUTES, "--only-read-items", "--max-history", "4", "--out", tmp_path / "out", "--limit"]
    small, _ = said(capsys, *words, "2")
    assert small["users"]["rows"] == 2 and small["items"]["rows"] < 30
    large, _ = said(capsys, *words, "10")
    assert large["users"]["rows"] == 10 and large["this_run"]["from_cache"] >= small["this_run"]["written"]


def test_item_texts_of_an_earlier_result(data: Path, tmp_path: Path, capsys: Any) -> None:
    said(capsys, data, "--items", "attributes", "--set", "items.columns=[brand]", "--out", tmp_path / "items")
    words = [data, "--users", "attributes", "--items-from", tmp_path / "items", "--out", tmp_path / "users"]
    record, _ = said(capsys, *words)
    assert record["items"] is None and record["users"]["statuses"] == {"ok": 24}
    users = read_summaries(tmp_path / "users", InteractionDataset.load(data)).users["test"]
    assert "brightwell" in " ".join(users.values()) and "kitchen" not in " ".join(users.values())


def test_another_job_in_the_folder_is_refused(data: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    said(capsys, data, *ATTRIBUTES, "--out", out)
    before = digests(out)
    other = [data, *ATTRIBUTES, "--out", out, "--set", "users.decay=0.2"]
    assert "holds the texts of another job (users differ)" in refused(capsys, *other)
    assert "(splits differ)" in refused(capsys, data, *ATTRIBUTES, "--split", "valid", "--out", out)
    assert digests(out) == before
    record, _ = said(capsys, *other, "--force")
    assert digests(out) != before and record["this_run"]["from_cache"] == 30, "the items stayed"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "found neither --items nor --users"),
        (["--items", "recurrent"], "--items recurrent: found a summarizer of users, expected one of items"),
        (["--items", "item_visoin"], "did you mean 'item_vision'"),
        (["--users", "recurrent"], "--users needs a model: name one with --model"),
        (["--users", "recurrent", "--endpoint", "http://localhost:1/v1"], "--endpoint needs --model"),
        (["--users", "recurrent", "--set", "users.block=3"], "no option 'block'"),
        (["--users", "recurrent", "--set", "users.block_size=0"], "block_size: found 0, expected at least 1"),
        (["--users", "attributes", "--set", "items.top=3"], "expected users.NAME=VALUE"),
        (["--users", "attributes", "--set", "users.decay=much"], "decay"),
        (["--users", "attributes", "--split", "tset"], "--split: found tset"),
        (["--users", "attributes", "--max-history", "2"], "max_history: found 2, expected at least block_size"),
        (["--users", "attributes", "--batch", "0"], "--batch: found 0"),
        (["--users", "attributes", "--only-read-items"], "--only-read-items needs both"),
        (["--users", "attributes", "--prefill"], "--prefill is of an endpoint"),
        (["--items", "attributes", "--items-from", "x"], "--items-from gives texts to --users"),
        (["--items", "item_vision", "--model", "m"], "the items have no images"),
        (["--items", "attributes", "--set", "items.columns=[colour]"], "colour"),
    ],
)
def test_refusals(words: list[str], message: str, data: Path, tmp_path: Path, capsys: Any) -> None:
    assert message in refused(capsys, data, *words, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / RECORD).exists()


UNSTEADY = """
from dataclasses import dataclass
from pathlib import Path

from llmrec.summarizers.attributes import Attributes
from llmrec.summarizers.base import Written


@dataclass
class Unsteady(Attributes):
    def write_users(self, steps, generator):
        if Path("down").exists():
            return [Written(step.previous, "unfinished", "busy") for step in steps]
        return super().write_users(steps, generator)
"""


def test_unfinished_texts_are_said_and_asked_for_again(
    data: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("unsteady.py").write_text(UNSTEADY)
    Path("down").touch()
    words = [data, "--users", "unsteady.py:Unsteady", "--out", "out"]
    record, told = said(capsys, *words, status=1)
    assert record["users"]["statuses"] == {"unfinished": 24} and "24 texts are unfinished" in told
    assert record["this_run"]["written"] == 0
    Path("down").unlink()
    record, _ = said(capsys, *words)
    assert record["users"]["statuses"] == {"ok": 24}
    assert json.loads(Path("out/summaries.json").read_text())["users"]["type"] == "unsteady.py:Unsteady"


# Kill -9 -------------------------------------------------------------------------------------------------------------

WORDS = ["--items", "slow.py:SlowItems", "--users", "slow.py:SlowUsers", "--batch", "4", "--out", "out"]


def started(data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> tuple[dict[str, Any], list[str]]:
    """Run in a folder to the end; what was said, and everything that was ever asked there."""
    monkeypatch.chdir(folder)
    record, _ = said(capsys, data, *WORDS)
    return record, Path("asked.log").read_text().splitlines()


def lines_in(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("out/cache/*.jsonl"))


def killed(data: Path, folder: Path, moment: str) -> None:
    """Run in a folder of its own, and kill -9 at a moment."""
    folder.mkdir()
    (folder / "slow.py").write_text(SLOW)
    (folder / "pause").write_text("0.12")
    reached = {
        "items": lambda: 8 <= lines_in(folder) < 28,
        "users": lambda: 38 <= lines_in(folder),
        "tables": lambda: any(folder.glob("out/*.partial")) or (folder / "out" / ITEMS).is_file(),
    }[moment]
    process = subprocess.Popen(
        [sys.executable, "-m", "llmrec", "summarize", str(data), *WORDS], cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    end = time.monotonic() + 120
    while not reached():
        assert process.poll() is None and time.monotonic() < end, f"the run did not reach {moment}"
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (folder / "out" / RECORD).exists(), f"the run ended before it was killed at {moment}"
    (folder / "pause").unlink()


def test_kill_at_three_moments_loses_nothing_and_does_nothing_twice(
    data: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "slow.py").write_text(SLOW)
    expected, asked = started(data, whole, monkeypatch, capsys)
    assert len(asked) == len(set(asked)) == expected["this_run"]["written"] > 80
    for moment in ("items", "users", "tables"):
        folder = tmp_path / moment
        killed(data, folder, moment)
        finished = lines_in(folder)
        record, again = started(data, folder, monkeypatch, capsys)
        assert digests(folder / "out") == digests(whole / "out"), moment
        assert record["this_run"]["from_cache"] == finished and record["users"] == expected["users"]
        times = Counter(again)
        twice = [text for text, count in times.items() if count > 1]
        assert set(times) == set(asked) and max(times.values()) <= 2
        assert len(twice) <= 4, "at most the batch that was under way"
        if moment == "tables":
            assert record["this_run"]["written"] == 0 and not twice
