"""Publishing a run on the Hub: collected by allow-list, scanned for secrets, sent as one commit with its card.

    collect   run folder -> files that may leave, the items without events, the card; refuses what must not leave
    push      create the repository, then one commit: either all files are there afterwards, or none changed

The token is the Hub client's own (`HF_TOKEN` or `hf auth login`); it is never an argument and never stored.
Interactions, users, predictions, checkpoints and logs stay at home (`run_dir.PUBLISHED_FILES` lists what goes).
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec import __version__
from llmrec.downloads import NAMES
from llmrec.errors import CheckFailed, CheckpointError, HubError
from llmrec.recipe import Recipe, load_recipe
from llmrec.redaction import find_secrets, shorten_homes
from llmrec.reporting.model_card import hub_name, render_card
from llmrec.reporting.sections import read_json
from llmrec.run_dir import PUBLISHED_FILES, PUBLISHED_MADE, RunDir
from llmrec.run_loading import check_dataset, load_dataset

if TYPE_CHECKING:
    from llmrec.data.catalogue import ItemCatalogue

CARD = "README.md"
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_RECORDS = ("recipe.yaml", "environment.json", "model/recommender.json", "dataset/catalogue.json")
"""Records of llmrec that may name folders: in the published copy "~" stands for a home folder."""


@dataclass(frozen=True)
class PublishedFile:
    """One file of an upload: its path in the repository, and its bytes or where they lie."""

    path: str
    content: bytes | Path
    size: int
    sha256: str

    @classmethod
    def of(cls, path: str, content: bytes | Path) -> PublishedFile:
        """A file with its size and hash."""
        if isinstance(content, bytes):
            return cls(path, content, len(content), hashlib.sha256(content).hexdigest())
        with content.open("rb") as file:
            return cls(path, content, content.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


@dataclass
class Publication:
    """What would be uploaded: the files (the card is one of them), and what the publisher should know."""

    files: list[PublishedFile]
    card: str
    notices: list[str] = field(default_factory=list)


def check_ready(repo: str) -> None:
    """Refuse a malformed name, or a machine without a token; nothing is sent.

    Raises:
        HubError: Saying which.
    """
    check_name(repo)
    from huggingface_hub import get_token

    if not get_token():
        raise HubError(
            f"publishing to {repo} needs a token of the Hub, found none; set HF_TOKEN or run `hf auth login`"
        )


def check_name(repo: str) -> None:
    """Refuse a name the Hub would refuse.

    Raises:
        HubError: It is not OWNER/NAME.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        valid = _REPO.fullmatch(repo) is not None
    except HFValidationError:
        valid = False
    if not valid:
        raise HubError(f"repository {repo!r}: expected OWNER/NAME of letters, digits, '-', '_' and '.'")


def collect(folder: Path, repo: str, *, titles: bool = False) -> Publication:
    """What a run would publish; nothing is sent and no token is needed.

    Args:
        folder: An evaluated run.
        repo: OWNER/NAME, for the card.
        titles: Publish item titles too; without it the items are their ids and a hash of the titles.

    Raises:
        CheckpointError: The run is unfinished, or a file is a link or not what its name says.
        CheckFailed: A file holds a secret; each is named with its line and kind.
        HubError: The name is malformed.
    """
    from llmrec.data.catalogue import ItemCatalogue

    check_name(repo)
    run = RunDir(folder)
    recipe = _finished_recipe(run)
    notices: list[str] = []
    files = [_file(run, recipe, name, path, notices) for name, path in _allowed(folder)]
    dataset = load_dataset(run)
    check_dataset(run, recipe, dataset)
    catalogue = ItemCatalogue.of(dataset, titles=titles)
    for name, content in catalogue.files().items():
        files.append(PublishedFile.of(f"dataset/{name}", _shortened(f"dataset/{name}", content, notices)))
    files.sort(key=lambda file: file.path)
    notices += _notices(recipe, catalogue)
    card = render_card(folder, repo, catalogue, [(file.path, file.size, file.sha256) for file in files])
    files.insert(0, PublishedFile.of(CARD, card.encode()))
    keys = "\n".join([*catalogue.item_keys[1:], *(catalogue.item_titles[1:] if titles else [])])
    _refuse_secrets([*files, PublishedFile.of("dataset/items.parquet (ids, then titles)", keys.encode())])
    return Publication(files, card, notices)


