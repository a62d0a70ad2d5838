"""Write texts of items and of users' tastes, by a model or from the items' columns.

DIR is a folder of `llmrec prepare`, or a run. FOLDER then holds

    items.parquet    item, key, text, status, reason
    users.parquet    user, key, split, example, events, text, blocks, status, reason
    summaries.json   data set, prompts, models, counts; cache/ holds every finished text

A user's text is made of the events before one held-out event of --split (the first one of valid or test, the last one
of train), block after block. Nothing is asked twice: after a kill the same command goes on, and ends with the same
bytes. Users and items without a text keep their row, with the reason.
"""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llmrec.commands.generator_flags import add_model_arguments, check_model_flags, generator_of
from llmrec.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llmrec.data.dataset import InteractionDataset
    from llmrec.data.summaries import UserText
    from llmrec.llm.generating import Generator
    from llmrec.summarizers.base import Summarizer, Written
    from llmrec.summarizers.jobs import History, Tally
    from llmrec.summarizers.store import TextStore

EXAMPLE = "llmrec summarize runs/synthetic --items attributes --users attributes --out runs/synthetic-summaries"
_JOB = "job.json"


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("folder", metavar="DIR", help="folder of a prepared data set, or a run")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder of the texts; the same one goes on")
    what = parser.add_argument_group("what is written")
    what.add_argument("--items", metavar="TYPE", help="item_vision, attributes, or path/to/file.py:Class")
    what.add_argument("--users", metavar="TYPE", help="recurrent, attributes, or path/to/file.py:Class")
    what.add_argument(
        "--set", action="append", default=[], metavar="items.NAME=VALUE",
        help="option of a summarizer, as in users.block_size=3 (`llmrec explain summarizer TYPE` lists them)",
    )  # fmt: skip
    what.add_argument("--items-from", metavar="FOLDER", help="item texts of an earlier result, for the users' prompts")
    what.add_argument("--only-read-items", action="store_true", help="write only items that the users' histories hold")
    what.add_argument(
        "--split", nargs="+", default=["test"], metavar="SPLIT", help="splits with the held-out events (default: test)"
    )
    what.add_argument("--max-history", type=int, default=30, metavar="N", help="most events of a user (default: 30)")
    what.add_argument("--limit", type=int, metavar="N", help="most users, drawn by --seed (default: all)")
    what.add_argument("--seed", type=int, default=0, metavar="N", help="of users and of sampled answers (default: 0)")
    add_model_arguments(parser)
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="texts asked at once (default: 16)")
    parser.add_argument("--cache", metavar="FOLDER", help="where finished texts are kept (default: FOLDER/cache)")
    parser.add_argument("--retry-failed", action="store_true", help="ask again where no usable answer came")
    parser.add_argument("--force", action="store_true", help="write another job's result over the one in FOLDER")


def run(args: Namespace) -> int:
    """Check every flag, then write; 1 where some texts are left for the same command to ask again.

    Raises:
        RecipeError: A flag or option cannot mean what it says.
        DataError: DIR is no data set, or lacks what a summarizer reads.
        CheckpointError: FOLDER holds another job, is in use, or the model cannot be loaded.
    """
    from llmrec.commands.output import emit, note
    from llmrec.summarizers.store import TextStore

    began = time.monotonic()
    _check_flags(args)
    check_model_flags(args)
    dataset = _load(Path(args.folder))
    note(f"data set {dataset.meta.name}: {dataset.num_users:,} users, {dataset.num_items:,} items -> {args.out}")
    summarizers = _summarizers(args)
    _check_data(dataset, summarizers)
    generator = generator_of(args, [f"--{part}" for part, one in summarizers.items() if one.needs_generator])
    out = Path(args.out)
    with TextStore(Path(args.cache or out / "cache"), retry_failed=args.retry_failed) as store:
        job = _claim(args, out, dataset, summarizers, generator)
        if len(store):
            note(f"{len(store):,} finished texts in {store.folder}")
        if store.dropped:
            note(f"{store.dropped:,} lines of a batch that was cut off are made again")
        record = _write(args, out, dataset, summarizers, generator, store, job)
    record["seconds"] = round(time.monotonic() - began, 2)
    unfinished = sum(part["statuses"].get("unfinished", 0) for part in (record["items"], record["users"]) if part)
    if unfinished:
        note(f"{unfinished:,} texts are unfinished for passing reasons; the same command asks for them again")
    emit(record, lambda: _tables(record), args.as_json)
    return 1 if unfinished else 0


# What is asked for ---------------------------------------------------------------------------------------------------


