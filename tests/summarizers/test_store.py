"""The cache under torn lines and foreign hands; tables that are whole, in order, and of this data set."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from llmrec.data.summaries import ITEMS, RECORD, USERS, UserText, read_summaries
from llmrec.errors import CheckpointError, DataError
from llmrec.summarizers.base import Written
from llmrec.summarizers.store import TextStore, write_results
from tests.summarizers.stubs import shop

BATCHES = [
    {"a": Written("first\nline, ä\u2028"), "b": Written("", "failed", "no")},
    {"c": Written("third", marks=("retried",), prompt_tokens=3, new_tokens=1)},
    {"d": Written("fourth"), "e": Written("fifth"), "f": Written("sixth")},
]


def filled(folder: Path) -> Path:
    with TextStore(folder) as store:
        for batch in BATCHES:
            store.append(batch)
    return folder / "000001.jsonl"


def texts_in(folder: Path) -> dict[str, Written]:
    with TextStore(folder) as store:
        return {key: store[key] for key in "abcdef" if key in store}


def test_what_was_appended_is_read_back(tmp_path: Path) -> None:
    path = filled(tmp_path)
    assert texts_in(tmp_path) == {key: text for batch in BATCHES for key, text in batch.items()}
    assert len(path.read_bytes().splitlines()) == 6, "one line per text"
    with TextStore(tmp_path) as store:
        store.append({"g": Written("more"), "a": Written("again")})
        assert store["a"] == BATCHES[0]["a"], "a finished text is not replaced"
    assert [file.name for file in sorted(tmp_path.glob("*.jsonl"))] == ["000001.jsonl", "000002.jsonl"]


def test_cut_anywhere_whole_batches_remain_and_the_rest_is_made_again(tmp_path: Path) -> None:
    path = filled(tmp_path / "whole")
    data, ends = path.read_bytes(), []
    lines = data.splitlines(keepends=True)
    for last in (2, 3, 6):
        ends.append(len(b"".join(lines[:last])))
    sizes = [0, 2, 3, 6]
    near = {end + step for end in (0, *ends) for step in (-2, -1, 0, 1)}
    for cut in sorted({*range(0, len(data), 23), *(n for n in near if 0 <= n <= len(data))}):
        folder = tmp_path / "cut"
        folder.mkdir(exist_ok=True)
        (folder / path.name).write_bytes(data[:cut])
        with TextStore(folder) as store:
            assert len(store) == sizes[sum(cut >= end for end in ends)], cut
            assert bool(store.dropped) == (cut not in (0, *ends))
    for cut in (ends[0] + 5, ends[1] + len(lines[3]), ends[2] - 1):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / path.name).write_bytes(data[:cut])
        with TextStore(folder) as store:
            for batch in BATCHES:
                store.append(batch)
        assert texts_in(folder) == texts_in(tmp_path / "whole")


def test_a_damaged_line_in_the_middle_is_no_kill(tmp_path: Path) -> None:
    path = filled(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[1][:9] + b"\n", *lines[2:]]))
    with pytest.raises(CheckpointError, match=r"000001.jsonl:2: found a line that is no finished text.*Delete it"):
        texts_in(tmp_path)


def test_unfinished_texts_are_not_kept_and_failed_ones_can_be_asked_for_again(tmp_path: Path) -> None:
    with TextStore(tmp_path) as store:
        store.append({"a": Written("", "unfinished", "busy"), "b": Written("", "failed"), "c": Written("x", "kept")})
        assert len(store) == 2 and "a" not in store
    with TextStore(tmp_path, retry_failed=True) as store:
        assert len(store) == 0
        store.append({"b": Written("now")})
    assert texts_in(tmp_path) == {"b": Written("now"), "c": Written("x", "kept")}, "the later text counts"


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with TextStore(tmp_path), pytest.raises(CheckpointError, match="in use by another process"), TextStore(tmp_path):
        pass
    with TextStore(tmp_path):
        pass


# Tables --------------------------------------------------------------------------------------------------------------

DATA = shop([[1, 2, 3, 4], [5, 6, 7]], items=7)
ROWS = [
    UserText(2, "test", 6, 2, "", 1, "failed", "no answer"),
    UserText(1, "test", 3, 3, "likes tea", 1, "ok"),
    UserText(1, "valid", 2, 2, "liked tea", 1, "ok"),
]


def test_texts_by_id(tmp_path: Path) -> None:
    write_results(tmp_path, DATA, {3: Written("three"), 1: Written("", "missing", "no picture")}, ROWS,
                  {"splits": ["valid", "test"]})  # fmt: skip
    found = read_summaries(tmp_path, DATA)
    assert found.items == {3: "three"} and found.users == {"valid": {1: "liked tea"}, "test": {1: "likes tea"}}
    assert [(row.user, row.split) for row in found.rows] == [(1, "valid"), (1, "test"), (2, "test")]
    assert found.rows[2] == ROWS[0], "who has no text keeps a row"
    items = pq.read_table(tmp_path / ITEMS)
    assert items.column_names == ["item", "key", "text", "status", "reason"]
    assert items.column("key").to_pylist() == ["key-1", "key-3"]
    assert pq.read_table(tmp_path / USERS).column("key").to_pylist() == ["user-1", "user-1", "user-2"]
    record = json.loads((tmp_path / RECORD).read_text())
    assert record["dataset"] == {"name": "hand made", "fingerprint": DATA.fingerprint}


def test_bytes_do_not_depend_on_the_order_of_completion(tmp_path: Path) -> None:
    items = {item: Written(f"text {item}") for item in range(1, 8)}
    write_results(tmp_path / "a", DATA, items, ROWS, {})
    write_results(tmp_path / "b", DATA, dict(reversed(items.items())), ROWS[::-1], {})
    for name in (ITEMS, USERS, RECORD):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_another_data_set_is_refused(tmp_path: Path) -> None:
    write_results(tmp_path, DATA, {}, ROWS, {})
    other = shop([[1, 2, 3, 5], [5, 6, 7]], items=7)
    with pytest.raises(CheckpointError, match=f"(?s){DATA.fingerprint}.*{other.fingerprint}"):
        read_summaries(tmp_path, other)


def test_an_unfinished_or_changed_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no finished summaries"):
        read_summaries(tmp_path, DATA)
    write_results(tmp_path, DATA, {}, ROWS, {})
    before = (tmp_path / USERS).read_bytes()
    write_results(tmp_path, DATA, {}, ROWS[1:], {})
    (tmp_path / USERS).write_bytes(before)
    with pytest.raises(DataError, match="users.parquet: is missing or not the table of its record"):
        read_summaries(tmp_path, DATA)
