"""Checkpoint folders that are either whole or not there: how they are written, verified, found and rotated.

A folder is written as `tmp-<name>.<pid>`, every file is flushed to the disk, `manifest.json` comes last and names size
and SHA-256 of each file, and one rename gives the folder its name. A reader believes a folder only when the manifest
and every file it names are as they were written, so a killed process, a full disk or a damaged file costs the newest
checkpoint at most. Files are safetensors and JSON; nothing here is ever unpickled.

`llmrec.training.states` says what goes into a checkpoint, `llmrec.training.loop` when it is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from llmrec.errors import CheckpointError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TRAINABLE, BEST, STRATEGY = "trainable.safetensors", "best.safetensors", "strategy.safetensors"
OPTIMIZER, OPTIMIZER_SCALARS, SCHEDULER = "optimizer.safetensors", "optimizer.json", "scheduler.json"
RANDOM, TRAINER_STATE, STAGE_STATE = "rng.safetensors", "trainer_state.json", "stage_state.json"
RESUMABLE = (TRAINABLE, STRATEGY, OPTIMIZER, OPTIMIZER_SCALARS, SCHEDULER, RANDOM, TRAINER_STATE, STAGE_STATE)
"""Files a run cannot be resumed without."""

_LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "safetensors", "numpy")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Manifest:
    """What a verified folder says about itself.

    Args:
        step: Optimizer steps done.
        files: File name -> {"size": bytes, "sha256": hex}.
        identity: What the folder belongs to: hashes of recipe, data and encoder, the base model, the settings.
        libraries: Versions it was written with.
    """

    step: int
    files: dict[str, dict[str, Any]]
    identity: dict[str, str]
    libraries: dict[str, str]


def notice(text: str) -> None:
    """One line for the user on standard error, from the first process of a launcher only."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, file=sys.stderr, flush=True)


def write_folder(folder: Path, contents: Mapping[str, bytes], *, step: int, identity: Mapping[str, str]) -> None:
    """Write a folder that is either whole or not there.

    Args:
        folder: Final place; a folder that is there already is replaced.
        contents: File name -> bytes.
        step: Optimizer steps done.
        identity: See `Manifest`.

    Raises:
        CheckpointError: The disk is full or refuses; earlier folders are as they were.
    """
    partial = folder.with_name(f"tmp-{folder.name}.{os.getpid()}")
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            files = {}
            for name, data in contents.items():
                _write_bytes(partial / name, data)
                files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            _write_bytes(partial / MANIFEST, _manifest_text(step, files, identity).encode())
            _flush_folder(partial)
            _take_place(partial, folder)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say what a full or refusing disk means for a run.

    Args:
        path: What is written inside.

    Raises:
        CheckpointError: Instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be written: {error}; earlier checkpoints are as they were. "
            "Free some space or mend the permissions, and start the same command again: it goes on from there"
        ) from error


def _manifest_text(step: int, files: dict[str, Any], identity: Mapping[str, str]) -> str:
    record = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "files": files,
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "identity": dict(sorted(identity.items())),
    }
    return json.dumps({**record, "sha256": _digest(record)}, indent=2) + "\n"


def _digest(record: Mapping[str, Any]) -> str:
    """Hash of a manifest without its own hash, so that a damaged manifest is noticed as well."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


@cache
def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _write_bytes(path: Path, data: bytes) -> None:
    """Write one file and wait until the disk has it. Every byte of a checkpoint passes here."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _take_place(partial: Path, folder: Path) -> None:
    """Rename `partial` to `folder`; one that is there steps aside first, since a rename cannot replace it."""
    aside = folder.with_name(f"tmp-replaced-{folder.name}.{os.getpid()}")
    if folder.exists():
        os.replace(folder, aside)
    os.replace(partial, folder)
    _flush_folder(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def verify(folder: Path, *, required: tuple[str, ...] = (TRAINABLE,), hashes: bool = True) -> Manifest:
    """Check that a folder is what was written.

    Args:
        folder: A checkpoint or final folder.
        required: Files it must have.
        hashes: Compare contents too, not only sizes.

    Returns:
        Its manifest.

    Raises:
        CheckpointError: Saying what is wrong; nothing is changed.
    """
    try:
        record = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {MANIFEST}, so it was never finished") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be read: {error}") from error
    if not isinstance(record, dict) or record.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"{folder / MANIFEST}: not a manifest of format version {FORMAT_VERSION}")
    if record.pop("sha256", None) != _digest(record):
        raise CheckpointError(f"{folder / MANIFEST}: its contents differ from what was written")
    missing = [name for name in required if name not in record["files"]]
    if missing:
        raise CheckpointError(f"{folder}: {', '.join(missing)} missing from its manifest")
    for name, expected in record["files"].items():
        _verify_file(folder / name, expected, hashes)
    return Manifest(record["step"], record["files"], record["identity"], record["libraries"])


