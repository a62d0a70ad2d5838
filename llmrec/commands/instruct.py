"""`llmrec instruct`: a prepared data set as prompts and answers, one JSON object a line.

The columns `prompt` and `completion` are those trainers of language models read; the rest says where a row came from.
A row whose answer stands in its own history stops the export, unless the data set declares repeated items.
"""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.errors import CheckFailed, RecipeError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llmrec.data.dataset import InteractionDataset
    from llmrec.data.instructions import InstructionExamples
    from llmrec.data.prompts import SlotRef

EXAMPLE = "llmrec instruct data/movielens-100k --template next_item/movie --out instructions.jsonl --candidates 20"
SLOT_MARKER = "<item>"
"""Where a vector belongs in exported hybrid prompts; titles never contain it."""


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("dataset", metavar="DIR", help="prepared data set")
    parser.add_argument("--template", required=True, metavar="NAME", help="prompt file, such as next_item/movie")
    parser.add_argument("--out", required=True, metavar="FILE.jsonl", help="file to write")
    parser.add_argument("--split", default="train", choices=("train", "valid", "test"), help="(default: train)")
    parser.add_argument("--candidates", type=int, metavar="N", help="list N candidates, the target among them")
    parser.add_argument("--style", choices=("text", "hybrid"), default="text", help="hybrid marks item slots as <item>")
    parser.add_argument("--max-history", type=int, default=10, metavar="N", help="latest items shown (default: 10)")
    parser.add_argument("--chat", action="store_true", help="write prompt and completion as lists of messages")
    parser.add_argument("--limit", type=int, metavar="N", help="a seeded draw of N rows instead of all")
    parser.add_argument("--seed", type=int, default=0, help="seed of phrasings, candidates and --limit (default: 0)")
    parser.add_argument(
        "--item-text", default="{title}", metavar="TEXT", help="words of an item (default: '{title}'); [..] is optional"
    )
    parser.add_argument("--max-chars", type=int, default=200, metavar="N", help="longest item text (default: 200)")
    parser.add_argument("--move-article", action="store_true", help="The Matrix (1999) for Matrix, The (1999)")
    parser.add_argument("--drop-year", action="store_true", help="leave out a year at the end of a title")


def run(args: Namespace) -> int:
    """Write the file and show its first row.

    Raises:
        CheckFailed: An answer stands in its own prompt outside the candidates.
        RecipeError: The split has no examples.
    """
    from llmrec.commands.output import emit
    from llmrec.data.dataset import InteractionDataset

    dataset = InteractionDataset.load(args.dataset)
    rows = _examples(dataset, args)
    if not len(rows):
        raise RecipeError(f"{args.dataset}: split {args.split!r} has no event with an earlier one; nothing to write")
    writer = _RowWriter(dataset, rows, args.style, args.chat)
    counts = _write(writer, Path(args.out), repeats_declared=dataset.meta.has_repeats)
    result = {
        "file": args.out,
        "dataset": dataset.fingerprint,
        "split": args.split,
        "template": args.template,
        "style": args.style,
        "candidates": args.candidates,
        "seed": args.seed,
        **counts,
        "preview": writer.row(rows[0]),
    }
    emit(result, lambda: _report(result), args.as_json)
    return 0


def _examples(dataset: InteractionDataset, args: Namespace) -> InstructionExamples:
    import numpy as np

    from llmrec.data.instructions import InstructionExamples, PromptOptions
    from llmrec.data.item_text import ItemTextSpec, title_texts
    from llmrec.data.negatives import stored_candidates

    options = PromptOptions(args.template, style=args.style, candidates=args.candidates, max_history=args.max_history)
    spec = ItemTextSpec(args.item_text, args.max_chars, args.move_article, args.drop_year)
    # A title that spells the marker out would be taken for a slot by whoever reads the file.
    titles = [text.replace(SLOT_MARKER, "(item)") for text in title_texts(dataset, spec)]
    examples = dataset.histories(args.split, args.max_history)
    if args.candidates is not None and args.split != "train":
        # The lists every system is measured on, not another draw.
        lists = stored_candidates(args.dataset, dataset, args.split, args.candidates, seed=args.seed)
        examples = examples.with_candidates(lists)
    if args.limit is not None and args.limit < 1:
        raise RecipeError(f"--limit is {args.limit}; expected at least 1")
    if args.limit is not None and args.limit < len(examples):
        chosen = np.random.default_rng(args.seed).permutation(len(examples))[: args.limit]
        examples = examples.subset(np.sort(chosen))
    training = args.split == "train"
    return InstructionExamples(dataset, examples, options, titles=titles, seed=args.seed, training=training)


