"""RecBole's atomic files: tab separated, with `name:type` in the first line (`user_id:token`).

A folder with one `.inter` file, and `.item` and `.user` files beside it, or the `.inter` file itself. Values of
`token_seq` columns are separated by blanks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmrec.data.sources.assembly import assemble
from llmrec.data.sources.base import RawTables, ReadOptions, Source
from llmrec.data.sources.columns import check_duplicates
from llmrec.data.sources.lines import split_lines, text_sample
from llmrec.data.sources.reading import Layout, RawFile, read_delimited, read_file
from llmrec.errors import DataError

TYPES = ("token", "token_seq", "float", "float_seq")


class RecBoleSource(Source):
    """Reads atomic files."""

    @classmethod
    def matches(cls, path: Path) -> bool:
        """An `.inter` file, or a folder with one."""
        return any(p.suffix == ".inter" for p in path.iterdir()) if path.is_dir() else path.suffix == ".inter"

    def read(self, connection: Any, path: Path, options: ReadOptions) -> RawTables:
        """Lazy tables of the atomic files.

        Raises:
            DataError: No `.inter` file or several, a header without types, or a bad row.
        """
        path = Path(path)
        if path.is_dir():
            found = sorted(path.glob("*.inter"))
            if len(found) != 1:
                raise DataError(
                    "no .inter file" if not found else "more than one .inter file",
                    file=path,
                    found=", ".join(p.name for p in found or sorted(path.iterdir()))[:300],
                    expected="one .inter file",
                    remedy="name the .inter file itself",
                )
            path = found[0]
        items = [read_atomic(connection, p) for p in [path.with_suffix(".item")] if p.is_file()]
        items += [read_file(connection, Path(item)) for item in options.items]
        users = read_atomic(connection, path.with_suffix(".user")) if path.with_suffix(".user").is_file() else None
        return assemble(connection, read_atomic(connection, path), items, users, options, categories_separator=r"\s+")


def read_atomic(connection: Any, path: Path) -> RawFile:
    """One atomic file; column names without their types.

    Raises:
        DataError: The file is missing or empty, or the first line is not a typed header.
    """
    if not path.is_file():
        raise DataError(
            "no such file", file=path, expected="an atomic file (.inter, .item, .user)", remedy="check the path"
        )
    text, _ = text_sample(path)
    header = split_lines(text)[0].rstrip("\r\n")
    fields = [field.strip().partition(":") for field in header.split("\t")]
    if not all(name and kind in TYPES for name, _, kind in fields):
        raise DataError(
            "the first line is not a typed header",
            file=path,
            line=1,
            found=header[:200],
            expected=f"tab separated name:type, with a type of {', '.join(TYPES)}",
            remedy="for a plain table use --format csv",
        )
    names = tuple(name for name, _, _ in fields)
    check_duplicates(names, path)
    return read_delimited(connection, path, Layout("\t", names, header=1, skip=1, quoted=False))
