"""Count a data set and look for leaks.

Leaks that belong to the declared protocol are warnings; any other ends with exit status 1. With --prompts the rows of
an instruction file are looked at as well (fields: prompt, completion, user, history, target, candidates).
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.errors import CheckFailed, DataError

if TYPE_CHECKING:
    from rich.console import RenderableType

EXAMPLE = "llmrec inspect runs/synthetic"


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("folder", metavar="DIR", help="folder written by `llmrec prepare`")
    parser.add_argument("--prompts", metavar="FILE.jsonl", help="instruction file to look at as well")


def run(args: Namespace) -> int:
    """Inspect; the report is printed even when a check fails.

    Raises:
        CheckFailed: A leak the declared protocol does not explain.
        DataError: The folder or the prompts cannot be read.
    """
    from llmrec.commands.output import emit
    from llmrec.data.dataset import InteractionDataset
    from llmrec.data.leaks import inspect_dataset
    from llmrec.data.negatives import read_stored

    dataset = InteractionDataset.load(args.folder)
    lists, fitted = read_stored(args.folder)
    prompts = read_prompts(Path(args.prompts)) if args.prompts else None
    findings = inspect_dataset(dataset, prompts, candidates=lists, artefacts=fitted)
    failed = [finding.name for finding in findings if finding.severity == "error"]
    record = {"dataset": dataset.summary(), "findings": findings, "passed": not failed}
    emit(record, lambda: _tables(record), args.as_json)
    if failed:
        raise CheckFailed(
            f"{args.folder}: leak checks failed: {', '.join(failed)}\n"
            "  expected: none; the report above says what was found in each"
        )
    return 0


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file.

    Raises:
        DataError: A line is not a JSON object with a prompt.
    """
    if not path.is_file():
        raise DataError("no such file", file=path, expected="a file written by `llmrec instruct`")
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    "not JSON", file=path, line=number, found=line.strip(), expected="one JSON object a line"
                ) from error
            if not isinstance(row, dict) or "prompt" not in row:
                raise DataError(
                    "not a prompt row", file=path, line=number, found=line.strip(), expected="a field 'prompt'"
                )
            rows.append(row)
    return rows


def _tables(record: dict[str, Any]) -> list[RenderableType]:
    from llmrec.commands.output import tabulate

    summary = record["dataset"]
    figures = [
        *((name, f"{summary[name]:,}") for name in ("users", "items", "interactions")),
        *((f"split {name}", f"{count:,}") for name, count in summary["splits"].items()),
        ("split rule", summary["split"]),
        ("fields", ", ".join(summary["fields"])),
        ("seen items", "removed at evaluation" if summary["remove_seen"] else "not removed, since items repeat"),
        ("fingerprint", summary["fingerprint"]),
    ]
    rows = [(finding.name, finding.severity, finding.count, finding.detail) for finding in record["findings"]]
    return [
        tabulate(("figure", "value"), figures, title=summary["name"]),
        tabulate(("check", "severity", "count", "detail"), rows, title="leak report"),
        *(f"note: {line}" for line in summary["notes"]),
    ]
