"""The result of an evaluation: the per-user table, its metrics with intervals, how they are recorded and printed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from llmrec.errors import CheckFailed, DataError, RecipeError
from llmrec.evaluation.intervals import bootstrap_means, bootstrap_statistic
from llmrec.evaluation.metrics import auc, list_statistics
from llmrec.evaluation.protocol import SAMPLED_NOTE, EvalProtocol
from llmrec.evaluation.tables import AUC, FORMAT_VERSION, VALID_RATIO, metric_values, split_metric, write_predictions

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

EXACT_RANKS, ANSWERS, LOGITS = "exact ranks", "answers", "logits"
USUAL = (EXACT_RANKS, ANSWERS, LOGITS)
"""Ways of measuring that the protocol names already; others are said beside the system."""
Estimate = dict[str, float | None]
"""{"mean", "low", "high"}; low and high are null for statistics of the whole catalogue (coverage, gini), which are
not means over users, so that resampling users would shift them."""


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation of one system found.

    Args:
        name: The system.
        predictions: The per-user table (`SCHEMA`).
        metrics: Metric name -> {"mean", "low", "high"}.
        protocol: The resolved protocol.
        fingerprint: Fingerprint of protocol and data set.
        dataset: Fingerprint of the data set.
        users: Number of users.
        measured: "exact ranks", "answers", "logits", or "top-20 lists" where a system only gives lists.
        notes: Remarks, such as rows put aside.
        exact: [n] bool, generated answers that equal the target's title; None where no answers were judged.
    """

    name: str
    predictions: pa.Table
    metrics: dict[str, Estimate]
    protocol: EvalProtocol
    fingerprint: str
    dataset: str
    users: int
    measured: str = EXACT_RANKS
    notes: tuple[str, ...] = field(default=())
    exact: np.ndarray | None = field(default=None, compare=False)

    @property
    def seed(self) -> int:
        """First draw of candidates."""
        return self.protocol.seeds[0]

    @property
    def label(self) -> str:
        """The protocol's label, with the way of measuring where it is not by exact ranks."""
        label = self.protocol.label()
        return label if self.measured in USUAL else f"{label}, by {self.measured}"

    def info(self) -> dict[str, Any]:
        """What is stored in the metadata of the table."""
        return {
            "format": FORMAT_VERSION,
            "system": self.name,
            "protocol": self.protocol.to_dict(),
            "label": self.label,
            "fingerprint": self.fingerprint,
            "dataset": self.dataset,
            "measured": self.measured,
        }

    def save(self, folder: str | Path, system_name: str | None = None) -> dict[str, Any]:
        """Write `folder`/predictions/<system>.parquet and return the JSON record of this system.

        Raises:
            RecipeError: The system's name cannot be a file name.
        """
        name = system_name or self.name
        if not name or name.startswith(".") or not all(c.isalnum() or c in "._+-" for c in name):
            raise RecipeError(f"system name {name!r} must consist of letters, digits and . _ + -")
        path = Path(folder) / "predictions" / f"{name}.parquet"
        write_predictions(self.predictions, path, {**self.info(), "system": name})
        return results_record({name: self})


def summarise(
    table: pa.Table,
    protocol: EvalProtocol,
    *,
    train_counts: np.ndarray | None = None,
    exact: np.ndarray | None = None,
    interval_seed: int = 0,
) -> dict[str, Estimate]:
    """All metrics of a table with 95% bootstrap intervals over users.

    Where every candidate was scored there is also "auc", the mean over lists of the share of negatives behind the
    target, and "pooled_auc" over the scores of all lists together, which also asks whether scores of different users
    mean the same (MLLM-MSR, 7).

    Args:
        table: Per-user table.
        protocol: Gives the cuts.
        train_counts: [I+1]; adds coverage, novelty and gini of the top-k lists (full ranking only).
        exact: [n] answers that equal the target's title; adds exact_match.
        interval_seed: Seed of the resampling.
    """
    users = table.column("user").to_numpy()
    names = [f"{kind}@{k}" for k in protocol.cuts for kind in ("hr", "ndcg", "mrr") if protocol.mode == "score"]
    if protocol.mode == "generate":
        names = ["hr@1", VALID_RATIO]
    scored = protocol.mode == "score" and _all_scored(table, protocol.num_candidates)
    names += [AUC] if scored else []
    columns = [metric_values(table, name) for name in names]
    if exact is not None:
        names, columns = [*names, "exact_match"], [*columns, exact.astype(np.float64)]
    intervals = bootstrap_means(np.stack(columns, axis=1), interval_seed, users=users)
    metrics: dict[str, Estimate] = {
        name: {**interval.to_dict()} for name, interval in zip(names, intervals, strict=True)
    }
    if scored:
        scores, labels, rows = _pooled(table)
        pooled = bootstrap_statistic(lambda drawn: auc(scores, labels, drawn), users[rows], interval_seed)
        metrics[f"pooled_{AUC}"] = {**pooled.to_dict()}
    if train_counts is not None and protocol.num_candidates is None and protocol.mode == "score":
        metrics |= _catalogue_metrics(table, protocol, users, train_counts, interval_seed)
    return metrics


