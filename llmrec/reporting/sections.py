"""What a report says about evaluations: one section per question, its table, its paired tests, sample lists.

A question is a protocol on a data set, told apart by the fingerprint. Systems of different questions never share a
table; so a ranking of sampled candidates always stands apart from a full ranking.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from llmrec.errors import DataError, RecipeError
from llmrec.evaluation.intervals import paired_test
from llmrec.evaluation.predictions import load_predictions
from llmrec.evaluation.protocol import SAMPLED_NOTE
from llmrec.evaluation.results import EvalResult, check_metric
from llmrec.evaluation.tables import VALID_RATIO, per_user
from llmrec.reporting.plots import band_plots, gate_plots, metric_bars, row_entropy

if TYPE_CHECKING:
    import pyarrow as pa

    from llmrec.data.dataset import InteractionDataset

ALL_PAIRS = 6
"""Up to this many systems are tested pair by pair; more are each tested against the best one only."""
SAMPLE_USERS, SAMPLE_SYSTEMS, SAMPLE_ITEMS, SAMPLE_HISTORY = 4, 4, 10, 12


@dataclass
class Measured:
    """One system of a section: its name on the page, its result and what the run recorded beside it."""

    name: str
    result: EvalResult
    metrics: dict[str, dict[str, float | None]]


@dataclass
class Section:
    """All systems that answered one question."""

    fingerprint: str
    label: str
    sampled: bool
    systems: dict[str, Measured] = field(default_factory=dict)
    slices: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    gates: list[dict[str, Any]] = field(default_factory=list)
    bands: list[dict[str, Any]] = field(default_factory=list)


def read_sections(runs: Mapping[str, Path]) -> list[Section]:
    """The evaluations of runs, one section per fingerprint, full rankings first.

    Args:
        runs: Name on the page -> folder.

    Raises:
        DataError: A table cannot be read, or no run has been evaluated.
    """
    sections: dict[str, Section] = {}
    systems = [{path.stem for path in folder.glob("evaluations/*/predictions/*.parquet")} for folder in runs.values()]
    # A run's name stands before a system only where two runs measured a system of that name.
    shared = {name for names in systems for name in names if sum(name in others for others in systems) > 1}
    for run, folder in runs.items():
        for evaluation in sorted((folder / "evaluations").glob("*")):
            _add_evaluation(sections, run, evaluation, shared)
    if not sections:
        raise DataError(
            "there is nothing to report",
            found=f"no evaluations/*/predictions/*.parquet in {', '.join(folder.name for folder in runs.values())}",
            expected="runs that have been evaluated",
            remedy="run: llmrec evaluate RUN",
        )
    return sorted(sections.values(), key=lambda section: (section.sampled, section.label))


def _add_evaluation(sections: dict[str, Section], run: str, folder: Path, shared: set[str]) -> None:
    recorded = read_json(folder / "metrics.json")
    section = None
    for path in sorted((folder / "predictions").glob("*.parquet")):
        result = load_predictions(path)
        section = sections.setdefault(
            result.fingerprint,
            Section(result.fingerprint, result.protocol.label(), result.protocol.num_candidates is not None),
        )
        name = f"{run} / {result.name}" if result.name in shared else result.name
        if name in section.systems:  # two folders of one run can hold the same question
            name = f"{name} ({folder.name})"
        section.systems[name] = Measured(name, result, _metrics(result, recorded, section, name))
        if result.label != result.protocol.label():
            section.notes.append(f"{name} was measured by {result.measured}")
        section.notes += [f"{name}: {note}" for note in recorded.get("notes", {}).get(result.name, [])]
        _add_slices(section, recorded, result.name, name)
    if section is not None and (folder / "gates.parquet").is_file():
        section.gates.append({"run": run, **read_gates(folder / "gates.parquet")})
    if section is not None and (folder / "bands.json").is_file():
        section.bands.append({"run": run, **read_bands(folder / "bands.json")})


def _metrics(
    result: EvalResult, recorded: Mapping[str, Any], section: Section, name: str
) -> dict[str, dict[str, float | None]]:
    """Metrics computed from the table, and those of the record that need more than ranks (coverage, gini, ...)."""
    stored = recorded.get("models", {}).get(result.name, {})
    differing = [
        metric
        for metric, value in result.metrics.items()
        if metric in stored and not math.isclose(float(stored[metric]["mean"]), float(value["mean"] or 0), abs_tol=1e-6)
    ]
    if differing:
        section.notes.append(
            f"{name}: metrics.json says otherwise for {', '.join(differing)}; shown is what the predictions give"
        )
    return {**result.metrics, **{metric: value for metric, value in stored.items() if metric not in result.metrics}}


def _add_slices(section: Section, recorded: Mapping[str, Any], system: str, name: str) -> None:
    """What the record says of a system on slices; they need the data set, so they are not computed anew."""
    for text, part in recorded.get("slices", {}).items():
        known = section.slices.setdefault(text, {"users": part["users"], "examples": part["examples"], "models": {}})
        if system in part["models"]:
            known["models"][name] = part["models"][system]


def slices(section: Section) -> list[dict[str, Any]]:
    """The slices of a section: {slice, users, examples, models: {system: metrics}, names: columns of the table}."""
    columns = shown_metrics(section)
    return [
        {
            "slice": text,
            **part,
            "names": [name for name in columns if any(name in values for values in part["models"].values())],
        }
        for text, part in section.slices.items()
    ]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file.

    Raises:
        DataError: The file is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"not JSON: {error}", file=path, remedy="run: llmrec evaluate RUN") from error
    if not isinstance(record, dict):
        raise DataError("not a JSON object", file=path, found=type(record).__name__)
    return record


def shown_metrics(section: Section) -> list[str]:
    """Columns of the table: per-user metrics at the cuts of the section, then catalogue figures at the middle cut."""
    present = list(dict.fromkeys(name for system in section.systems.values() for name in system.metrics))
    cuts = sorted({int(name.partition("@")[2]) for name in present if name.startswith("hr@")})
    cut = 10 if 10 in cuts or not cuts else cuts[-1]
    low = [k for k in cuts if k < cut][-1:] + [cut] + [k for k in cuts if k > cut][:1]
    usual = ["hr@1", *(f"{kind}@{k}" for kind in ("hr", "ndcg") for k in low), f"mrr@{cut}"]
    usual += [f"{kind}@{cut}" for kind in ("coverage", "novelty", "gini")] + [VALID_RATIO, "exact_match"]
    return [name for name in dict.fromkeys(usual) if name in present]


def bars(section: Section) -> str:
    """Bar plots of the main metrics of a section."""
    wanted = [name for name in shown_metrics(section) if name.split("@")[0] in ("hr", "ndcg", "mrr", VALID_RATIO)]
    main = default_metric(section)
    cut = main.partition("@")[2]
    names = [name for name in wanted if name.partition("@")[2] in (cut, "")] or [main]
    return metric_bars({name: system.metrics for name, system in section.systems.items()}, names)


def default_metric(section: Section) -> str:
    """ndcg at 10 or the largest cut of the section; hr@1 where single answers were judged."""
    protocol = next(iter(section.systems.values())).result.protocol
    if protocol.mode == "generate":
        return "hr@1"
    return f"ndcg@{10 if 10 in protocol.cuts else protocol.cuts[-1]}"


def paired_tests(section: Section, metric: str, *, seed: int = 0) -> list[dict[str, Any]]:
    """Paired tests between the systems of a section, with p-values adjusted by Holm's step-down rule.

    Returns:
        Records {a, b, difference: {mean, low, high}, p_value, p_holm, mcnemar, users}; difference is a - b.
    """
    values = {}
    for name, system in section.systems.items():
        try:
            check_metric(system.result, metric)
        except RecipeError as error:
            section.notes.append(f"{name} is left out of the tests: {error}")
            continue
        keys, numbers = per_user(system.result.predictions, metric)
        values[name] = (keys, examples_of(system.result.predictions), numbers)
    records: list[dict[str, Any]] = []
    for a, b in _pairs({name: float(numbers.mean()) for name, (*_, numbers) in values.items()}):
        if values[a][:2] != values[b][:2]:
            section.notes.append(f"{a} and {b} were measured on different users or targets: no paired test")
            continue
        test = paired_test(values[a][2], values[b][2], seed=seed)
        record: dict[str, Any] = {"a": a, "b": b, "difference": test.difference.to_dict(), "users": test.users}
        records.append({**record, "p_value": test.p_value, "mcnemar": test.mcnemar})
    for record, adjusted in zip(records, holm([record["p_value"] for record in records]), strict=True):
        record["p_holm"] = adjusted
    return records


def _pairs(means: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    order = sorted(means, key=lambda name: -means[name])
    yield from combinations(order, 2) if len(order) <= ALL_PAIRS else ((order[0], other) for other in order[1:])


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: max over j <= i of min(1, (m - j + 1) p_(j)), in the order given."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def examples_of(table: pa.Table) -> list[tuple[int, int]]:
    """(example, draw of candidates) of every row, sorted."""
    return sorted(zip(table.column("example_id").to_pylist(), table.column("seed").to_pylist(), strict=True))


def read_gates(path: Path) -> dict[str, Any]:
    """Drawing and figures of a table `user, gate_0 .. gate_{E-1}`.

    Raises:
        DataError: The table is not of that shape.
    """
    table = pq.read_table(path)
    experts = [f"gate_{number}" for number in range(len(table.column_names) - 1)]
    if not experts or set(table.column_names) != {"user", *experts} or not table.num_rows:
        raise DataError(
            "not a table of gate weights",
            file=path,
            found=f"{table.num_rows} rows of {', '.join(table.column_names)}",
            expected="rows of user, gate_0, gate_1, ...",
        )
    weights = np.stack([table.column(name).to_numpy().astype(np.float64) for name in experts], axis=1)
    if not np.isfinite(weights).all():
        raise DataError("gate weights must be finite", file=path)
    entropy = float(row_entropy(weights).mean())
    return {
        "svg": gate_plots(weights),
        "users": len(weights),
        "experts": len(experts),
        "mean": weights.mean(axis=0).tolist(),
        "leads": (np.bincount(weights.argmax(axis=1), minlength=len(experts)) / len(weights)).tolist(),
        "entropy": entropy,
        "uniform_entropy": math.log(len(experts)),
    }


def read_bands(path: Path) -> dict[str, Any]:
    """Drawing and rows of bands.json: what each spectral band of each signal holds and gives (SSR).

    Raises:
        DataError: The file is not of that shape.
    """
    rows = read_json(path).get("bands")
    fields = {"signal", "band", "from", "to", "energy", "gate", "margin"}
    if not isinstance(rows, list) or not rows or any(not fields <= row.keys() for row in rows):
        raise DataError("not a record of bands", file=path, expected=f"a list of {', '.join(sorted(fields))}")
    return {"svg": band_plots(rows), "rows": rows}


def samples(section: Section, dataset: InteractionDataset) -> list[dict[str, Any]]:
    """A few targets with their history and what up to `SAMPLE_SYSTEMS` systems recommended, titles throughout.

    The examples are spread evenly over the users, so nobody chose the flattering ones.
    """
    systems = list(section.systems.values())[:SAMPLE_SYSTEMS]
    protocol = systems[0].result.protocol
    examples = dataset.histories(protocol.split, SAMPLE_HISTORY)  # type: ignore[arg-type]
    titles = dataset.item_titles
    rows = [_first_rows(system.result.predictions) for system in systems]
    shared = [n for n, number in enumerate(examples.example_ids.tolist()) if all(number in found for found in rows)]
    if not shared:
        return []
    chosen = sorted({shared[i] for i in np.linspace(0, len(shared) - 1, min(SAMPLE_USERS, len(shared))).astype(int)})
    found = []
    for place in chosen:
        example, number, target = examples[place], int(examples.example_ids[place]), int(examples.targets[place])
        lists = [_list(system, rows[i][number], target, titles) for i, system in enumerate(systems)]
        found.append(
            {
                "user": dataset.user_keys[example["user_id"]],
                "history": [titles[item] for item in example["item_ids"]],
                "earlier": len(example["seen"]) - len(example["item_ids"]),
                "target": titles[target],
                "systems": lists,
            }
        )
    return found


def _first_rows(table: pa.Table) -> dict[int, int]:
    """Example -> its first row; further rows are further draws of candidates."""
    numbers, first = np.unique(table.column("example_id").to_numpy(), return_index=True)
    return dict(zip(numbers.tolist(), first.tolist(), strict=True))


def _list(system: Measured, row: int, target: int, titles: Sequence[str]) -> dict[str, Any]:
    record = system.result.predictions.slice(row, 1).to_pylist()[0]
    items = record["items"][:SAMPLE_ITEMS]
    return {
        "name": system.name,
        "items": [{"title": titles[item] if item else "(no such item)", "hit": item == target} for item in items],
        "rank": record["rank"],
        "ranked": record["num_ranked"],
        "text": record["text"],
    }


def sampled_note(section: Section) -> str | None:
    """The warning that goes with sampled candidates."""
    return SAMPLED_NOTE if section.sampled else None
