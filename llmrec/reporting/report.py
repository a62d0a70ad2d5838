"""The report: runs as one HTML page that needs nothing but itself.

Style sheet and drawings are inline, there is no script, and a content security policy forbids loading anything. Every
text from data sets, recipes and systems is escaped by the template engine. Torch is not needed to write it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from llmrec import discovery
from llmrec.errors import DataError, RecipeError
from llmrec.reporting import sections as evaluations
from llmrec.reporting.plots import check_matplotlib, training_curves
from llmrec.run_dir import RunDir, write_text

if TYPE_CHECKING:
    from llmrec.data.dataset import InteractionDataset

TEMPLATES = Path(__file__).parent / "templates"
_RECORDED = ("protocol", "fingerprint", "users", "metrics", "slices", "test_metric", "tests", "notes")
_PARTS = ("encoder", "tuner", "head", "item_tokenizer", "summarizer")


@dataclass
class RunRecord:
    """What is read from one run folder.

    Args:
        name: Name on the page, different for every run.
        recipe_text: recipe.yaml as it stands.
        recipe: The same, parsed; empty where it is missing.
        environment: Flat name -> value.
        stages: [{name, lines, svg}] in order.
        dataset: The prepared data set, or None where it is not at hand.
        papers: [(part, system, citation, address)].
        evaluated: Day of the latest evaluation.
        notices: What the reader should know about this run.
    """

    name: str
    folder: Path
    recipe_text: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)
    dataset: InteractionDataset | None = None
    papers: list[tuple[str, str, str, str]] = field(default_factory=list)
    evaluated: str = ""
    notices: list[str] = field(default_factory=list)


def write_report(runs: Sequence[Path], out: Path, *, title: str | None = None) -> dict[str, Any]:
    """Write runs as one self-contained HTML page.

    Args:
        runs: Run folders; those that answered the same question share a table.
        out: The file; an interrupted write leaves an earlier page in place.
        title: Headline; by default the names of the runs.

    Returns:
        JSON-ready record of what the page shows: sections with their metrics and tests, notices, size in bytes.

    Raises:
        DataError: A folder is no run, or nothing has been evaluated.
        DependencyError: Matplotlib is missing.
    """
    check_matplotlib()
    records = read_runs(runs)
    found = evaluations.read_sections({record.name: record.folder for record in records})
    shown = [_section(section, records) for section in found]
    headline = title or _title(records)
    page = (
        _environment()
        .get_template("report.jinja")
        .render(
            title=headline,
            written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            runs=records,
            datasets=_datasets(records),
            sections=shown,
            papers=sorted({paper for record in records for paper in record.papers}),
        )
    )
    write_text(Path(out), page)
    return {
        "report": str(out),
        "title": headline,
        "bytes": len(page.encode()),
        "runs": [record.name for record in records],
        "notices": {record.name: record.notices for record in records if record.notices},
        "sections": [{key: section[key] for key in _RECORDED} for section in shown],
    }


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Read run folders, each with a name of its own.

    Raises:
        DataError: A folder is not a run, or a file in it cannot be read.
        RecipeError: No folder is given.
    """
    if not folders:
        raise RecipeError("report needs at least one run folder")
    records: list[RunRecord] = []
    for folder in map(Path, folders):
        if not (folder / "evaluations").is_dir() and not (folder / "recipe.yaml").is_file():
            raise DataError("not a run", file=folder, expected="a folder with recipe.yaml and evaluations/")
        record = _read_run(folder)
        taken, number = {other.name for other in records}, 2
        plain = record.name
        while record.name in taken:
            record.name, number = f"{plain} ({number})", number + 1
        records.append(record)
    return records


def _read_run(folder: Path) -> RunRecord:
    run = RunDir(folder)
    record = RunRecord(folder.resolve().name, folder)
    if run.recipe.is_file():
        record.recipe_text = run.recipe.read_text(encoding="utf-8-sig")
        record.recipe = _parse_recipe(run.recipe, record.recipe_text)
        record.name = str(record.recipe.get("name", record.name))
    record.environment = dict(_flat(evaluations.read_json(run.environment)))
    record.stages = [_stage(path) for path in sorted((folder / "stages").glob("*/log.jsonl"), key=_stage_number)]
    record.papers = _papers_of(record.recipe)
    record.dataset = _dataset(run, record.notices)
    tables = list((folder / "evaluations").glob("*/predictions/*.parquet"))
    if tables:
        latest = max(path.stat().st_mtime for path in tables)
        record.evaluated = time.strftime("%Y-%m-%d", time.gmtime(latest))
    return record


