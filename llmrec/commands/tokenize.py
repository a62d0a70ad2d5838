"""Give the items of a data set codes, the words of models that write items.

DIR is a folder of `llmrec prepare`, or a run. FOLDER then holds

    tokenizer.json, codes.safetensors, fit.json   the fitted tokenizer
    codes.parquet                                 item, title, code_1 .. code_M, tokens such as <a_12><b_7>
    usage.png, levels.png                         use of every code; item features coloured by code (extra: report)

and a recipe over the same data set takes it over instead of fitting its own:

    item_tokenizer: {type: TYPE, pretrained: FOLDER}

A recipe with the same seed and features would fit the very same codes.
"""

from __future__ import annotations

import json
import os
import shutil
import string
import time
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from rich.console import RenderableType

    from llmrec.data.dataset import InteractionDataset
    from llmrec.data.schema import ItemFeatures
    from llmrec.item_tokenizers.base import ItemTokenizer
    from llmrec.recipe import ItemFeaturesSpec, ItemTokenizerSpec

EXAMPLE = (
    "llmrec tokenize runs/synthetic --type rqkmeans --set codebook_size=32 --text none --collaborative als "
    "--out runs/synthetic-codes"
)
CODES, USAGE, LEVELS = "codes.parquet", "usage.png", "levels.png"
WRITTEN = ("tokenizer.json", "codes.safetensors", "fit.json", CODES, USAGE, LEVELS)
"""Every file of FOLDER; --force replaces a folder that holds nothing else."""


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("folder", metavar="DIR", help="folder of a prepared data set, or a run")
    parser.add_argument(
        "--type", required=True, metavar="TYPE", help="rqkmeans, rqvae, fsq, cofirec, or path/to/file.py:Class"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="option of the tokenizer (`llmrec explain item_tokenizer TYPE` lists them)",
    )  # fmt: skip
    parser.add_argument(
        "--text", default="minilm", metavar="minilm|ID|llm:NAME|none",
        help="model of the item texts: minilm (default), a sentence-transformers id or folder, llm:NAME, or none",
    )  # fmt: skip
    parser.add_argument(
        "--level", action="append", default=[], metavar="NAME=TEMPLATE",
        help="text level, as in title='{title}[ by {brand}]' (default: by the columns the items have)",
    )  # fmt: skip
    parser.add_argument(
        "--collaborative", metavar="als|RUN",
        help="one more level of item vectors: als, a run with a trained encoder of this data set, "
        "or as in a recipe: '{type: als, factors: 32}'",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="seed of features and fit (default: 42)")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder of the codes; new or empty")
    parser.add_argument("--no-plots", action="store_true", help="leave the drawings out")
    parser.add_argument("--force", action="store_true", help="replace an earlier result in FOLDER")


