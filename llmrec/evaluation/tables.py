"""The per-user table: its columns, how it is built, written and read, and the metric values in it.

One row of the table is one example under one draw of candidates:

    user, user_key     id in the data set, original id
    example_id         stable index of the example
    target, target_key the item to find, its original id
    rank               rank of the target, null where it was not found (a list or an answer without it)
    num_ranked         items ranked: the whole catalogue less removed items, C, the list's length, or 1 for an answer
                       that names one item and 0 for one that does not
    items, scores      the best items, best first
    text               the raw answer of a system that writes
    seed               draw of candidates

The schema's metadata (key "llmrec") says which system, protocol and data set it belongs to, so a file stands alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmrec.errors import DataError, RecipeError
from llmrec.evaluation.intervals import user_sums
from llmrec.evaluation.metrics import hit_rate, list_auc, ndcg, reciprocal_rank

if TYPE_CHECKING:
    from llmrec.data.dataset import InteractionDataset
    from llmrec.data.sequences import SequenceExamples

FORMAT_VERSION = 1
SCHEMA = pa.schema(
    {
        "user": pa.int64(),
        "user_key": pa.string(),
        "example_id": pa.int64(),
        "target": pa.int64(),
        "target_key": pa.string(),
        "rank": pa.float64(),
        "num_ranked": pa.int64(),
        "items": pa.list_(pa.int32()),
        "scores": pa.list_(pa.float32()),
        "text": pa.string(),
        "seed": pa.int64(),
    }
)
RANK_METRICS = {"hr": hit_rate, "recall": hit_rate, "ndcg": ndcg, "mrr": reciprocal_rank}
VALID_RATIO, AUC = "valid_ratio", "auc"


def write_predictions(table: pa.Table, path: Path, info: Mapping[str, Any]) -> None:
    """Write a table with its metadata; an interrupted write leaves no file of that name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    pq.write_table(table.replace_schema_metadata({"llmrec": json.dumps(info)}), partial, compression="zstd")
    os.replace(partial, path)


def read_info(table: pa.Table) -> dict[str, Any] | None:
    """The metadata written by `write_predictions`, or None for a table that somebody else wrote."""
    stored = (table.schema.metadata or {}).get(b"llmrec")
    info = json.loads(stored) if stored is not None else None
    if info is not None and info.get("format") != FORMAT_VERSION:
        raise DataError("unknown format of predictions", found=info.get("format"), expected=str(FORMAT_VERSION))
    return info


def prediction_table(
    dataset: InteractionDataset,
    *,
    users: np.ndarray,
    example_ids: np.ndarray,
    targets: np.ndarray,
    ranks: np.ndarray,
    num_ranked: np.ndarray,
    items: np.ndarray,
    scores: np.ndarray,
    texts: Sequence[str] | None,
    seed: int,
) -> pa.Table:
    """A table of n rows from arrays; `items` and `scores` are [n, K] with item 0 for empty places at the end.

    Ranks of NaN or infinity become null.
    """
    user_keys, item_keys = np.array(dataset.user_keys, dtype=object), np.array(dataset.item_keys, dtype=object)
    columns = [
        pa.array(users, pa.int64()),
        pa.array(user_keys[users], pa.string()),
        pa.array(example_ids, pa.int64()),
        pa.array(targets, pa.int64()),
        pa.array(item_keys[targets], pa.string()),
        pa.array(ranks, pa.float64(), mask=~np.isfinite(ranks)),
        pa.array(num_ranked, pa.int64()),
        *_lists(items, scores),
        pa.nulls(len(users), pa.string()) if texts is None else pa.array(list(texts), pa.string()),
        pa.array(np.full(len(users), seed), pa.int64()),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _lists(items: np.ndarray, scores: np.ndarray) -> list[pa.Array]:
    # An empty place inside a list (an unknown item) stays, so that positions keep their meaning; trailing ones go.
    places = np.arange(1, items.shape[1] + 1)
    lengths = np.where(items > 0, places, 0).max(axis=1, initial=0)
    inside = places[None, :] <= lengths[:, None]
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    return [
        pa.ListArray.from_arrays(offsets, pa.array(values[inside].astype(kind)))
        for values, kind in ((items, np.int32), (scores, np.float32))
    ]


def example_places(table: pa.Table, examples: SequenceExamples, file: Path | None = None) -> np.ndarray:
    """[n] int64 place of each row's example among `examples`.

    Args:
        table: Per-user table.
        examples: Examples of one split with ascending `example_ids`, as a data set gives them.
        file: Where the table was read from, for the message.

    Raises:
        DataError: A row's example is not among them, or has another target.
    """
    example_ids, targets = (table.column(name).to_numpy() for name in ("example_id", "target"))
    places = np.searchsorted(examples.example_ids, example_ids).clip(0, len(examples) - 1)
    same = (examples.example_ids[places] == example_ids) & (examples.targets[places] == targets)
    if not same.all():
        raise DataError("targets are not those of the data set", file=file, found=f"{int((~same).sum())} rows differ")
    return places


def split_metric(name: str) -> tuple[str, int | None]:
    """("ndcg", 10) from "ndcg@10"; ("valid_ratio", None); ("auc", None).

    Raises:
        RecipeError: No such per-user metric.
    """
    kind, _, cut = name.lower().partition("@")
    if kind in (VALID_RATIO, AUC) and not cut:
        return kind, None
    if kind not in RANK_METRICS or not cut.isdigit() or int(cut) < 1:
        raise RecipeError(f"metric {name!r} is not known; expected {', '.join(RANK_METRICS)} with a cut (ndcg@10), "
                          f"{AUC} or {VALID_RATIO}")  # fmt: skip
    return kind, int(cut)


def metric_values(table: pa.Table, name: str) -> np.ndarray:
    """[n] values of a per-example metric from a per-user table."""
    kind, cut = split_metric(name)
    if kind == AUC:
        ranks = table.column("rank").to_numpy(zero_copy_only=False).astype(np.float64)
        return list_auc(ranks, table.column("num_ranked").to_numpy())
    if cut is None:
        return (table.column("num_ranked").to_numpy() > 0).astype(np.float64)
    ranks = table.column("rank").to_numpy(zero_copy_only=False).astype(np.float64)
    return RANK_METRICS[kind](ranks, cut)


def per_user(table: pa.Table, name: str) -> tuple[list[str], np.ndarray]:
    """Original ids of the users in ascending order of user id, and each user's mean value of a metric."""
    users = table.column("user").to_numpy()
    _, first = np.unique(users, return_index=True)
    sums, counts = user_sums(metric_values(table, name), users)
    return table.column("user_key").take(pa.array(first)).to_pylist(), sums[:, 0] / counts