def _all_scored(table: pa.Table, size: int | None) -> bool:
    """Whether every list of candidates is there as a whole, with its scores."""
    if size is None or table.column("rank").null_count or not len(table):
        return False
    lengths = table.column("items").combine_chunks().value_lengths().to_numpy()
    return bool((lengths == table.column("num_ranked").to_numpy()).all())


def _pooled(table: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Score, label (1 = target) and row of every candidate of a table."""
    items, scores = (table.column(name).combine_chunks() for name in ("items", "scores"))
    rows = np.repeat(np.arange(len(table)), items.value_lengths().to_numpy())
    labels = items.flatten().to_numpy() == table.column("target").to_numpy()[rows]
    return scores.flatten().to_numpy(), labels.astype(np.int64), rows


def _catalogue_metrics(
    table: pa.Table, protocol: EvalProtocol, users: np.ndarray, train_counts: np.ndarray, interval_seed: int
) -> dict[str, Estimate]:
    column = table.column("items").combine_chunks()
    lengths = column.value_lengths().to_numpy()
    lists = np.zeros((len(lengths), max(protocol.cuts)), dtype=np.int64)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    places = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    inside = places < lists.shape[1]
    lists[rows[inside], places[inside]] = column.flatten().to_numpy()[inside]
    metrics: dict[str, Estimate] = {}
    for k in protocol.cuts:
        statistics = list_statistics(lists[:, :k], train_counts)
        metrics[f"coverage@{k}"] = {"mean": statistics.coverage, "low": None, "high": None}
        filled = np.isfinite(statistics.novelty)
        if filled.any():
            novelty = bootstrap_means(statistics.novelty[filled], interval_seed, users=users[filled])[0]
            metrics[f"novelty@{k}"] = {**novelty.to_dict()}
        metrics[f"gini@{k}"] = {"mean": statistics.gini, "low": None, "high": None}
    return metrics


def check_metric(result: EvalResult, metric: str) -> None:
    """Refuse a metric that says nothing about a result.

    Raises:
        RecipeError: The metric is unknown, its cut holds all candidates or is longer than the measured lists, or the
            result is of single answers and the metric is not.
    """
    kind, cut = split_metric(metric)
    size, protocol = result.protocol.num_candidates, result.protocol
    if protocol.mode == "generate" and metric not in ("hr@1", "recall@1", VALID_RATIO):
        raise RecipeError(f"{metric} is not defined for single answers; choose hr@1 or {VALID_RATIO}")
    if kind == AUC and AUC not in result.metrics:
        raise RecipeError(f"{AUC} is for lists of scored candidates; {result.name} was measured by {result.label}")
    if protocol.mode != "generate" and kind == VALID_RATIO:
        raise RecipeError(f"{VALID_RATIO} is for generated answers; {result.name} was measured by {result.measured}")
    if cut is not None and size is not None and protocol.mode == "score" and cut >= size:
        raise RecipeError(f"{metric} holds all {size} candidates; choose a cut below {size}")
    listed = re.fullmatch(r"top-(\d+) lists", result.measured)
    if cut is not None and listed is not None and cut > int(listed[1]):
        raise RecipeError(f"{result.name} was measured on its {result.measured}; {metric} needs longer ones")


def results_record(results: Mapping[str, EvalResult]) -> dict[str, Any]:
    """JSON record of several systems measured under one protocol.

    Raises:
        CheckFailed: Their fingerprints differ, so their numbers must not share a table.
        DataError: There are no results.
    """
    if not results:
        raise DataError("no results to report", expected="at least one evaluated system")
    kinds = {result.fingerprint: f"{name}: {result.protocol.label()}" for name, result in results.items()}
    if len(kinds) > 1:
        shown = "; ".join(f"{label} [{fingerprint}]" for fingerprint, label in kinds.items())
        raise CheckFailed(
            f"these numbers answer different questions and must not share a table: {shown}. "
            "Evaluate the systems under one protocol on one data set."
        )
    first = next(iter(results.values()))
    record = {
        "protocol": first.protocol.label(),
        "protocol_fields": first.protocol.to_dict(),
        "fingerprint": first.fingerprint,
        "dataset": first.dataset,
        "users": first.users,
        "examples": first.predictions.num_rows,
        "seed": first.seed,
        "models": {name: result.metrics for name, result in results.items()},
        "measured": {name: result.measured for name, result in results.items()},
        "notes": {name: list(result.notes) for name, result in results.items() if result.notes},
    }
    if first.protocol.num_candidates is not None:
        record["warning"] = SAMPLED_NOTE
    return record


def print_results(record: Mapping[str, Any], console: Console, metrics: Sequence[str] | None = None) -> None:
    """Print `results_tables`."""
    for part in results_tables(record, metrics):
        console.print(part)


def results_table(record: Mapping[str, Any], metrics: Sequence[str] | None = None) -> Table:
    """A record as a table: a row a system, intervals below the means, protocol and fingerprint in the caption.

    Args:
        record: From `results_record`.
        metrics: Columns; by default the accuracy metrics at the cut 10 (or the largest) and what answers add.
    """
    from rich.text import Text

    caption = f"{record['protocol']}; {record['users']} users, 95% intervals; fingerprint {record['fingerprint']}"
    if "warning" in record:
        caption += f"\n{record['warning']}"
    return _systems_table(record, record["models"], metrics, caption=Text(caption), caption_justify="left")


def results_tables(record: Mapping[str, Any], metrics: Sequence[str] | None = None) -> list[RenderableType]:
    """`results_table`, and below it a table for each slice; an empty slice is said in words."""
    from rich.text import Text

    shown: list[RenderableType] = [results_table(record, metrics)]
    for text, part in record.get("slices", {}).items():
        title = Text(f"slice {text}: {part['users']} users, {part['examples']} examples")
        present = _present(part["models"])
        names = [name for name in metrics or () if name in present]  # figures of the whole catalogue have no slices
        shown.append(
            _systems_table(record, part["models"], names, title=title, title_justify="left")
            if part["models"]
            else Text(f"slice {text}: no example of split {record['protocol_fields']['split']} lies in it")
        )
    return shown


def _present(models: Mapping[str, Mapping[str, Estimate]]) -> list[str]:
    return list(dict.fromkeys(name for values in models.values() for name in values))


def _systems_table(
    record: Mapping[str, Any],
    models: Mapping[str, Mapping[str, Estimate]],
    metrics: Sequence[str] | None,
    **options: Any,
) -> Table:
    from rich.table import Table
    from rich.text import Text

    cuts, present = record["protocol_fields"]["ks"], _present(models)
    cut = 10 if 10 in cuts else max(cuts)
    usual = ("hr@1", f"hr@{cut}", f"ndcg@{cut}", f"mrr@{cut}", f"coverage@{cut}", VALID_RATIO, "exact_match")
    shown = list(metrics or [name for name in dict.fromkeys(usual) if name in present] or present)
    table = Table(**options)
    table.add_column("system", overflow="fold")
    for name in shown:
        table.add_column(name, justify="right")
    for system, values in models.items():
        measured = record["measured"].get(system, EXACT_RANKS)
        marked = system if measured in USUAL else f"{system} (by {measured})"
        table.add_row(Text(marked), *(_cell(values.get(name)) for name in shown))
    return table


def _cell(value: Estimate | None) -> str:
    if value is None:
        return "-"
    return f"{value['mean']:.4f}" + ("" if value["low"] is None else f"\n{value['low']:.4f}-{value['high']:.4f}")
