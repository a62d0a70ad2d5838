"""Predictions on disk: our own per-user tables, and anybody's file, scored by the same code.

A list without `example_id` answers each target of its user. In a full ranking with seen items removed, seen items are
taken out of a list and the rest closes up, as scores would do it; with candidates, only candidates stay in a list.
A place wasted on an unknown or repeated item stays wasted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llmrec.errors import CheckFailed, DataError
from llmrec.evaluation.found import Found, list_ranks, with_drawn_candidates
from llmrec.evaluation.prediction_files import Answers, read_answers
from llmrec.evaluation.protocol import EvalProtocol
from llmrec.evaluation.results import EXACT_RANKS, EvalResult, summarise
from llmrec.evaluation.tables import SCHEMA, example_places, prediction_table, read_info

if TYPE_CHECKING:
    from llmrec.data.dataset import InteractionDataset
    from llmrec.data.sequences import SequenceExamples

OnBadRows = Literal["stop", "quarantine"]


def load_predictions(path: str | Path) -> EvalResult:
    """Read a table written by `EvalResult.save`; metrics are computed anew from its ranks.

    Raises:
        DataError: The file is missing or is not such a table.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError("no predictions here", file=path, expected="a file written by `llmrec evaluate`")
    table = _open_parquet(path).read()
    info = read_info(table)
    if info is not None and info["protocol"].get("mode") == "pointwise":
        raise DataError(
            "these are logits of events, not ranks",
            file=path,
            expected="a table of ranks or lists",
            remedy=f"AUC and GAUC stand in {path.parent.parent / 'metrics.json'}",
        )
    if info is None or table.schema.names != SCHEMA.names:
        raise DataError(
            "not a per-user table of llmrec",
            file=path,
            found=", ".join(table.schema.names),
            expected=", ".join(SCHEMA.names),
            remedy="score a file of your own with: llmrec compare RUN --predictions FILE --dataset DIR",
        )
    protocol = EvalProtocol.from_dict(info["protocol"])
    return EvalResult(
        name=info["system"],
        predictions=table.cast(SCHEMA),
        metrics=summarise(table, protocol),
        protocol=protocol,
        fingerprint=info["fingerprint"],
        dataset=info["dataset"],
        users=len(pc.unique(table.column("user"))),
        measured=info["measured"],
    )


def is_own_table(path: Path) -> bool:
    """Whether a file was written by `EvalResult.save`."""
    if path.suffix != ".parquet" or not path.is_file():
        return False
    return b"llmrec" in (_open_parquet(path).schema_arrow.metadata or {})


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise DataError(f"cannot be read as .parquet: {error}", file=path) from error


def score_predictions(
    path: str | Path,
    dataset: InteractionDataset,
    protocol: EvalProtocol,
    *,
    name: str | None = None,
    on_bad_rows: OnBadRows = "stop",
) -> EvalResult:
    """Measure somebody's predictions file against a data set.

    Args:
        path: The file; see `prediction_files` for its shapes; or a table written by `EvalResult.save`.
        dataset: Gives targets, histories and ids.
        protocol: The question; mode "score".
        name: Name of the system; by default the file's name.
        on_bad_rows: "stop" raises at unknown ids, repeated items and missing users; "quarantine" counts them in the
            result's notes: unknown users are left out, unknown and repeated items waste their place, and missing
            users count as not found.

    Raises:
        DataError: The file cannot be read as one of the shapes, or holds bad rows and `on_bad_rows` is "stop".
        CheckFailed: A table of ours answers another protocol or data set.
    """
    path, protocol = Path(path), protocol.resolve(dataset)
    if protocol.mode != "score":
        raise DataError("a predictions file holds lists or ranks", file=path, expected="a protocol of mode 'score'")
    examples = dataset.histories(protocol.split, protocol.max_history)  # type: ignore[arg-type]
    if not len(examples):
        raise DataError(f"split {protocol.split!r} of data set {dataset.meta.name!r} holds no target with a history")
    if is_own_table(path):
        return _score_own(path, dataset, protocol, examples, name)
    given = read_answers(path)
    problems = _Problems(path, on_bad_rows)
    rows = _rows_of_examples(given, examples, dataset, problems)
    lists = None if given.lists is None else _item_ids(given, dataset, problems)
    problems.finish()
    if lists is None:
        problems.notes.append("ranks are taken as the file gives them")
    draws = protocol.seeds if protocol.num_candidates is not None else protocol.seeds[:1]
    tables = []
    for seed in draws:
        drawn = with_drawn_candidates(dataset, examples, protocol, seed)
        if lists is None:
            found = _measure_ranks(given, rows, protocol)
        else:
            found = _measure_lists(given, lists, rows, drawn, protocol)
        tables.append(_table(dataset, drawn, found, seed))
    predictions = pa.concat_tables(tables).combine_chunks()
    counts = dataset.context().train_counts if lists is not None else None
    return EvalResult(
        name=name or path.stem,
        predictions=predictions,
        metrics=summarise(predictions, protocol, train_counts=counts),
        protocol=protocol,
        fingerprint=protocol.fingerprint(dataset),
        dataset=dataset.fingerprint,
        users=len(np.unique(examples.users)),
        measured=EXACT_RANKS if lists is None else "lists of a file",
        notes=tuple(problems.notes),
    )


