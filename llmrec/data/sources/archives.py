"""Zip archives of data sets, read without trusting them.

A member is refused when its name is absolute, climbs with "..", holds a drive letter, a backslash or a control
character, or when it is a link; the archive, when it holds too many members, unpacks to too much, or is packed
more tightly than any table.
"""

from __future__ import annotations

import stat
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from llmrec.errors import DataError

MAX_MEMBERS = 100_000
MAX_BYTES = 16 << 30
MAX_RATIO = 100
_CHUNK = 1 << 20


def extract_zip(archive: Path, folder: Path, wanted: Callable[[str], bool]) -> dict[str, Path]:
    """Write the wanted members into a folder, flat.

    Args:
        archive: The zip file.
        folder: An existing empty folder.
        wanted: Chooses members by their file name.

    Returns:
        File name -> path in `folder`. Of equal file names in several sub-folders the first is taken.

    Raises:
        DataError: The archive is damaged, or breaks a rule above.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            members = opened.infolist()
            if len(members) > MAX_MEMBERS:
                raise _refused(archive, f"{len(members)} members", f"at most {MAX_MEMBERS}")
            for member in members:
                _check_member(archive, member)
            budget, found = MAX_BYTES, dict[str, Path]()
            for member in members:
                name = PurePosixPath(member.filename).name
                if member.is_dir() or name in found or not wanted(name):
                    continue
                target = folder / name
                budget -= _copy(opened, member, target, min(budget, member.file_size), archive)
                found[name] = target
            return found
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(
            f"the archive cannot be read: {error}", file=archive, remedy="fetch it again, or unpack it yourself"
        ) from error


def _check_member(archive: Path, member: zipfile.ZipInfo) -> None:
    name = member.orig_filename
    parts = PurePosixPath(name).parts
    odd = "\\" in name or any(unicodedata.category(character) in ("Cc", "Cf") for character in name)
    if name.startswith("/") or ".." in parts or (parts and ":" in parts[0]) or odd:
        raise _refused(archive, f"member {name!r}", "plain relative names")
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise _refused(archive, f"member {name!r} is a link or device", "files and folders")
    if member.file_size > MAX_RATIO * max(member.compress_size, 1) + _CHUNK:
        raise _refused(
            archive,
            f"member {name!r} unpacks {member.compress_size} to {member.file_size} bytes",
            f"at most {MAX_RATIO}:1",
        )


def _copy(opened: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path, limit: int, archive: Path) -> int:
    """Copy one member, counting the bytes that really come out (a header may lie)."""
    total = 0
    with opened.open(member) as source, open(target, "wb") as out:
        while chunk := source.read(_CHUNK):
            total += len(chunk)
            if total > limit:
                raise _refused(
                    archive, f"member {member.filename!r} holds more than {limit} bytes", "the size its header states"
                )
            out.write(chunk)
    return total


def _refused(archive: Path, found: str, expected: str) -> DataError:
    return DataError(
        "the archive is not safe to unpack",
        file=archive,
        found=found,
        expected=expected,
        remedy="fetch it from its provider, or unpack it yourself",
    )