def run(args: Namespace) -> int:
    """Check every flag, then make features, fit, and write the folder at once.

    Raises:
        RecipeError: A flag, option or template cannot mean what it says, or FOLDER is taken.
        DataError: DIR is no data set, or its items cannot be coded like this.
        CheckpointError: The collaborative encoder is not one of this data set.
        DependencyError: Matplotlib, or the text model's library, is missing.
    """
    from llmrec.commands.item_levels import features_spec
    from llmrec.commands.output import emit, note
    from llmrec.reporting.code_plots import require_matplotlib

    out = Path(args.out).resolve()
    _check_out(out, args.out, args.force)
    if not args.no_plots:
        require_matplotlib()
    dataset = _load(Path(args.folder))
    note(f"data set {dataset.meta.name}: {dataset.num_items:,} items -> {args.out}")
    levels = features_spec(
        dataset, type_name=args.type, text=args.text, templates=args.level, collaborative=args.collaborative
    )
    spec = _tokenizer_spec(args)
    for name, template in levels.levels.items():
        note(f"level {name}: {template!r} by {levels.text}")
    if levels.collaborative is not None:
        note(f"level collaborative: item vectors of {levels.collaborative.type}")
    staging = out.with_name(f".{out.name}.partial.{os.getpid()}")
    try:
        record = _fit(args, dataset, levels, spec, staging)
        _put_in_place(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # what a failure left; after success there is nothing
    emit(record, lambda: _tables(record), args.as_json)
    return 0


# What is asked for ---------------------------------------------------------------------------------------------------


def _check_out(out: Path, shown: str, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise RecipeError(f"--out {shown} is a file; expected a folder that is new or empty")
    there = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if there and not force:
        raise RecipeError(
            f"--out {shown}: found {', '.join(there[:6])}; expected a folder that is new or empty. "
            "--force replaces an earlier result"
        )
    foreign = [name for name in there if name not in WRITTEN]
    if foreign:
        raise RecipeError(
            f"--force replaces what tokenize wrote and nothing else; {shown} also holds {', '.join(foreign[:6])}: "
            "remove them, or choose another folder"
        )


def _load(folder: Path) -> InteractionDataset:
    from llmrec.data.dataset import InteractionDataset
    from llmrec.run_dir import RunDir
    from llmrec.run_loading import load_dataset

    if (folder / "recipe.yaml").is_file():
        return load_dataset(RunDir(folder))
    return InteractionDataset.load(folder)


def _tokenizer_spec(args: Namespace) -> ItemTokenizerSpec:
    """Type and options, checked by building the tokenizer once."""
    from llmrec import discovery
    from llmrec.recipe import ItemTokenizerSpec, apply_override

    options: dict[str, Any] = {}
    for text in args.set:
        apply_override(options, text)
    discovery.build("item_tokenizer", args.type, options)
    return ItemTokenizerSpec(type=args.type, **options)


# What is done --------------------------------------------------------------------------------------------------------


def _fit(
    args: Namespace, dataset: InteractionDataset, levels: ItemFeaturesSpec, spec: ItemTokenizerSpec, out: Path
) -> dict[str, Any]:
    """Features, fit, table and drawings, written to the folder `out`; returns what the verb says."""
    import pyarrow.parquet as pq

    from llmrec.commands.output import note
    from llmrec.llm.loading import own_device
    from llmrec.recipe import part_seed
    from llmrec.training.item_codes import fit_item_tokenizer, make_item_features

    began = time.monotonic()
    seed = part_seed(args.seed, "item_features")
    features = make_item_features(levels, dataset, seed=seed, device=own_device())
    seconds = time.monotonic() - began
    tokenizer = fit_item_tokenizer(
        spec, features, dataset, out, seed=part_seed(args.seed, "item_tokenizer"), say=note, seconds_before=seconds
    )
    made_from = _complete_record(out, args.seed, levels)
    codes = tokenizer.codes[1:].numpy()
    pq.write_table(codes_table(dataset, codes), out / CODES, compression="zstd")
    if not args.no_plots:
        _draw(tokenizer, features, codes, out)
    return {
        **_figures(tokenizer, codes),
        "type": spec.type,
        "options": spec.options,
        "dataset": {"name": dataset.meta.name, "fingerprint": dataset.fingerprint, "items": dataset.num_items},
        "features": {name: {"items": int(mask.sum()), "width": int(values.shape[1])}
                     for name, (values, mask) in features.items()},
        "seed": args.seed,
        "seconds": {name: made_from[f"{name}_seconds"] for name in ("feature", "fit")},
        "out": args.out,
        "files": sorted(path.name for path in out.iterdir()),
        "recipe": {"item_tokenizer": {"type": spec.type, "pretrained": args.out}},
    }  # fmt: skip


def _complete_record(folder: Path, seed: int, features: ItemFeaturesSpec) -> dict[str, Any]:
    """Add to fit.json what the codes were made from; folders by their last name, since runs are published with it."""
    from llmrec.run_dir import write_json

    asked = features.model_dump(mode="json", include={"text", "levels", "collaborative", "max_tokens"})
    asked["text"] = _last_name(features.text) if features.levels else None
    if features.collaborative is not None and features.collaborative.pretrained is not None:
        asked["collaborative"]["pretrained"] = _last_name(features.collaborative.pretrained)
    record = json.loads((folder / "fit.json").read_text(encoding="utf-8"))
    record |= {"seed": seed, "features": asked}
    write_json(folder / "fit.json", record)
    return record


def _last_name(name: str) -> str:
    folder = Path(name.removeprefix("llm:"))
    return name if not folder.is_dir() else ("llm:" if name.startswith("llm:") else "") + folder.resolve().name


def codes_table(dataset: InteractionDataset, codes: np.ndarray) -> pa.Table:
    """The codes [I, M] beside original ids: item, title (where there are titles), code_1 .. code_M, tokens."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from llmrec.data.schema import TITLE

    columns: dict[str, Any] = {"item": pa.array(dataset.item_keys[1:], pa.string())}
    if TITLE in dataset.items.column_names:
        columns["title"] = dataset.items.column(TITLE)
    pieces: list[Any] = []
    for level, column in enumerate(codes.T, start=1):
        columns[f"code_{level}"] = pa.array(column, pa.int64())
        pieces += [f"<{level_letters(level)}_", columns[f"code_{level}"].cast(pa.string()), ">"]
    columns["tokens"] = pc.binary_join_element_wise(*pieces, "")
    return pa.table(columns)


def level_letters(level: int) -> str:
    """1 -> a, 26 -> z, 27 -> aa: the letters of a level in token strings."""
    letters = ""
    while level > 0:
        level, place = divmod(level - 1, 26)
        letters = string.ascii_lowercase[place] + letters
    return letters


def _draw(tokenizer: ItemTokenizer, features: ItemFeatures, codes: np.ndarray, out: Path) -> None:
    from llmrec.item_tokenizers.base import fused
    from llmrec.reporting.code_plots import draw_levels, draw_usage

    names = getattr(tokenizer, "level_names", None)
    draw_usage(codes, tokenizer.level_sizes, names, out / USAGE)
    draw_levels(fused(features), codes, names, out / LEVELS)


def _figures(tokenizer: ItemTokenizer, codes: np.ndarray) -> dict[str, Any]:
    from llmrec.reporting.code_plots import level_usage, sharing_items

    report = tokenizer.report
    assert report is not None
    return {
        "levels": [asdict(one) for one in level_usage(codes, tokenizer.level_sizes,
                                                      getattr(tokenizer, "level_names", None))],
        "collisions": {"before": report.collisions, "after": sharing_items(codes),
                       "policy": getattr(tokenizer, "collisions", None)},
        "reconstruction": report.reconstruction,
        "fingerprint": tokenizer.fingerprint,
    }  # fmt: skip


def _put_in_place(staging: Path, out: Path) -> None:
    """Rename the finished folder to its place; an earlier result makes room first and is removed last."""
    earlier = out.with_name(f".{out.name}.earlier.{os.getpid()}")
    if out.is_dir():
        out.rename(earlier)
    try:
        staging.rename(out)
    except OSError:
        if earlier.is_dir():
            earlier.rename(out)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def _tables(record: dict[str, Any]) -> list[RenderableType]:
    from llmrec.commands.output import tabulate

    levels = record["levels"]
    named = any(level["name"] for level in levels)
    headings = ["level", *(["name"] if named else []), "codes", "used", "perplexity", "largest bucket"]
    rows = [
        [level["level"], *([level["name"]] if named else []), level["size"], level["used"],
         round(level["perplexity"], 1), f"{level['largest']:,} items ({level['largest_share']:.1%})"]
        for level in levels
    ]  # fmt: skip
    collisions, items = record["collisions"], record["dataset"]["items"]
    taken = record["recipe"]["item_tokenizer"]
    return [
        tabulate(headings, rows, title=f"{record['type']} codes of {items:,} items -> {record['out']}"),
        f"items that share a code: {collisions['before']:,} before collisions were resolved, "
        f"{collisions['after']:,} after" + (f" ({collisions['policy']})" if collisions["policy"] else ""),
        f"in a recipe: item_tokenizer: {{type: {taken['type']}, pretrained: {taken['pretrained']}}}",
    ]