def _score_own(
    path: Path, dataset: InteractionDataset, protocol: EvalProtocol, examples: SequenceExamples, name: str | None
) -> EvalResult:
    result, wanted = load_predictions(path), protocol.fingerprint(dataset)
    if result.fingerprint != wanted:
        raise CheckFailed(
            f"{path} answers another question: {result.label} [{result.fingerprint}], "
            f"asked for: {protocol.label()} [{wanted}]"
        )
    answered = len(np.unique(example_places(result.predictions, examples, path)))
    if answered != len(examples):
        raise DataError("targets without an answer", file=path, found=f"{answered} of {len(examples)} targets")
    counts = dataset.context().train_counts
    metrics = summarise(result.predictions, protocol, train_counts=counts)
    return replace(result, name=name or result.name, protocol=protocol, metrics=metrics)


@dataclass
class _Problems:
    """Counts bad rows, and stops with all of them named when the rule says so."""

    path: Path
    rule: OnBadRows

    def __post_init__(self) -> None:
        self.notes: list[str] = []

    def add(self, what: str, found: Sequence[str]) -> None:
        if found:
            shown = ", ".join(repr(key) for key in list(dict.fromkeys(found))[:3])
            self.notes.append(f"{len(found)} {what}, such as {shown}")

    def finish(self) -> None:
        if self.notes and self.rule == "stop":
            raise DataError(
                "predictions do not fit the data set",
                file=self.path,
                found="; ".join(self.notes),
                expected="original ids of this data set, no item twice in a list, and every user of the split",
                remedy="mend the file, or count such rows and go on with --on-bad-rows quarantine",
            )


def _rows_of_examples(
    given: Answers, examples: SequenceExamples, dataset: InteractionDataset, problems: _Problems
) -> np.ndarray:
    """[n] entry of the file that answers each example, -1 where there is none."""
    place = {key: number for number, key in enumerate(given.keys)}
    if given.by_example:
        wanted = [str(number) for number in examples.example_ids.tolist()]
        known = set(wanted)
        problems.add("unknown example ids", [key for key in given.keys if key not in known])
    else:
        wanted = [dataset.user_keys[user] for user in examples.users]
        known = set(dataset.user_keys[1:])
        problems.add("rows of unknown users", [key for key in given.keys if key not in known])
    rows = np.array([place.get(key, -1) for key in wanted], dtype=np.int64)
    missing = [key for key, row in zip(wanted, rows, strict=True) if row < 0]
    problems.add("targets without an answer", missing)
    return rows


def _item_ids(given: Answers, dataset: InteractionDataset, problems: _Problems) -> list[np.ndarray]:
    assert given.lists is not None
    unknown: list[str] = []
    twice: list[str] = []
    lists = []
    for keys in given.lists:
        ids = dataset.item_ids_of(keys)
        unknown += [key for key, item in zip(keys, ids, strict=True) if item == 0]
        first = np.zeros(len(ids), dtype=bool)
        first[np.unique(ids, return_index=True)[1]] = True
        again = ~first & (ids > 0)
        twice += [keys[row] for row in np.flatnonzero(again)]
        lists.append(np.where(again, 0, ids))
    problems.add("unknown items", unknown)
    problems.add("repeated items", twice)
    return lists


def _measure_lists(
    given: Answers, lists: list[np.ndarray], rows: np.ndarray, examples: SequenceExamples, protocol: EvalProtocol
) -> Found:
    length = max(protocol.cuts)
    found = Found.empty(len(examples), length)
    for number, row in enumerate(rows):
        if row < 0:
            continue
        entry, target = lists[row], examples.targets[number]
        keep = np.ones(len(entry), dtype=bool)
        if examples.candidates is not None:
            keep = np.isin(entry, examples.candidates[number]) | (entry == 0)
        elif protocol.remove_seen:
            keep = ~np.isin(entry, examples.items[examples.first[number] : examples.end[number]]) | (entry == target)
        entry = entry[keep]
        found.ranks[number] = list_ranks(entry[None, :], np.array([target]))[0] if len(entry) else np.nan
        found.num_ranked[number] = int((entry > 0).sum())
        size = min(length, len(entry))
        found.items[number, :size] = entry[:size]
        scores = np.array(given.scores[row], dtype=np.float32)[keep] if given.scores is not None else None
        found.scores[number, :size] = np.nan if scores is None else scores[:size]
    return found


def _measure_ranks(given: Answers, rows: np.ndarray, protocol: EvalProtocol) -> Found:
    assert given.ranks is not None
    found = Found.empty(len(rows), max(protocol.cuts))
    answered = rows >= 0
    found.ranks[answered] = given.ranks[rows[answered]]
    return replace(found, num_ranked=np.isfinite(found.ranks).astype(np.int64))


def _table(dataset: InteractionDataset, examples: SequenceExamples, found: Found, seed: int) -> pa.Table:
    return prediction_table(
        dataset,
        users=examples.users,
        example_ids=examples.example_ids,
        targets=examples.targets,
        ranks=found.ranks,
        num_ranked=found.num_ranked,
        items=found.items,
        scores=found.scores,
        texts=None,
        seed=seed,
    )