@dataclass
class _RowWriter:
    """Makes the rows of the file; items and users go by their original ids."""

    dataset: InteractionDataset
    examples: InstructionExamples
    style: str
    chat: bool

    def rows(self) -> Iterator[tuple[dict[str, Any], bool]]:
        """Every row, and whether its answer stands in its own history."""
        for example in (self.examples[index] for index in range(len(self.examples))):
            yield self.row(example), self.leaks(example)

    def row(self, example: dict[str, Any]) -> dict[str, Any]:
        """One line of the file."""
        from llmrec.data.prompts import segments_to_text

        titles = self.examples.titles
        segments, target = self.segments(example), int(example["targets"][-1])
        prompt = segments_to_text(segments, f" {SLOT_MARKER}" if self.style == "hybrid" else "")
        keys = self.dataset.item_keys
        row: dict[str, Any] = {
            "prompt": [{"role": "user", "content": prompt}] if self.chat else prompt,
            "completion": [{"role": "assistant", "content": titles[target]}] if self.chat else f" {titles[target]}\n",
            "user": self.dataset.user_keys[example["user_id"]],
            "history": [keys[item] for item in example["item_ids"]],
            "target": keys[target],
            "candidates": [keys[item] for item in example.get("candidates", ()) if item],
            "example_id": example["example_id"],
        }
        if self.style == "hybrid":
            row["item_slots"] = [keys[part.item_id] for part in segments if not isinstance(part, str)]
        return row

    def leaks(self, example: dict[str, Any]) -> bool:
        """Whether the answer's title is among those of the history, apart from letter case and punctuation."""
        keys = self._title_keys
        return keys[int(example["targets"][-1])] in {keys[item] for item in example["item_ids"]}

    @cached_property
    def _title_keys(self) -> list[str]:
        from llmrec.data.item_text import same_title_key

        return [same_title_key(title) for title in self.examples.titles]

    def segments(self, example: dict[str, Any]) -> list[str | SlotRef]:
        from llmrec.data.prompts import render_next_item

        titles = self.examples.titles
        past, offered = (
            [(int(item), titles[int(item)]) for item in items if item]
            for items in (example["item_ids"], example.get("candidates", ()))
        )
        return render_next_item(self.examples.template, example["variant"], past, offered)


def _write(writer: _RowWriter, path: Path, repeats_declared: bool) -> dict[str, int]:
    """Write all rows beside the file and rename at the end, so a stopped run leaves no half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    counts = {"rows": 0, "answers_in_history": 0}
    try:
        with partial.open("w", encoding="utf-8") as file:
            for row, leaks in _with_progress(writer.rows(), len(writer.examples)):
                if leaks and not repeats_declared:
                    raise CheckFailed(
                        f"{path}: the answer {row['target']!r} of user {row['user']!r} stands in its own history\n"
                        "  expected: answers outside the prompt, since the data set declares no repeated items\n"
                        "  remedy: see `llmrec inspect`, or prepare with --repeats keep, first or last"
                    )
                counts["rows"] += 1
                counts["answers_in_history"] += leaks
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return counts


def _with_progress(rows: Iterator[tuple[dict[str, Any], bool]], total: int) -> Iterator[tuple[dict[str, Any], bool]]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(rows, "writing", total=total, console=console, transient=True, disable=not console.is_terminal)


def _report(result: dict[str, Any]) -> list[RenderableType]:
    from rich.panel import Panel
    from rich.text import Text

    from llmrec.commands.output import tabulate

    row = result["preview"]
    chat = not isinstance(row["prompt"], str)
    prompt, answer = (row[name][0]["content"] if chat else row[name] for name in ("prompt", "completion"))
    table = tabulate(
        ("file", "rows", "split", "style", "candidates", "answers in history"),
        [[result[name] for name in ("file", "rows", "split", "style", "candidates", "answers_in_history")]],
    )
    lines: list[RenderableType] = [
        table,
        Panel(Text(prompt), title="prompt"),
        Panel(Text(answer.strip()), title="answer"),
    ]
    if result["answers_in_history"]:
        lines.append(Text("repeated items: these answers also stand in the history, as the data set declares"))
    return lines
