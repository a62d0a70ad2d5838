"""The folder of a prepared data set: data card (README.md), quarantined rows (rejected.csv), safe writing."""

from __future__ import annotations

import csv
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

    from llmrec.data.dataset import InteractionDataset
    from llmrec.data.prepare import Preparation

CARD, REJECTED, REJECTED_IMAGES = "README.md", "rejected.csv", "rejected_images.csv"
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")
_SPLIT_MEANING = {
    "train": "training targets and inputs",
    "valid": "validation targets",
    "test": "test targets",
    "test_lapse": "test targets after a gap of unseen events",
    "calibration": "targets for calibrating uncertainty",
    "history": "inputs only, never a target",
}


def write_folder(preparation: Preparation, folder: str | Path) -> Path:
    """Write a data set with its card and its quarantined rows, so that an interruption leaves no half-written data set.

    Everything is written beside the folder first. An older data set in the folder is replaced, its stored candidate
    lists included; a folder that holds anything else is left alone.

    Raises:
        DataError: `folder` is a file, or holds something that is not a data set.
    """
    folder = Path(folder)
    _check_target(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        preparation.dataset.save(staged)
        if preparation.rejected is not None and preparation.rejected.num_rows:
            write_rejected(preparation.rejected, staged / REJECTED)
        if preparation.rejected_images is not None and preparation.rejected_images.num_rows:
            write_rejected(preparation.rejected_images, staged / REJECTED_IMAGES)
        (staged / CARD).write_text(render_card(preparation.dataset, preparation.rejected), encoding="utf-8")
        folder.mkdir(exist_ok=True)
        (folder / REJECTED).unlink(missing_ok=True)
        (folder / REJECTED_IMAGES).unlink(missing_ok=True)
        shutil.rmtree(folder / "candidates", ignore_errors=True)
        # meta.json last: until then its fingerprint does not fit the tables and no reader accepts the folder
        for path in sorted(staged.iterdir(), key=lambda path: (path.name == "meta.json", path.name)):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return folder


def _check_target(folder: Path) -> None:
    if folder.is_dir():
        names = sorted(path.name for path in folder.iterdir())
        if not names or "meta.json" in names:
            return
        found = f"a folder with {', '.join(names[:5])}"
    elif folder.exists():
        found = "a file"
    else:
        return
    raise DataError(
        "will not write a data set here",
        file=folder,
        found=found,
        expected="a new folder, an empty one, or an earlier data set",
        remedy="choose another --out",
    )


def write_rejected(rejected: pa.Table, path: Path) -> None:
    """Quarantined rows as CSV; cells a spreadsheet would run as a formula get a leading apostrophe."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(rejected.column_names)
        for batch in rejected.to_batches():
            columns = [column.to_pylist() for column in batch.columns]
            writer.writerows([defuse(cell) for cell in row] for row in zip(*columns, strict=True))


def defuse(cell: Any) -> Any:
    """A cell that no spreadsheet runs; numbers stay numbers."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA_STARTS) else cell


def render_card(dataset: InteractionDataset, rejected: pa.Table | None = None) -> str:
    """The data card as Markdown."""
    summary, meta = dataset.summary(), dataset.meta
    lengths = summary["history_length"]
    figures = {
        "users": dataset.num_users,
        "items": dataset.num_items,
        "interactions": dataset.interactions.num_rows,
        "density": f"{summary['density']:.4%}",
        "events per user (min / median / max)": f"{lengths['min']} / {lengths['median']:g} / {lengths['max']}",
        "fingerprint": f"`{dataset.fingerprint}`",
    }
    rules = {
        "source": meta.source,
        "positives": f"`{meta.positive}`",
        "repeated (user, item) events": f"{meta.repeats} (present: {'yes' if meta.has_repeats else 'no'})",
        "filters": ", ".join(f"{name} = {value}" for name, value in meta.filters.items()) or "none",
        "order within a user": meta.tie_rule,
        "split": meta.split,
        "seen items at evaluation": "removed" if meta.remove_seen else "not removed, since items repeat",
        "parent data set": f"`{meta.parent}`" if meta.parent else "none",
    }
    splits = [(name, f"{count:,}", _SPLIT_MEANING[name]) for name, count in summary["splits"].items()]
    parts = [
        _front_matter(meta.name),
        f"# {_plain(meta.name)}",
        "Interactions prepared by llmrec. The terms of the original source apply to everything in this folder.",
        "## Figures\n\n" + _table(("figure", "value"), figures.items()),
        "## Splits\n\n" + _table(("split", "events", "meaning"), splits),
        "## Rules\n\n" + _table(("rule", "value"), rules.items()),
        "## Steps\n\n" + _table(("step", "count"), _steps(meta.counts)),
        "## Columns\n\n" + _columns(dataset),
        "## Notices\n\n" + ("\n".join(f"- {_plain(line)}" for line in meta.notes) or "none"),
        _rejected_section(rejected),
        _use_section(),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(name: str) -> str:
    return f"---\npretty_name: {json.dumps(name)}\ntags:\n- recommendation\n- llmrec\n---"


def _steps(counts: Mapping[str, int]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), f"{count:,}") for name, count in sorted(counts.items(), key=_step_order)]


def _step_order(entry: tuple[str, int]) -> int:
    # reading comes first; everything else stands in the order it happened
    return {"rows_read": -2, "rows_rejected": -1}.get(entry[0], 0)


def _columns(dataset: InteractionDataset) -> str:
    tables = (
        ("interactions", dataset.interactions),
        ("items", dataset.items),
        ("users", dataset.users),
    )
    theirs = dataset.meta.columns
    rows = [
        (name, column, str(table.schema.field(column).type), theirs.get(column, ""))
        for name, table in tables
        for column in table.column_names
    ]
    return _table(("table", "column", "type", "source column"), rows)


def _rejected_section(rejected: pa.Table | None) -> str:
    if rejected is None or not rejected.num_rows:
        return ""
    counts: dict[str, int] = {}
    for reason in rejected.column("reason").to_pylist():
        counts[str(reason)] = counts.get(str(reason), 0) + 1
    top = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))[:10]
    head = f"## Rejected rows\n\n{rejected.num_rows:,} rows were left out; {REJECTED} lists each with its place.\n\n"
    return head + _table(("reason", "rows"), [(reason, f"{count:,}") for reason, count in top])


def _use_section() -> str:
    return (
        "## Use\n\n```python\nfrom llmrec.data.dataset import InteractionDataset\n\n"
        'dataset = InteractionDataset.load("THIS_FOLDER")\n```\n\n'
        "`llmrec inspect THIS_FOLDER` looks for leaks. Ids count from 1 in the order of the sorted original ids; "
        "the column `key` of items and users holds the original ids."
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(_plain(cell) for cell in line)} |" for line in lines)


def _plain(value: Any) -> str:
    """Text that stays in its cell and carries no markup of its own."""
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