def push(
    folder: Path,
    repo: str,
    *,
    private: bool | None = False,
    revision: str | None = None,
    titles: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Publish a run, or show what would be published.

    Args:
        folder: An evaluated run.
        repo: OWNER/NAME; made where it does not exist.
        private: True needs a private repository, None makes a new one private and leaves an existing one as it is.
        revision: Branch; made where it does not exist.
        titles: See `collect`.
        dry_run: Send nothing; no token is needed.

    Returns:
        {"repo", "revision", "dry_run", "files": [{"path", "bytes", "sha256"}], "removed", "notices", "card", "url"}.

    Raises:
        HubError: No token, or the Hub cannot be reached or refuses; the repository keeps the files it had.
        LlmrecError: See `collect`.
    """
    publication = collect(folder, repo, titles=titles)
    record: dict[str, Any] = {
        "repo": repo,
        "revision": revision or "main",
        "dry_run": dry_run,
        "files": [{"path": file.path, "bytes": file.size, "sha256": file.sha256} for file in publication.files],
        "removed": [],
        "notices": publication.notices,
        "card": publication.card,
        "url": None,
    }
    if dry_run:
        return record
    check_ready(repo)
    from huggingface_hub.errors import HTTPError

    try:
        return {**record, **_send(publication, repo, private, revision)}
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # what the Hub's client raises
        cause = error.__cause__ or error
        reason = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise HubError(
            f"publishing to {repo} failed: {type(cause).__name__}: {reason.strip()}\n"
            "  expected: a token that may write there (HF_TOKEN or `hf auth login`) and a Hub that can be reached"
        ) from error


def _send(publication: Publication, repo: str, private: bool | None, revision: str | None) -> dict[str, Any]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(library_name="llmrec", library_version=__version__)
    api.create_repo(repo, private=None if private is False else True, exist_ok=True)
    if private and not api.repo_info(repo).private:
        raise HubError(f"{repo} exists and is public; nothing was sent. Choose another name, or leave --private out")
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
    paths = {file.path for file in publication.files}
    # Files of an earlier run would be mixed with this one; files that are none of ours stay.
    stale = [path for path in api.list_repo_files(repo, revision=revision) if _is_ours(path) and path not in paths]
    adds = [
        CommitOperationAdd(file.path, str(file.content) if isinstance(file.content, Path) else file.content)
        for file in publication.files
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")
        commit = api.create_commit(
            repo,
            [*adds, *(CommitOperationDelete(path) for path in stale)],
            commit_message=f"Run published by llmrec {__version__}",
            revision=revision,
        )
    return {"url": str(commit.repo_url), "commit": commit.oid, "removed": stale}


def _finished_recipe(run: RunDir) -> Recipe:
    if not run.recipe.is_file():
        raise CheckpointError(f"{run.root} is not a run: it has no {run.recipe.name}")
    recipe = load_recipe(run.recipe)
    needed = [run.environment, run.metrics]
    needed += [run.encoder / "config.json"] if recipe.encoder is not None else []
    needed += [run.model / "recommender.json"] if recipe.llm is not None and recipe.prompt is not None else []
    missing = [path.relative_to(run.root).as_posix() for path in needed if not path.is_file()]
    if missing:
        raise CheckpointError(
            f"{run.root} is not finished: {', '.join(missing)} missing; train the recipe to its end and evaluate it"
        )
    parts = [part for part in (recipe.encoder, recipe.tuner, recipe.head) if part is not None and ":" in part.type]
    if parts:
        raise CheckpointError(
            f"{run.root} uses the Python file {parts[0].type}, and code is not published; "
            "put it into an installed package and name it by its dotted path"
        )
    return recipe


def _allowed(root: Path) -> list[tuple[str, Path]]:
    """(path in the repository, file) for everything on the allow-list that exists; links are refused."""
    found: dict[str, Path] = {}
    for pattern in PUBLISHED_FILES:
        for path in sorted(root.glob(pattern)):
            name = path.relative_to(root)
            linked = [part for part in (path, *path.parents[: len(name.parts) - 1]) if part.is_symlink()]
            if linked or not path.resolve().is_relative_to(root.resolve()):
                raise CheckpointError(
                    f"{path} is a link; only files inside the run are published. Copy the file into the run"
                )
            if path.is_file():
                found[name.as_posix()] = path
    return sorted(found.items())


def _file(run: RunDir, recipe: Recipe, name: str, path: Path, notices: list[str]) -> PublishedFile:
    """One file of the run as it is published; own records lose home folders, weights must be safetensors."""
    if path.suffix == ".safetensors":
        _check_safetensors(path)
        return PublishedFile.of(name, path)
    content = path.read_bytes()
    if path.suffix == ".json":
        record = read_json(path)
        if name == "model/adapter/adapter_config.json":
            # peft stores the folder the base model was read from.
            base = read_json(run.model / "recommender.json")["base"]["name"]
            record["base_model_name_or_path"] = hub_name(base) or shorten_homes(base)
            content = (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()
    return PublishedFile.of(name, _shortened(name, content, notices))


def _shortened(name: str, content: bytes, notices: list[str]) -> bytes:
    if name not in _RECORDS:
        return content
    short = shorten_homes(content.decode()).encode()
    if short != content:
        notices.append(f"{name}: home folders are written as ~ in the published copy")
    return short


def _notices(recipe: Recipe, catalogue: ItemCatalogue) -> list[str]:
    found = []
    if recipe.prompt is not None and recipe.prompt.reads_titles and "titles" not in catalogue.fields:
        found.append("this run reads item titles, which are not published: loading needs the data set (see --titles)")
    if recipe.llm is not None and recipe.llm.model not in NAMES and hub_name(recipe.llm.model) is None:
        found.append("the base model is a folder of this machine: loading needs base_model=... with the same weights")
    return found


def _check_safetensors(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            file.keys()
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}; no other format is published") from error


def _refuse_secrets(files: Sequence[PublishedFile]) -> None:
    found = []
    for file in files:
        with file.content.open("rb") if isinstance(file.content, Path) else io.BytesIO(file.content) as stream:
            found += [f"{file.path}, {finding.place}: {finding.kind}" for finding in find_secrets(stream)]
    if found:
        raise CheckFailed(
            "nothing was sent: files to be published hold what should not leave this machine\n  "
            + "\n  ".join(found)
            + "\nremove it from the files and try again; a token that was written into a file should be revoked"
        )


def _is_ours(path: str) -> bool:
    return path != CARD and any(fnmatchcase(path, pattern) for pattern in (*PUBLISHED_FILES, *PUBLISHED_MADE))
