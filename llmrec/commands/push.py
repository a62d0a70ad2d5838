"""Publish a run on the Hub: weights, configuration, tokenizer, metrics and a model card.

Files go by an allow-list, after a scan for secrets; interactions, users and predictions never do. The token comes from
HF_TOKEN or `hf auth login`. `--dry-run` shows every file with size and hash, and the card, and needs no token.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

EXAMPLE = "llmrec push runs/smoke-ilora --repo me/smoke-ilora --dry-run"


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("run", metavar="RUN", help="run folder, evaluated")
    parser.add_argument("--repo", metavar="OWNER/NAME", required=True, help="repository; made where it does not exist")
    parser.add_argument("--private", action="store_true", help="only into a private repository")
    parser.add_argument("--revision", metavar="BRANCH", help="branch; made where it does not exist (default: main)")
    parser.add_argument("--titles", action="store_true", help="publish item titles too, if their source permits it")
    parser.add_argument("--dry-run", action="store_true", help="list files, sizes, hashes and the card; send nothing")


def run(args: Namespace) -> int:
    """Collect, scan, and send unless it is a dry run.

    Raises:
        CheckFailed: A file holds a secret.
        CheckpointError: The run is not finished.
        HubError: No token, a malformed name, or the Hub refuses.
    """
    from llmrec.commands.output import emit
    from llmrec.reporting.hub import push

    record = push(
        Path(args.run),
        args.repo,
        private=args.private,
        revision=args.revision,
        titles=args.titles,
        dry_run=args.dry_run,
    )
    emit({"run": args.run, **record}, lambda: _shown(record), args.as_json)
    return 0


def _shown(record: dict[str, Any]) -> list[RenderableType]:
    from rich.text import Text

    from llmrec.commands.output import tabulate

    rows = [(file["path"], file["bytes"], file["sha256"][:16]) for file in record["files"]]
    title = f"{'would be published' if record['dry_run'] else 'published'}: {record['repo']} ({record['revision']})"
    shown: list[RenderableType] = [tabulate(("file", "bytes", "SHA-256"), rows, title=title)]
    shown += [Text(f"removed: {path}") for path in record["removed"]]
    shown += [Text(notice) for notice in record["notices"]]
    shown.append(Text(f"\n{record['card']}" if record["dry_run"] else str(record["url"])))
    return shown