def _parse_recipe(path: Path, text: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"not YAML: {error}", file=path) from error
    if not isinstance(found, dict):
        raise DataError("not a recipe", file=path, found=type(found).__name__, expected="keys and values")
    return found


def _dataset(run: RunDir, notices: list[str]) -> InteractionDataset | None:
    from llmrec.data.dataset import InteractionDataset

    try:
        return InteractionDataset.load(run.dataset)
    except DataError as error:
        # The page is worth having without titles; it says so where the data section would stand.
        notices.append(f"data set not shown: {str(error).splitlines()[0].rpartition(': ')[2]}")
        return None


def _stage_number(path: Path) -> tuple[int, str]:
    number = path.parent.name.partition("-")[0]
    return (int(number) if number.isdigit() else 0, path.parent.name)


def _stage(path: Path) -> dict[str, Any]:
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(text)
            lines.append({**record, "step": int(record["step"])})
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                "not a log line", file=path, line=number, found=text, expected='{"step": 1, "loss": ...}'
            ) from error
    losses = [line["loss"] for line in lines if isinstance(line.get("loss"), int | float)]
    svg = training_curves(lines)
    return {
        "name": path.parent.name,
        "steps": max((line["step"] for line in lines), default=0),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "svg": Markup(svg) if svg is not None else None,  # noqa: S704 - drawn by us; texts inside are escaped there
    }


def _flat(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in record.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", " ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return rows


def _papers_of(recipe: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """The publications behind the parts a recipe names."""
    parts = [(kind, recipe.get(kind)) for kind in _PARTS]
    parts += [("transform", part) for part in recipe.get("transforms") or []]
    parts += [("strategy", stage.get("strategy")) for stage in recipe.get("stages") or [] if isinstance(stage, dict)]
    files = {
        f"llmrec/{discovery.KINDS[kind]}/{part['type']}.py": kind
        for kind, part in parts
        if isinstance(part, dict) and "type" in part
    }
    return [
        (files[file], system, paper.citation(), _address(paper.url_id))
        for system, entries in discovery.papers().items()
        for file, paper in entries
        if file in files
    ]


def _address(url_id: str) -> str:
    if not url_id:
        return ""
    return f"https://doi.org/{url_id}" if url_id.startswith("10.") else f"https://arxiv.org/abs/{url_id}"


def _section(section: evaluations.Section, records: Sequence[RunRecord]) -> dict[str, Any]:
    metric = evaluations.default_metric(section)
    tests = evaluations.paired_tests(section, metric)
    first = next(iter(section.systems.values())).result
    datasets = [r.dataset for r in records if r.dataset is not None and r.dataset.fingerprint == first.dataset]
    if not datasets:
        section.notes.append("sample recommendations need the data set this was measured on, and it is not at hand")
    return {
        "protocol": section.label,
        "fingerprint": section.fingerprint,
        "dataset": first.dataset,
        "users": first.users,
        "seeds": ", ".join(map(str, first.protocol.seeds)),
        "names": evaluations.shown_metrics(section),
        "metrics": {name: system.metrics for name, system in section.systems.items()},
        "slices": evaluations.slices(section),
        "bars": Markup(evaluations.bars(section)),  # noqa: S704
        "test_metric": metric,
        "tests": tests,
        "warning": evaluations.sampled_note(section),
        "notes": list(dict.fromkeys(section.notes)),
        "gates": [{**gates, "svg": Markup(gates["svg"])} for gates in section.gates],  # noqa: S704
        "bands": [{**bands, "svg": Markup(bands["svg"])} for bands in section.bands],  # noqa: S704
        "samples": evaluations.samples(section, datasets[0]) if datasets else [],
    }


def _datasets(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """One summary per different data set of the runs."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        if record.dataset is not None:
            summary = found.setdefault(record.dataset.fingerprint, {**record.dataset.summary(), "runs": []})
            summary["runs"].append(record.name)
    return list(found.values())


def _title(records: Sequence[RunRecord]) -> str:
    names = [record.name for record in records]
    return ", ".join(names) if len(names) < 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    return environment


def _number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if 0.0005 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"