def _verify_file(path: Path, expected: Mapping[str, Any], hashes: bool) -> None:
    try:
        size = path.stat().st_size
        if size != expected["size"]:
            raise CheckpointError(f"{path}: found {size} bytes, expected {expected['size']}")
        if hashes:
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != expected["sha256"]:
                raise CheckpointError(f"{path}: its contents differ from what was written (SHA-256)")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every folder with a checkpoint's name, newest first; nothing is verified."""
    if not folder.is_dir():
        return []
    found = ((_CHECKPOINT.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def find_latest(folder: Path, verify: bool = True) -> Path | None:
    """The newest checkpoint that can be resumed, or None.

    Damaged ones are named with the reason on standard error and left where they are.

    Args:
        folder: Where the `checkpoint-N` folders lie.
        verify: Compare hashes as well as sizes.
    """
    for _, path in list_checkpoints(folder):
        try:
            check(path, required=RESUMABLE, hashes=verify)
            return path
        except CheckpointError as error:
            notice(f"checkpoint {path.name} is passed over: {error}")
    return None


check = verify  # `find_latest` has a parameter of the same name


def rotate(folder: Path, keep: int | None, newest: int) -> None:
    """Delete all but the newest `keep` checkpoints, once the newest has been verified; None keeps all.

    Args:
        folder: Where the `checkpoint-N` folders lie.
        keep: How many stay.
        newest: Step of the checkpoint just written. Later ones are damaged leftovers that a resumed run passed over;
            they stay until it writes them again.

    Raises:
        CheckpointError: The newest checkpoint is damaged; nothing is deleted then.
    """
    checkpoints = [(step, path) for step, path in list_checkpoints(folder) if step <= newest]
    if keep is None or keep < 1 or len(checkpoints) <= keep:
        return
    verify(checkpoints[0][1], required=RESUMABLE)
    for _, path in checkpoints[keep:]:
        shutil.rmtree(path)


def clear_leftovers(folder: Path) -> None:
    """Remove `tmp-*` folders of killed processes; only for the holder of the lock, when nobody can be writing."""
    leftovers = sorted(folder.glob("tmp-*")) if folder.is_dir() else []
    for path in leftovers:
        if path.name.startswith("tmp-replaced-") and not _original(path).exists():
            os.replace(path, _original(path))
            continue
        notice(f"removed {path.name}, which a stopped run left half written")
        shutil.rmtree(path)


def _original(aside: Path) -> Path:
    return aside.with_name(aside.name.removeprefix("tmp-replaced-").rpartition(".")[0])


def compare_identity(found: Mapping[str, str], expected: Mapping[str, str], where: Path, *, force: bool) -> None:
    """Refuse a folder that belongs to something else.

    Raises:
        CheckpointError: Listing the differences, unless `force`; then they are printed.
    """
    differences = [
        f"  {name}: stored {found.get(name, 'nothing')}, now {expected.get(name, 'nothing')}"
        for name in sorted(set(found) | set(expected))
        if found.get(name) != expected.get(name)
    ]
    if not differences:
        return
    text = "\n".join([f"{where} was written for something else:", *differences])
    if not force:
        raise CheckpointError(f"{text}\nUse another output folder, start anew (resume never), or force it (--force)")
    notice(f"{text}\nIt is used all the same, as forced")
