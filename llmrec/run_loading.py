"""Where a run is and what it was trained on: a folder, or a published run on the Hub, with its data set or items."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from llmrec.errors import CheckpointError, DataError, HubError
from llmrec.run_dir import PUBLISHED_FILES, PUBLISHED_MADE, RunDir

if TYPE_CHECKING:
    from llmrec.data.dataset import InteractionDataset
    from llmrec.recipe import Recipe


def find_run(run: str | Path, revision: str | None = None) -> Path:
    """The folder of a run: itself, or a download of the files a published run consists of.

    Raises:
        CheckpointError: Neither a folder nor a Hub id.
        HubError: No such repository or revision, or the Hub cannot be reached.
    """
    name = str(run)
    if Path(run).is_dir():
        if revision is not None:
            raise CheckpointError(f"{name} is a folder; revision {revision!r} belongs to a Hub id")
        return Path(run)
    if isinstance(run, Path) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise CheckpointError(f"no folder {name}; expected a run, or a Hub id such as OWNER/NAME")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=[*PUBLISHED_FILES, *PUBLISHED_MADE],
                              library_name="llmrec")
        )  # fmt: skip
    except (OSError, HTTPError, HFValidationError) as error:
        at = "" if revision is None else f" at revision {revision!r}"
        raise HubError(
            f"there is no folder {name}, and the Hub gave no run {name}{at}: {str(error).strip().splitlines()[0]}\n"
            "  expected: a run folder, or a repository of `llmrec push`; private ones need HF_TOKEN or `hf auth login`"
        ) from error


def load_dataset(run: RunDir, folder: str | Path | None = None) -> InteractionDataset:
    """The data set of a run, or the catalogue of a published one.

    Args:
        run: The run.
        folder: A data set to take instead; `load_system` checks that it is the same one.
    """
    from llmrec.data.catalogue import RECORD, ItemCatalogue
    from llmrec.data.dataset import InteractionDataset

    if folder is not None:
        return InteractionDataset.load(folder)
    if (run.catalogue / RECORD).is_file():
        return ItemCatalogue.load(run.catalogue)
    return InteractionDataset.load(run.dataset)


def check_dataset(run: RunDir, recipe: Recipe, dataset: InteractionDataset) -> None:
    """Refuse a data set other than the one a run was trained on.

    Raises:
        CheckpointError: Naming both hashes.
        DataError: A model that reads titles was published without them.
    """
    from llmrec.data.catalogue import ItemCatalogue, check_item_index

    environment, encoder, head = (
        json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for path in (run.environment, run.encoder / "config.json", run.model / "config.json")
    )
    stored = dataset.stored["item_index"] if isinstance(dataset, ItemCatalogue) else None
    index = environment.get("item_index", stored)
    reads_titles = recipe.prompt is not None and recipe.prompt.reads_titles
    if reads_titles and isinstance(dataset, ItemCatalogue) and index["titles"] and "titles" not in dataset.fields:
        raise DataError(
            f"{run.root}: this run reads item titles, and it was published without them",
            found=f"the hash {index['titles']} of the titles",
            expected="the titles",
            remedy='prepare the data set and give its folder, dataset="FOLDER", or publish it with --titles',
        )
    if index is not None:
        check_item_index(str(run.root), index, dataset, titles=reads_titles)
    expected_ones = {part.get("dataset_fingerprint") for part in (environment, encoder, head)} - {None}
    for expected in sorted(expected_ones):
        if expected != dataset.fingerprint:
            raise CheckpointError(
                f"{run.root} was trained on the data set {expected}, found {dataset.fingerprint} "
                f"({dataset.meta.name}); use the data set it was trained on"
            )


def refuse_code(recipe: Recipe, name: str) -> None:
    """Refuse a published run that names a Python file: it would be a file of whoever loads the run.

    Raises:
        CheckpointError: Naming the file. Installed code, named by a dotted path, is allowed.
    """
    parts = [recipe.encoder, recipe.tuner, recipe.head, recipe.item_tokenizer, *(s.strategy for s in recipe.stages)]
    foreign = [part.type for part in parts if part is not None and ":" in part.type]
    if foreign:
        raise CheckpointError(
            f"{name} names the Python file {foreign[0]}, which is not run for a published run; "
            "put the part into an installed package and name it by its dotted path"
        )
