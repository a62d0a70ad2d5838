"""Any table: one CSV, TSV, JSON Lines or Parquet file, or a folder with `interactions.*` and `items.*`.

Columns are recognised by name (`llmrec.data.sources.columns`), the separator by the first line. CSV and JSON Lines
may be gzipped. Text must be UTF-8; a byte order mark and mixed line ends do no harm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmrec.data.sources.assembly import assemble
from llmrec.data.sources.base import RawTables, ReadOptions, Source
from llmrec.data.sources.reading import FileFormat, file_format, read_file
from llmrec.errors import DataError


class TableSource(Source):
    """Reads tables of any origin.

    Args:
        format: "csv", "jsonl" or "parquet" of the main file, whatever its suffix says.
    """

    def __init__(self, format: FileFormat | None = None) -> None:
        self.format: FileFormat | None = format

    @classmethod
    def matches(cls, path: Path) -> bool:
        """A file with a known suffix, or a folder with `interactions.*`."""
        return bool(find_tables(path, "interactions")) if path.is_dir() else file_format(path) is not None

    def read(self, connection: Any, path: Path, options: ReadOptions) -> RawTables:
        """Lazy tables of the file or folder, extra item files joined on the item id.

        Raises:
            DataError: A file, column or row is not what was expected.
        """
        path = Path(path)
        users = None
        if path.is_dir():
            main = _single(path, "interactions", required=True)
            own, people = _single(path, "items"), _single(path, "users")
            items = [own] if own else []
            users = read_file(connection, people) if people else None
        else:
            main, items = path, []
        assert main is not None
        extra = [_item_file(Path(item)) for item in options.items]
        tables = [read_file(connection, item) for item in (*items, *extra)]
        return assemble(connection, read_file(connection, main, self.format), tables, users, options)


def find_tables(folder: Path, stem: str) -> list[Path]:
    """Files `stem.*` of a known format in a folder, sorted."""
    return sorted(
        p for p in folder.iterdir() if p.is_file() and p.name.split(".")[0].lower() == stem and file_format(p)
    )


def _single(folder: Path, stem: str, *, required: bool = False) -> Path | None:
    files = find_tables(folder, stem)
    if len(files) > 1 or (required and not files):
        present = sorted(p.name for p in folder.iterdir())[:12]
        raise DataError(
            f"more than one {stem} file" if files else f"no {stem} file",
            file=folder,
            found=f"files: {', '.join(p.name for p in files) if files else ', '.join(present) or 'none'}",
            expected=f"one of {stem}.csv, {stem}.tsv, {stem}.jsonl, {stem}.parquet (or .gz of a text one)",
            remedy="name the file itself instead of the folder"
            if files
            else f"rename your file to {stem}.csv or name the file itself",
        )
    return files[0] if files else None


def _item_file(path: Path) -> Path:
    """An item file, or the `items.*` of a folder."""
    found = _single(path, "items", required=True) if path.is_dir() else path
    assert found is not None
    return found
