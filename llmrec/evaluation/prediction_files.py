"""Reading anybody's predictions file.

Three shapes (.parquet, .csv, .tsv, .jsonl) are understood; ids are original ids:

    lists   user, items            items ranked best first: a list, a JSON list, or ids separated by "|" or blanks
    long    user, item, score      one row an item, ranked by descending score; or user, item, position from 1
    ranks   user, rank             the rank of the target itself, empty where it was not found

A column `example_id` (from our own tables) may replace `user` where a user has several targets.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmrec.errors import DataError

NAMES = {
    "user": ("user_key", "user", "user_id"),
    "items": ("items", "recommendations", "ranked_items"),
    "item": ("item_key", "item", "item_id"),
    "position": ("position",),
    "score": ("score",),
    "rank": ("rank",),
    "example_id": ("example_id",),
}


@dataclass(frozen=True)
class Answers:
    """A foreign file as it is read, one entry an answer.

    Args:
        path: The file.
        by_example: Whether keys are example ids rather than original user ids.
        keys: Whom each answer is for, without repeats.
        lists: Original item ids, best first; None in a file of ranks.
        scores: Scores of the listed items, where the file has them.
        ranks: [n] rank of the target, NaN where it was not found; None in a file of lists.
    """

    path: Path
    by_example: bool
    keys: list[str]
    lists: list[list[str]] | None
    scores: list[list[float]] | None
    ranks: np.ndarray | None


def read_answers(path: Path) -> Answers:
    """Read a file of one of the three shapes.

    Raises:
        DataError: The file is missing, damaged, or has none of the shapes.
    """
    columns, size = _read_columns(path)
    found = {role: next((n for n in names if n in columns), None) for role, names in NAMES.items()}
    owner = found["example_id"] or found["user"]
    if owner is None or size == 0:
        raise DataError(
            "no rows of predictions" if owner else "predictions name no user",
            file=path,
            found=", ".join(columns) or "no columns",
            expected="columns user, items; or user, item, score; or user, rank",
        )
    by_example, keys = found["example_id"] is not None, [str(key) for key in columns[owner]]
    if found["items"]:
        lists = [_split_list(value, path) for value in columns[found["items"]]]
        return Answers(path, by_example, _unique(keys, path), lists, _scores_of(columns, lists), None)
    order = found["position"] or found["score"] or (found["rank"] if found["item"] else None)
    if found["item"] and order:
        descending = order == found["score"]
        return _group(path, by_example, keys, columns[found["item"]], columns[order], descending)
    if found["rank"]:
        ranks = _numbers(columns[found["rank"]], path, found["rank"], empty=np.nan)
        if (ranks < 1).any():
            raise DataError("ranks count from 1", file=path, column=found["rank"], found=float(np.nanmin(ranks)))
        return Answers(path, by_example, _unique(keys, path), None, None, ranks)
    raise DataError(
        "predictions hold neither lists nor ranks",
        file=path,
        found=", ".join(columns),
        expected="columns user, items; or user, item, score; or user, rank",
    )


def _read_columns(path: Path) -> tuple[dict[str, list[Any]], int]:
    if not path.is_file():
        raise DataError("no such predictions file", file=path, expected="a .parquet, .csv, .tsv or .jsonl file")
    readers: dict[str, Callable[[Path], pa.Table]] = {
        ".parquet": pq.read_table,
        ".csv": lambda p: _read_csv(p, ","),
        ".tsv": lambda p: _read_csv(p, "\t"),
        ".jsonl": _read_jsonl,
    }
    if path.suffix not in readers:
        raise DataError("unknown kind of file", file=path, found=path.suffix, expected=", ".join(readers))
    try:
        table = readers[path.suffix](path)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read as {path.suffix}: {error}", file=path) from error
    wanted = {name for names in NAMES.values() for name in names} | {"scores"}
    columns = {name: table.column(name).to_pylist() for name in table.column_names if name in wanted}
    return columns, table.num_rows


def _read_csv(path: Path, delimiter: str) -> pa.Table:
    from pyarrow import csv

    # Everything is read as text: an id such as 007 must keep its zeros.
    names = [name for group in NAMES.values() for name in group]
    options = csv.ConvertOptions(column_types={name: pa.string() for name in names})
    return csv.read_csv(path, parse_options=csv.ParseOptions(delimiter=delimiter), convert_options=options)


def _read_jsonl(path: Path) -> pa.Table:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line) if line.strip() else {}
        except json.JSONDecodeError as error:
            raise DataError("not a JSON object", file=path, line=number, found=line[:80]) from error
        if not isinstance(row, dict):
            raise DataError("not a JSON object", file=path, line=number, found=line[:80])
        if row:
            rows.append({key: _as_text(value) for key, value in row.items()})
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: pa.array([row.get(name) for row in rows], pa.string()) for name in names})


def _as_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value)


def _split_list(value: Any, path: Path) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list):
        return [str(item) for item in value]
    text = str(value).strip()
    if text.startswith("["):
        try:
            return [str(item) for item in json.loads(text)]
        except json.JSONDecodeError as error:
            raise DataError("a list is not valid JSON", file=path, found=text[:80]) from error
    return [part.strip() for part in (text.split("|") if "|" in text else text.split())]


def _scores_of(columns: dict[str, list[Any]], lists: list[list[str]]) -> list[list[float]] | None:
    scores = columns.get("scores")
    if scores is None or not all(isinstance(row, list) for row in scores):
        return None
    return scores if all(len(row) == len(items) for row, items in zip(scores, lists, strict=True)) else None


def _numbers(values: list[Any], path: Path, column: str, *, empty: float | None = None) -> np.ndarray:
    out = np.empty(len(values))
    for row, value in enumerate(values):
        if empty is not None and value in (None, ""):
            out[row] = empty
            continue
        try:
            out[row] = float(value)
        except (TypeError, ValueError):
            out[row] = np.nan
        if np.isnan(out[row]):
            raise DataError("not a number", file=path, column=column, found=value, expected="a number in every row")
    return out


def _unique(keys: list[str], path: Path) -> list[str]:
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise DataError(
            f"{len(twice)} users have more than one row",
            file=path,
            found=repr(twice[0]),
            expected="one row a user, or a column example_id that tells a user's targets apart",
        )
    return keys


def _group(
    path: Path, by_example: bool, keys: list[str], items: list[Any], order: list[Any], descending: bool
) -> Answers:
    values = _numbers(order, path, "score" if descending else "position")
    owners, owner = np.unique(np.array(keys, dtype=object).astype(str), return_inverse=True)
    by_owner = np.lexsort((-values if descending else values, owner))  # stable: equal scores keep the file's order
    bounds = np.searchsorted(owner[by_owner], np.arange(1, len(owners)))
    groups = np.split(by_owner, bounds)
    lists = [[str(items[row]) for row in group] for group in groups]
    scores = [[float(values[row]) for row in group] for group in groups] if descending else None
    return Answers(path, by_example, owners.tolist(), lists, scores, None)