def _check_flags(args: Namespace) -> None:
    if not (args.items or args.users):
        raise RecipeError("summarize: found neither --items nor --users; expected one of them, or both")
    for name, least in (("limit", 1), ("batch", 1), ("max_history", 1)):
        found = getattr(args, name)
        if found is not None and found < least:
            raise RecipeError(f"--{name.replace('_', '-')}: found {found}, expected at least {least}")
    if args.items_from and (args.items or not args.users):
        raise RecipeError(
            "--items-from gives texts to --users in place of --items; found it with --items or no --users"
        )
    if args.only_read_items and not (args.items and args.users):
        raise RecipeError("--only-read-items needs both --items and --users")
    if Path(args.out).is_file():
        raise RecipeError(f"--out {args.out} is a file; expected a folder")


def _load(folder: Path) -> InteractionDataset:
    from llmrec.data.dataset import InteractionDataset
    from llmrec.run_dir import RunDir
    from llmrec.run_loading import load_dataset

    if (folder / "recipe.yaml").is_file():
        return load_dataset(RunDir(folder))
    return InteractionDataset.load(folder)


def _summarizers(args: Namespace) -> dict[str, Summarizer]:
    """The summarizers by what they write, with their options."""
    from llmrec import discovery
    from llmrec.recipe import apply_override

    types = {part: getattr(args, part) for part in ("items", "users") if getattr(args, part)}
    options: dict[str, Any] = {}
    for text in args.set:
        place = apply_override(options, text)
        if len(place) != 2 or place[0] not in types:
            expected = " or ".join(f"{part}.NAME=VALUE" for part in types)
            raise RecipeError(f"--set {text}: expected {expected}")
    found: dict[str, Summarizer] = {}
    for part, name in types.items():
        summarizer = discovery.build("summarizer", name, options.get(part, {}), where=f"--{part}: ")
        if part not in summarizer.summarises:
            able = " and ".join(sorted(summarizer.summarises))
            raise RecipeError(f"--{part} {name}: found a summarizer of {able}, expected one of {part}")
        found[part] = summarizer
    return found


def _check_data(dataset: InteractionDataset, summarizers: dict[str, Summarizer]) -> None:
    """Find out before a model is loaded whether the data have what is to be read."""
    if any(summarizer.reads_images for summarizer in summarizers.values()):
        from llmrec.data.item_images import ItemImages

        ItemImages(dataset.items)
    if "items" in summarizers:
        summarizers["items"].item_words(dataset)
    if "users" in summarizers:
        summarizers["users"].lines(dataset, {})


def _claim(
    args: Namespace, out: Path, dataset: InteractionDataset, summarizers: dict[str, Summarizer],
    generator: Generator | None,
) -> dict[str, Any]:  # fmt: skip
    """Note what FOLDER is to hold, or make sure that it holds just that; returns the note."""
    from llmrec.run_dir import write_json

    parts: dict[str, Any] = {}
    for part, summarizer in summarizers.items():
        options = asdict(cast("Any", summarizer))
        parts[part] = {
            "type": _last_name(getattr(args, part)),
            "options": options,
            "version": summarizer.version(generator),
        }
    job = {
        "dataset": dataset.fingerprint, **parts, "model": _last_name(args.model) if generator else None,
        "generator": generator.identity if generator else None,
        "splits": list(dict.fromkeys(args.split)) if "users" in summarizers else [],
        "max_history": args.max_history, "seed": args.seed, "only_read_items": args.only_read_items,
        "items_from": _files_of(args.items_from),
    }  # fmt: skip
    job = json.loads(json.dumps(job))
    path = out / _JOB
    if path.is_file() and not args.force:
        found = json.loads(path.read_text(encoding="utf-8"))
        differ = sorted(name for name in job.keys() | found.keys() if job.get(name) != found.get(name))
        if differ:
            raise CheckpointError(
                f"{out} holds the texts of another job ({', '.join(differ)} differ); choose another --out, or replace "
                "its tables with --force (finished texts in its cache stay)"
            )
    write_json(path, job)
    return job


def _files_of(folder: str | None) -> dict[str, str] | None:
    from llmrec.data.summaries import read_record

    return read_record(Path(folder))["files"] if folder else None


def _last_name(name: str) -> str:
    """A folder, or file of a class, by its last name: results are shared, without the places of one machine."""
    place = name.partition(":")[0]
    return Path(name).resolve().name if Path(name).is_dir() else Path(name).name if place.endswith(".py") else name


# What is done --------------------------------------------------------------------------------------------------------


def _write(
    args: Namespace, out: Path, dataset: InteractionDataset, summarizers: dict[str, Summarizer],
    generator: Generator | None, store: TextStore, job: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """All texts, then the tables; returns what the verb says."""
    from llmrec.commands.text_progress import TextProgress
    from llmrec.data.summaries import read_summaries
    from llmrec.summarizers.jobs import Tally, untitled, write_item_texts, write_user_texts
    from llmrec.summarizers.store import write_results

    tallies = {"items": Tally(), "users": Tally()}
    histories = _histories(args, dataset, summarizers)
    items: dict[int, Written] = {}
    users: list[UserText] = []
    texts: dict[int, str] = read_summaries(args.items_from, dataset).items if args.items_from else {}
    if "items" in summarizers:
        wanted = range(1, dataset.num_items + 1)
        chosen = {item for one in histories for item in one.items} if args.only_read_items else set(wanted)
        with TextProgress("items", len(chosen)) as tell:
            items = write_item_texts(
                dataset, chosen, summarizers["items"], generator, store, batch=args.batch, tell=tell,
                tally=tallies["items"],
            )  # fmt: skip
        texts = {item: done.text for item, done in items.items() if done.text}
    if "users" in summarizers:
        writer = summarizers["users"]
        steps = sum(len(writer.spans(len(one.items))) for one in histories)
        with TextProgress("users' blocks", steps) as tell:
            users = write_user_texts(
                histories, writer.lines(dataset, texts), writer, generator, store, batch=args.batch, tell=tell,
                tally=tallies["users"],
            )  # fmt: skip
    read = set(items) | {item for one in histories for item in one.items}
    counts: dict[str, Any] = {
        "items": _figures([done.status for done in items.values()], tallies["items"]) if items else None,
        "users": _figures([row.status for row in users], tallies["users"]) if users else None,
        "untitled_items": untitled(dataset, read),
    }
    about = {name: value for name, value in job.items() if name != "dataset"}
    write_results(out, dataset, items, users, {**about, "limit": args.limit, "counts": counts})
    return {**counts, "dataset": {"name": dataset.meta.name, "fingerprint": dataset.fingerprint},
            "this_run": _this_run(generator, list(tallies.values())), "out": args.out}  # fmt: skip


def _histories(args: Namespace, dataset: InteractionDataset, summarizers: dict[str, Summarizer]) -> list[History]:
    from llmrec.data.sequences import CONTEXT_OF
    from llmrec.summarizers.jobs import held_out_histories

    if "users" not in summarizers:
        return []
    unknown = [split for split in args.split if split not in CONTEXT_OF]
    if unknown:
        raise RecipeError(f"--split: found {', '.join(unknown)}, expected some of {', '.join(CONTEXT_OF)}")
    return held_out_histories(
        dataset, list(dict.fromkeys(args.split)), max_history=args.max_history,
        block_size=summarizers["users"].block_size, limit=args.limit, seed=args.seed,
    )  # fmt: skip


def _figures(statuses: list[str], tally: Tally) -> dict[str, Any]:
    from llmrec.summarizers.store import count_statuses

    return {"rows": len(statuses), "statuses": count_statuses(statuses), "texts": tally.asked + tally.cached,
            "marks": dict(sorted(tally.marks.items())), "tokens": dict(tally.all_tokens)}  # fmt: skip


def _this_run(generator: Generator | None, tallies: list[Tally]) -> dict[str, Any]:
    """What this process asked and what that cost; texts of earlier ones are free."""
    usage = getattr(generator, "usage", None)  # an endpoint's own report, repeated attempts included
    return {
        "written": sum(tally.asked for tally in tallies),
        "from_cache": sum(tally.cached for tally in tallies),
        "tokens": {name: sum(tally.tokens[name] for tally in tallies) for name in ("prompt", "new")},
        "cost": usage.cost if usage else None,
        "endpoint": usage.to_dict() if usage else None,
    }


# What is shown -------------------------------------------------------------------------------------------------------


def _tables(record: dict[str, Any]) -> list[RenderableType]:
    from llmrec.commands.output import tabulate

    rows: list[list[Any]] = []
    for part in ("items", "users"):
        figures = record[part]
        if figures:
            rows += [[part, name, count] for name, count in figures["statuses"].items()]
            rows += [[f"{part}: texts", mark.replace("_", " "), count] for mark, count in figures["marks"].items()]
    if record["untitled_items"]:
        rows.append(["items", "without a title, called by their id", record["untitled_items"]])
    now = record["this_run"]
    said = (
        f"{now['written']:,} texts written and {now['from_cache']:,} from the cache in {record['seconds']:.1f} s; "
        f"{now['tokens']['prompt']:,} tokens read, {now['tokens']['new']:,} written"
    )
    if now["cost"] is not None:
        said += f"; cost {now['cost']:.4f}"
    title = f"summaries of {record['dataset']['name']} -> {record['out']}"
    return [tabulate(["of", "status or mark", "number"], rows, title=title), said]
